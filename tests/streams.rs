//! Every stream format has each token once, in order, and one end.

mod support;

use serde_json::{Value, json};
use support::http::{BodyEnd, completion, texts};
use support::{Setup, full_speed, grpc, with_interval};
use tokenway::proto::v1;

use std::time::Duration;

fn expected_tokens(count: usize) -> Vec<String> {
    (0..count).map(|index| format!("token_{index}")).collect()
}

#[tokio::test]
async fn ndjson_has_one_line_per_token() {
    let server = Setup::test_runner(full_speed()).start().await;
    let request = completion(&json!({"prompt": "a b c", "max_tokens": 2048, "stream": true}));
    let (response, body) = request.header("x-request-id", "mine").fetch(&server).await;
    assert_eq!(response.status, 200);
    assert_eq!(
        response.header("content-type"),
        Some("application/x-ndjson")
    );
    assert_eq!(response.header("vary"), Some("accept"));
    assert_eq!(response.header("x-request-id"), Some("mine"));
    assert_eq!(body.end, BodyEnd::Clean);
    let lines = body.lines();
    assert_eq!(texts(&lines, 0), expected_tokens(2048));
    let mut expected = json!({
        "id": "cmpl-mine", "object": "text_completion", "created": lines[0]["created"],
        "model": "llm_test",
        "choices": [{"index": 0, "text": "token_0", "logprobs": null, "finish_reason": null}],
    });
    assert_eq!(lines[0], expected);
    expected["choices"][0]["text"] = json!("token_2047");
    expected["choices"][0]["finish_reason"] = json!("length");
    assert_eq!(lines[2047], expected);
}

#[tokio::test]
async fn sse_has_one_event_per_token_and_then_done() {
    let server = Setup::test_runner(full_speed()).start().await;
    let options = json!({"include_usage": true});
    let body = json!({
        "prompt": "a b c", "max_tokens": 2048, "stream": true, "stream_options": options,
    });
    let (response, body) = completion(&body)
        .accept("text/event-stream")
        .fetch(&server)
        .await;
    assert_eq!(
        response.header("content-type"),
        Some("text/event-stream; charset=utf-8")
    );
    assert_eq!(body.end, BodyEnd::Clean);
    let events = body.events();
    assert_eq!(events.len(), 2048 + 2);
    assert_eq!(events[2049], "[DONE]");
    let objects: Vec<Value> = events[..2049]
        .iter()
        .map(|event| serde_json::from_str(event).unwrap())
        .collect();
    assert_eq!(texts(&objects, 0), expected_tokens(2048));
    assert_eq!(objects[2048]["choices"], json!([]));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 2048, "total_tokens": 2051});
    assert_eq!(objects[2048]["usage"], usage);
}

#[tokio::test]
async fn a_unary_response_is_one_body() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"prompt": "a b c", "max_tokens": 3, "n": 2});
    let (response, body) = completion(&body)
        .accept("text/event-stream")
        .fetch(&server)
        .await;
    assert_eq!(response.header("content-type"), Some("application/json"));
    let body = body.json();
    let choice = |index: u32| {
        json!({"index": index, "text": "token_0token_1token_2", "logprobs": null,
            "finish_reason": "length"})
    };
    assert_eq!(body["choices"], json!([choice(0), choice(1)]));
    let usage = json!({"prompt_tokens": 3, "completion_tokens": 6, "total_tokens": 9});
    assert_eq!(body["usage"], usage);
}

#[tokio::test]
async fn a_grpc_stream_has_a_start_each_token_once_and_a_summary() {
    let server = Setup::test_runner(full_speed()).start().await;
    let mut request = grpc::request("a b c", 2048);
    request.seed = Some(-5);
    request.include_stamps = true;
    let response = server.grpc().await.complete(request).await.unwrap();
    assert!(response.metadata().get("x-request-id").is_some());
    let completion = grpc::collect(response.into_inner()).await;
    assert_eq!(completion.texts(0), expected_tokens(2048));
    assert_eq!(completion.choices[0].finish, v1::FinishReason::Length);
    let started = completion.started.as_ref().expect("a `started` event");
    assert_eq!((started.prompt_tokens, started.seed), (3, -5));
    assert_eq!((started.model.as_str()), "llm_test");
    let usage = completion.usage();
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 2048));
    assert!(
        completion.choices[0]
            .tokens
            .iter()
            .all(|token| token.emitted_ns.is_some())
    );
}

#[tokio::test]
async fn grpc_timestamps_are_sent_only_on_request() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)));
    let server = server.start().await;
    let mut client = server.grpc().await;
    for include_stamps in [false, true] {
        let request = v1::CompletionRequest {
            include_stamps,
            ..grpc::request("a", 2)
        };
        let stream = client.complete(request).await.unwrap().into_inner();
        let completion = grpc::collect(stream).await;
        for token in &completion.choices[0].tokens {
            let has_timestamps = (token.due_ns.is_some(), token.emitted_ns.is_some());
            assert_eq!(has_timestamps, (include_stamps, include_stamps));
        }
    }
}

#[tokio::test]
async fn two_hundred_concurrent_streams_lose_nothing() {
    let server = Setup::test_runner(with_interval(Duration::from_millis(1)))
        .start()
        .await;
    let client = server.grpc().await;
    let over_http = (0..100).map(|_| async {
        let body = json!({"prompt": "a", "max_tokens": 200, "stream": true});
        let (_, body) = completion(&body).fetch(&server).await;
        assert_eq!(body.end, BodyEnd::Clean);
        texts(&body.lines(), 0)
    });
    let over_grpc = (0..100).map(|_| {
        let mut client = client.clone();
        async move {
            let stream = client
                .complete(grpc::request("a", 200))
                .await
                .unwrap()
                .into_inner();
            let completion = grpc::collect(stream).await;
            completion
                .texts(0)
                .into_iter()
                .map(str::to_owned)
                .collect::<Vec<_>>()
        }
    });
    let (over_http, over_grpc) = tokio::join!(
        futures_util::future::join_all(over_http),
        futures_util::future::join_all(over_grpc)
    );
    for texts in over_http.into_iter().chain(over_grpc) {
        assert_eq!(texts, expected_tokens(200));
    }
    server.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn the_same_request_has_the_same_tokens_over_every_api_and_format() {
    let engine = Setup::test_runner(full_speed()).start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    let body = |stream: bool| {
        json!({"prompt": ["a", "b c"], "max_tokens": 40, "n": 2, "stop": "token_37",
            "stream": stream})
    };
    let expected = expected_tokens(37);
    for server in [&engine, &gateway] {
        let (_, ndjson) = completion(&body(true)).fetch(server).await;
        let sse = completion(&body(true)).accept("text/event-stream");
        let (_, sse) = sse.fetch(server).await;
        let events: Vec<Value> = sse
            .events()
            .iter()
            .filter(|event| **event != "[DONE]")
            .map(|event| serde_json::from_str(event).unwrap())
            .collect();
        let (_, unary) = completion(&body(false)).fetch(server).await;
        let unary = unary.json();
        for choice in 0..4_u8 {
            let with_end = [expected.clone(), vec![String::new()]].concat();
            assert_eq!(texts(&ndjson.lines(), choice.into()), with_end);
            assert_eq!(texts(&events, choice.into()), with_end);
            let unary = &unary["choices"][usize::from(choice)];
            assert_eq!(unary["text"], expected.concat());
            assert_eq!(unary["finish_reason"], "stop");
        }
        assert_eq!(unary["usage"]["completion_tokens"], 4 * 38);
    }
    let mut request = grpc::request("a", 40);
    request.n = Some(2);
    request.stop = vec!["token_37".to_owned()];
    let stream = engine.stream(request).await;
    let completion = grpc::collect(stream).await;
    for choice in 0..2 {
        assert_eq!(completion.texts(choice), expected);
        assert_eq!(completion.choices[choice].finish, v1::FinishReason::Stop);
    }
    assert_eq!(completion.usage().completion_tokens, 2 * 38);
}

#[tokio::test]
async fn more_choices_than_slots_run_in_turn() {
    let server = Setup::test_runner(full_speed()).slots(2).start().await;
    let body = json!({"prompt": ["a", "b", "c"], "max_tokens": 300, "n": 3, "stream": true});
    let (response, body) = completion(&body).fetch(&server).await;
    assert_eq!((response.status, body.end), (200, BodyEnd::Clean));
    let lines = body.lines();
    for choice in 0..9 {
        assert_eq!(texts(&lines, choice), expected_tokens(300));
    }
}
