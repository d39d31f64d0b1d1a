#!/usr/bin/env bash
# `make test`: installs missing test dependencies and runs all tests. Arguments go to the test runner.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/llama.sh
scripts/venv.sh
scripts/venv.sh .venv-python-worker examples/python_worker/requirements.txt
scripts/node.sh
for client in curl "${TOKENWAY_TEST_CHROMIUM:-chromium}"; do
    command -v "$client" >/dev/null && continue
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || {
        echo "The tests need $client. On Debian: sudo apt-get install $client" >&2
        exit 1
    }
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$client" >/dev/null
done
if ((${#FEATURES[@]})); then
    TOKENWAY_TEST_MODEL=$(scripts/model.sh) || {
        echo "The tests with the real model cannot run. \`cargo test\` runs all others." >&2
        exit 1
    }
    export TOKENWAY_TEST_MODEL
    TOKENWAY_TEST_TEMPLATES=$(scripts/chat_templates.sh) || {
        echo "The test with real chat templates cannot run. \`cargo test\` runs all others." >&2
        exit 1
    }
    export TOKENWAY_TEST_TEMPLATES
    scripts/venv.sh .venv-lm-eval tests/clients/lm_eval/requirements.txt
fi
if cargo nextest --version >/dev/null 2>&1; then
    cargo nextest run "${FEATURES[@]}" "$@"
else
    cargo test --lib --bins --tests --examples "${FEATURES[@]}" "$@"
fi
cargo test --doc "${FEATURES[@]}"
