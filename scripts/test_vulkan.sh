#!/usr/bin/env bash
# Builds llama.cpp with Vulkan, and runs a real model on Mesa's software device. The build compiles all
# of llama.cpp's shaders.
#
# VK_ICD_FILENAMES and GGML_VK_VISIBLE_DEVICES select another driver and device, such as that of a real GPU.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

packages=(glslc libvulkan-dev mesa-vulkan-drivers spirv-headers)

has_packages() {
    dpkg-query --show "${packages[@]}" >/dev/null 2>&1
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
driver=$(echo /usr/share/vulkan/icd.d/lvp_icd.*.json)
export VK_ICD_FILENAMES=${VK_ICD_FILENAMES:-$driver}
# llama.cpp uses a software device only if it is named.
export GGML_VK_VISIBLE_DEVICES=${GGML_VK_VISIBLE_DEVICES:-0}
TOKENWAY_TEST_MODEL=$(scripts/model.sh)
export TOKENWAY_TEST_MODEL
cargo nextest run --features vulkan --profile long --test llama_vulkan "$@"
