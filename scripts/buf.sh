#!/usr/bin/env bash
# Lints the protos, and compares them with those of the last release tag.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

buf=(npx --yes @bufbuild/buf@1.75.0)
"${buf[@]}" lint proto
if tag=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); then
    # Wire compatibility: field numbers, types and services must stay.
    "${buf[@]}" breaking proto --against ".git#tag=$tag,subdir=proto"
    echo "The protos are wire compatible with $tag."
else
    echo "There is no release tag to compare the protos with."
fi
