//! Tests of the requests that continue a completion.

use super::*;
use crate::tokens::{Timestamps, TokenBatch};

fn request(input: Input, n: u32) -> v1::CompletionRequest {
    v1::CompletionRequest {
        model: "m".to_owned(),
        input: Some(input),
        n: Some(n),
        max_tokens: Some(10),
        min_tokens: 4,
        temperature: Some(0.5),
        ..v1::CompletionRequest::default()
    }
}

fn prompt() -> Input {
    Input::Prompt("p".to_owned())
}

fn chat() -> Input {
    Input::Chat(v1::Chat {
        messages: vec![message("user", "hi")],
    })
}

fn message(role: &str, content: &str) -> v1::ChatMessage {
    v1::ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        ..v1::ChatMessage::default()
    }
}

fn deliver(delivered: &mut Delivered, choice: u32, tokens: &[(TokenId, &str)], ended: bool) {
    let mut batch = TokenBatch::default();
    for (id, text) in tokens {
        batch.push_with(*id, Timestamps::default(), |out| out.push_str(text));
    }
    delivered.record_tokens(&v1::Tokens {
        choice,
        tokens: batch,
        finish_reason: i32::from(ended),
        ..v1::Tokens::default()
    });
}

/// Returns what the client has of two choices: three tokens of the first, and the whole second.
fn two_choices(message: &v1::CompletionRequest) -> Delivered {
    let mut delivered = Delivered::at_start(message);
    deliver(&mut delivered, 0, &[(5, "a"), (6, "b "), (7, "")], false);
    deliver(&mut delivered, 1, &[(8, "c"), (9, "d")], true);
    delivered
}

fn facts() -> TargetFacts {
    TargetFacts {
        prompt_ids: vec![1, 2],
        seed: 77,
    }
}

fn whole(continuation: Continuation) -> v1::CompletionRequest {
    match continuation.requests {
        Requests::Whole(message) => *message,
        Requests::PerChoice(requests) => panic!("expected one request: {requests:?}"),
    }
}

/// Returns the only request of a continuation, which must be that of choice 0.
fn only_choice(continuation: Continuation) -> ChoiceRequest {
    match continuation.requests {
        Requests::PerChoice(mut requests) => {
            assert_eq!(requests.len(), 1, "{requests:?}");
            let request = requests.remove(0);
            assert_eq!(request.choice, 0);
            request
        }
        Requests::Whole(message) => panic!("expected the request of one choice: {message:?}"),
    }
}

#[test]
fn a_resumption_sends_all_ids_but_the_last_of_an_ended_choice() {
    let message = request(prompt(), 2);
    let resumed = continuation(Rung::Resume, &message, &two_choices(&message), &facts());
    let sent = whole(resumed);
    assert_eq!((sent.seed, sent.n), (Some(77), Some(2)));
    let ids: Vec<_> = sent.resume.iter().map(|it| &it.token_ids[..]).collect();
    assert_eq!(ids, [&[5, 6, 7][..], &[8]]);
}

#[test]
fn a_replay_sends_the_request_again_with_the_same_seed() {
    let message = request(chat(), 2);
    let sent = whole(continuation(
        Rung::Replay,
        &message,
        &two_choices(&message),
        &facts(),
    ));
    let expected = v1::CompletionRequest {
        seed: Some(77),
        ..message
    };
    assert_eq!(sent, expected);
}

#[test]
fn ids_are_appended_to_the_prompt_up_to_the_last_whole_character() {
    let message = request(prompt(), 2);
    let by_ids = continuation(Rung::TokenIds, &message, &two_choices(&message), &facts());
    let sent = only_choice(by_ids).message;
    let ids = v1::TokenIds {
        ids: vec![1, 2, 5, 6],
    };
    assert_eq!(sent.input, Some(Input::PromptTokenIds(ids)));
    assert_eq!((sent.n, sent.temperature), (Some(1), Some(0.5)));
    assert_eq!((sent.max_tokens, sent.min_tokens), (Some(8), 2));
    assert_ne!(sent.seed, Some(77), "the random draws are not repeated");
}

#[test]
fn text_is_appended_to_the_prompt() {
    let message = request(prompt(), 2);
    let by_text = continuation(Rung::Text, &message, &two_choices(&message), &facts());
    let sent = only_choice(by_text);
    assert_eq!(sent.message.input, Some(Input::Prompt("pab ".to_owned())));
    assert!(!sent.continues_message);
    // The engine generates the token without text again.
    assert_eq!((sent.delivered_tokens, sent.repeated_tokens), (2, 1));
    assert_eq!(
        (sent.tokens_left, sent.message.max_tokens),
        (Some(8), Some(8))
    );
}

#[test]
fn a_chat_goes_on_after_the_assistants_text_without_trailing_white_space() {
    let message = request(chat(), 2);
    let delivered = two_choices(&message);
    let mut by_text = continuation(Rung::Text, &message, &delivered, &facts());
    let mut batch = TokenBatch::default();
    batch.push_with(0, Timestamps::default(), |out| out.push_str(" x"));
    let tokens = v1::Tokens {
        tokens: batch,
        ..v1::Tokens::default()
    };
    let joined = by_text.seam.join(tokens, &delivered);
    let joined = joined.expect("it repeats the space").expect("a token");
    assert_eq!((joined.first_index, joined.tokens.text()), (3, "x"));
    let sent = only_choice(by_text);
    assert!(sent.continues_message);
    let messages = vec![message_of(&sent, 0), message_of(&sent, 1)];
    assert_eq!(messages, [("user", "hi"), ("assistant", "ab")]);
}

fn message_of(sent: &ChoiceRequest, at: usize) -> (&str, &str) {
    match &sent.message.input {
        Some(Input::Chat(chat)) => (&chat.messages[at].role, &chat.messages[at].content),
        other => panic!("expected a chat: {other:?}"),
    }
}

#[test]
fn white_space_that_the_engine_generates_again_does_not_count_for_its_limit() {
    let message = request(chat(), 1);
    let mut delivered = Delivered::at_start(&message);
    deliver(&mut delivered, 0, &[(5, "a"), (6, "b "), (7, "\n")], false);
    let sent = only_choice(continuation(Rung::Text, &message, &delivered, &facts()));
    assert_eq!((sent.delivered_tokens, sent.repeated_tokens), (1, 2));
    assert_eq!(
        (sent.tokens_left, sent.message.max_tokens),
        (Some(7), Some(9))
    );
    assert_eq!(sent.message.min_tokens, 3);
}

#[test]
fn a_chat_of_which_only_white_space_was_delivered_starts_again() {
    let message = request(chat(), 1);
    let mut delivered = Delivered::at_start(&message);
    deliver(&mut delivered, 0, &[(5, " \n")], false);
    let sent = only_choice(continuation(Rung::Text, &message, &delivered, &facts()));
    assert_eq!(sent.message.input, message.input);
    assert!(!sent.continues_message);
}

#[test]
fn a_choice_at_its_limit_has_no_tokens_left() {
    let message = v1::CompletionRequest {
        max_tokens: Some(2),
        ..request(prompt(), 1)
    };
    let mut delivered = Delivered::at_start(&message);
    deliver(&mut delivered, 0, &[(5, "a"), (6, "b")], false);
    let sent = only_choice(continuation(Rung::Text, &message, &delivered, &facts()));
    assert_eq!(sent.tokens_left, Some(0));
}

#[test]
fn single_characters_are_not_counted_as_tokens() {
    let message = v1::CompletionRequest {
        max_tokens: Some(2),
        ..request(prompt(), 1)
    };
    let mut delivered = Delivered::at_start(&message);
    let started = v1::Started {
        text_only: true,
        ..v1::Started::default()
    };
    delivered.record_start(&started, "m", false);
    deliver(&mut delivered, 0, &[(0, "a"), (0, "b"), (0, "c")], false);
    let left = |delivered: &Delivered| {
        let by_text = continuation(Rung::Text, &message, delivered, &facts());
        let sent = only_choice(by_text);
        (sent.tokens_left, sent.message.max_tokens)
    };
    assert_eq!(left(&delivered), (Some(1), Some(1)));
    let mut words = Delivered::at_start(&message);
    words.record_start(&started, "m", false);
    deliver(&mut words, 0, &[(0, "one "), (0, "two ")], false);
    assert_eq!(left(&words), (Some(0), Some(0)));
    delivered.set_token_count(0, 2);
    assert_eq!(left(&delivered), (Some(0), Some(0)));
    // A tokenizer has not counted the tokens without text.
    deliver(&mut delivered, 0, &[(0, "")], false);
    delivered.set_token_count(0, 1);
    assert_eq!(left(&delivered), (Some(1), Some(1)));
}

#[test]
fn tokens_whose_text_the_engine_holds_back_are_generated_again_and_not_repeated() {
    let message = request(prompt(), 1);
    let mut delivered = Delivered::at_start(&message);
    deliver(&mut delivered, 0, &[(5, "a"), (6, ""), (7, "")], false);
    let mut by_text = continuation(Rung::Text, &message, &delivered, &facts());
    let mut batch = TokenBatch::default();
    for (id, text) in [(6, ""), (7, ""), (8, "bcd")] {
        batch.push_with(id, Timestamps::default(), |out| out.push_str(text));
    }
    let tokens = v1::Tokens {
        tokens: batch,
        ..v1::Tokens::default()
    };
    let joined = by_text.seam.join(tokens, &delivered);
    let joined = joined.expect("it continues").expect("a token");
    let ids: Vec<_> = joined.tokens.iter().map(|token| token.id).collect();
    assert_eq!((joined.first_index, ids), (3, vec![8]));
}
