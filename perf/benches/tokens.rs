//! Cost of a token in the gRPC API: encoding and decoding a `Tokens` message with 256 tokens, with Tokenway's
//! hand-written code and with prost's derived code.

use std::hint::black_box;

use bytes::{Bytes, BytesMut};
use criterion::{Criterion, Throughput};
use prost::Message;
use tokenway::proto::v1;

/// Number of tokens in the largest message.
const TOKENS: u32 = 256;

/// The `Tokens` message with the code that prost derives.
#[derive(Clone, PartialEq, Message)]
struct DerivedTokens {
    #[prost(uint32, tag = "1")]
    choice: u32,
    #[prost(uint32, tag = "2")]
    first_index: u32,
    #[prost(message, repeated, tag = "3")]
    tokens: Vec<v1::Token>,
    #[prost(enumeration = "v1::FinishReason", tag = "4")]
    finish_reason: i32,
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    tokens(&mut criterion, "tokens", false);
    tokens(&mut criterion, "tokens with timestamps", true);
    criterion.final_summary();
}

fn tokens(criterion: &mut Criterion, name: &str, stamps: bool) {
    let derived = make_message(stamps);
    let by_hand = v1::Tokens {
        choice: derived.choice,
        first_index: derived.first_index,
        tokens: derived.tokens.iter().cloned().collect(),
        finish_reason: derived.finish_reason,
    };
    let bytes = Bytes::from(derived.encode_to_vec());
    assert_eq!(
        by_hand.encode_to_vec(),
        bytes,
        "both have the same encoding"
    );

    let mut group = criterion.benchmark_group(name);
    group.throughput(Throughput::Elements(u64::from(TOKENS)));
    let mut out = BytesMut::new();
    group.bench_function("encode by hand", |bencher| {
        bencher.iter(|| encode(&by_hand, &mut out));
    });
    group.bench_function("encode as derived", |bencher| {
        bencher.iter(|| encode(&derived, &mut out));
    });
    group.bench_function("decode by hand", |bencher| {
        bencher.iter(|| decode::<v1::Tokens>(&bytes));
    });
    group.bench_function("decode as derived", |bencher| {
        bencher.iter(|| decode::<DerivedTokens>(&bytes));
    });
    group.finish();
}

/// Encodes into reused memory, as tonic's encoder does.
fn encode(message: &impl Message, out: &mut BytesMut) {
    out.clear();
    let room = black_box(message).encode(out);
    room.expect("the buffer grows");
    black_box(out);
}

/// Decodes from one piece of memory. Dropping the message is part of the cost.
fn decode<M: Message + Default>(bytes: &Bytes) {
    let message = M::decode(black_box(bytes.clone()));
    black_box(message.expect("it was encoded above"));
}

fn make_message(stamps: bool) -> DerivedTokens {
    // A machine's clock after an hour.
    let due_ns = stamps.then_some(3_600_000_000_000);
    let tokens = (0..TOKENS).map(|id| v1::Token {
        id,
        text: format!("token_{id}"),
        due_ns,
        emitted_ns: due_ns,
        logprobs: None,
    });
    DerivedTokens {
        choice: 0,
        first_index: TOKENS,
        tokens: tokens.collect(),
        finish_reason: 0,
    }
}
