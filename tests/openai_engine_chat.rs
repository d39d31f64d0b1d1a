//! Chats of OpenAI-compatible engines with tools, reasoning and refusals: what clients of both APIs see, and what the
//! engine receives.

mod support;

use serde_json::{Value, json};
use support::http::{BodyEnd, Request, post};
use support::openai_engine::{OpenAiEngine, chat_event, whole_with_usage};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;

async fn gateway(engine: &OpenAiEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    gateway
}

fn chat(fields: &Value) -> Request {
    let mut body = json!({"messages": [{"role": "user", "content": "weather?"}]});
    let fields = fields.as_object().expect("fields").clone();
    body.as_object_mut().expect("a body").extend(fields);
    post("/v1/chat/completions", body.to_string())
}

fn grpc_chat() -> v1::CompletionRequest {
    let message = v1::ChatMessage {
        role: "user".to_owned(),
        content: "weather?".to_owned(),
        ..v1::ChatMessage::default()
    };
    v1::CompletionRequest {
        input: Some(Input::Chat(v1::Chat {
            messages: vec![message],
        })),
        ..v1::CompletionRequest::default()
    }
}

/// Starts an engine that reasons, says something, and calls two tools. The last chunk has both text and the end of a
/// tool call.
async fn tool_calling_engine() -> OpenAiEngine {
    let call = |index: u32, id: &str, name: &str| {
        json!({"tool_calls": [{"index": index, "id": id, "type": "function",
            "function": {"name": name, "arguments": ""}}]})
    };
    let arguments =
        |index: u32, text: &str| json!([{"index": index, "function": {"arguments": text}}]);
    let events = vec![
        chat_event(&json!({"role": "assistant", "content": ""}), None),
        chat_event(&json!({"reasoning_content": "Two "}), None),
        chat_event(&json!({"reasoning": "cities."}), None),
        chat_event(&json!({"content": "Look"}), None),
        chat_event(&call(0, "call_a", "weather"), None),
        chat_event(
            &json!({"tool_calls": arguments(0, "{\"city\":\"Köln\"}")}),
            None,
        ),
        chat_event(&call(1, "call_b", "weather"), None),
        chat_event(
            &json!({"content": "ing", "tool_calls": arguments(1, "{}")}),
            Some("tool_calls"),
        ),
    ];
    let usage = json!({
        "prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 5},
    });
    OpenAiEngine::answering(whole_with_usage(events, &usage)).await
}

/// The deltas that every stream has, in order.
fn expected_deltas() -> Vec<Value> {
    let call = |index: u32, id: &str| {
        json!({"tool_calls": [{"index": index, "id": id, "type": "function",
            "function": {"name": "weather", "arguments": ""}}]})
    };
    let arguments = |index: u32, text: &str| json!({"tool_calls": [{"index": index, "function": {"arguments": text}}]});
    vec![
        json!({"role": "assistant", "content": ""}),
        json!({"reasoning_content": "Two "}),
        json!({"reasoning_content": "cities."}),
        json!({"content": "Look"}),
        call(0, "call_a"),
        arguments(0, "{\"city\":\"Köln\"}"),
        call(1, "call_b"),
        arguments(1, "{}"),
        json!({"content": "ing"}),
        json!({}),
    ]
}

fn assert_stream(objects: &[Value]) {
    let (last, lines) = objects.split_last().expect("objects");
    let deltas: Vec<_> = lines
        .iter()
        .map(|line| line["choices"][0]["delta"].clone())
        .collect();
    assert_eq!(deltas, expected_deltas());
    let reasons: Vec<_> = lines
        .iter()
        .map(|line| &line["choices"][0]["finish_reason"])
        .collect();
    let (reason, earlier) = reasons.split_last().expect("lines");
    assert_eq!(*reason, "tool_calls");
    assert!(earlier.iter().all(|reason| reason.is_null()));
    let usage = json!({
        "prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50,
        "prompt_tokens_details": {"cached_tokens": 16},
        "completion_tokens_details": {"reasoning_tokens": 5},
    });
    assert_eq!(last["usage"], usage);
}

#[tokio::test]
async fn reasoning_text_and_tool_calls_reach_a_client_of_every_format() {
    let engine = tool_calling_engine().await;
    let gateway = gateway(&engine).await;
    let stream = json!({"stream": true, "stream_options": {"include_usage": true}});

    let request = chat(&stream).accept("application/x-ndjson");
    let (_, body) = request.fetch(&gateway).await;
    assert_stream(&body.lines());
    assert_eq!(body.end, BodyEnd::Clean);

    let (_, body) = chat(&stream).fetch(&gateway).await;
    let mut events = body.events();
    assert_eq!(events.pop(), Some("[DONE]"));
    let parse = |event: &str| serde_json::from_str(event).expect("JSON");
    let objects: Vec<Value> = events.into_iter().map(parse).collect();
    assert_stream(&objects);

    let (_, body) = chat(&json!({})).fetch(&gateway).await;
    let function = |arguments: &str| json!({"name": "weather", "arguments": arguments});
    let message = json!({
        "role": "assistant", "content": "Looking", "refusal": null,
        "reasoning_content": "Two cities.",
        "tool_calls": [
            {"id": "call_a", "type": "function", "function": function("{\"city\":\"Köln\"}")},
            {"id": "call_b", "type": "function", "function": function("{}")},
        ],
    });
    let choice = &body.json()["choices"][0];
    assert_eq!(choice["message"], message);
    assert_eq!(choice["finish_reason"], "tool_calls");
}

#[tokio::test]
async fn reasoning_text_and_tool_calls_reach_a_client_of_grpc() {
    let engine = tool_calling_engine().await;
    let gateway = gateway(&engine).await;
    let answer = grpc::collect(gateway.stream(grpc_chat()).await).await;
    assert_eq!(answer.texts(0), ["Look", "ing"]);
    assert_eq!(answer.choices[0].finish, v1::FinishReason::ToolCalls);
    let reasoning: String = answer
        .chat
        .iter()
        .map(|it| &*it.reasoning_content)
        .collect();
    assert_eq!(reasoning, "Two cities.");
    let calls = answer.chat.iter().flat_map(|delta| &delta.tool_calls);
    let calls: Vec<_> = calls
        .map(|it| (it.index, &*it.id, &*it.name, &*it.arguments))
        .collect();
    let expected = [
        (0, "call_a", "weather", ""),
        (0, "", "", "{\"city\":\"Köln\"}"),
        (1, "call_b", "weather", ""),
        (1, "", "", "{}"),
    ];
    assert_eq!(calls, expected);
    let usage = answer.usage();
    assert_eq!(
        (usage.cached_prompt_tokens, usage.reasoning_tokens),
        (Some(16), Some(5))
    );
}

#[tokio::test]
async fn a_message_with_only_a_tool_call_or_a_refusal_has_null_as_its_content() {
    let call = json!({"tool_calls": [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}]});
    for (delta, reason) in [(call, "function_call"), (json!({"refusal": "No."}), "stop")] {
        let events = vec![chat_event(&delta, Some(reason))];
        let usage = json!({"prompt_tokens": 1, "completion_tokens": 1});
        let engine = OpenAiEngine::answering(whole_with_usage(events, &usage)).await;
        let gateway = gateway(&engine).await;
        let (_, body) = chat(&json!({})).fetch(&gateway).await;
        let choice = &body.json()["choices"][0];
        assert_eq!(choice["message"]["content"], Value::Null);
        let is_call = reason == "function_call";
        assert_eq!(choice["message"]["tool_calls"].is_array(), is_call);
        assert_eq!(
            choice["message"]["tool_calls"][0]["type"] == "function",
            is_call
        );
        assert_eq!(choice["message"]["refusal"] == "No.", !is_call);
        let expected = if is_call { "tool_calls" } else { "stop" };
        assert_eq!(choice["finish_reason"], expected);
        assert_eq!(body.json()["usage"].get("prompt_tokens_details"), None);
    }
}

#[tokio::test]
async fn a_conversation_with_tools_reaches_the_engine_as_the_client_wrote_it() {
    let engine = tool_calling_engine().await;
    let gateway = gateway(&engine).await;
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let fields = json!({
        "messages": [
            {"role": "user", "content": "weather?"},
            {"role": "assistant", "content": null, "tool_calls": [call], "reasoning_content": "r"},
            {"role": "tool", "content": "rain", "tool_call_id": "c"},
        ],
        "tools": [{"type": "function", "function": {
            "name": "f", "description": "d", "strict": false,
            "parameters": {"type": "object", "properties": {"z": {}, "a": {}}},
        }}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": false,
        "response_format": {"type": "json_object"},
        "reasoning_effort": "high",
    });
    let (response, body) = chat(&fields).fetch(&gateway).await;
    assert_eq!(response.status, 200, "{}", body.text);
    let received = &engine.received()[0].body;
    for (name, value) in fields.as_object().expect("fields") {
        assert_eq!(&received[name], value, "{name}");
    }
    let parameters = received["tools"][0]["function"]["parameters"].to_string();
    assert!(parameters.contains(r#"{"z":{},"a":{}}"#), "{parameters}");
}

#[tokio::test]
async fn values_without_an_effect_are_left_out() {
    let engine = tool_calling_engine().await;
    let gateway = gateway(&engine).await;
    let fields = json!({
        "tools": [], "tool_choice": "auto", "parallel_tool_calls": true,
        "response_format": {"type": "text"}, "reasoning_effort": null,
    });
    chat(&fields).fetch(&gateway).await;
    let received = &engine.received()[0].body;
    for name in fields.as_object().expect("fields").keys() {
        assert_eq!(received.get(name), None, "{name}");
    }
}

#[tokio::test]
async fn a_tokenway_engine_rejects_what_its_runner_cannot_do_and_accepts_what_has_no_effect() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    gateway.ready().await.expect("the engine is up");
    let call = json!({"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}});
    let assistant = |part: Value| {
        let mut message = json!({"role": "assistant", "content": null});
        let parts = part.as_object().expect("parts").clone();
        message.as_object_mut().expect("a message").extend(parts);
        json!({"messages": [message]})
    };
    for (param, fields) in [
        (
            "tools",
            json!({"tools": [{"type": "function", "function": {"name": "f"}}]}),
        ),
        ("tool_choice", json!({"tool_choice": "required"})),
        (
            "response_format",
            json!({"response_format": {"type": "json_object"}}),
        ),
        ("reasoning_effort", json!({"reasoning_effort": "low"})),
        ("tool_calls", assistant(json!({"tool_calls": [call]}))),
        (
            "tool_call_id",
            json!({"messages": [{"role": "tool", "content": "", "tool_call_id": "c"}]}),
        ),
        (
            "reasoning_content",
            assistant(json!({"reasoning_content": "r"})),
        ),
        ("refusal", assistant(json!({"refusal": "r"}))),
    ] {
        for server in [&engine, &gateway] {
            let (response, body) = chat(&fields).fetch(server).await;
            let expected = ("unsupported_parameter".to_owned(), Some(param.to_owned()));
            assert_eq!((response.status, body.error()), (400, expected), "{fields}");
        }
    }
    for fields in [
        json!({"tools": [], "tool_choice": "none", "parallel_tool_calls": true}),
        json!({"response_format": {"type": "text"}, "reasoning_effort": "medium"}),
    ] {
        let mut fields = fields;
        fields["max_tokens"] = json!(1);
        for server in [&engine, &gateway] {
            let (response, body) = chat(&fields).fetch(server).await;
            assert_eq!(response.status, 200, "{fields}: {}", body.text);
        }
    }
    let tools = v1::CompletionRequest {
        tools: vec![v1::Tool::default()],
        ..grpc_chat()
    };
    for server in [&engine, &gateway] {
        let (_, error) = grpc::grpc_error(server, tools.clone()).await;
        let expected = (ErrorKind::UnsupportedParameter, Some("tools".to_owned()));
        assert_eq!((error.kind, error.param), expected);
    }
}
