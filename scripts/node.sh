#!/usr/bin/env bash
# Installs the packages of the third-party Node clients into tests/clients/node_modules, and again only when the lock
# file has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../tests/clients"

checksum_file=node_modules/package-lock.sha256
wanted=$(cat package-lock.json .npmrc | sha256sum)

if [[ -f $checksum_file && $(<"$checksum_file") == "$wanted" ]] && command -v node >/dev/null; then
    exit 0
fi

# Node 18 is the first version with built-in `fetch` and web streams.
has_node() {
    command -v npm >/dev/null && command -v node >/dev/null &&
        node --eval 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)'
}

if ! has_node; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "Installing Node, which the Node clients of the tests need, with apt-get …"
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            nodejs npm >/dev/null
    fi
    if ! has_node; then
        echo "scripts/node.sh: Node 18 or newer, with npm, is needed." \
            "On Debian or Ubuntu: sudo apt-get install nodejs npm" >&2
        exit 1
    fi
fi

# Removed first, so that an interrupted installation is repeated.
rm -f "$checksum_file"
npm ci --loglevel=error
echo "$wanted" >"$checksum_file"
