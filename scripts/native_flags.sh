# To be sourced before llama.cpp is compiled for this processor. Turns off llama.cpp's code for Intel AMX: if GCC 12
# compiles it, it crashes with an illegal instruction (https://github.com/ggml-org/llama.cpp/pull/26954).
if grep -q -m 1 amx_tile /proc/cpuinfo 2>/dev/null; then
    without_amx='-mno-amx-tile -mno-amx-int8 -mno-amx-bf16'
    export CFLAGS="${CFLAGS:-} $without_amx" CXXFLAGS="${CXXFLAGS:-} $without_amx"
fi
