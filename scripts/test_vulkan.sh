#!/usr/bin/env bash
# Builds llama.cpp with Vulkan, and runs a real model on Mesa's software device. The build compiles all
# of llama.cpp's shaders.
#
# VK_ICD_FILENAMES and GGML_VK_VISIBLE_DEVICES select another driver and device, such as that of a real GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(glslc libvulkan-dev mesa-vulkan-drivers spirv-headers)
# llama.cpp uses VK_EXT_layer_settings, which older headers lack.
min_headers=1.3.272

has_packages() {
    dpkg-query --show "${packages[@]}" >/dev/null 2>&1
}

# Unpacks the headers of Debian 13 into a folder. Installs nothing. Debian 12 has headers of version 1.3.239.
fetch_headers() {
    local folder=$1 mirror options
    mkdir -p "$folder"/apt/{lists,cache}
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Codename: bookworm' | head -1)
    [[ -n $mirror ]] || return 1
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" \
        >"$folder/apt/sources.list"
    options=(-qq -o Dir::Etc::SourceList="$folder/apt/sources.list" -o Dir::Etc::SourceParts=/dev/null
        -o Dir::State::Lists="$folder/apt/lists" -o Dir::Cache="$folder/apt/cache" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update &&
        (cd "$folder/apt" && apt-get "${options[@]}" download libvulkan-dev) &&
        dpkg-deb --extract "$folder"/apt/libvulkan-dev_*.deb "$folder"
}

source scripts/llama.sh
((${#FEATURES[@]})) || exit 1
if ! has_packages; then
    [[ $(id -u) == 0 ]] && command -v apt-get >/dev/null || {
        echo "Vulkan's tools are missing. Install them (Debian, Ubuntu: sudo apt-get install ${packages[*]})" \
            "and run this command again." >&2
        exit 1
    }
    echo "Installing Vulkan's tools and Mesa's software device with apt-get …"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
fi
if dpkg --compare-versions "$(dpkg-query --show --showformat '${Version}' libvulkan-dev)" lt $min_headers; then
    headers=$(realpath -m "${CARGO_TARGET_DIR:-target}/vulkan-headers")
    [[ -d $headers/usr/include/vulkan ]] || fetch_headers "$headers" || {
        echo "Vulkan's headers are too old. Install version $min_headers or later and run this command again." >&2
        exit 1
    }
    # The C++ compiler searches this folder before the system's.
    export CPATH=$headers/usr/include
fi
driver=$(echo /usr/share/vulkan/icd.d/lvp_icd.*.json)
export VK_ICD_FILENAMES=${VK_ICD_FILENAMES:-$driver}
# llama.cpp uses a software device only if it is named.
export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}
TOKENWAY_TEST_MODEL=$(scripts/model.sh)
export TOKENWAY_TEST_MODEL
cargo nextest run --features vulkan --profile long --test llama_vulkan "$@"
