//! The connections between a gateway and an OpenAI-compatible engine: when they are used again, and when they are closed.

mod support;

use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};
use support::http::completion;
use support::openai_engine::{OpenAiEngine, Step, delta, event, whole};
use support::{Setup, TestServer, grpc};

async fn gateway(engine: &OpenAiEngine) -> TestServer {
    let gateway = Setup::gateway_at(&[engine.url()]).start().await;
    gateway.ready().await.expect("the engine is up");
    gateway
}

fn stream_body() -> Value {
    json!({"prompt": "hi", "max_tokens": 9, "stream": true})
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
async fn a_client_that_leaves_ends_the_engines_request() {
    let before_the_head = vec![Step::WaitForClose];
    let before_a_token = vec![Step::Head, Step::WaitForClose];
    let in_the_middle = cut(&[Step::WaitForClose]);
    for steps in [before_the_head, before_a_token, in_the_middle] {
        let is_started = steps.len() > 2;
        let engine = OpenAiEngine::answering(steps).await;
        let gateway = gateway(&engine).await;
        if is_started {
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
        engine.wait_for_closed(1).await;

        let call = gateway.grpc().await;
        let calling = tokio::spawn(async move {
            let mut call = call;
            let response = call.complete(grpc::request("hi", 9)).await;
            response
                .expect("it is admitted")
                .into_inner()
                .message()
                .await
        });
        engine.wait_for_requests(2).await;
        calling.abort();
        engine.wait_for_closed(2).await;
    }
}

#[tokio::test]
async fn a_connection_is_used_again_only_after_a_whole_response() {
    let requests = AtomicUsize::new(0);
    let engine = OpenAiEngine::start(move |_| match requests.fetch_add(1, Ordering::Relaxed) {
        2 => cut(&[Step::WaitForClose]),
        _ => whole(&["a"]),
    })
    .await;
    let gateway = gateway(&engine).await;
    for _ in 0..2 {
        let (_, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
        assert_eq!(body.json()["choices"][0]["text"], "a");
    }
    let mut response = completion(&stream_body()).send(&gateway).await;
    response.read_line().await.expect("a line");
    drop(response);
    engine.wait_for_closed(1).await;
    let (_, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], "a");
    let connections: Vec<_> = engine.received().iter().map(|it| it.connection).collect();
    assert_eq!(connections[0], connections[1]);
    assert_ne!(connections[2], connections[3]);
}

#[tokio::test]
async fn a_request_is_sent_again_if_its_connection_breaks_before_the_response() {
    let requests = AtomicUsize::new(0);
    let engine = OpenAiEngine::start(move |_| match requests.fetch_add(1, Ordering::Relaxed) {
        0 => vec![Step::Rst],
        1 => vec![Step::Fin],
        _ => whole(&["a"]),
    })
    .await;
    let gateway = gateway(&engine).await;
    let (_, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
    assert_eq!(body.json()["choices"][0]["text"], "a");
    assert_eq!(engine.received().len(), 3);
}

#[tokio::test]
async fn an_engine_that_breaks_every_connection_is_an_upstream_error() {
    let engine = OpenAiEngine::answering(vec![Step::Rst]).await;
    let gateway = gateway(&engine).await;
    let (response, body) = completion(&json!({"prompt": "hi"})).fetch(&gateway).await;
    assert_eq!((response.status, &*body.error().0), (502, "upstream_error"));
    assert_eq!(engine.received().len(), 4);
}
