#!/usr/bin/env bash
# `make perf`: measures the cost that each API adds to a token, in under a minute once it is built. Arguments go
# to `tokenway-perf overhead`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

command -v cargo >/dev/null || {
    echo "cargo is needed to build Tokenway: https://rustup.rs says how to install it." >&2
    exit 1
}
mkdir -p target
cargo build --release --bin tokenway-perf
"${CARGO_TARGET_DIR:-target}/release/tokenway-perf" overhead --quick \
    --json target/overhead.json --html target/overhead.html "$@"
echo "Charts: target/overhead.html. All measurements: target/overhead.json."
