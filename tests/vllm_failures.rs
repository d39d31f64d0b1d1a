//! A gateway in front of vLLM's gRPC API: what clients of both APIs see when the engine fails or rejects a request, and
//! what the engine sees when a client leaves.

mod support;

use futures_util::future::join_all;
use serde_json::{Value, json};
use support::http::{BodyEnd, completion, expected_error, http_error, texts};
use support::vllm_engine::{Step, VllmEngine, ending, output, prompt, send, whole};
use support::{Setup, TestServer, grpc};
use tonic::{Code, Status};
use vllm_proto::finish_info::FinishReason;
use vllm_proto::generate_request::Prompt;

async fn gateway(engine: &VllmEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    gateway
}

fn stream_body() -> Value {
    json!({"prompt": "hi", "max_tokens": 9, "stream": true, "stream_options": {"include_usage": true}})
}

/// Returns the steps of a response that ends after two tokens with `end`.
fn cut(end: &[Step]) -> Vec<Step> {
    let steps = [
        prompt(3),
        send(output(0, "a", &[10])),
        send(output(0, "b", &[11])),
    ];
    steps.into_iter().chain(end.iter().cloned()).collect()
}

/// Starts an engine that answers with these steps, and fails every request that continues a stream.
async fn cutting(steps: Vec<Step>) -> VllmEngine {
    VllmEngine::start(move |request| match &request.prompt {
        Some(Prompt::Text(text)) if text == "hi" => steps.clone(),
        _ => vec![Step::Fail(Status::internal("it fails"))],
    })
    .await
}

#[tokio::test]
async fn a_stream_that_the_engine_cuts_ends_with_one_error_and_never_looks_whole() {
    let given_up = |reason: i32| send(ending(output(0, "", &[]), reason, 2));
    let without_ids = vllm_proto::SequenceOutput {
        num_tokens: 1,
        ..output(0, "", &[])
    };
    let ends: [&[Step]; 9] = [
        &[given_up(FinishReason::Aborted.into()), Step::End],
        &[given_up(99), Step::End],
        &[Step::End],
        &[Step::Fail(Status::internal("secret"))],
        &[Step::Fail(Status::unavailable("secret"))],
        &[Step::Fail(Status::cancelled("secret"))],
        &[Step::Fail(Status::resource_exhausted("secret"))],
        &[send(without_ids), Step::WaitForCancel],
        &[send(output(1, "c", &[12])), Step::WaitForCancel],
    ];
    for end in ends {
        let engine = cutting(cut(end)).await;
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
        assert!(over_grpc.summary.is_none(), "{end:?}");
    }
}

#[tokio::test]
async fn a_stream_that_the_engine_resets_ends_with_one_error() {
    // A reset drops what has not been flushed, so the engine waits until the client has the tokens.
    let engine = cutting(cut(&[Step::WaitForSignal, Step::Reset])).await;
    let gateway = gateway(&engine).await;
    let mut response = completion(&stream_body()).send(&gateway).await;
    for _ in 0..2 {
        response.read_line().await.expect("a line");
    }
    engine.resume();
    let body = response.read_rest().await;
    assert_eq!((body.lines().len(), body.end), (1, BodyEnd::Unclean));
    assert_eq!(body.error().0, "upstream_error");

    let stream = gateway.stream(grpc::request("hi", 9)).await;
    let over_grpc = grpc::collect_from(stream, |tokens| {
        if tokens == 2 {
            engine.resume();
        }
    });
    let status = over_grpc.await.error.expect("the stream fails");
    assert_eq!(status.code(), Code::Aborted);
}

#[tokio::test]
async fn a_killed_engine_ends_its_streams_with_an_error() {
    let mut engine = VllmEngine::answering(cut(&[Step::WaitForCancel])).await;
    let gateway = gateway(&engine).await;
    let mut response = completion(&stream_body()).send(&gateway).await;
    response.read_line().await.expect("a line");
    engine.kill();
    let body = response.read_rest().await;
    assert_eq!(body.end, BodyEnd::Unclean);
    let lines = body.lines();
    let last = lines.last().expect("a line");
    assert_eq!(last["error"]["code"], "upstream_error");
}

#[tokio::test]
async fn a_response_is_whole_after_its_last_choice_whatever_the_engine_sends_then() {
    for end in [
        Step::End,
        Step::Fail(Status::internal("late")),
        Step::WaitForCancel,
    ] {
        let mut steps = whole(&["a"]);
        steps.pop();
        steps.push(end.clone());
        let engine = VllmEngine::answering(steps).await;
        let gateway = gateway(&engine).await;
        let (_, body) = completion(&stream_body()).fetch(&gateway).await;
        assert_eq!(
            (body.lines().len(), body.end),
            (2, BodyEnd::Clean),
            "{end:?}"
        );
    }
}

#[tokio::test]
async fn a_client_that_leaves_cancels_the_engines_work() {
    let before_the_headers = vec![Step::WithholdHeaders];
    let in_prefill = vec![Step::WaitForCancel];
    let before_a_token = vec![prompt(3), Step::WaitForCancel];
    let in_the_middle = cut(&[Step::WaitForCancel]);
    for steps in [
        before_the_headers,
        in_prefill,
        before_a_token,
        in_the_middle,
    ] {
        let has_tokens = steps.len() > 2;
        let engine = VllmEngine::answering(steps).await;
        let gateway = gateway(&engine).await;
        if has_tokens {
            let mut response = completion(&stream_body()).send(&gateway).await;
            response.read_line().await.expect("a line");
            drop(response);
        } else {
            let bytes = completion(&stream_body()).bytes();
            let mut client = tokio::net::TcpStream::connect(gateway.http_address())
                .await
                .expect("the gateway accepts connections");
            tokio::io::AsyncWriteExt::write_all(&mut client, &bytes)
                .await
                .expect("it is sent");
            engine.wait_for_requests(1).await;
            drop(client);
        }
        engine.wait_for_cancelled(1).await;

        let mut client = gateway.grpc().await;
        let calling = tokio::spawn(async move {
            let response = client.complete(grpc::request("hi", 9)).await;
            let mut events = response.expect("it is admitted").into_inner();
            while let Ok(Some(_)) = events.message().await {}
        });
        engine.wait_for_requests(2).await;
        calling.abort();
        engine.wait_for_cancelled(2).await;
    }
}

#[tokio::test]
async fn an_error_of_the_request_is_passed_on_and_one_of_the_engine_is_not() {
    for (status, expected, code) in [
        (
            Status::invalid_argument("top_p must be in (0, 1]"),
            expected_error(400, "invalid_value", Some("top_p")),
            Code::InvalidArgument,
        ),
        (
            Status::invalid_argument("this model's maximum context length is 64 tokens"),
            expected_error(400, "context_length_exceeded", None),
            Code::InvalidArgument,
        ),
        (
            Status::not_found("model `x` not found"),
            expected_error(404, "model_not_found", Some("model")),
            Code::NotFound,
        ),
        (
            Status::resource_exhausted("secret"),
            expected_error(429, "queue_full", None),
            Code::ResourceExhausted,
        ),
        (
            Status::unavailable("secret"),
            expected_error(503, "no_worker", None),
            Code::Unavailable,
        ),
        (
            Status::internal("secret"),
            expected_error(502, "upstream_error", None),
            Code::Aborted,
        ),
        (
            Status::unimplemented("secret"),
            expected_error(502, "upstream_error", None),
            Code::Aborted,
        ),
    ] {
        let engine = VllmEngine::answering(vec![Step::Reject(status.clone())]).await;
        let gateway = gateway(&engine).await;
        let (response, body) = completion(&stream_body()).fetch(&gateway).await;
        let (error_code, param) = body.error();
        assert_eq!((response.status, error_code, param), expected, "{status}");
        let is_passed_on = body.text.contains(status.message());
        assert_eq!(is_passed_on, status.message() != "secret", "{}", body.text);
        let (seen, _) = grpc::grpc_error(&gateway, grpc::request("hi", 1)).await;
        assert_eq!(seen, code, "{status}");
    }
}

#[tokio::test]
async fn an_invalid_request_that_the_engine_notices_late_is_passed_on() {
    let late = Step::Fail(Status::invalid_argument("logprobs is too large"));
    let engine = VllmEngine::answering(vec![Step::WaitForSignal, late]).await;
    let gateway = gateway(&engine).await;
    engine.resume();
    let answer = http_error(&gateway, completion(&json!({"prompt": "hi"}))).await;
    assert_eq!(
        answer,
        expected_error(400, "invalid_value", Some("logprobs"))
    );
}
