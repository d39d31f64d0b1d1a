//! Cost of writing a token's line in the HTTP API: 256 tokens that are ready together, into reused memory. The
//! `serde_json` benchmarks write the same lines with a serializer, for comparison.

use std::hint::black_box;

use bytes::{BufMut, BytesMut};
use criterion::{Criterion, Throughput};
use serde::Serialize;
use tokenway::gateway::lines::{ChoiceTokens, LineWriter, ResponseMetadata};
use tokenway::gateway::{CompletionRoute, StreamFormat, StreamOptions};
use tokenway::tokens::{TextToken, Timestamps, TokenBatch};

/// Number of tokens in the largest event.
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
    let words = make_batch(|id| format!("token_{id}"));
    let code = make_batch(|_| "\t\"name\": \"\\d+\"\n".to_owned());
    let quotes = make_batch(|_| "“naïve” – 20 °C".to_owned());
    let cases = [
        ("ndjson", StreamFormat::Ndjson, plain, &words),
        (
            "ndjson with timestamps",
            StreamFormat::Ndjson,
            stamped,
            &words,
        ),
        ("ndjson with escapes", StreamFormat::Ndjson, plain, &code),
        ("ndjson with quotes", StreamFormat::Ndjson, plain, &quotes),
        ("sse", StreamFormat::Sse, plain, &words),
        ("sse with timestamps", StreamFormat::Sse, stamped, &words),
        ("sse with escapes", StreamFormat::Sse, plain, &code),
    ];
    let mut group = criterion.benchmark_group("lines");
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    for (name, format, options, tokens) in cases {
        let mut lines = LineWriter::new(format, options, response_metadata());
        let mut out = BytesMut::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                out.clear();
                let choice = ChoiceTokens {
                    index: 0,
                    tokens: black_box(tokens),
                    finish_reason: None,
                };
                lines.write_tokens(&mut out, &choice);
                black_box(&out);
            });
        });
    }
    for (name, tokens) in [
        ("serde_json, ndjson", &words),
        ("serde_json, ndjson with escapes", &code),
    ] {
        let head = response_metadata();
        let mut out = BytesMut::new();
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                out.clear();
                for token in black_box(tokens).iter() {
                    let chunk = Chunk::of(&head, token.text);
                    serde_json::to_writer((&mut out).writer(), &chunk).expect("memory");
                    out.put_u8(b'\n');
                }
                black_box(&out);
            });
        });
    }
    group.finish();
}

/// One token of a completion's stream.
#[derive(Serialize)]
struct Chunk<'a> {
    id: &'a str,
    object: &'static str,
    created: u64,
    model: &'a str,
    choices: [Choice<'a>; 1],
}

#[derive(Serialize)]
struct Choice<'a> {
    index: u32,
    text: &'a str,
    logprobs: Option<()>,
    finish_reason: Option<&'static str>,
}

impl<'a> Chunk<'a> {
    fn of(head: &'a ResponseMetadata, text: &'a str) -> Self {
        let choice = Choice {
            index: 0,
            text,
            logprobs: None,
            finish_reason: None,
        };
        Self {
            id: &head.id,
            object: "text_completion",
            created: head.created,
            model: &head.model,
            choices: [choice],
        }
    }
}

/// Returns response metadata with fields as long as those of a real response.
fn response_metadata() -> ResponseMetadata {
    ResponseMetadata {
        route: CompletionRoute::Completions,
        id: "cmpl-00000000-0000-4000-8000-000000000000".to_owned(),
        created: 1_700_000_000,
        model: "llm-test".to_owned(),
    }
}

fn make_batch(text: impl Fn(u32) -> String) -> TokenBatch {
    // A machine's clock after an hour.
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
