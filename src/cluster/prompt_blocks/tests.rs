//! Tests of which requests have a common prefix.

use prost_types::Struct;
use prost_types::value::Kind;

use super::*;
use crate::prefix_index::PrefixIndex;

/// Returns the number of tokens of `later` that are warm after `earlier`.
fn warm(earlier: &v1::CompletionRequest, later: &v1::CompletionRequest) -> u64 {
    let (key, mut index) = (RandomState::new(), PrefixIndex::new(10_000));
    index.record(&prompt_blocks(earlier, &key), 0);
    index.warm_tokens(&prompt_blocks(later, &key), 0)
}

fn text(prompt: &str) -> v1::CompletionRequest {
    with_input(Input::Prompt(prompt.to_owned()))
}

fn token_ids(ids: std::ops::Range<u32>) -> v1::CompletionRequest {
    let ids = ids.collect();
    with_input(Input::PromptTokenIds(v1::TokenIds { ids }))
}

fn chat(messages: &[(&str, &str)]) -> v1::CompletionRequest {
    let messages = messages.iter().map(|(role, content)| v1::ChatMessage {
        role: (*role).to_owned(),
        content: (*content).to_owned(),
        ..v1::ChatMessage::default()
    });
    let messages = messages.collect();
    with_input(Input::Chat(v1::Chat { messages }))
}

fn with_input(input: Input) -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(input),
        ..v1::CompletionRequest::default()
    }
}

fn with_extra_field(
    request: &v1::CompletionRequest,
    name: &str,
    value: &str,
) -> v1::CompletionRequest {
    let value = Value {
        kind: Some(Kind::StringValue(value.to_owned())),
    };
    v1::CompletionRequest {
        extra_fields: Some(Struct {
            fields: [(name.to_owned(), value)].into(),
        }),
        ..request.clone()
    }
}

const SYSTEM: (&str, &str) = ("system", "Answer in one short sentence.");
const QUESTION: (&str, &str) = ("user", "What is the capital of France?");
const ANSWER: (&str, &str) = ("assistant", "The capital of France is Paris.");

/// Tokens of the first two messages.
const FIRST_TURN: u64 = 7 + 7;

#[test]
fn a_chat_that_grows_keeps_its_prefix() {
    let long = "word ".repeat(1_000);
    let first = chat(&[SYSTEM, QUESTION]);
    let second = chat(&[SYSTEM, QUESTION, ANSWER, ("user", &long)]);
    let third = chat(&[SYSTEM, QUESTION, ANSWER, ("user", &long), ANSWER, QUESTION]);
    assert_eq!(warm(&first, &second), FIRST_TURN);
    assert_eq!(warm(&second, &third), FIRST_TURN + 7 + 1_250);
    assert_eq!(warm(&third, &first), FIRST_TURN);
}

#[test]
fn a_long_text_keeps_the_blocks_before_its_first_difference() {
    let common = "abcd".repeat(1_000);
    let (one, other) = (common.clone() + "one", common.clone() + "other");
    let whole_blocks = u64::try_from(common.len() / BLOCK_BYTES * BLOCK_BYTES / 4).unwrap();
    assert_eq!(warm(&text(&one), &text(&other)), whole_blocks);
    let message = |content: &str| chat(&[SYSTEM, ("user", content)]);
    assert_eq!(warm(&message(&one), &message(&other)), 7 + whole_blocks);
    assert_eq!(warm(&text(&one), &text(&one)), 1_000);
}

#[test]
fn token_ids_are_compared_in_blocks() {
    assert_eq!(warm(&token_ids(0..1_000), &token_ids(0..1_000)), 1_000);
    assert_eq!(warm(&token_ids(0..1_000), &token_ids(0..300)), 256);
    assert_eq!(warm(&token_ids(0..1_000), &token_ids(1..1_001)), 0);
}

#[test]
fn messages_with_other_roles_or_other_boundaries_are_different() {
    let first = chat(&[SYSTEM, QUESTION]);
    for other in [
        chat(&[("user", SYSTEM.1), QUESTION]),
        chat(&[
            ("system", "Answer in one "),
            ("system", "short sentence."),
            QUESTION,
        ]),
        text(&format!("{}{}", SYSTEM.1, QUESTION.1)),
    ] {
        assert_eq!(warm(&first, &other), 0, "{other:?}");
    }
    let other_answer = chat(&[SYSTEM, ("assistant", QUESTION.1)]);
    assert_eq!(warm(&first, &other_answer), 7);
    // The second message differs from the second block of a longer message, so only the first block is common.
    let block = "x".repeat(BLOCK_BYTES);
    let two = chat(&[("user", &block), ("user", &block)]);
    let one = chat(&[("user", &block.repeat(2))]);
    assert_eq!(warm(&two, &one), 128);
}

#[test]
fn every_part_of_a_message_counts() {
    let changes: [fn(&mut v1::ChatMessage); 6] = [
        |it| it.name = "a".to_owned(),
        |it| it.tool_call_id = "a".to_owned(),
        |it| it.reasoning_content = "a".to_owned(),
        |it| it.refusal = "a".to_owned(),
        |it| it.tool_calls.push(v1::ToolCall::default()),
        |it| it.content.push('a'),
    ];
    let plain = chat(&[SYSTEM]);
    for (number, change) in changes.into_iter().enumerate() {
        let mut changed = plain.clone();
        if let Some(Input::Chat(chat)) = &mut changed.input {
            change(&mut chat.messages[0]);
        }
        assert_eq!(warm(&plain, &changed), 0, "change {number}");
    }
}

#[test]
fn options_that_are_rendered_before_the_prompt_keep_prompts_apart() {
    let plain = chat(&[SYSTEM, QUESTION]);
    let tool = |name: &str| v1::Tool {
        function: Some(v1::FunctionDefinition {
            name: name.to_owned(),
            ..v1::FunctionDefinition::default()
        }),
    };
    let tools = |names: &[&str]| v1::CompletionRequest {
        tools: names.iter().map(|name| tool(name)).collect(),
        ..plain.clone()
    };
    let low = v1::CompletionRequest {
        reasoning_effort: "low".to_owned(),
        ..plain.clone()
    };
    let rendered = with_extra_field(&plain, "chat_template", "{{ messages }}");
    for other in [&tools(&["a"]), &low, &rendered] {
        assert_eq!(warm(&plain, other), 0, "{other:?}");
        assert!(warm(other, other) >= FIRST_TURN);
    }
    assert_eq!(warm(&tools(&["a"]), &tools(&["b"])), 0);
}

#[test]
fn options_that_change_only_the_answer_keep_the_prefix() {
    let plain = chat(&[SYSTEM, QUESTION]);
    let mut other = with_extra_field(&plain, "request_tag", "7");
    other.temperature = Some(0.0);
    other.max_tokens = Some(7);
    other.user = "a".to_owned();
    other.stop = vec!["b".to_owned()];
    assert_eq!(warm(&plain, &other), FIRST_TURN);
}

#[test]
fn salts_keep_prompts_apart() {
    let plain = chat(&[SYSTEM, QUESTION]);
    let salted = |salt: &str| v1::CompletionRequest {
        cache_salt: salt.to_owned(),
        ..plain.clone()
    };
    assert_eq!(warm(&salted("a"), &salted("a")), FIRST_TURN);
    assert_eq!(warm(&salted("a"), &salted("b")), 0);
    assert_eq!(warm(&salted("a"), &plain), 0);
}
