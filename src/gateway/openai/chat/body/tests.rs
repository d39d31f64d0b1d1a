//! Tests of the chat body: accepted fields, and the field that an error names.

use serde_json::{Value, json};

use super::*;
use crate::gateway::unknown::UnknownFieldPolicy;

fn chat(body: &Value) -> Result<ParsedBody<StreamOptions>, Error> {
    let fields = Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Refuse);
    ChatBody::parse(&mut fields.expect("the body is an object"))
}

fn rejected(body: &Value) -> (&'static str, Option<String>) {
    let error = chat(body).expect_err(&body.to_string());
    (error.kind.mapping().code, error.param)
}

fn error(code: &'static str, param: &str) -> (&'static str, Option<String>) {
    (code, Some(param.to_owned()))
}

#[test]
fn null_and_openai_defaults_are_accepted() {
    let body = json!({
        "messages": [{"role": "user", "content": "a", "tool_calls": null, "name": null}],
        "response_format": {"type": "text"}, "tools": [], "tool_choice": "none",
        "parallel_tool_calls": true, "modalities": ["text"], "store": false, "metadata": {},
        "service_tier": "auto", "reasoning_effort": null, "function_call": "none",
        "logprobs": false, "top_logprobs": null, "max_completion_tokens": null, "max_tokens": 5,
    });
    assert_eq!(chat(&body).unwrap().messages[0].max_tokens, Some(5));
}

#[test]
fn hints_and_defaults_that_change_no_answer_are_accepted() {
    let plain = chat(&json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}));
    let plain = plain.unwrap();
    for fields in [
        json!({"prompt_cache_key": "a", "prompt_cache_retention": "24h"}),
        json!({"safety_identifier": "a", "service_tier": "default"}),
        json!({"logprobs": false, "top_logprobs": 0}),
        json!({"top_logprobs": 0}),
        json!({"tool_choice": "auto", "parallel_tool_calls": false, "tools": []}),
        json!({"max_completion_tokens": 5}),
        json!({"echo": false, "add_generation_prompt": true, "continue_final_message": false}),
        json!({"skip_special_tokens": true, "use_beam_search": false, "length_penalty": 1.0}),
        json!({"modalities": ["text"], "metadata": null, "store": false}),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "a"}], "max_tokens": 5});
        let all = body.as_object_mut().unwrap();
        all.extend(fields.as_object().unwrap().clone());
        let parsed = chat(&body).unwrap_or_else(|error| panic!("{body}: {error:?}"));
        assert_eq!(parsed.messages, plain.messages, "{body}");
        assert_eq!(parsed.response, plain.response, "{body}");
    }
}

#[test]
fn ignored_unknown_fields_are_named_in_the_response() {
    let body = json!({
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {}}]},
            {"role": "user", "content": "b", "x": 1, "y": null},
        ],
        "stream": true, "stream_options": {"cat": 1}, "no_stop_trim": false,
    });
    let fields = Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Ignore);
    let mut fields = fields.expect("the body is an object");
    assert!(ChatBody::parse(&mut fields).is_ok());
    let response = fields.into_ignored().add_header(Default::default());
    let names = response.headers()["x-ignored-fields"]
        .to_str()
        .expect("the header is ASCII");
    let mut names: Vec<_> = names.split(',').collect();
    names.sort_unstable();
    let expected = [
        "messages[0].content[0].cache_control",
        "messages[1].x",
        "no_stop_trim",
        "stream_options.cat",
    ];
    assert_eq!(names, expected);
    // An unsupported field is rejected, not ignored like an unknown one.
    let body = json!({"messages": [{"role": "user", "content": "a"}], "functions": [{}]});
    let fields = Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Ignore);
    let error = ChatBody::parse(&mut fields.expect("the body is an object"))
        .expect_err("functions are unsupported");
    assert_eq!(error.param.as_deref(), Some("functions"));
}

#[test]
fn message_content_is_text_or_a_list_of_text_parts() {
    let body = json!({"messages": [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "name": "n", "content": [
            {"type": "text", "text": "c"}, {"type": "text", "text": "d"},
        ]},
        {"role": "assistant", "content": ""},
    ]});
    let message = |role: &str, content: &str, name: &str| v1::ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
        name: name.to_owned(),
        ..v1::ChatMessage::default()
    };
    let expected = v1::Chat {
        messages: vec![
            message("system", "a", ""),
            message("system", "b", ""),
            message("user", "c\nd", "n"),
            message("assistant", "", ""),
        ],
    };
    let body = chat(&body).unwrap();
    assert_eq!(body.messages[0].input, Some(Input::Chat(expected)));
}

/// Asserts that a chat whose second message is `message` is rejected with this error.
fn assert_second_message_rejected(message: &Value, code: &'static str, param: &str) {
    let user = json!({"role": "user", "content": "a"});
    let body = json!({"messages": [user, message]});
    assert_eq!(rejected(&body), error(code, param), "{body}");
}

#[test]
fn an_invalid_message_is_rejected_and_the_field_path_named() {
    for (code, param, message) in [
        ("invalid_type", "messages[1]", json!("a")),
        (
            "missing_parameter",
            "messages[1].role",
            json!({"content": "a"}),
        ),
        (
            "missing_parameter",
            "messages[1].content",
            json!({"role": "user"}),
        ),
        (
            "invalid_type",
            "messages[1].role",
            json!({"role": 1, "content": "a"}),
        ),
        (
            "invalid_value",
            "messages[1].role",
            json!({"role": "cat", "content": "a"}),
        ),
        (
            "unsupported_parameter",
            "messages[1].role",
            json!({"role": "function", "name": "f", "content": "a"}),
        ),
        (
            "missing_parameter",
            "messages[1].tool_call_id",
            json!({"role": "tool", "content": "a"}),
        ),
        (
            "invalid_value",
            "messages[1].tool_call_id",
            json!({"role": "tool", "content": "a", "tool_call_id": ""}),
        ),
        (
            "invalid_value",
            "messages[1].tool_call_id",
            json!({"role": "user", "content": "a", "tool_call_id": "b"}),
        ),
        (
            "missing_parameter",
            "messages[1].tool_calls[0].type",
            json!({"role": "assistant", "tool_calls": [{}]}),
        ),
        (
            "missing_parameter",
            "messages[1].tool_calls[0].function.arguments",
            json!({"role": "assistant", "tool_calls": [
                {"type": "function", "id": "a", "function": {"name": "f"}},
            ]}),
        ),
        (
            "invalid_value",
            "messages[1].role",
            json!({"role": "user", "content": "a", "reasoning_content": "b"}),
        ),
        (
            "missing_parameter",
            "messages[1].content",
            json!({"role": "assistant", "content": null, "reasoning_content": ""}),
        ),
        (
            "unknown_parameter",
            "messages[1].cat",
            json!({"role": "user", "content": "a", "cat": 1}),
        ),
        (
            "invalid_type",
            "messages[1].name",
            json!({"role": "user", "content": "a", "name": 1}),
        ),
        (
            "invalid_type",
            "messages[1].content",
            json!({"role": "user", "content": 1}),
        ),
        (
            "invalid_value",
            "messages[1].content",
            json!({"role": "user", "content": []}),
        ),
    ] {
        assert_second_message_rejected(&message, code, param);
    }
}

#[test]
fn an_invalid_content_part_is_rejected_and_the_field_path_named() {
    let part =
        |part: Value| json!({"role": "user", "content": [{"type": "text", "text": "a"}, part]});
    for (code, param, message) in [
        ("invalid_type", "messages[1].content[1]", part(json!("a"))),
        (
            "missing_parameter",
            "messages[1].content[1].type",
            part(json!({"text": "a"})),
        ),
        (
            "missing_parameter",
            "messages[1].content[1].text",
            part(json!({"type": "text"})),
        ),
        (
            "unsupported_parameter",
            "messages[1].content[1].type",
            part(json!({"type": "image_url", "image_url": {}})),
        ),
        (
            "unknown_parameter",
            "messages[1].content[1].cat",
            part(json!({"type": "text", "text": "a", "cat": 1})),
        ),
    ] {
        assert_second_message_rejected(&message, code, param);
    }
}

#[test]
fn a_message_from_an_openai_response_can_be_sent_back() {
    let response = json!({
        "role": "assistant", "content": "a", "refusal": null, "annotations": [], "tool_calls": [],
        "audio": null, "function_call": null,
    });
    let user = json!({"role": "user", "content": "b"});
    let body = json!({"messages": [user, response, user]});
    assert!(chat(&body).is_ok());
}

#[test]
fn an_invalid_chat_field_is_rejected_and_named() {
    for (code, param, value) in [
        ("invalid_type", "messages", json!("a")),
        ("invalid_value", "messages", json!([])),
        ("missing_parameter", "messages", json!(null)),
        ("invalid_type", "tools", json!({})),
        ("invalid_value", "tool_choice", json!("any")),
        ("invalid_type", "tool_choice", json!(true)),
        ("invalid_type", "parallel_tool_calls", json!("yes")),
        ("invalid_type", "response_format", json!("text")),
        ("invalid_type", "reasoning_effort", json!(1)),
        ("unsupported_parameter", "functions", json!([{}])),
        ("unsupported_parameter", "metadata", json!({"a": "b"})),
        ("unsupported_parameter", "service_tier", json!("flex")),
        ("invalid_type", "prompt_cache_key", json!(1)),
        ("invalid_type", "prompt_cache_retention", json!(24)),
        ("invalid_type", "safety_identifier", json!(["u"])),
        ("unsupported_parameter", "store", json!(true)),
        ("unknown_parameter", "best_of", json!(1)),
        ("unsupported_parameter", "echo", json!(true)),
        ("unknown_parameter", "suffix", json!("a")),
        ("unknown_parameter", "prompt", json!("a")),
        ("invalid_value", "top_logprobs", json!(1)),
        ("invalid_type", "logprobs", json!(1)),
        ("unsupported_parameter", "verbosity", json!("high")),
        ("invalid_value", "n", json!(129)),
        ("invalid_value", "max_tokens", json!(0)),
        ("invalid_value", "max_completion_tokens", json!(0)),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
        body[param] = value;
        assert_eq!(rejected(&body), error(code, param), "{body}");
    }
    let messages = json!([{"role": "user", "content": "a"}]);
    let body = json!({"messages": messages, "logprobs": true, "top_logprobs": 21});
    assert_eq!(rejected(&body), error("invalid_value", "top_logprobs"));
    let body = json!({"messages": messages, "max_tokens": 1, "max_completion_tokens": 2});
    assert_eq!(rejected(&body), error("invalid_value", "max_tokens"));
}

#[test]
fn an_invalid_tool_or_format_is_rejected_and_the_field_path_named() {
    let function = |function: Value| json!([{"type": "function", "function": function}]);
    for (code, param, field, value) in [
        ("missing_parameter", "tools[0].type", "tools", json!([{}])),
        (
            "unsupported_parameter",
            "tools[0].type",
            "tools",
            json!([{"type": "custom", "custom": {"name": "f"}}]),
        ),
        (
            "missing_parameter",
            "tools[0].function",
            "tools",
            json!([{"type": "function"}]),
        ),
        (
            "invalid_value",
            "tools[0].function.name",
            "tools",
            function(json!({"name": ""})),
        ),
        (
            "invalid_type",
            "tools[0].function.parameters",
            "tools",
            function(json!({"name": "f", "parameters": "{}"})),
        ),
        (
            "unknown_parameter",
            "tools[0].function.cat",
            "tools",
            function(json!({"name": "f", "cat": 1})),
        ),
        (
            "missing_parameter",
            "tool_choice.function.name",
            "tool_choice",
            json!({"type": "function", "function": {}}),
        ),
        (
            "unsupported_parameter",
            "tool_choice.type",
            "tool_choice",
            json!({"type": "allowed_tools"}),
        ),
        (
            "unsupported_parameter",
            "response_format.type",
            "response_format",
            json!({"type": "grammar"}),
        ),
        (
            "missing_parameter",
            "response_format.json_schema",
            "response_format",
            json!({"type": "json_schema"}),
        ),
    ] {
        let mut body = json!({"messages": [{"role": "user", "content": "a"}]});
        body[field] = value;
        assert_eq!(rejected(&body), error(code, param), "{body}");
    }
    let tools = vec![function(json!({"name": "f"}))[0].clone(); 129];
    let body = json!({"messages": [{"role": "user", "content": "a"}], "tools": tools});
    assert_eq!(rejected(&body), error("invalid_value", "tools"));
}

#[test]
fn a_schema_keeps_the_order_of_its_keys_and_its_numbers() {
    let schema = r#"{"type":"object","properties":{"z":{"maximum":18446744073709551615},"a":{"minimum":-0.1}}}"#;
    let body = format!(
        r#"{{"messages": [{{"role": "user", "content": "a"}}], "tool_choice": "required",
        "tools": [{{"type": "function", "function": {{"name": "f", "parameters": {schema}}}}}],
        "response_format": {{"type": "json_schema", "json_schema": {{"name": "n", "schema": {schema}}}}}}}"#
    );
    let fields = Fields::parse(body.as_bytes(), UnknownFieldPolicy::Refuse);
    let parsed = ChatBody::parse(&mut fields.expect("the body is an object"));
    let message = &parsed.expect("a valid body").messages[0];
    let function = message.tools[0].function.as_ref().expect("a function");
    assert_eq!((&*function.name, &*function.parameters), ("f", schema));
    let format = message.response_format.clone().expect("a format").format;
    let Some(v1::response_format::Format::JsonSchema(format)) = format else {
        panic!("{format:?} is not a schema");
    };
    assert_eq!((&*format.name, &*format.schema), ("n", schema));
}

#[test]
fn a_conversation_with_tools_reaches_the_engine() {
    let call = json!({
        "id": "c", "type": "function", "index": 0,
        "function": {"name": "f", "arguments": "{}"},
    });
    let body = json!({"messages": [
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "tool_call_id": "c", "content": "7"},
        {"role": "assistant", "content": null, "refusal": "no"},
    ]});
    let expected = vec![
        v1::ChatMessage {
            role: "assistant".to_owned(),
            tool_calls: vec![v1::ToolCall {
                id: "c".to_owned(),
                name: "f".to_owned(),
                arguments: "{}".to_owned(),
            }],
            reasoning_content: "r".to_owned(),
            ..v1::ChatMessage::default()
        },
        v1::ChatMessage {
            role: "tool".to_owned(),
            content: "7".to_owned(),
            tool_call_id: "c".to_owned(),
            ..v1::ChatMessage::default()
        },
        v1::ChatMessage {
            role: "assistant".to_owned(),
            refusal: "no".to_owned(),
            ..v1::ChatMessage::default()
        },
    ];
    let body = chat(&body).unwrap();
    let expected = Input::Chat(v1::Chat { messages: expected });
    assert_eq!(body.messages[0].input, Some(expected));
}

#[test]
fn an_engine_error_names_the_limit_that_the_client_sets() {
    for (field, param) in [
        ("max_tokens", "max_tokens"),
        ("max_completion_tokens", "max_completion_tokens"),
    ] {
        let body = json!({"messages": [{"role": "user", "content": "a"}], field: 5});
        let names = chat(&body).unwrap().names;
        for (engine_name, client_name) in [("max_tokens", param), ("chat", "messages")] {
            let error = names.with_client_field_name(Error::invalid_value(engine_name, ""));
            assert_eq!(error.param.as_deref(), Some(client_name));
        }
    }
}
