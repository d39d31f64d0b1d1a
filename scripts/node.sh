#!/usr/bin/env bash
# Installs what the tests with third-party clients in Node need, into tests/clients/node_modules. It
# installs again only when what is locked has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../tests/clients"

stamp=node_modules/package-lock.sha256
wanted=$(cat package-lock.json .npmrc | sha256sum)

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && command -v node >/dev/null; then
    exit 0
fi

# Node's own fetch and streams came with version 18.
has_node() {
    command -v npm >/dev/null && command -v node >/dev/null &&
        node --eval 'process.exit(parseInt(process.versions.node) < 18 ? 1 : 0)'
}

if ! has_node; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        echo "Installing Node with apt-get, which the tests with clients in Node run on …"
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

# The stamp goes first: an installation that is broken off is begun again.
rm -f "$stamp"
npm ci --loglevel=error
echo "$wanted" >"$stamp"
