#!/usr/bin/env bash
# `make perf-model`: compares Tokenway with llama.cpp's own server on a real model. The first run compiles both for this
# processor, which takes about half an hour on two cores. A run then takes about 25 minutes, or more on slower processors. Arguments go to
# `tokenway-perf model`, such as `--rounds 1` or `--only growing-chat`. The variable TOKENWAY names a program to measure
# instead of the one that this script builds. `--vllm scripts/vllm.sh` also measures vLLM, after
# `scripts/vllm.sh install`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/llama.sh
((${#FEATURES[@]})) || exit 1
model=$(scripts/model.sh)
server=$(scripts/llama_server.sh)
target=${CARGO_TARGET_DIR:-target}
cargo build --release --bin tokenway-perf
program=${TOKENWAY:-}
if [[ -z $program ]]; then
    source scripts/native_flags.sh
    # llama.cpp's build script reads this flag, too. It makes cargo compile all crates again, so they get a folder of
    # their own, and other builds stay as they are.
    RUSTFLAGS="-C target-cpu=native" cargo build --release --target-dir "$target/native" --bin tokenway "${FEATURES[@]}"
    program=$target/native/release/tokenway
fi
mkdir -p target
"$target/release/tokenway-perf" model --tokenway "$program" --model-path "$model" --llama-server "$server" \
    --json target/model.json --html target/model.html --picture target/model.svg "$@"
echo "Charts: target/model.html. All measurements: target/model.json."
