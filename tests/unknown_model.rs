//! Names by which clients ask for models: aliases, and whatever they have built in.

mod support;

use serde_json::json;
use support::http::{completion, get, refusal, refused};
use support::{Setup, TestServer, full_speed, grpc};
use tokenway::proto::v1;

/// The model that answers a request for this one, over the HTTP API.
async fn over_http(server: &TestServer, model: &str) -> String {
    let body = json!({"model": model, "prompt": "a", "max_tokens": 1});
    let (response, body) = completion(&body).fetch(server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    body.json()["model"].as_str().expect("a name").to_owned()
}

/// The same over the gRPC API.
async fn over_grpc(server: &TestServer, model: &str) -> String {
    let request = v1::CompletionRequest {
        model: model.to_owned(),
        ..grpc::request("a", 1)
    };
    let completion = grpc::collect(server.stream(request).await).await;
    completion.started.expect("it starts").model
}

#[tokio::test]
async fn any_name_is_served_by_the_first_model_where_the_engine_is_set_to_that() {
    let engine = Setup::test_runner(full_speed()).and_model("second", full_speed());
    let engine = engine.any_model().start().await;
    let gateway = Setup::gateway(&[&engine]).start().await;
    for (asked, answers) in [
        ("gpt-4o", "llm_test"),
        ("", "llm_test"),
        ("llm_test", "llm_test"),
        ("second", "second"),
    ] {
        assert_eq!(over_grpc(&engine, asked).await, answers);
        assert_eq!(over_http(&engine, asked).await, answers);
        assert_eq!(over_http(&gateway, asked).await, answers);
    }
    let (response, body) = get("/v1/models/gpt-4o").fetch(&gateway).await;
    assert_eq!(response.status, 200);
    assert_eq!(body.json()["id"], "llm_test");
    let (_, body) = get("/v1/models").fetch(&engine).await;
    assert_eq!(body.json()["data"].as_array().map(Vec::len), Some(2));
}

#[tokio::test]
async fn a_gateway_asks_first_the_engine_that_has_the_model_by_name() {
    let any = Setup::test_runner(full_speed()).any_model().start().await;
    let other = Setup::test_runner(full_speed()).and_model("second", full_speed());
    let other = other.start().await;
    for engines in [[&any, &other], [&other, &any]] {
        let gateway = Setup::gateway(&engines).start().await;
        gateway.ready().await.expect("an engine is up");
        // It has listed the models of both.
        let (_, body) = get("/v1/models").fetch(&gateway).await;
        assert_eq!(body.json()["data"].as_array().map(Vec::len), Some(2));
        assert_eq!(over_http(&gateway, "second").await, "second");
        assert_eq!(over_http(&gateway, "gpt-4o").await, "llm_test");
    }
}

#[tokio::test]
async fn an_unknown_name_is_not_found_by_default() {
    let server = Setup::test_runner(full_speed()).start().await;
    let body = json!({"model": "gpt-4o", "prompt": "a"});
    let expected = refused(404, "model_not_found", Some("model"));
    assert_eq!(refusal(&server, completion(&body)).await, expected);
}
