//! The HTTP API of a gateway in front of remote engines that are dead, hung or draining.

mod support;

use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value, json};
use support::http::{BodyEnd, Request, completion, get};
use support::program::engine_process;
use support::{Setup, TestServer, foreign_server, full_speed, silent_at};
use tokenway::runner::llm_test::TestRunnerLoader;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

fn stream_request() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 5, "stream": true}))
}

async fn start_gateway(engines: &[&str]) -> TestServer {
    Setup::gateway_at(engines).start().await
}

/// Sends a request that must be rejected. Returns the status and the error code of the rejection.
async fn status_and_code(gateway: &TestServer, request: Request) -> (u16, String) {
    let (response, body) = request.fetch(gateway).await;
    (response.status, body.error().0)
}

#[tokio::test]
async fn models_of_all_engines_are_listed_and_served() {
    let engine = |name: &str| {
        let mut setup = Setup::test_runner(full_speed());
        setup.engine().models[0].name = name.to_owned();
        setup.start()
    };
    let (first, second) = tokio::join!(engine("first"), engine("second"));
    let gateway = Setup::gateway(&[&second, &first]).start().await;
    let (_, body) = get("/v1/models").fetch(&gateway).await;
    let body = body.json();
    let listed = body["data"].as_array().expect("a list").iter();
    let names: Vec<_> = listed.map(|model| model["id"].clone()).collect();
    assert_eq!(names, ["first", "second"]);
    for name in ["first", "second"] {
        let request = completion(&json!({"model": name, "prompt": "a", "max_tokens": 1}));
        let (_, body) = request.fetch(&gateway).await;
        assert_eq!(body.json()["model"], name);
    }
}

#[tokio::test]
async fn killing_an_engine_ends_its_streams_with_an_error() {
    let (engine, address) = engine_process().await;
    let gateway = start_gateway(&[&address]).await;
    let mut response = stream_request().send(&gateway).await;
    assert!(response.read_line().await.is_some());
    assert!(response.read_line().await.is_some());
    engine.signal(Signal::KILL);
    let record: Value = response.read_json_line().await.expect("an error record");
    assert_eq!(record["error"]["code"], "upstream_error");
    assert_eq!(record["error"]["tokens_delivered"], 2);
    assert_eq!(record["error"]["retryable"], true);
    assert_eq!(response.read_rest().await.end, BodyEnd::Unclean);
    engine.wait_for_exit_code().await;
    // The request either uses the broken connection or fails to open a new one. Both errors are retryable.
    let (status, code) = status_and_code(&gateway, stream_request()).await;
    let known = [(502, "upstream_error"), (503, "no_worker")];
    assert!(known.contains(&(status, code.as_str())), "{status} {code}");
    let (models, _) = get("/v1/models").fetch(&gateway).await;
    assert!(models.header("retry-after").is_some() || models.status == 502);
    gateway.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn a_dead_engine_is_skipped() {
    let (gone, address) = engine_process().await;
    let there = Setup::test_runner(full_speed()).start().await;
    let gateway = start_gateway(&[&address, &there.grpc_url()]).await;
    gone.signal(Signal::KILL);
    gone.wait_for_exit_code().await;
    for _ in 0..10 {
        let (response, body) = stream_request().fetch(&gateway).await;
        assert_eq!((response.status, body.lines().len()), (200, 5));
        assert_eq!(body.end, BodyEnd::Clean);
    }
}

#[tokio::test]
async fn a_hung_engine_is_a_504_at_the_deadline() {
    let (engine, address) = engine_process().await;
    let gateway = start_gateway(&[&address]).await;
    engine.stop();
    let request = stream_request().header("x-request-timeout", "0.2");
    let expected = (504, "deadline_exceeded".to_owned());
    assert_eq!(status_and_code(&gateway, request).await, expected);
    engine.signal(Signal::KILL);
    engine.wait_for_exit_code().await;
}

#[tokio::test]
async fn a_draining_gateway_ends_its_streams_with_draining() {
    let engine = Setup::test_runner(silent_at(2)).start().await;
    let timeout = Duration::from_millis(1);
    let gateway = Setup::gateway(&[&engine]).drain(Duration::ZERO, timeout);
    let gateway = gateway.start().await;
    let mut response = stream_request().send(&gateway).await;
    assert!(response.read_line().await.is_some());
    assert!(response.read_line().await.is_some());
    gateway.drain().await.assert_all_gauges_are_zero();
    let record: Value = response.read_json_line().await.expect("an error record");
    assert_eq!(record["error"]["code"], "draining");
    assert_eq!(record["error"]["tokens_delivered"], 2);
    assert_eq!(response.read_rest().await.end, BodyEnd::Unclean);
}

#[tokio::test]
async fn a_gateways_health_watch_does_not_delay_the_engines_drain() {
    let long = Duration::from_secs(3_600);
    let engine = Setup::test_runner(full_speed()).drain(Duration::ZERO, long);
    let engine = engine.start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    assert_eq!(stream_request().fetch(&gateway).await.1.end, BodyEnd::Clean);
    engine.drain().await.assert_all_gauges_are_zero();
}

#[tokio::test]
async fn streams_of_a_hung_engine_fail_long_before_their_deadline() {
    let (engine, address) = engine_process().await;
    let gateway = start_gateway(&[&address]).await;
    let mut response = stream_request()
        .header("x-request-timeout", "20")
        .send(&gateway)
        .await;
    assert!(response.read_line().await.is_some());
    assert!(response.read_line().await.is_some());
    engine.stop();
    let record: Value = response.read_json_line().await.expect("an error record");
    assert_eq!(record["error"]["code"], "upstream_error");
    engine.signal(Signal::KILL);
    engine.wait_for_exit_code().await;
}

#[tokio::test]
async fn requests_reach_the_engine_that_serves_the_model() {
    let named = |name| {
        let loader = TestRunnerLoader::new(full_speed());
        Setup::runner(name, Arc::new(loader), 1)
    };
    let (one, other) = (named("one").start().await, named("other").start().await);
    let gateway = Setup::gateway(&[&one, &other]).start().await;
    for model in ["one", "other"] {
        let request = completion(&json!({"prompt": "a", "model": model}));
        let (response, body) = request.fetch(&gateway).await;
        assert_eq!(response.status, 200, "{}", body.text);
        assert_eq!(body.json()["model"], model);
    }
    let unknown = completion(&json!({"prompt": "a", "model": "none"}));
    let expected = (404, "model_not_found".to_owned());
    assert_eq!(status_and_code(&gateway, unknown).await, expected);
}

#[tokio::test(flavor = "multi_thread")]
async fn thousands_of_disconnects_affect_no_other_stream() {
    let engine = Setup::test_runner(full_speed()).slots(32).start().await;
    let gateway = Arc::new(Setup::gateway(&[&engine]).start().await);
    let clients = (0..16).map(|_| {
        let gateway = Arc::clone(&gateway);
        tokio::spawn(async move {
            let body = json!({"prompt": "a", "max_tokens": 100_000, "stream": true});
            for _ in 0..300 {
                let mut stream = completion(&body).send(&gateway).await;
                let line = stream.read_json_line().await.expect("a first line");
                assert_eq!(line["choices"][0]["text"], "token_0", "{line}");
            }
        })
    });
    for client in clients.collect::<Vec<_>>() {
        client.await.expect("every stream starts");
    }
}

#[tokio::test]
async fn error_details_of_an_engine_reach_the_client() {
    let delay = Duration::from_millis(2_500);
    let mut details = ErrorDetails::with_retry_info(Some(delay));
    let full = Status::with_error_details(Code::ResourceExhausted, "Come later.", details.clone());
    details = ErrorDetails::with_bad_request_violation("max_tokens", "It is too much.");
    let invalid = Status::with_error_details(Code::InvalidArgument, "Not that.", details);
    let rejected = async |status| {
        let engine = format!("http://{}", foreign_server::rejecting(status).await);
        let gateway = start_gateway(&[&engine]).await;
        completion(&json!({"prompt": "a"})).fetch(&gateway).await
    };
    let (response, body) = rejected(full).await;
    assert_eq!(response.status, 429);
    assert_eq!(response.header("retry-after"), Some("3"));
    assert_eq!(response.header("retry-after-ms"), Some("2500"));
    assert_eq!(body.error(), ("rate_limited".to_owned(), None));
    assert_eq!(body.json()["error"]["message"], "Come later.");
    let (response, body) = rejected(invalid).await;
    assert_eq!(response.status, 400);
    assert_eq!(response.header("x-should-retry"), Some("false"));
    let expected = ("invalid_value".to_owned(), Some("max_tokens".to_owned()));
    assert_eq!(body.error(), expected);
}

#[tokio::test]
async fn the_unknown_model_error_lists_the_models_of_all_engines() {
    let engine = async |name| {
        let loader = TestRunnerLoader::new(full_speed());
        Setup::runner(name, Arc::new(loader), 8).start().await
    };
    let (first, second) = (engine("first").await, engine("second").await);
    let gateway = Setup::gateway(&[&first, &second]).start().await;
    let fetch = async |body: &Value| completion(body).fetch(&gateway).await;
    // Wait until the gateway knows the models of both engines.
    let (response, body) = fetch(&json!({"prompt": "a", "model": "third"})).await;
    assert_eq!(response.status, 404);
    let message = body.json()["error"]["message"].to_string();
    assert!(message.contains("first, second"), "{message}");
    let (response, body) = fetch(&json!({"prompt": "a"})).await;
    assert_eq!(response.status, 400);
    let expected = ("missing_parameter".to_owned(), Some("model".to_owned()));
    assert_eq!(body.error(), expected);
}
