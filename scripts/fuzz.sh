#!/usr/bin/env bash
# Runs the fuzz targets of fuzz/: scripts/fuzz.sh [SECONDS [TARGET...]], by default every target for 60 seconds. With 0
# seconds the targets are only built. It needs stable Rust and a C++ compiler, and uses target/fuzz.
# Runs as many targets at the same time as there are processors, and prints one line per target. An input that breaks an
# invariant is kept, and further lines of its target say how to run the input again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

seconds=${1:-60}
targets=("${@:2}")
((${#targets[@]})) || targets=($(basename --suffix .rs fuzz/fuzz_targets/*.rs))

# The coverage that libFuzzer reads. `--target` keeps it out of build scripts and macros, which are not linked with it.
passes=sanitizer-coverage
host=$(rustc --print host-tuple)
RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-$passes-level=4 -Cllvm-args=-$passes-inline-8bit-counters \
-Cllvm-args=-$passes-pc-table -Cllvm-args=-$passes-trace-compares" \
    cargo build --quiet --profile fuzz --target "$host" --target-dir target/fuzz --package tokenway-fuzz --bins
((seconds)) || exit 0

# Runs one target and prints its line. Fails if an input breaks an invariant.
run_target() {
    local target=$1 result=0
    local program=target/fuzz/$host/fuzz/$target folder=target/fuzz/runs/$target
    mkdir -p "$folder/corpus" "$folder/crashes"
    # New inputs go to the first folder.
    "$program" -max_total_time="$seconds" -timeout=10 -print_final_stats=1 -verbosity=1 \
        -artifact_prefix="$folder/crashes/" "$folder/corpus" "fuzz/corpus/$target" &>"$folder/log" || result=1
    local executions rate coverage
    executions=$(sed -n 's/^stat::number_of_executed_units: *//p' "$folder/log")
    rate=$(sed -n 's/^stat::average_exec_per_sec: *//p' "$folder/log")
    coverage=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$folder/log" | tail -n 1)
    printf '%-20s %10s executions %8s/s %8s edges\n' \
        "$target" "${executions:-?}" "${rate:-?}" "${coverage:-?}"
    ((result == 0)) && return
    input=$(sed -n 's/.*Test unit written to //p' "$folder/log" | tail -n 1)
    {
        echo "$target failed. The log is $folder/log. To run the input again:"
        echo "    $program $input"
        echo "Fix the code, and keep the input: cp $input fuzz/corpus/$target/"
    } >&2
    return 1
}
export -f run_target
export host seconds

# `xargs` fails if a target does.
printf '%s\n' "${targets[@]}" | xargs -P "$(nproc)" -I TARGET bash -c 'run_target TARGET'
