//! A table of requests. Each request is sent over every transport: gRPC, and HTTP as NDJSON, as SSE and as one JSON
//! body; directly to the engine's process, and through a gateway. All transports must return the same text, tokens,
//! logprobs, usage, finish reason or error.

#[path = "../support/mod.rs"]
mod support;

#[cfg(feature = "llama-cpp")]
mod llama;
mod outcome;
mod slot_events;
mod table;
mod transport;

use std::time::Duration;

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::{Setup, full_speed, silent_at};
use tokenway::runner::llm_test::TestRunnerOptions;

use outcome::Outcome;
use slot_events::{SlotEvent, slot_events};
use table::{ExpectedEnd, LENGTH, Row, STOP, chat, completion};
use transport::{Format, Servers, Transport};

const PROMPT: &str = "The capital of France is";

/// Facts about a model that the table needs.
struct TableModel {
    name: &'static str,
    /// A text that occurs within the first ten tokens of the greedy completion. `stop_id` is the id of a token of
    /// this text.
    stop: &'static str,
    stop_id: u32,
    /// Id of a token that a `logit_bias` of 100 forces the model to emit.
    biased_id: u32,
    context_length: u32,
}

/// Sends a row over every transport that supports it. Asserts that all outcomes are equal.
async fn assert_all_transports_agree(servers: &Servers, row: &Row) {
    // The requests run concurrently, because other sequences on the device must not change a result.
    let transports = Transport::ALL
        .into_iter()
        .filter(|transport| transport.supports(row));
    let outcomes = transports.map(async |transport| (transport, servers.run(transport, row).await));
    let mut outcomes = join_all(outcomes).await.into_iter();
    let (first, expected) = &outcomes
        .next()
        .expect("at least one transport supports the row");
    assert_expected_end(row, expected);
    for (transport, outcome) in outcomes {
        let at = format!("'{}' over {first:?} and over {transport:?}", row.name);
        if matches!(transport, Transport::Http(Format::Unary, _)) {
            // A unary response has no token ids. It is either a whole completion or an error.
            let expected = match &expected.error {
                Some(error) => Outcome::failed(error.clone()),
                None => expected.clone().without_token_ids(),
            };
            assert_eq!(expected, outcome, "{at}");
        } else {
            assert_eq!(*expected, outcome, "{at}");
        }
    }
}

fn assert_expected_end(row: &Row, outcome: &Outcome) {
    match row.ends {
        ExpectedEnd::With(reason) => {
            assert_eq!(outcome.error, None, "'{}'", row.name);
            assert!(!outcome.choices.is_empty(), "'{}'", row.name);
            for choice in &outcome.choices {
                assert_eq!(choice.finish.as_deref(), Some(reason), "'{}'", row.name);
            }
        }
        ExpectedEnd::Failing(code) => {
            let actual = outcome.error.as_ref().map(|(code, _)| code.as_str());
            assert_eq!(actual, Some(code), "'{}'", row.name);
        }
    }
}

/// Returns a completion of [`PROMPT`] with temperature 0, and with 12 tokens unless `fields` sets `max_tokens`.
fn greedy_row(name: &'static str, mut fields: Value, ends: ExpectedEnd) -> Row {
    fields["temperature"] = json!(0);
    if fields.get("max_tokens").is_none() {
        fields["max_tokens"] = json!(12);
    }
    completion(name, &json!(PROMPT), &fields, ends)
}

/// Returns a completion of [`PROMPT`] with 12 sampled tokens.
fn sampled_row(name: &'static str, mut fields: Value) -> Row {
    fields["max_tokens"] = json!(12);
    fields["seed"] = json!(7);
    fields["ignore_eos"] = json!(true);
    completion(name, &json!(PROMPT), &fields, LENGTH)
}

/// Completions that both runners support.
fn completion_rows(model: &TableModel) -> Vec<Row> {
    let mut rows = greedy_rows(model);
    rows.extend(echo_rows());
    rows.extend(sampled_rows(model));
    rows.push(completion(
        "token ids",
        &json!([5, 6, 7]),
        &json!({"temperature": 0}),
        LENGTH,
    ));
    rows
}

fn greedy_rows(model: &TableModel) -> Vec<Row> {
    let (stop, stop_id) = (model.stop, model.stop_id);
    vec![
        greedy_row("greedy", json!({}), LENGTH),
        greedy_row("max_tokens by default", json!({"max_tokens": null}), LENGTH),
        greedy_row("a model by its name", json!({"model": model.name}), LENGTH),
        greedy_row("stop as a string", json!({"stop": stop}), STOP),
        greedy_row("stop as a list", json!({"stop": ["not there", stop]}), STOP),
        greedy_row(
            "stop shown",
            json!({"stop": stop, "include_stop_str_in_output": true}),
            STOP,
        ),
        greedy_row(
            "stop after min_tokens",
            json!({"stop": stop, "min_tokens": 11}),
            LENGTH,
        ),
        greedy_row("stop_token_ids", json!({"stop_token_ids": [stop_id]}), STOP),
        greedy_row(
            "a stop token shown",
            json!({"stop_token_ids": [stop_id], "include_stop_str_in_output": true}),
            STOP,
        ),
        greedy_row(
            "min_tokens",
            json!({"stop_token_ids": [stop_id], "min_tokens": 12}),
            LENGTH,
        ),
        greedy_row(
            "logprobs of the sampled tokens only",
            json!({"logprobs": 0}),
            LENGTH,
        ),
        greedy_row(
            "logprobs and a stop",
            json!({"logprobs": 2, "stop": stop}),
            STOP,
        ),
    ]
}

fn echo_rows() -> Vec<Row> {
    vec![
        greedy_row("echo", json!({"echo": true}), LENGTH),
        greedy_row(
            "echo with several choices",
            json!({"echo": true, "n": 2}),
            LENGTH,
        ),
        greedy_row(
            "echo with logprobs",
            json!({"echo": true, "logprobs": 3}),
            LENGTH,
        ),
        greedy_row(
            "echo with logprobs and several choices",
            json!({"echo": true, "logprobs": 1, "n": 2}),
            LENGTH,
        ),
        greedy_row("echo alone", json!({"echo": true, "max_tokens": 0}), LENGTH),
        greedy_row(
            "the prompt's logprobs alone",
            json!({"echo": true, "max_tokens": 0, "logprobs": 2}),
            LENGTH,
        ),
    ]
}

fn sampled_rows(model: &TableModel) -> Vec<Row> {
    let bias = json!({model.biased_id.to_string(): 100});
    vec![
        sampled_row("seed", json!({})),
        sampled_row("a high temperature", json!({"temperature": 1.7})),
        sampled_row("top_p", json!({"top_p": 0.6})),
        sampled_row("top_k", json!({"top_k": 5})),
        sampled_row("min_p", json!({"min_p": 0.2})),
        sampled_row("presence_penalty", json!({"presence_penalty": 1.5})),
        sampled_row("frequency_penalty", json!({"frequency_penalty": -1.5})),
        sampled_row("repetition_penalty", json!({"repetition_penalty": 1.3})),
        sampled_row("n", json!({"n": 3})),
        sampled_row("logit_bias", json!({"logit_bias": bias})),
        sampled_row(
            "priority and user",
            json!({"priority": 3, "user": "somebody"}),
        ),
        sampled_row(
            "logprobs of sampled tokens",
            json!({"logprobs": 5, "temperature": 1.7}),
        ),
        sampled_row("best_of", json!({"best_of": 4, "n": 2})),
        sampled_row(
            "best_of with logprobs",
            json!({"best_of": 3, "logprobs": 1}),
        ),
    ]
}

/// Chat completions that both runners support.
fn chat_rows(model: &TableModel) -> Vec<Row> {
    let hello = json!("Name the capital of France.");
    let limited = |name, mut fields: Value| {
        fields["max_completion_tokens"] = json!(6);
        fields["temperature"] = json!(0);
        fields["ignore_eos"] = json!(true);
        chat(name, &hello, &fields, LENGTH)
    };
    let part = |text| json!({"type": "text", "text": text});
    let parts = json!([part("Name the capital"), part("of France.")]);
    vec![
        limited("a conversation", json!({})),
        limited("several choices of a chat", json!({"n": 2})),
        limited("logprobs of a chat", json!({"logprobs": true})),
        limited(
            "top_logprobs of a chat",
            json!({"logprobs": true, "top_logprobs": 4}),
        ),
        limited(
            "response_format text",
            json!({"response_format": {"type": "text"}}),
        ),
        chat(
            "max_tokens of a chat",
            &hello,
            &json!({"max_tokens": 3, "seed": 1, "ignore_eos": true}),
            LENGTH,
        ),
        chat(
            "content in parts",
            &parts,
            &json!({"max_tokens": 3, "seed": 1, "ignore_eos": true}),
            LENGTH,
        ),
        chat(
            "a chat without max_tokens",
            &hello,
            &json!({"stop_token_ids": [model.stop_id], "temperature": 0}),
            STOP,
        ),
        chat(
            "max_completion_tokens over the context",
            &hello,
            &json!({"max_completion_tokens": model.context_length}),
            ExpectedEnd::Failing("context_length_exceeded"),
        ),
    ]
}

/// Requests that are rejected.
fn rejected_rows(model: &TableModel) -> Vec<Row> {
    let prompt = json!(PROMPT);
    let invalid = ExpectedEnd::Failing("invalid_value");
    let row = |name, fields: &Value, ends| completion(name, &prompt, fields, ends);
    vec![
        row(
            "an unknown model",
            &json!({"model": "nobody"}),
            ExpectedEnd::Failing("model_not_found"),
        ),
        row(
            "max_tokens over the context",
            &json!({"max_tokens": model.context_length}),
            ExpectedEnd::Failing("context_length_exceeded"),
        ),
        row(
            "a suffix",
            &json!({"suffix": "."}),
            ExpectedEnd::Failing("unsupported_parameter"),
        ),
        row(
            "a temperature out of range",
            &json!({"temperature": 2.5}),
            invalid,
        ),
        row("a top_p out of range", &json!({"top_p": -0.5}), invalid),
        row("a top_k out of range", &json!({"top_k": -2}), invalid),
        row("a min_p out of range", &json!({"min_p": 1.5}), invalid),
        row(
            "a presence_penalty out of range",
            &json!({"presence_penalty": 3}),
            invalid,
        ),
        row(
            "a frequency_penalty out of range",
            &json!({"frequency_penalty": -3}),
            invalid,
        ),
        row(
            "a repetition_penalty out of range",
            &json!({"repetition_penalty": 0}),
            invalid,
        ),
        row(
            "a logit_bias out of range",
            &json!({"logit_bias": {"1": 101}}),
            invalid,
        ),
        row("an n out of range", &json!({"n": 0}), invalid),
        row("max_tokens of 0", &json!({"max_tokens": 0}), invalid),
        row(
            "min_tokens over max_tokens",
            &json!({"max_tokens": 3, "min_tokens": 4}),
            invalid,
        ),
        row(
            "too many stop strings",
            &json!({"stop": vec!["a"; 17]}),
            invalid,
        ),
        row("an empty stop string", &json!({"stop": ""}), invalid),
        row(
            "too many stop tokens",
            &json!({"stop_token_ids": vec![1; 129]}),
            invalid,
        ),
        completion("no token ids", &json!([]), &json!({}), invalid),
    ]
}

fn test_model() -> TableModel {
    TableModel {
        name: "llm_test",
        stop: "token_5",
        stop_id: 5,
        biased_id: 1,
        context_length: 1_048_576,
    }
}

async fn assert_table(servers: &Servers, model: &TableModel) {
    for row in completion_rows(model)
        .iter()
        .chain(&chat_rows(model))
        .chain(&rejected_rows(model))
    {
        assert_all_transports_agree(servers, row).await;
    }
}

#[tokio::test]
async fn every_transport_returns_the_same_for_the_test_runner() {
    let servers = Servers::start(Setup::test_runner(full_speed())).await;
    assert_table(&servers, &test_model()).await;
}

#[tokio::test]
async fn a_mid_stream_failure_is_the_same_over_every_transport() {
    let options = TestRunnerOptions {
        fail_at: Some(3),
        ..full_speed()
    };
    let servers = Servers::start(Setup::test_runner(options)).await;
    let ends = ExpectedEnd::Failing("internal_error");
    for row in [
        completion("a failure", &json!(PROMPT), &json!({"max_tokens": 9}), ends),
        completion(
            "with echo",
            &json!(PROMPT),
            &json!({"max_tokens": 9, "echo": true}),
            ends,
        ),
        chat(
            "a failure of a chat",
            &json!("Hi"),
            &json!({"max_tokens": 9}),
            ends,
        ),
    ] {
        assert_all_transports_agree(&servers, &row).await;
    }
}

#[tokio::test]
async fn an_expired_deadline_is_the_same_over_every_transport() {
    let servers = Servers::start(Setup::test_runner(silent_at(3))).await;
    let ends = ExpectedEnd::Failing("deadline_exceeded");
    let timeout = Duration::from_millis(300);
    for row in [
        completion(
            "a deadline",
            &json!(PROMPT),
            &json!({"max_tokens": 9}),
            ends,
        ),
        chat(
            "a deadline of a chat",
            &json!("Hi"),
            &json!({"max_tokens": 9}),
            ends,
        ),
    ] {
        assert_all_transports_agree(&servers, &row.with_deadline(timeout)).await;
    }
}

#[tokio::test]
async fn a_disconnect_frees_the_slot_over_every_transport() {
    let (setup, mut events) = slot_events(silent_at(3));
    let servers = Servers::start(setup).await;
    let row = completion(
        "disconnected",
        &json!(PROMPT),
        &json!({"max_tokens": 9}),
        LENGTH,
    );
    for transport in Transport::ALL {
        let open = servers.send_unread(transport, &row).await;
        assert_eq!(
            events.recv().await,
            Some(SlotEvent::Admitted),
            "{transport:?}"
        );
        drop(open);
        assert_eq!(
            events.recv().await,
            Some(SlotEvent::Released),
            "{transport:?}"
        );
    }
}
