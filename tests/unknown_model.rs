//! Requests for model names that the server does not have.

mod support;

use serde_json::json;
use support::http::{completion, expected_error, get, http_error};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::proto::v1;

/// Returns the name of the model that serves a request for `model` over the HTTP API.
async fn model_over_http(server: &TestServer, model: &str) -> String {
    let body = json!({"model": model, "prompt": "a", "max_tokens": 1});
    let (response, body) = completion(&body).fetch(server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    body.json()["model"].as_str().expect("a name").to_owned()
}

/// Returns the name of the model that serves a request for `model` over the gRPC API.
async fn model_over_grpc(server: &TestServer, model: &str) -> String {
    let request = v1::CompletionRequest {
        model: model.to_owned(),
        ..grpc::request("a", 1)
    };
    let completion = grpc::collect(server.stream(request).await).await;
    completion.started.expect("a `started` event").model
}

#[tokio::test]
async fn unknown_model_names_are_served_by_the_first_model_when_configured() {
    let engine = Setup::test_runner(full_speed()).with_model("second", full_speed());
    let engine = engine.unknown_model_uses_first().start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    for (requested, served) in [
        ("gpt-4o", "llm_test"),
        ("", "llm_test"),
        ("llm_test", "llm_test"),
        ("second", "second"),
    ] {
        assert_eq!(model_over_grpc(&engine, requested).await, served);
        assert_eq!(model_over_http(&engine, requested).await, served);
        assert_eq!(model_over_http(&gateway, requested).await, served);
    }
    let (response, body) = get("/v1/models/gpt-4o").fetch(&gateway).await;
    assert_eq!(response.status, 200);
    assert_eq!(body.json()["id"], "llm_test");
    let (_, body) = get("/v1/models").fetch(&engine).await;
    assert_eq!(body.json()["data"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_gateway_prefers_the_engine_that_lists_the_model() {
    let any = Setup::test_runner(full_speed())
        .unknown_model_uses_first()
        .start()
        .await;
    let other = Setup::test_runner(full_speed()).with_model("second", full_speed());
    let other = other.start().await;
    for engines in [[&any, &other], [&other, &any]] {
        let gateway = Setup::gateway(&engines).start().await;
        gateway.ready().await.expect("an engine is up");
        // Once the model list is complete, the gateway knows both engines.
        let (_, body) = get("/v1/models").fetch(&gateway).await;
        assert_eq!(body.json()["data"].as_array().map(Vec::len), Some(2));
        assert_eq!(model_over_http(&gateway, "second").await, "second");
        assert_eq!(model_over_http(&gateway, "gpt-4o").await, "llm_test");
    }
}

#[tokio::test]
async fn an_unknown_model_name_is_a_404_by_default() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"model": "gpt-4o", "prompt": "a"});
    let expected = expected_error(404, "model_not_found", Some("model"));
    assert_eq!(http_error(&server, completion(&body)).await, expected);
}
