#!/usr/bin/env bash
# Replaces the inputs of fuzz/corpus/ that are named by a hash with inputs that scripts/fuzz.sh has found. For each
# target it selects inputs of at most 1,024 bytes that together have the coverage of all inputs, and of these at most
# 32, spread evenly over their sizes. It needs the programs that scripts/fuzz.sh has built.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

max_input_bytes=1024
max_inputs=32

host=$(rustc --print host-tuple)
for corpus in fuzz/corpus/*; do
    target=${corpus##*/}
    selected=target/fuzz/selected/$target
    rm -rf "$selected"
    mkdir -p "$selected"
    "target/fuzz/$host/fuzz/$target" -set_cover_merge=1 -max_len="$max_input_bytes" \
        -artifact_prefix="target/fuzz/selected/$target-" "$selected" "$corpus" \
        "target/fuzz/runs/$target/corpus" &>"target/fuzz/selected/$target.log"
    find "$corpus" -regextype posix-extended -regex '.*/[0-9a-f]{40}' -delete
    named=$(sha1sum "$corpus"/*)
    mapfile -t found < <(find "$selected" -type f -printf '%s %p\n' | sort -n | cut -d ' ' -f 2)
    step=$(((${#found[@]} + max_inputs - 1) / max_inputs))
    for ((at = 0; at < ${#found[@]}; at += step)); do
        # libFuzzer names an input by its SHA-1.
        [[ $named == *"${found[at]##*/}"* ]] || cp "${found[at]}" "$corpus/"
    done
    printf '%-20s %4s inputs %6s bytes\n' "$target" "$(find "$corpus" -type f | wc -l)" \
        "$(cat "$corpus"/* | wc -c)"
done
