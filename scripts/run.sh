#!/usr/bin/env bash
# `make run`: builds Tokenway and serves a real model, or the test runner if llama.cpp or the model is unavailable.
# Arguments go to `tokenway serve`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/llama.sh
settings=(--runner llm_test)
if ((${#FEATURES[@]})) && model=$(scripts/model.sh); then
    settings=(--runner llama --model-path "$model" --model-name SmolLM2-135M-Instruct)
else
    echo "Serving the test runner instead of a real model: its tokens are token_0, token_1, …" >&2
fi
echo "Building Tokenway; the first build takes about ten minutes …" >&2
cargo build --release --bin tokenway "${FEATURES[@]}"
exec "${CARGO_TARGET_DIR:-target}/release/tokenway" serve "${settings[@]}" "$@"
