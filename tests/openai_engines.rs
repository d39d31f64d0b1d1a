//! A gateway in front of OpenAI-compatible engines: what clients of both APIs see, and what the engine receives.

mod support;

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::http::{BodyEnd, completion, get, post, texts};
use support::openai_engine::{OpenAiEngine, Received, Step, delta, event, whole};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tonic::Code;

async fn gateway(engine: &OpenAiEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    wait_until_up(&gateway).await;
    gateway
}

/// Waits until the gateway has read the engine's list of models.
async fn wait_until_up(gateway: &TestServer) {
    gateway.ready().await.expect("an engine is up");
}

fn stream_body() -> Value {
    json!({"prompt": "hi", "max_tokens": 9, "stream": true, "stream_options": {"include_usage": true}})
}

/// Returns the steps of a response that ends after two deltas with `end`.
fn cut(end: &[Step]) -> Vec<Step> {
    let steps = [
        Step::Head,
        event(&delta("a", None)),
        event(&delta("b", None)),
    ];
    steps.into_iter().chain(end.iter().cloned()).collect()
}

#[tokio::test]
async fn each_delta_is_one_line_in_every_format_and_one_token_over_grpc() {
    let engine = OpenAiEngine::answering(whole(&["The ", "c\u{e4}t", "\u{1f600}\n\"x\""])).await;
    let gateway = gateway(&engine).await;
    let expected = ["The ", "c\u{e4}t", "\u{1f600}\n\"x\""];

    let (_, body) = completion(&stream_body()).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), expected);
    assert_eq!(lines[2]["choices"][0]["finish_reason"], "length");
    assert_eq!((lines.len(), &lines[0]["model"]), (4, &json!("m")));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6});
    assert_eq!(lines[3]["usage"], usage);
    assert_eq!(body.end, BodyEnd::Clean);

    let request = completion(&stream_body()).accept("text/event-stream");
    let (_, body) = request.fetch(&gateway).await;
    let events = body.events();
    assert_eq!((events.len(), events[4]), (5, "[DONE]"));

    let unary = json!({"prompt": "hi", "max_tokens": 9});
    let (_, body) = completion(&unary).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], expected.concat());
    assert_eq!(body.json()["usage"], usage);

    let over_grpc = grpc::collect(gateway.stream(grpc::request("hi", 9)).await).await;
    assert_eq!(over_grpc.texts(0), expected);
    assert!(over_grpc.started.as_ref().expect("it starts").text_only);
    assert_eq!(over_grpc.choices[0].finish, v1::FinishReason::Length);
    assert_eq!(over_grpc.usage().prompt_tokens, 3);
}

#[tokio::test]
async fn a_chat_is_sent_to_the_engine_as_a_chat() {
    let chunk = |delta: Value, reason: Option<&str>| {
        event(
            &json!({"model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}),
        )
    };
    let engine = OpenAiEngine::answering(vec![
        Step::Head,
        chunk(json!({"role": "assistant", "content": ""}), None),
        chunk(json!({"content": "Paris"}), None),
        chunk(json!({}), Some("stop")),
        Step::Chunk("data: [DONE]\n\n".to_owned()),
        Step::End,
    ])
    .await;
    let gateway = gateway(&engine).await;
    let messages = json!([{"role": "user", "content": "Capital of France?"}]);
    let body = json!({"model": "m", "messages": messages, "temperature": 0});
    let (_, body) = post("/v1/chat/completions", body.to_string())
        .fetch(&gateway)
        .await;
    assert_eq!(body.json()["choices"][0]["message"]["content"], "Paris");
    assert_eq!(body.json()["choices"][0]["finish_reason"], "stop");
    let received = &engine.received()[0];
    assert_eq!(received.path, "/v1/chat/completions");
    assert_eq!(
        (&received.body["messages"], &received.body["temperature"]),
        (&messages, &json!(0.0))
    );
}

#[tokio::test]
async fn an_engine_that_reports_ids_is_asked_for_them() {
    let models = r#"{"data":[{"id":"v","owned_by":"vllm","max_model_len":64}]}"#;
    let engine = OpenAiEngine::with_models(models, |_| {
        let chunk = |text: &str, ids: &[u32], reason: Option<&str>| {
            event(&json!({"model": "v", "choices": [
                {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason},
            ]}))
        };
        vec![
            Step::Head,
            chunk("a", &[5], None),
            chunk("", &[6], None),
            chunk("\u{e9}b", &[7, 8], Some("stop")),
            Step::Chunk("data: [DONE]\n\n".to_owned()),
            Step::End,
        ]
    })
    .await;
    let gateway = gateway(&engine).await;
    let request =
        json!({"prompt": "hi", "stream": true, "stream_options": {"return_token_ids": true}});
    let (_, body) = completion(&request).fetch(&gateway).await;
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), ["a", "", "", "\u{e9}b"]);
    let ids: Vec<_> = lines
        .iter()
        .map(|line| &line["choices"][0]["token_ids"])
        .collect();
    assert_eq!(ids, [&json!([5]), &json!([6]), &json!([7]), &json!([8])]);
    assert_eq!(engine.received()[0].body["return_token_ids"], true);
    let (_, listed) = get("/v1/models").fetch(&gateway).await;
    assert_eq!(listed.json()["data"][0]["id"], "v");
}

#[tokio::test]
async fn a_stream_that_the_engine_cuts_ends_with_one_error_and_never_looks_whole() {
    let chunk = |text: &str| Step::Chunk(text.to_owned());
    let ends: [&[Step]; 8] = [
        &[Step::Fin],
        &[Step::Rst],
        &[Step::End],
        &[chunk("data: [DONE]\n\n"), Step::End],
        &[chunk("data: {\"choices\":[{\"index\":0,\"te"), Step::Fin],
        &[
            chunk("data: {\"choices\":[{\"index\":0,\"te\n\n"),
            Step::End,
        ],
        &[
            chunk("data: {\"error\":{\"message\":\"secret\"}}\n\n"),
            Step::End,
        ],
        &[
            chunk("event: error\ndata: secret\n\ndata: [DONE]\n\n"),
            Step::End,
        ],
    ];
    for end in ends {
        // The engine fails every request that continues the stream.
        let steps = cut(end);
        let engine = OpenAiEngine::start(move |received| match &received.body["prompt"] {
            prompt if prompt == "hi" => steps.clone(),
            _ => vec![Step::Answer(500, "", json!({}))],
        })
        .await;
        // A gateway for each request, because the faults of several requests would open the breaker.
        let gateways = join_all((0..4).map(|_| gateway(&engine))).await;
        let (response, body) = completion(&stream_body()).fetch(&gateways[0]).await;
        let lines = body.lines();
        assert_eq!(
            (response.status, body.end),
            (200, BodyEnd::Unclean),
            "{end:?}"
        );
        assert_eq!(texts(&lines[..2], 0), ["a", "b"], "{end:?}");
        assert_eq!(lines.len(), 3, "{end:?}");
        assert_eq!(lines[2]["error"]["code"], "upstream_error", "{end:?}");
        assert!(!body.text.contains("secret"), "{end:?}");

        let sse = completion(&stream_body()).accept("text/event-stream");
        let (_, body) = sse.fetch(&gateways[1]).await;
        assert!(!body.text.contains("[DONE]"), "{end:?}");

        let (response, body) = completion(&json!({"prompt": "hi"}))
            .fetch(&gateways[2])
            .await;
        assert_eq!(
            (response.status, &*body.error().0),
            (502, "upstream_error"),
            "{end:?}"
        );

        let over_grpc = grpc::collect(gateways[3].stream(grpc::request("hi", 9)).await).await;
        let status = over_grpc.error.as_ref().expect("the stream fails");
        assert_eq!(
            (status.code(), over_grpc.token_count(0)),
            (Code::Aborted, 2),
            "{end:?}"
        );
    }
}

#[tokio::test]
async fn a_stream_with_a_finish_reason_is_whole_without_an_end_marker() {
    for end in [vec![Step::End], vec![Step::Fin], vec![Step::WaitForClose]] {
        let mut steps = vec![Step::Head, event(&delta("a", Some("stop")))];
        steps.extend(end);
        let engine = OpenAiEngine::answering(steps.clone()).await;
        let gateway = gateway(&engine).await;
        let (_, body) = completion(&json!({"prompt": "hi", "stream": true}))
            .fetch(&gateway)
            .await;
        assert_eq!(
            (texts(&body.lines(), 0), body.end),
            (vec!["a".to_owned()], BodyEnd::Clean),
            "{steps:?}"
        );
    }
}

#[tokio::test]
async fn comments_unknown_events_and_empty_choices_reach_no_client() {
    let noise =
        ": ping\n\nevent: ping\ndata: {}\n\ndata: {\"choices\":[]}\n\ndata: {\"choices\":null}\n\n";
    let mut steps = whole(&["a", "[DONE]", "b"]);
    steps.insert(2, Step::Chunk(noise.to_owned()));
    let engine = OpenAiEngine::answering(steps).await;
    let gateway = gateway(&engine).await;
    let (_, body) = completion(&json!({"prompt": "hi", "stream": true}))
        .fetch(&gateway)
        .await;
    assert_eq!(texts(&body.lines(), 0), ["a", "[DONE]", "b"]);
    assert_eq!((body.lines().len(), body.end), (3, BodyEnd::Clean));
}

#[tokio::test]
async fn a_request_that_has_passed_through_the_gateway_before_is_rejected() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
    let received = engine.received();
    let via = received[0].header("x-tokenway-via").expect("a header");
    let returned = completion(&json!({"prompt": "hi"})).header("x-tokenway-via", via);
    let (response, body) = returned.fetch(&gateway).await;
    assert_eq!((response.status, &*body.error().0), (502, "upstream_error"));
    assert!(body.text.contains("engine of itself"), "{}", body.text);
    assert_eq!(engine.received().len(), 1);
}

#[tokio::test]
async fn an_error_of_the_request_is_passed_on_and_one_of_the_engine_is_not() {
    let error = |message: &str, code: &str| json!({"error": {"message": message, "param": "stop", "code": code}});
    for (status, code, expected_status, expected) in [
        (400, "x", 400, "invalid_value"),
        (422, "x", 422, "invalid_value"),
        (451, "x", 451, "invalid_value"),
        (
            400,
            "context_length_exceeded",
            400,
            "context_length_exceeded",
        ),
        (404, "model_not_found", 404, "model_not_found"),
        (401, "invalid_api_key", 502, "upstream_error"),
        (500, "x", 502, "upstream_error"),
        (503, "x", 503, "no_worker"),
    ] {
        let answer = Step::Answer(status, "", error("stop is secret", code));
        let engine = OpenAiEngine::answering(vec![answer]).await;
        let gateway = gateway(&engine).await;
        let (response, body) = completion(&stream_body()).fetch(&gateway).await;
        let (code, param) = body.error();
        assert_eq!(
            (response.status, &*code),
            (expected_status, expected),
            "{status}"
        );
        let is_clients = expected_status < 500;
        assert_eq!(param.as_deref() == Some("stop"), is_clients, "{status}");
        let has_message = body.text.contains("stop is secret");
        assert_eq!(has_message, is_clients, "{status}: {}", body.text);
    }
}

#[tokio::test]
async fn a_busy_engine_answers_429_with_its_own_delay() {
    let answer = Step::Answer(
        429,
        "retry-after: 77\r\n",
        json!({"error": {"message": "slow down"}}),
    );
    let engine = OpenAiEngine::answering(vec![answer]).await;
    let gateway = gateway(&engine).await;
    let (response, body) = completion(&stream_body()).fetch(&gateway).await;
    assert_eq!(
        (response.status, response.header("retry-after")),
        (429, Some("77"))
    );
    assert_eq!(body.error().0, "queue_full");
    let (code, error) = grpc::grpc_error(&gateway, grpc::request("hi", 1)).await;
    assert_eq!(
        (code, error.kind),
        (Code::ResourceExhausted, ErrorKind::QueueFull)
    );
}

#[tokio::test]
async fn another_engine_with_the_model_takes_the_request_of_one_that_refuses_it() {
    let refusing = OpenAiEngine::answering(vec![Step::Answer(503, "", json!({}))]).await;
    let answering = OpenAiEngine::answering(whole(&["a"])).await;
    let gateway = Setup::gateway_at(&[refusing.url(), answering.url()])
        .start()
        .await;
    wait_until_up(&gateway).await;
    for _ in 0..4 {
        let (_, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
        assert_eq!(body.json()["choices"][0]["text"], "a");
    }
}

#[tokio::test]
async fn a_field_that_the_engine_cannot_honor_is_rejected_and_named() {
    let engine = OpenAiEngine::answering(whole(&["a"])).await;
    let gateway = gateway(&engine).await;
    for (field, value) in [
        ("top_k", json!(3)),
        ("echo", json!(true)),
        ("ignore_eos", json!(true)),
    ] {
        let mut body = json!({"prompt": "hi"});
        body[field] = value;
        let (response, body) = completion(&body).fetch(&gateway).await;
        assert_eq!(response.status, 400, "{field}");
        assert_eq!(
            body.error(),
            ("unsupported_parameter".to_owned(), Some(field.to_owned()))
        );
    }
    let received: Vec<Received> = engine.received();
    assert!(received.is_empty(), "{received:?}");
}

#[tokio::test]
async fn a_tokenway_server_can_be_an_openai_engine_too() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let url = format!("openai+{}/v1", engine.http_url());
    let gateway = Setup::gateway_at(&[url]).start().await;
    wait_until_up(&gateway).await;
    let request = json!({"prompt": "hi", "max_tokens": 2048, "n": 2, "stream": true});
    let (_, body) = completion(&request).fetch(&gateway).await;
    let lines = body.lines();
    let expected: Vec<_> = (0..2_048).map(|index| format!("token_{index}")).collect();
    for choice in 0..2 {
        assert_eq!(texts(&lines, choice), expected);
    }
    assert_eq!(lines.len(), 2 * 2_048);
}
