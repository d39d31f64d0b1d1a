#!/usr/bin/env bash
# Checks that no dependency in Cargo.lock declares a newer Rust than `rust-version` in Cargo.toml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

cargo metadata --format-version 1 --all-features --locked | python3 -c '
import json, sys

def version(text):
    return tuple(int(part) for part in text.split("."))[:2]

packages = json.load(sys.stdin)["packages"]
declared = next(it["rust_version"] for it in packages if it["name"] == "tokenway")
newer = [it for it in packages if version(it["rust_version"] or "0.0") > version(declared)]
for it in newer:
    name, needed = it["name"], it["rust_version"]
    print(f"{name} needs Rust {needed}, and Cargo.toml declares {declared}", file=sys.stderr)
sys.exit(bool(newer))
'
