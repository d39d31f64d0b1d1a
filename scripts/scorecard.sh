#!/usr/bin/env bash
# `make scorecard`: plays the faults of an engine on Tokenway, SMG and LiteLLM, and prints a table of grades, in about
# six minutes once all is built and installed. Arguments go to the scorecard, such as `--gateway Tokenway`,
# `--fault cut` or `--out FILE`. TOKENWAY is the program to test; without it, the program is built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/peers.sh
program=${TOKENWAY:-}
if [[ -z $program ]]; then
    command -v cargo >/dev/null || {
        echo "cargo is needed to build Tokenway: https://rustup.rs says how to install it." \
            "Or set TOKENWAY to a program that is built." >&2
        exit 1
    }
    cargo build --release --bin tokenway
    program=${CARGO_TARGET_DIR:-target}/release/tokenway
fi
PYTHONPATH=scripts .venv-peers/bin/python -m scorecard --tokenway "$program" "$@"
