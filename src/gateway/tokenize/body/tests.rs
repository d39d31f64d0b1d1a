//! Tests of the bodies of `/tokenize` and `/detokenize`: accepted fields, and the field that an error names.

use serde_json::{Value, json};

use super::*;
use crate::gateway::unknown::UnknownFieldPolicy;

fn fields(body: &Value) -> Result<Fields, Error> {
    Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Refuse)
}

fn code_and_param(error: Error) -> (&'static str, Option<String>) {
    (error.kind.mapping().code, error.param)
}

fn error(code: &'static str, param: &str) -> (&'static str, Option<String>) {
    (code, Some(param.to_owned()))
}

#[test]
fn tokenize_takes_text_or_a_conversation() {
    let parse = |body: Value| TokenizeBody::parse(&mut fields(&body)?);
    let text = parse(json!({"prompt": "", "model": "m", "add_special_tokens": false})).unwrap();
    let expected = v1::TokenizeRequest {
        model: "m".to_owned(),
        input: Some(Input::Text(String::new())),
        add_special_tokens: Some(false),
    };
    assert_eq!(text, expected);
    let messages = json!([{"role": "user", "content": "a"}]);
    assert!(parse(json!({"messages": messages, "prompt": null})).is_ok());
    for (code, param, body) in [
        ("missing_parameter", "prompt", json!({})),
        (
            "invalid_value",
            "prompt",
            json!({"prompt": "a", "messages": messages}),
        ),
        ("invalid_type", "prompt", json!({"prompt": ["a"]})),
        ("unknown_parameter", "n", json!({"prompt": "a", "n": 1})),
        (
            "unsupported_parameter",
            "return_token_strs",
            json!({"prompt": "a", "return_token_strs": true}),
        ),
        (
            "unsupported_parameter",
            "add_generation_prompt",
            json!({"messages": messages, "add_generation_prompt": false}),
        ),
    ] {
        assert_eq!(code_and_param(parse(body).unwrap_err()), error(code, param));
    }
}

#[test]
fn detokenize_takes_a_list_of_token_ids() {
    let parse = |body: Value| DetokenizeBody::parse(&mut fields(&body)?);
    assert_eq!(parse(json!({"tokens": [1, 2]})).unwrap().token_ids, [1, 2]);
    for (code, body) in [
        ("missing_parameter", json!({})),
        ("invalid_type", json!({"tokens": 1})),
        ("invalid_type", json!({"tokens": ["a"]})),
        ("invalid_value", json!({"tokens": [-1]})),
    ] {
        assert_eq!(
            code_and_param(parse(body).unwrap_err()),
            error(code, "tokens")
        );
    }
}

#[test]
fn an_engine_error_names_the_field_that_the_client_sets() {
    for (names, engine_name, client_name) in [
        (TOKENIZE_NAMES, "text", "prompt"),
        (TOKENIZE_NAMES, "chat", "messages"),
        (DETOKENIZE_NAMES, "token_ids", "tokens"),
        (DETOKENIZE_NAMES, "model", "model"),
    ] {
        let error = names.with_client_field_name(Error::invalid_value(engine_name, ""));
        assert_eq!(error.param.as_deref(), Some(client_name));
    }
}
