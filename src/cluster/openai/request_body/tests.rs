//! Tests of request bodies, compared with the JSON that is expected.

use serde_json::{Value, json};

use super::*;

fn facts(flavor: Flavor) -> BodyFacts<'static> {
    BodyFacts {
        model: "m",
        seed: 7,
        flavor,
        continues_message: false,
    }
}

fn request(message: &v1::CompletionRequest, flavor: Flavor) -> (Api, Value) {
    let request = EngineRequest::new(message, &facts(flavor)).expect("a valid request");
    let body = serde_json::from_slice(&request.body).expect("the body is JSON");
    (request.api, body)
}

fn prompt(text: &str) -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(Input::Prompt(text.to_owned())),
        ..v1::CompletionRequest::default()
    }
}

#[test]
fn fields_that_the_client_leaves_out_are_left_to_the_engine() {
    let body = json!({
        "model": "m", "prompt": "hi", "max_tokens": 16, "seed": 7,
        "stream": true, "stream_options": {"include_usage": true},
    });
    assert_eq!(
        request(&prompt("hi"), Flavor::Other),
        (Api::Completions, body)
    );
}

#[test]
fn a_chat_is_sent_as_a_chat_and_may_fill_the_context() {
    let message = v1::CompletionRequest {
        input: Some(Input::Chat(v1::Chat {
            messages: vec![
                v1::ChatMessage {
                    role: "system".to_owned(),
                    content: "Be brief.".to_owned(),
                    ..v1::ChatMessage::default()
                },
                v1::ChatMessage {
                    role: "user".to_owned(),
                    content: "hi".to_owned(),
                    name: "ann".to_owned(),
                    ..v1::ChatMessage::default()
                },
            ],
        })),
        ..v1::CompletionRequest::default()
    };
    let (api, body) = request(&message, Flavor::Other);
    assert_eq!(api, Api::Chats);
    let messages = json!([
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi", "name": "ann"},
    ]);
    assert_eq!(
        (&body["messages"], &body["max_tokens"]),
        (&messages, &Value::Null)
    );
}

#[test]
fn every_option_has_its_name_in_openais_api() {
    let message = v1::CompletionRequest {
        max_tokens: Some(9),
        n: Some(2),
        temperature: Some(0.5),
        top_p: Some(0.25),
        top_k: Some(4),
        min_p: Some(0.125),
        presence_penalty: Some(1.0),
        frequency_penalty: Some(-1.0),
        repetition_penalty: Some(1.5),
        logit_bias: [(3, -2.0)].into(),
        stop: vec!["x".to_owned()],
        stop_token_ids: vec![2],
        include_stop_str_in_output: true,
        min_tokens: 1,
        ignore_eos: true,
        user: "u".to_owned(),
        cache_salt: "salt".to_owned(),
        suffix: Some("end".to_owned()),
        ..prompt("hi")
    };
    let (_, body) = request(&message, Flavor::Vllm);
    let expected = json!({
        "model": "m", "prompt": "hi", "suffix": "end", "max_tokens": 9, "seed": 7, "n": 2,
        "stream": true, "stream_options": {"include_usage": true}, "return_token_ids": true,
        "temperature": 0.5, "top_p": 0.25, "top_k": 4, "min_p": 0.125,
        "presence_penalty": 1.0, "frequency_penalty": -1.0, "repetition_penalty": 1.5,
        "logit_bias": {"3": -2.0}, "stop": ["x"], "stop_token_ids": [2],
        "include_stop_str_in_output": true, "min_tokens": 1, "ignore_eos": true, "user": "u", "cache_salt": "salt",
    });
    assert_eq!(body, expected);
}

#[test]
fn a_salt_is_sent_only_to_a_server_that_is_known_to_honor_it() {
    let message = v1::CompletionRequest {
        cache_salt: "salt".to_owned(),
        ..prompt("a")
    };
    assert_eq!(request(&message, Flavor::Vllm).1["cache_salt"], "salt");
    for flavor in [Flavor::LlamaCpp, Flavor::LlamaCppV1, Flavor::Other] {
        let error = EngineRequest::new(&message, &facts(flavor))
            .err()
            .expect("an error");
        assert_eq!(error.kind, ErrorKind::UnsupportedParameter, "{flavor:?}");
        assert_eq!(error.param.as_deref(), Some("cache_salt"), "{flavor:?}");
        assert!(
            error.message.contains("--prefix-sharing caller"),
            "{error:?}"
        );
    }
}

#[test]
fn token_ids_are_sent_as_ids() {
    let message = v1::CompletionRequest {
        input: Some(Input::PromptTokenIds(v1::TokenIds { ids: vec![1, 2] })),
        ..v1::CompletionRequest::default()
    };
    assert_eq!(request(&message, Flavor::Other).1["prompt"], json!([1, 2]));
}

#[test]
fn a_field_that_cannot_be_passed_on_is_named() {
    let cases = [
        (
            "echo",
            v1::CompletionRequest {
                echo: true,
                ..prompt("a")
            },
        ),
        (
            "include_stamps",
            v1::CompletionRequest {
                include_stamps: true,
                ..prompt("a")
            },
        ),
        (
            "resume",
            v1::CompletionRequest {
                resume: vec![v1::ResumedChoice::default()],
                ..prompt("a")
            },
        ),
    ];
    for (param, message) in cases {
        let rejected = EngineRequest::new(&message, &facts(Flavor::Other));
        let error = rejected.err().expect("the request is rejected");
        assert_eq!(error.kind, ErrorKind::UnsupportedParameter);
        assert_eq!(error.param.as_deref(), Some(param));
    }
}

fn chat_request(messages: Vec<v1::ChatMessage>) -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(Input::Chat(v1::Chat { messages })),
        ..v1::CompletionRequest::default()
    }
}

#[test]
fn a_message_with_other_parts_and_no_text_has_null_as_its_content() {
    let assistant = v1::ChatMessage {
        role: "assistant".to_owned(),
        tool_calls: vec![v1::ToolCall {
            id: "c".to_owned(),
            name: "f".to_owned(),
            arguments: "{\"x\":1}".to_owned(),
        }],
        reasoning_content: "r".to_owned(),
        ..v1::ChatMessage::default()
    };
    let tool = v1::ChatMessage {
        role: "tool".to_owned(),
        tool_call_id: "c".to_owned(),
        ..v1::ChatMessage::default()
    };
    let message = chat_request(vec![assistant, tool]);
    let call =
        json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}});
    let mut expected = json!([
        {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "r"},
        {"role": "tool", "content": "", "tool_call_id": "c"},
    ]);
    assert_eq!(request(&message, Flavor::LlamaCpp).1["messages"], expected);
    // vLLM has a newer name for it.
    expected[0]["reasoning"] = json!("r");
    assert_eq!(request(&message, Flavor::Vllm).1["messages"], expected);
}

#[test]
fn tools_and_formats_have_the_form_of_openais_api_and_keep_the_clients_json() {
    let schema = r#"{"z": 1.50, "a": 18446744073709551615}"#;
    let message = v1::CompletionRequest {
        tools: vec![v1::Tool {
            function: Some(v1::FunctionDefinition {
                name: "f".to_owned(),
                description: "d".to_owned(),
                parameters: schema.to_owned(),
                strict: Some(true),
            }),
        }],
        tool_choice: Some(v1::ToolChoice {
            choice: Some(v1::tool_choice::Choice::Function("f".to_owned())),
        }),
        parallel_tool_calls: Some(false),
        response_format: Some(v1::ResponseFormat {
            format: Some(v1::response_format::Format::JsonSchema(
                v1::JsonSchemaFormat {
                    name: "n".to_owned(),
                    schema: schema.to_owned(),
                    ..v1::JsonSchemaFormat::default()
                },
            )),
        }),
        reasoning_effort: "low".to_owned(),
        ..chat_request(vec![v1::ChatMessage::default()])
    };
    let engine_request = EngineRequest::new(&message, &facts(Flavor::Other));
    let body = engine_request.expect("a valid request").body;
    let text = String::from_utf8(body).expect("the body is UTF-8");
    assert_eq!(text.matches(schema).count(), 2, "{text}");
    let body: Value = serde_json::from_str(&text).expect("the body is JSON");
    let schema: Value = serde_json::from_str(schema).expect("the schema is JSON");
    let function = json!({"name": "f", "description": "d", "parameters": schema, "strict": true});
    assert_eq!(
        body["tools"],
        json!([{"type": "function", "function": function}])
    );
    let choice = json!({"type": "function", "function": {"name": "f"}});
    assert_eq!(body["tool_choice"], choice);
    let format = json!({"type": "json_schema", "json_schema": {"name": "n", "schema": schema}});
    assert_eq!(body["response_format"], format);
    assert_eq!(body["parallel_tool_calls"], false);
    assert_eq!(body["reasoning_effort"], "low");
}

#[test]
fn an_invalid_tool_choice_or_format_is_named() {
    let chat = || chat_request(vec![v1::ChatMessage::default()]);
    let tool = |parameters: &str| v1::Tool {
        function: Some(v1::FunctionDefinition {
            name: "f".to_owned(),
            parameters: parameters.to_owned(),
            ..v1::FunctionDefinition::default()
        }),
    };
    for (param, message) in [
        (
            "tools",
            v1::CompletionRequest {
                tools: vec![v1::Tool::default()],
                ..chat()
            },
        ),
        (
            "tools",
            v1::CompletionRequest {
                tools: vec![tool("[]")],
                ..chat()
            },
        ),
        (
            "tools",
            v1::CompletionRequest {
                tools: vec![tool("{")],
                ..chat()
            },
        ),
        (
            "tools",
            v1::CompletionRequest {
                tools: vec![tool("")],
                ..prompt("a")
            },
        ),
        (
            "tool_choice",
            v1::CompletionRequest {
                tool_choice: Some(v1::ToolChoice::default()),
                ..chat()
            },
        ),
        (
            "response_format",
            v1::CompletionRequest {
                response_format: Some(v1::ResponseFormat::default()),
                ..chat()
            },
        ),
    ] {
        let rejected = EngineRequest::new(&message, &facts(Flavor::Vllm));
        let error = rejected.err().expect("the request is rejected");
        assert_eq!(error.kind, ErrorKind::InvalidValue);
        assert_eq!(error.param.as_deref(), Some(param));
    }
}

#[test]
fn logprobs_have_the_form_of_their_api() {
    let with_logprobs = |top: u32, message: v1::CompletionRequest| v1::CompletionRequest {
        logprobs: Some(top),
        ..message
    };
    let chat = || chat_request(vec![v1::ChatMessage::default()]);
    for (flavor, top, sent) in [
        (Flavor::Vllm, 0, 0),
        (Flavor::LlamaCpp, 0, 1),
        (Flavor::LlamaCppV1, 0, 1),
        (Flavor::Other, 3, 3),
    ] {
        let (api, body) = request(&with_logprobs(top, prompt("a")), flavor);
        let name = match api {
            Api::LlamaCpp => "n_probs",
            Api::Completions | Api::Chats => "logprobs",
        };
        assert_eq!(
            (&body[name], body.get("top_logprobs")),
            (&json!(sent), None)
        );
        let (_, body) = request(&with_logprobs(top, chat()), flavor);
        assert_eq!(
            (&body["logprobs"], &body["top_logprobs"]),
            (&json!(true), &json!(sent))
        );
    }
}

#[test]
fn only_vllm_echoes_and_only_a_text_prompt() {
    let echo = |message: v1::CompletionRequest| v1::CompletionRequest {
        echo: true,
        ..message
    };
    let (_, body) = request(&echo(prompt("a")), Flavor::Vllm);
    assert_eq!(
        (&body["echo"], body.get("return_token_ids")),
        (&json!(true), None)
    );
    let ids = v1::CompletionRequest {
        input: Some(Input::PromptTokenIds(v1::TokenIds { ids: vec![1] })),
        ..v1::CompletionRequest::default()
    };
    let chat = chat_request(vec![v1::ChatMessage::default()]);
    for (message, flavor) in [
        (ids, Flavor::Vllm),
        (chat, Flavor::Vllm),
        (prompt("a"), Flavor::LlamaCpp),
        (prompt("a"), Flavor::Other),
    ] {
        let rejected = EngineRequest::new(&echo(message), &facts(flavor)).err();
        let error = rejected.expect("the request is rejected");
        assert_eq!(error.param.as_deref(), Some("echo"));
    }
}

#[test]
fn llama_cpp_gets_prompts_over_its_own_api_and_chats_over_openais() {
    let message = v1::CompletionRequest {
        logprobs: Some(0),
        ..prompt("hi")
    };
    let (api, body) = request(&message, Flavor::LlamaCpp);
    assert_eq!(api, Api::LlamaCpp);
    assert_eq!(body["return_tokens"], true);
    assert_eq!(body.get("logprobs"), None);
    let chat = v1::CompletionRequest {
        input: Some(Input::Chat(v1::Chat::default())),
        ..message
    };
    let (api, body) = request(&chat, Flavor::LlamaCpp);
    assert_eq!((api, body.get("return_tokens")), (Api::Chats, None));
}

#[test]
fn only_vllm_gets_the_priority() {
    let message = v1::CompletionRequest {
        priority: Some(-3),
        ..prompt("hi")
    };
    for (flavor, expected) in [
        (Flavor::Vllm, Some(json!(-3))),
        (Flavor::LlamaCpp, None),
        (Flavor::Other, None),
    ] {
        let (_, body) = request(&message, flavor);
        assert_eq!(body.get("priority"), expected.as_ref(), "{flavor:?}");
    }
}
