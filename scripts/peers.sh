#!/usr/bin/env bash
# Installs the gateways that `make scorecard` compares with Tokenway, at pinned versions, into .venv-peers. Installs again
# only when scripts/scorecard/requirements.txt has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

scripts/venv.sh .venv-peers scripts/scorecard/requirements.txt
