//! Cost of assembling UTF-8 characters from a token's bytes: a completion of 256 tokens.

use std::hint::black_box;

use criterion::{Criterion, Throughput};
use tokenway::text::utf8::Utf8Assembler;

/// Number of tokens in the completion.
const TOKENS: u32 = 256;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    utf8(&mut criterion);
    criterion.final_summary();
}

fn utf8(criterion: &mut Criterion) {
    let cases = [
        ("ascii", repeat_tokens(&[b"token_1"])),
        ("whole characters", repeat_tokens(&["日本語".as_bytes()])),
        // A character split over two tokens, and over as many tokens as it has bytes.
        (
            "characters over 2 tokens",
            repeat_tokens(&[b"\xe6\x97", b"\xa5"]),
        ),
        (
            "characters over 4 tokens",
            repeat_tokens(&[b"\xf0", b"\x9f", b"\x98", b"\x80"]),
        ),
        ("no characters", repeat_tokens(&[b"a\xff"])),
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
fn repeat_tokens(tokens: &[&[u8]]) -> Vec<Vec<u8>> {
    let tokens = tokens.iter().map(|token| token.to_vec()).cycle();
    tokens.zip(0..TOKENS).map(|(token, _)| token).collect()
}
