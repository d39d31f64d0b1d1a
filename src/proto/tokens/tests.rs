//! Tests that the hand-written message encodes and decodes like the generated one.

use prost::Message;

use super::*;
use crate::proto::generated::GeneratedTokens as Generated;

fn token(id: u32, text: &str, emitted_ns: Option<u64>) -> v1::Token {
    v1::Token {
        id,
        text: text.to_owned(),
        due_ns: emitted_ns.map(|ns| ns / 2),
        emitted_ns,
        logprobs: None,
    }
}

/// Creates a token with every kind of log probability.
fn with_logprobs(id: u32, text: &str) -> v1::Token {
    let top = |id, logprob| v1::TopLogprob {
        id,
        token_bytes: vec![0xff; 3],
        logprob,
    };
    let logprobs = v1::Logprobs {
        logprob: Some(-0.25),
        token_bytes: text.into(),
        top: vec![top(0, 0.0), top(u32::MAX, -9999.0)],
    };
    v1::Token {
        logprobs: Some(logprobs),
        ..token(id, text, None)
    }
}

fn messages() -> Vec<Generated> {
    let long = "long ".repeat(100);
    let tokens = vec![
        token(0, "", None),
        token(300, "é\n\0", Some(u64::MAX)),
        token(u32::MAX, &long, None),
        with_logprobs(5, "likely"),
        v1::Token {
            logprobs: Some(v1::Logprobs::default()),
            ..token(1, "x", Some(300))
        },
        token(2, "y", None),
    ];
    let empty = Generated::default();
    let full = Generated {
        choice: 127,
        first_index: 1 << 20,
        tokens: tokens.clone(),
        finish_reason: 2,
    };
    let unknown_reason = Generated {
        tokens,
        finish_reason: -1,
        ..empty.clone()
    };
    vec![empty, full, unknown_reason]
}

fn hand_written(message: &Generated) -> Tokens {
    message.clone().into()
}

#[test]
fn tokens_encode_like_the_generated_message() {
    for message in messages() {
        let bytes = message.encode_to_vec();
        let hand_written = hand_written(&message);
        assert_eq!(hand_written.encode_to_vec(), bytes);
        assert_eq!(hand_written.encoded_len(), bytes.len());
        assert_eq!(Tokens::decode(&bytes[..]).unwrap(), hand_written);
    }
}

#[test]
fn a_message_split_at_any_byte_decodes_the_same() {
    let message = &messages()[1];
    let bytes = message.encode_to_vec();
    for at in 0..bytes.len() {
        let (one, other) = bytes.split_at(at);
        let read = Tokens::decode(one.chain(other)).unwrap();
        assert_eq!(read, hand_written(message));
    }
}

#[test]
fn decoding_fails_wherever_the_generated_message_fails() {
    let bytes = messages()[1].encode_to_vec();
    for at in 0..bytes.len() {
        // Truncate the message at each byte, and change each byte. This produces invalid lengths and invalid
        // UTF-8.
        let mut changed = bytes.clone();
        changed[at] ^= 0x80;
        for broken in [&bytes[..at], &changed] {
            let (generated, read) = (Generated::decode(broken), Tokens::decode(broken));
            match (generated, read) {
                (Ok(generated), Ok(read)) => assert_eq!(read, hand_written(&generated)),
                (Err(generated), Err(_)) => drop(generated),
                (generated, read) => panic!("{at}: {generated:?} {read:?}"),
            }
        }
    }
}
