#!/usr/bin/env bash
# `make test-long`: runs each test of tests/exit_codes.rs two hundred times, while the real model computes or loads.
# TOKENWAY_TEST_EXITS sets another number. Takes about 15 minutes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/llama.sh
((${#FEATURES[@]})) || exit 1
TOKENWAY_TEST_MODEL=$(scripts/model.sh)
export TOKENWAY_TEST_MODEL TOKENWAY_TEST_EXITS=${TOKENWAY_TEST_EXITS:-200}
cargo nextest run "${FEATURES[@]}" --profile long --test exit_codes "$@"
