#!/usr/bin/env bash
# Creates a Python virtual environment: `scripts/venv.sh [FOLDER REQUIREMENTS…]`. The default is .venv with the
# packages of the examples and of the third-party test clients. Installs again only when the requirements have changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

venv=${1:-.venv}
requirements=("${@:2}")
((${#requirements[@]})) || requirements=(examples/requirements.txt tests/clients/requirements.txt)
checksum_file=$venv/requirements.sha256
wanted=$(cat "${requirements[@]}" | sha256sum)

if [[ -x $venv/bin/python && -f $checksum_file && $(<"$checksum_file") == "$wanted" ]]; then
    exit 0
fi

# Debian's python3 lacks ensurepip, which venv needs.
can_make_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null
}

if ! can_make_venv; then
    if [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            python3 python3-venv
    fi
    if ! can_make_venv; then
        echo "scripts/venv.sh: python3 with its venv module is needed." \
            "On Debian or Ubuntu: sudo apt-get install python3 python3-venv" >&2
        exit 1
    fi
fi

# Removed first, so that an interrupted installation is repeated.
rm -f "$checksum_file"
echo "Installing Python packages into $venv …" >&2
python3 -m venv --clear "$venv"
install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
for file in "${requirements[@]}"; do
    install+=(--requirement "$file")
done
"${install[@]}"
echo "$wanted" >"$checksum_file"
