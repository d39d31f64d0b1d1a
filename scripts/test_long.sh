#!/usr/bin/env bash
# `make test-long`: runs each test of tests/exit_codes.rs two hundred times, while the real model computes or loads,
# and each fuzz target for five minutes, as many at the same time as there are processors. TOKENWAY_TEST_EXITS and
# TOKENWAY_FUZZ_SECONDS set other numbers. On two processors it takes about an hour and a quarter, and ten minutes more
# to build the fuzz targets for the first time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/llama.sh
((${#FEATURES[@]})) || exit 1
TOKENWAY_TEST_MODEL=$(scripts/model.sh)
export TOKENWAY_TEST_MODEL TOKENWAY_TEST_EXITS=${TOKENWAY_TEST_EXITS:-200}
cargo nextest run "${FEATURES[@]}" --profile long --test exit_codes "$@"
scripts/fuzz.sh "${TOKENWAY_FUZZ_SECONDS:-300}"
