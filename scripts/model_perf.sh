#!/usr/bin/env bash
# `make perf-model`: measures Tokenway beside llama.cpp's own server with a real model. Both are compiled for this processor,
# once: about half an hour on two cores. A run takes about ten minutes. Arguments go to `tokenway-perf model`, such as
# `--rounds 1` or `--only growing-chat`. TOKENWAY is the program to measure; without it, the program is built. If vLLM is
# installed (`scripts/vllm.sh install`), `--vllm scripts/vllm.sh` measures it, too.
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
    # The flag is also that of Tokenway's llama.cpp. All crates are compiled again, so they get a folder of their own.
    RUSTFLAGS="-C target-cpu=native" cargo build --release --target-dir "$target/native" --bin tokenway "${FEATURES[@]}"
    program=$target/native/release/tokenway
fi
mkdir -p target
"$target/release/tokenway-perf" model --tokenway "$program" --model-path "$model" --llama-server "$server" \
    --json target/model.json --html target/model.html --picture target/model.svg "$@"
echo "Charts: target/model.html. All measurements: target/model.json."
