#!/usr/bin/env bash
# `make test`: installs what the tests need and is missing, and runs all of them. Arguments go to the
# test runner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/venv.sh
source scripts/llama.sh
if ((${#FEATURES[@]})); then
    TOKENWAY_TEST_MODEL=$(scripts/model.sh)
    export TOKENWAY_TEST_MODEL
fi
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run "${FEATURES[@]}" "$@"
else
    cargo test --lib --bins --tests --examples "${FEATURES[@]}" "$@"
fi
cargo test --doc "${FEATURES[@]}"
