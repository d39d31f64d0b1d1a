//! What a token's line costs the HTTP door: 256 tokens that are ready together, written into memory
//! that is used again.

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, Throughput};
use tokenway::gateway::lines::{ChoiceTokens, LineWriter, ResponseMetadata};
use tokenway::gateway::{Route, StreamFormat, StreamOptions};
use tokenway::tokens::{TextToken, Timestamps, TokenBatch};

/// The most tokens of one event.
const TOKENS: u32 = 256;

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    lines(&mut criterion);
    criterion.final_summary();
}

fn lines(criterion: &mut Criterion) {
    let plain = StreamOptions::default();
    let stamped = StreamOptions {
        include_stamps: true,
        ..plain
    };
    let words = batch(|id| format!("token_{id}"));
    let code = batch(|_| "\t\"name\": \"\\d+\"\n".to_owned());
    let quotes = batch(|_| "“naïve” – 20 °C".to_owned());
    let cases = [
        ("ndjson", StreamFormat::Ndjson, plain, &words),
        ("ndjson with stamps", StreamFormat::Ndjson, stamped, &words),
        ("ndjson with escapes", StreamFormat::Ndjson, plain, &code),
        ("ndjson with quotes", StreamFormat::Ndjson, plain, &quotes),
        ("sse", StreamFormat::Sse, plain, &words),
        ("sse with stamps", StreamFormat::Sse, stamped, &words),
        ("sse with escapes", StreamFormat::Sse, plain, &code),
    ];
    let mut group = criterion.benchmark_group("lines");
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    for (name, format, options, tokens) in cases {
        let mut lines = LineWriter::new(format, options, head());
        let mut out = BytesMut::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                out.clear();
                let choice = ChoiceTokens {
                    index: 0,
                    tokens: black_box(tokens),
                    finish_reason: None,
                };
                lines.tokens(&mut out, &choice);
                black_box(&out);
            });
        });
    }
    group.finish();
}

/// As long as a real response's.
fn head() -> ResponseMetadata {
    ResponseMetadata {
        route: Route::Completions,
        id: "cmpl-00000000-0000-4000-8000-000000000000".to_owned(),
        created: 1_700_000_000,
        model: "llm-test".to_owned(),
    }
}

fn batch(text: impl Fn(u32) -> String) -> TokenBatch {
    // The clock of a machine that has been up for an hour.
    let timestamps = Timestamps {
        due_ns: 3_600_000_000_000,
        emitted_ns: 3_600_000_012_345,
    };
    let mut batch = TokenBatch::default();
    for id in 0..TOKENS {
        let text = &text(id);
        batch.push(TextToken {
            id,
            text,
            timestamps,
            logprobs: None,
        });
    }
    batch
}
