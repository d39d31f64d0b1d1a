//! Cost of assembling characters for a token: a completion of 256 tokens.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tokenway::text::utf8::Utf8Assembler;

/// Tokens of the completion.
const TOKENS: u32 = 256;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    utf8(&mut criterion);
    criterion.final_summary();
}

fn utf8(criterion: &mut Criterion) {
    let cases = [
        ("ascii", repeated(&[b"token_1"])),
        ("whole characters", repeated(&["日本語".as_bytes()])),
        // A character over two tokens, and over as many tokens as it has bytes.
        (
            "characters over 2 tokens",
            repeated(&[b"\xe6\x97", b"\xa5"]),
        ),
        (
            "characters over 4 tokens",
            repeated(&[b"\xf0", b"\x9f", b"\x98", b"\x80"]),
        ),
        ("no characters", repeated(&[b"a\xff"])),
    ];
    let mut group = criterion.benchmark_group("utf8");
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    for (name, tokens) in cases {
        let mut assembler = Utf8Assembler::default();
        let mut text = String::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                for token in black_box(&tokens) {
                    text.clear();
                    assembler.push(token, &mut text);
                    black_box(&text);
                }
                assembler.finish(&mut text);
            });
        });
    }
    group.finish();
}

/// Repeats these tokens up to the length of the completion.
fn repeated(tokens: &[&[u8]]) -> Vec<Vec<u8>> {
    let tokens = tokens.iter().map(|token| token.to_vec()).cycle();
    tokens.zip(0..TOKENS).map(|(token, _)| token).collect()
}
