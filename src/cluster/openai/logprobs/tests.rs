//! Tests of both forms of log probabilities, and of the division of a text among tokens.

use serde_json::{Value, json};

use super::*;

fn tokens(json: &Value, top: u32) -> Vec<ScoredToken> {
    let raw = serde_json::value::to_raw_value(json).expect("valid JSON");
    read(&raw, top).expect("a known form")
}

fn likely(id: TokenId, bytes: &[u8], logprob: f32) -> TopLogprob {
    TopLogprob {
        id,
        token_bytes: bytes.to_vec(),
        logprob,
    }
}

fn with_bytes(bytes: &[&[u8]]) -> Vec<ScoredToken> {
    let token = |bytes: &&[u8]| ScoredToken {
        id: None,
        logprobs: Logprobs {
            token_bytes: bytes.to_vec(),
            ..Logprobs::default()
        },
    };
    bytes.iter().map(token).collect()
}

#[test]
fn the_form_of_chats_is_read() {
    let json = json!({"content": [
        {"id": 7, "token": "a", "bytes": [97], "logprob": -0.5, "top_logprobs": [
            {"id": 8, "token": "b", "bytes": null, "logprob": -1e39},
            {"id": 7, "token": "a", "bytes": [97], "logprob": -0.5},
        ]},
        {"token": "\u{e9}", "logprob": -0.25, "top_logprobs": []},
    ], "refusal": null});
    let read = tokens(&json, 2);
    let top = vec![likely(7, b"a", -0.5), likely(8, b"b", MIN_LOGPROB)];
    assert_eq!(read[0].id, Some(7));
    assert_eq!(read[0].logprobs.top, top);
    assert_eq!(read[1].id, None);
    assert_eq!(read[1].logprobs.token_bytes, "\u{e9}".as_bytes());
    assert_eq!(read[1].logprobs.logprob, Some(-0.25));
}

#[test]
fn the_form_of_completions_is_read() {
    let json = json!({
        "tokens": ["a", "bytes:\\xf0\\x9f", "bytes:"],
        "token_logprobs": [-0.5, -0.25, -0.125],
        "top_logprobs": [{"b": -1.0, "a": -0.5, "c": -2.0}, {"bytes:x\\x9f": -1.5}, {}],
        "text_offset": [0, 1, 1],
    });
    let read = tokens(&json, 2);
    let bytes: Vec<_> = read.iter().map(|it| &*it.logprobs.token_bytes).collect();
    assert_eq!(bytes, [&b"a"[..], b"\xf0\x9f", b"bytes:"]);
    let top = [likely(0, b"a", -0.5), likely(0, b"b", -1.0)];
    assert_eq!(read[0].logprobs.top, top, "sorted, and without the third");
    assert_eq!(read[1].logprobs.top, [likely(0, b"x\x9f", -1.5)]);
    assert_eq!(read[2].logprobs.logprob, Some(-0.125));
}

#[test]
fn missing_parts_are_no_error() {
    for (json, expected) in [
        (json!({}), 0),
        (json!({"content": null, "tokens": null}), 0),
        (json!({"content": []}), 0),
        (json!({"content": [null, {}]}), 1),
        (
            json!({"content": [{"top_logprobs": [null, {}, {"token": "a"}]}]}),
            1,
        ),
        (json!({"tokens": ["a", null]}), 2),
        (
            json!({"tokens": ["a"], "token_logprobs": [], "top_logprobs": null}),
            1,
        ),
        (
            json!({"tokens": ["a"], "token_logprobs": [null], "top_logprobs": [null]}),
            1,
        ),
        (json!({"tokens": ["a"], "top_logprobs": [{"b": null}]}), 1),
        (json!({"token_logprobs": [-1.0]}), 0),
    ] {
        let read = tokens(&json, 5);
        assert_eq!(read.len(), expected, "{json}");
        assert!(read.iter().all(|it| it.logprobs.logprob.is_none()));
        assert!(read.iter().all(|it| it.logprobs.top.is_empty()));
    }
}

#[test]
fn another_form_is_an_error() {
    for json in [
        json!("a"),
        json!({"content": "a"}),
        json!({"content": [{"bytes": [256]}]}),
        json!({"tokens": {"a": 1}}),
    ] {
        let raw = serde_json::value::to_raw_value(&json).expect("valid JSON");
        assert!(read(&raw, 1).is_err(), "{json}");
    }
}

/// A text, the bytes of its tokens, and the texts that the tokens get.
type SplitCase = (
    &'static str,
    &'static [&'static [u8]],
    &'static [&'static str],
);

#[test]
fn the_texts_of_the_tokens_add_up_to_the_delta() {
    let cases: [SplitCase; 8] = [
        ("ab", &[b"a", b"b"], &["a", "b"]),
        // A character in three tokens, and one that starts in the middle of a token.
        (
            "\u{1f600}",
            &[b"\xf0", b"\x9f\x98", b"\x80"],
            &["", "", "\u{1f600}"],
        ),
        ("a\u{e9}b", &[b"a\xc3", b"\xa9b"], &["a", "\u{e9}b"]),
        // A stop string cuts the text, and a special token has no text.
        ("a", &[b"a", b"STOP"], &["", "a"]),
        ("", &[b"<|im_end|>"], &[""]),
        // The start of the character came with an earlier chunk.
        ("\u{e9}", &[b"\xa9"], &["\u{e9}"]),
        ("a", &[b"", b"a", b""], &["", "a", ""]),
        ("a", &[], &[]),
    ];
    for (text, bytes, expected) in cases {
        let parts = split_text(text, &with_bytes(bytes));
        assert_eq!(parts, expected, "{text}");
        if !bytes.is_empty() {
            assert_eq!(parts.concat(), text);
        }
    }
}
