//! Lines compared with the JSON that is expected.

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;
use crate::gateway::arbitrary;
use crate::tokens::{Logprobs, Timestamps, TokenBatch};

fn writer(format: StreamFormat, options: StreamOptions) -> LineWriter {
    let metadata = ResponseMetadata {
        route: CompletionRoute::Completions,
        id: "cmpl-1".to_owned(),
        created: 7,
        model: "m\"1".to_owned(),
    };
    LineWriter::new(format, options, metadata)
}

fn tokens(texts: &[&str]) -> TokenBatch {
    let timestamps = Timestamps {
        due_ns: 1,
        emitted_ns: 2,
    };
    let mut batch = TokenBatch::default();
    for text in texts {
        batch.push(TextToken {
            id: 9,
            text,
            timestamps,
            logprobs: None,
        });
    }
    batch
}

fn written(write: impl FnOnce(&mut BytesMut)) -> String {
    let mut out = BytesMut::new();
    write(&mut out);
    String::from_utf8(out.to_vec()).unwrap()
}

#[test]
fn each_token_is_one_line_with_an_openai_object() {
    let mut writer = writer(StreamFormat::Ndjson, StreamOptions::default());
    let tokens = tokens(&["a", "b"]);
    let text = written(|out| {
        let choice = ChoiceTokens {
            index: 3,
            tokens: &tokens,
            finish_reason: Some(FinishReason::Length),
        };
        writer.write_tokens(out, &choice);
    });
    assert_eq!(
        text,
        "{\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":7,\"model\":\"m\\\"1\",\
         \"choices\":[{\"index\":3,\"text\":\"a\",\"logprobs\":null,\"finish_reason\":null}]}\n\
         {\"id\":\"cmpl-1\",\"object\":\"text_completion\",\"created\":7,\"model\":\"m\\\"1\",\
         \"choices\":[{\"index\":3,\"text\":\"b\",\"logprobs\":null,\
         \"finish_reason\":\"length\"}]}\n"
    );
}

#[test]
fn a_line_with_every_option_is_valid_json() {
    let options = StreamOptions {
        include_usage: true,
        continuous_usage_stats: false,
        include_stamps: true,
        include_timings: true,
        return_token_ids: true,
    };
    let escaped: String = (0..0x30_u8)
        .map(char::from)
        .chain("\"\\é😀\u{7f}°“\u{85}\u{2028}\u{2029}\u{84}\u{2027}".chars())
        .collect();
    let text = written(|out| {
        let tokens = tokens(&[&escaped]);
        let choice = ChoiceTokens {
            index: 0,
            tokens: &tokens,
            finish_reason: None,
        };
        writer(StreamFormat::Ndjson, options).write_tokens(out, &choice);
    });
    let line: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(line["choices"][0]["text"], escaped);
    assert_eq!(line["choices"][0]["token_ids"], json!([9]));
    assert_eq!(line["stamp"], json!({"due_ns": 1, "emitted_ns": 2}));
    assert_eq!(line.get("usage"), Some(&Value::Null));
    assert_eq!(text.matches('\n').count(), 1);
    assert!(!text.contains(['\u{85}', '\u{2028}', '\u{2029}']));
}

#[test]
fn line_separators_in_any_text_are_escaped() {
    const TEXT: &str = "a\u{85}b\u{2028}c\u{2029}d";
    let logprobs = Logprobs {
        logprob: Some(-0.5),
        token_bytes: TEXT.as_bytes().to_vec(),
        top: Vec::new(),
    };
    let mut tokens = TokenBatch::default();
    tokens.push(TextToken {
        id: 0,
        text: TEXT,
        timestamps: Timestamps::default(),
        logprobs: Some(&logprobs),
    });
    let choice = ChoiceTokens {
        index: 0,
        tokens: &tokens,
        finish_reason: Some(FinishReason::Stop),
    };
    let options = StreamOptions {
        include_usage: true,
        ..StreamOptions::default()
    };
    for route in [CompletionRoute::Completions, CompletionRoute::Chat] {
        let metadata = ResponseMetadata {
            route,
            id: "cmpl-1".to_owned(),
            created: 7,
            model: TEXT.to_owned(),
        };
        let mut writer = LineWriter::new(StreamFormat::Ndjson, options, metadata).with_logprobs();
        let text = written(|out| {
            writer.write_tokens(out, &choice);
            writer.write_usage_and_timings(out, Usage::new(1, 1), || Value::Null);
            let error = Error::invalid_value(TEXT, TEXT);
            writer.write_error(out, &error, 0);
        });
        assert!(!text.contains(['\u{85}', '\u{2028}', '\u{2029}']), "{text}");
        let objects: Vec<Value> = text
            .split_terminator('\n')
            .map(|line| serde_json::from_str(line).expect("JSON"))
            .collect();
        let [token, .., usage, error] = &objects[..] else {
            panic!("{objects:?}");
        };
        let choice = &token["choices"][0];
        match route {
            CompletionRoute::Completions => {
                assert_eq!(choice["text"], TEXT);
                assert_eq!(choice["logprobs"]["tokens"][0], TEXT);
                assert_eq!(choice["logprobs"]["top_logprobs"][0][TEXT], -0.5);
            }
            CompletionRoute::Chat => {
                assert_eq!(choice["delta"]["content"], TEXT);
                assert_eq!(choice["logprobs"]["content"][0]["token"], TEXT);
                let bytes = &choice["logprobs"]["content"][0]["bytes"];
                assert_eq!(*bytes, json!(TEXT.as_bytes()));
            }
        }
        assert_eq!(
            (&usage["model"], &token["model"]),
            (&json!(TEXT), &json!(TEXT))
        );
        assert_eq!(error["error"]["message"], TEXT);
        assert_eq!(error["error"]["param"], TEXT);
    }
}

#[test]
fn a_finish_reason_without_a_token_has_its_own_line() {
    let text = written(|out| {
        let choice = ChoiceTokens {
            index: 0,
            tokens: &TokenBatch::default(),
            finish_reason: Some(FinishReason::Stop),
        };
        writer(StreamFormat::Sse, StreamOptions::default()).write_tokens(out, &choice);
    });
    let line: Value =
        serde_json::from_str(text.strip_prefix("data: ").unwrap().trim_end()).unwrap();
    assert_eq!(line["choices"][0]["text"], "");
    assert_eq!(line["choices"][0]["finish_reason"], "stop");
    assert!(text.ends_with("\n\n"));
}

#[test]
fn only_sse_has_a_done_event_and_keep_alives() {
    let sse = writer(StreamFormat::Sse, StreamOptions::default());
    let ndjson = writer(StreamFormat::Ndjson, StreamOptions::default());
    assert_eq!(written(|out| sse.write_done(out)), "data: [DONE]\n\n");
    assert_eq!(written(|out| ndjson.write_done(out)), "");
    assert!(
        sse.keep_alive()
            .is_some_and(|comment| comment.starts_with(b":"))
    );
    assert_eq!(ndjson.keep_alive(), None);
}

/// The lines of a chat, each as JSON.
fn chat_lines(
    options: StreamOptions,
    write: impl FnOnce(&mut LineWriter, &mut BytesMut),
) -> Vec<Value> {
    let mut metadata = writer(StreamFormat::Ndjson, options).metadata;
    metadata.route = CompletionRoute::Chat;
    let mut writer = LineWriter::new(StreamFormat::Ndjson, options, metadata);
    let text = written(|out| write(&mut writer, out));
    let lines = text.lines().map(serde_json::from_str);
    lines.map(|line| line.expect("JSON")).collect()
}

#[test]
fn a_chat_stream_is_a_role_line_then_token_lines_then_a_finish_line() {
    let lines = chat_lines(StreamOptions::default(), |writer, out| {
        writer.write_role(out, 1);
        for (tokens, finish_reason) in [
            (tokens(&["a"]), None),
            (tokens(&["b"]), Some(FinishReason::Length)),
            (TokenBatch::default(), Some(FinishReason::Stop)),
        ] {
            let choice = ChoiceTokens {
                index: 1,
                tokens: &tokens,
                finish_reason,
            };
            writer.write_tokens(out, &choice);
        }
    });
    assert_eq!(lines[0]["object"], "chat.completion.chunk");
    let choices: Vec<_> = lines
        .iter()
        .map(|line| line["choices"][0].clone())
        .collect();
    let choice = |delta: Value, reason: Option<&str>| {
        json!({
            "index": 1, "delta": delta, "logprobs": null, "finish_reason": reason,
        })
    };
    let expected = [
        choice(json!({"role": "assistant", "content": ""}), None),
        choice(json!({"content": "a"}), None),
        choice(json!({"content": "b"}), None),
        choice(json!({}), Some("length")),
        choice(json!({}), Some("stop")),
    ];
    assert_eq!(choices, expected);
}

#[test]
fn the_finish_line_of_a_chat_has_the_usage_and_no_token() {
    let options = StreamOptions {
        continuous_usage_stats: true,
        include_stamps: true,
        return_token_ids: true,
        ..StreamOptions::default()
    };
    let lines = chat_lines(options, |writer, out| {
        writer.add_prompt(2);
        let choice = ChoiceTokens {
            index: 0,
            tokens: &tokens(&["a", "b"]),
            finish_reason: Some(FinishReason::Stop),
        };
        writer.write_tokens(out, &choice);
    });
    let shown = |line: &Value| {
        (
            line["choices"][0]["token_ids"].clone(),
            line["usage"].clone(),
        )
    };
    let usage = |completion| json!(Usage::new(2, completion));
    assert_eq!(shown(&lines[1]), (json!([9]), usage(2)));
    assert_eq!(shown(&lines[2]), (json!([]), usage(2)));
    assert_eq!(lines[2].get("stamp"), None);
    assert_eq!(lines.len(), 3);
}

#[test]
fn continuous_usage_counts_started_prompts_and_written_tokens() {
    let options = StreamOptions {
        continuous_usage_stats: true,
        include_usage: true,
        ..StreamOptions::default()
    };
    let lines = chat_lines(options, |writer, out| {
        writer.add_prompt(2);
        writer.write_role(out, 0);
        writer.add_prompt(3);
        for index in 0..2 {
            let tokens = tokens(&["a", "b"]);
            let choice = ChoiceTokens {
                index,
                tokens: &tokens,
                finish_reason: None,
            };
            writer.write_tokens(out, &choice);
        }
    });
    let usage = |prompt, completion| json!(Usage::new(prompt, completion));
    let so_far: Vec<_> = lines.iter().map(|line| line["usage"].clone()).collect();
    assert_eq!(
        so_far,
        [
            usage(2, 0),
            usage(5, 1),
            usage(5, 2),
            usage(5, 3),
            usage(5, 4)
        ]
    );
}

#[test]
fn text_offsets_count_characters_and_continue_across_the_lines_of_a_choice() {
    let mut writer = writer(StreamFormat::Ndjson, StreamOptions::default()).with_logprobs();
    let logprobs = Logprobs {
        logprob: Some(-0.5),
        token_bytes: b"x".to_vec(),
        top: Vec::new(),
    };
    let text = written(|out| {
        for (index, text) in [(0, "\u{e9}\u{e9}"), (1, "a"), (0, "b"), (0, "")] {
            let mut tokens = TokenBatch::default();
            tokens.push(TextToken {
                id: 0,
                text,
                timestamps: Timestamps::default(),
                logprobs: Some(&logprobs),
            });
            let choice = ChoiceTokens {
                index,
                tokens: &tokens,
                finish_reason: None,
            };
            writer.write_tokens(out, &choice);
        }
    });
    let offsets = text.lines().map(|line| {
        let line: Value = serde_json::from_str(line).expect("JSON");
        line["choices"][0]["logprobs"]["text_offset"][0].clone()
    });
    assert!(offsets.eq([0, 0, 2, 3]));
}

proptest! {
    #[test]
    fn any_text_is_one_record_of_valid_json_in_each_format(
        texts in vec(arbitrary::text(), 1..4),
        is_sse: bool,
        is_chat: bool,
        options: [bool; 5],
    ) {
        let metadata = ResponseMetadata {
            route: if is_chat { CompletionRoute::Chat } else { CompletionRoute::Completions },
            id: texts[0].clone(),
            created: 7,
            model: texts[0].clone(),
        };
        let (format, prefix, end) = match is_sse {
            true => (StreamFormat::Sse, "data: ", "\n\n"),
            false => (StreamFormat::Ndjson, "", "\n"),
        };
        let mut writer = LineWriter::new(format, options_from(options), metadata);
        let text = written(|out| {
            let texts: Vec<_> = texts.iter().map(String::as_str).collect();
            let tokens = tokens(&texts);
            writer.write_tokens(out, &ChoiceTokens { index: 0, tokens: &tokens, finish_reason: None });
        });
        // Python's `splitlines` also ends a line at these.
        prop_assert!(!text.contains(['\r', '\u{85}', '\u{2028}', '\u{2029}', '\u{c}', '\u{1c}']), "{text}");
        let records: Vec<_> = text.split_terminator(end).collect();
        prop_assert_eq!(records.len(), texts.len(), "{}", text);
        for (record, text) in records.iter().zip(&texts) {
            let json = record.strip_prefix(prefix).expect("the record has its prefix");
            let object: Value = serde_json::from_str(json).expect("the record is JSON");
            let choice = &object["choices"][0];
            let content = if is_chat { &choice["delta"]["content"] } else { &choice["text"] };
            prop_assert_eq!(content, text);
            prop_assert_eq!([&object["id"], &object["model"]], [&texts[0]; 2]);
        }
    }
}

fn options_from(bits: [bool; 5]) -> StreamOptions {
    let [
        include_usage,
        continuous_usage_stats,
        include_stamps,
        include_timings,
        return_token_ids,
    ] = bits;
    StreamOptions {
        include_usage,
        continuous_usage_stats,
        include_stamps,
        include_timings,
        return_token_ids,
    }
}
