#!/usr/bin/env bash
# `make test-engines`: installs vLLM (6 GB) and runs the tests of tests/vllm_server.rs in front of it. Takes about ten
# minutes. Arguments go to the test runner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/venv.sh
scripts/venv.sh .venv-python-worker examples/python_worker/requirements.txt
TOKENWAY_TEST_MODEL=$(scripts/model.sh)
export TOKENWAY_TEST_MODEL
scripts/vllm.sh install
# Two servers need both cores, so the tests run one after the other.
cargo nextest run --profile long --test vllm_server --run-ignored only --test-threads 1 --no-capture "$@"
