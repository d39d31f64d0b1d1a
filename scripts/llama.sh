# Sourced: sees to what llama.cpp is built with (cmake and libclang). Afterwards FEATURES holds the flags
# for cargo that build the real model in, or nothing where that cannot be had; a message says why.

FEATURES=()

# Whether bindgen would find a libclang, by the places where it looks.
has_libclang() {
    [[ -n ${LIBCLANG_PATH:-} ]] && return 0
    local found
    found=$(ldconfig -p 2>/dev/null; compgen -G '/usr/lib/llvm-*/lib/libclang*.so*') || true
    # libclang-cpp is another library, which bindgen cannot use.
    [[ $(grep 'libclang[-.]' <<<"$found" | grep -v -- '-cpp\.') ]]
}

has_llama_tools() {
    command -v c++ >/dev/null || return 1
    [[ -n ${CMAKE:-} ]] || command -v cmake >/dev/null || return 1
    has_libclang
}

install_from_debian() {
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
    echo "Installing cmake and libclang with apt-get, which llama.cpp is built with …"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq \
        --no-install-recommends cmake g++ libclang1-14 >/dev/null
}

install_from_pypi() {
    local venv=target/llama-tools
    python3 -c 'import ensurepip, venv' 2>/dev/null || return 1
    echo "Installing cmake and libclang into $venv, which llama.cpp is built with …"
    [[ -x $venv/bin/python ]] || python3 -m venv "$venv" || return 1
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check cmake libclang || return 1
    CMAKE=$PWD/$venv/bin/cmake
    LIBCLANG_PATH=$("$venv/bin/python" -c \
        'import clang, pathlib; print(pathlib.Path(clang.__path__[0], "native"))') || return 1
    export CMAKE LIBCLANG_PATH
}

if ! command -v c++ >/dev/null && [[ $(id -u) != 0 ]]; then
    echo "No C++ compiler: the real model is left out. Install one (Debian: sudo apt-get install g++)." >&2
elif has_llama_tools || install_from_debian || install_from_pypi; then
    FEATURES=(--features llama-cpp)
    # A libclang without its compiler does not know where the compiler's own headers are.
    if command -v gcc >/dev/null; then
        BINDGEN_EXTRA_CLANG_ARGS="${BINDGEN_EXTRA_CLANG_ARGS:--I$(gcc -print-file-name=include)}"
        export BINDGEN_EXTRA_CLANG_ARGS
    fi
else
    echo "Neither cmake nor libclang could be installed: the real model is left out." >&2
    echo "Install them (Debian: sudo apt-get install cmake libclang1-14) and run this again." >&2
fi
