//! Tests of the body of `/v1/completions`: accepted fields, and the field that an error names.

use serde_json::{Value, json};

use super::*;
use crate::gateway::unknown::UnknownFieldPolicy;

fn fields(body: &Value) -> Result<Fields, Error> {
    Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Refuse)
}

fn completions(body: &Value) -> Result<ParsedBody<StreamOptions>, Error> {
    CompletionsBody::parse(&mut fields(body)?)
}

fn code_and_param(error: Error) -> (&'static str, Option<String>) {
    (error.kind.mapping().code, error.param)
}

fn rejected(body: &Value) -> (&'static str, Option<String>) {
    code_and_param(completions(body).expect_err(&body.to_string()))
}

fn error(code: &'static str, param: &str) -> (&'static str, Option<String>) {
    (code, Some(param.to_owned()))
}

#[test]
fn a_prompt_has_four_forms() {
    let inputs = |prompt: Value| -> Vec<Input> {
        let body = completions(&json!({"prompt": prompt})).unwrap();
        body.messages
            .into_iter()
            .filter_map(|message| message.input)
            .collect()
    };
    let text = |text: &str| Input::Prompt(text.to_owned());
    let ids = |ids: &[u32]| Input::PromptTokenIds(v1::TokenIds { ids: ids.to_vec() });
    assert_eq!(inputs(json!("a")), [text("a")]);
    assert_eq!(inputs(json!(["a", "b"])), [text("a"), text("b")]);
    assert_eq!(inputs(json!([1, 2.0])), [ids(&[1, 2])]);
    assert_eq!(inputs(json!([[1], [2, 3]])), [ids(&[1]), ids(&[2, 3])]);
}

#[test]
fn null_and_openai_defaults_are_accepted() {
    let body = json!({
        "prompt": "a", "best_of": 1, "echo": false, "logit_bias": null, "logprobs": null,
        "suffix": null, "max_tokens": null, "n": null, "stop": null, "stream": null,
        "stream_options": {"include_usage": null}, "seed": null, "user": null, "model": null,
        "unknown": null, "min_tokens": 0, "ignore_eos": false, "stop_token_ids": [],
    });
    let body = completions(&body).unwrap();
    assert_eq!(body.stream, None);
    assert_eq!(body.messages[0].max_tokens, None);
    for obfuscated in [true, false] {
        let options = json!({"include_obfuscation": obfuscated});
        let body = json!({"prompt": "a", "stream": true, "stream_options": options});
        assert!(completions(&body).is_ok());
    }
}

#[test]
fn hints_and_defaults_that_change_no_answer_are_accepted() {
    let plain = completions(&json!({"prompt": "a"})).unwrap();
    for body in [
        json!({"prompt": "a", "prompt_cache_key": "k", "safety_identifier": "u"}),
        json!({"prompt": "a", "prompt_cache_retention": "in_memory", "service_tier": "auto"}),
        json!({"prompt": "a", "logprobs": false, "store": false, "metadata": {}}),
        json!({"prompt": "a", "skip_special_tokens": true, "length_penalty": 1}),
        json!({"prompt": "a", "response_format": {"type": "text"}}),
    ] {
        let parsed = completions(&body).unwrap_or_else(|error| panic!("{body}: {error:?}"));
        assert_eq!(parsed.messages, plain.messages, "{body}");
        assert_eq!(parsed.response, plain.response, "{body}");
    }
}

#[test]
fn every_field_of_a_completion_reaches_the_engine() {
    let body = json!({
        "prompt": "a", "model": "m", "max_tokens": 0, "echo": true, "n": 2, "logprobs": 5,
        "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125, "presence_penalty": 1,
        "frequency_penalty": -1, "repetition_penalty": 1.5, "logit_bias": {"7": -100},
        "seed": -0.0, "stop": ["x"], "stop_token_ids": [9], "include_stop_str_in_output": true,
        "min_tokens": 4, "ignore_eos": true, "priority": -2, "user": "u", "suffix": "s",
        "stream": true, "stream_options": {"include_stamps": true},
    });
    let expected = v1::CompletionRequest {
        input: Some(Input::Prompt("a".to_owned())),
        model: "m".to_owned(),
        max_tokens: Some(0),
        echo: true,
        n: Some(2),
        logprobs: Some(5),
        temperature: Some(0.5),
        top_p: Some(0.25),
        top_k: Some(3),
        min_p: Some(0.125),
        presence_penalty: Some(1.0),
        frequency_penalty: Some(-1.0),
        repetition_penalty: Some(1.5),
        logit_bias: [(7, -100.0)].into(),
        seed: Some(0),
        stop: vec!["x".to_owned()],
        stop_token_ids: vec![9],
        include_stop_str_in_output: true,
        min_tokens: 4,
        ignore_eos: true,
        priority: Some(-2),
        user: "u".to_owned(),
        suffix: Some("s".to_owned()),
        include_stamps: true,
        // Not an HTTP field: `resume`.
        ..v1::CompletionRequest::default()
    };
    assert_eq!(completions(&body).unwrap().messages, [expected]);
}

#[test]
fn best_of_requests_log_probabilities_without_returning_them() {
    let body = completions(&json!({"prompt": "a", "best_of": 5, "n": 2})).unwrap();
    let message = &body.messages[0];
    assert_eq!((message.n, message.logprobs), (Some(5), Some(0)));
    let expected = ResponseOptions {
        choices: 2,
        logprobs: None,
    };
    assert_eq!((body.candidates, body.response), (5, expected));
}

#[test]
fn a_wrong_type_is_rejected_and_the_field_named() {
    for (name, value) in [
        ("prompt", json!(1)),
        ("prompt", json!(["a", 1])),
        ("prompt", json!([1, "a"])),
        ("prompt", json!(["a", [1]])),
        ("prompt", json!([[1], ["a"]])),
        ("prompt", json!([1.5])),
        ("max_tokens", json!("16")),
        ("max_tokens", json!(1.5)),
        ("temperature", json!("hot")),
        ("stream", json!(1)),
        ("stop", json!([1])),
        ("stop", json!(1)),
        ("stop_token_ids", json!(1)),
        ("stop_token_ids", json!(["a"])),
        ("logit_bias", json!([])),
        ("logit_bias.1", json!({"1": "a"})),
        ("echo", json!("yes")),
        ("suffix", json!(1)),
        ("stream_options", json!(true)),
        ("user", json!(7)),
    ] {
        let mut body = json!({"prompt": "a"});
        let field = name.split('.').next().expect("the name is not empty");
        body[field] = value;
        assert_eq!(rejected(&body), error("invalid_type", name), "{body}");
    }
    assert_eq!(rejected(&json!([])), ("invalid_type", None));
}

#[test]
fn an_out_of_range_missing_or_unknown_field_is_rejected_and_named() {
    let long = "m".repeat(100_000);
    let many = vec!["a"; 129];
    let biases: serde_json::Map<_, _> = (0..1_025).map(|id| (id.to_string(), json!(1))).collect();
    for (name, body) in [
        ("prompt", json!({"prompt": []})),
        ("prompt", json!({"prompt": [[]]})),
        ("prompt", json!({"prompt": [-1]})),
        ("prompt", json!({"prompt": [4_294_967_296_u64]})),
        ("max_tokens", json!({"prompt": "a", "max_tokens": -1})),
        ("max_tokens", json!({"prompt": "a", "max_tokens": 1e23})),
        ("temperature", json!({"prompt": "a", "temperature": 1e39})),
        ("n", json!({"prompt": ["a", "b"], "n": 65})),
        ("prompt", json!({"prompt": many})),
        ("n", json!({"prompt": "a", "n": 0, "best_of": 2})),
        ("model", json!({"prompt": "a", "model": long})),
        ("stop", json!({"prompt": "a", "stop": long})),
        ("user", json!({"prompt": "a", "user": long})),
        ("logprobs", json!({"prompt": "a", "logprobs": 6})),
        ("best_of", json!({"prompt": "a", "best_of": 0})),
        ("best_of", json!({"prompt": "a", "best_of": 21})),
        ("best_of", json!({"prompt": "a", "best_of": 2, "n": 3})),
        (
            "best_of",
            json!({"prompt": "a", "best_of": 2, "stream": true}),
        ),
        (
            "best_of",
            json!({"prompt": ["a", "b", "c", "d", "e", "f", "g"], "best_of": 20}),
        ),
        ("logit_bias", json!({"prompt": "a", "logit_bias": {"a": 1}})),
        (
            "logit_bias",
            json!({"prompt": "a", "logit_bias": {"01": 1}}),
        ),
        (
            "logit_bias",
            json!({"prompt": "a", "logit_bias": {"+1": 1}}),
        ),
        ("logit_bias", json!({"prompt": "a", "logit_bias": biases})),
        (
            "stop_token_ids",
            json!({"prompt": "a", "stop_token_ids": vec![1; 129]}),
        ),
        ("suffix", json!({"prompt": vec!["a"; 50], "suffix": long})),
        (
            "stream_options",
            json!({"prompt": "a", "stream_options": {"include_usage": true}}),
        ),
    ] {
        assert_eq!(rejected(&body), error("invalid_value", name), "{name}");
    }
    let missing = error("missing_parameter", "prompt");
    assert_eq!(rejected(&json!({"prompt": null})), missing);
    let unknown = error("unknown_parameter", "temprature");
    assert_eq!(rejected(&json!({"prompt": "a", "temprature": 1})), unknown);
    let options = json!({"include_obfuscation": 1});
    let body = json!({"prompt": "a", "stream": true, "stream_options": options});
    let unsupported = error(
        "unsupported_parameter",
        "stream_options.include_obfuscation",
    );
    assert_eq!(rejected(&body), unsupported);
}

#[test]
fn an_echo_that_would_make_the_response_too_large_is_rejected() {
    let long = "a ".repeat(1_000_000);
    let parse = |n: u32, logprobs: Value| {
        let body = json!({"prompt": long, "echo": true, "n": n, "logprobs": logprobs});
        completions(&body).map_err(|error| error.param)
    };
    assert!(parse(1, json!(null)).is_ok());
    assert!(parse(32, json!(null)).is_ok());
    let echo = Some(Some("echo".to_owned()));
    assert_eq!(parse(128, json!(null)).err(), echo);
    // The engine checks this one: the number of tokens is not known here.
    assert!(parse(1, json!(5)).is_ok());
    let body = json!({"prompt": "\u{1}".repeat(600_000), "echo": true, "n": 20});
    assert_eq!(rejected(&body), error("invalid_value", "echo"));
    let ids = vec![1; 500_000];
    let body = json!({"prompt": ids, "echo": true, "logprobs": 5});
    assert_eq!(rejected(&body), error("invalid_value", "echo"));
}

#[test]
fn an_out_of_range_number_is_not_rounded_into_the_range() {
    let read = |temperature: f64| {
        let body = completions(&json!({"prompt": "a", "temperature": temperature})).unwrap();
        body.messages[0].temperature()
    };
    assert_eq!((read(2.0), read(0.0), read(0.7)), (2.0, 0.0, 0.7));
    assert!(read(2.000_000_1) > 2.0 && read(-1e-50) < 0.0);
}

#[test]
fn an_engine_error_names_the_field_that_the_client_sets() {
    for (body, logprobs) in [
        (json!({"prompt": "a", "best_of": 2}), "best_of"),
        (
            json!({"prompt": "a", "best_of": 2, "logprobs": 1}),
            "logprobs",
        ),
    ] {
        let names = completions(&body).unwrap().names;
        for (engine_name, client_name) in [("prompt_token_ids", "prompt"), ("logprobs", logprobs)] {
            let error = names.with_client_field_name(Error::invalid_value(engine_name, ""));
            assert_eq!(error.param.as_deref(), Some(client_name));
        }
    }
}
