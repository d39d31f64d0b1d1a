//! Several models in one server, from `[[model]]` tables in the settings file.

mod support;

use serde_json::{Value, json};
use support::grpc;
use support::http::{Body, completion, get};
use support::program::{Outcome, Program, documented_file, tokenway};
use support::running_program::RunningProgram;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

/// Settings of two models: one without a queue that completes requests, and one with a queue limit of one whose
/// sequences never end.
const TWO_MODELS: &str = r#"
[[model]]
name = "quick"
aliases = ["default", "q:latest"]
queue_depth = 0
test_runner_frequency_ms = 0

[[model]]
name = "stuck"
aliases = ["silent"]
slots = 1
queue_depth = 1
test_runner_frequency_ms = 0
test_runner_silent_at = 1
"#;

const MODEL_LIST: &str = "quick (also default, q:latest, test), stuck (also silent).";

/// A running server with several models.
struct ServedModels {
    running: RunningProgram,
    http: String,
    grpc: InferenceClient<Channel>,
    ready: Vec<String>,
    /// Keeps the settings file until the test ends.
    _folder: tempfile::TempDir,
}

fn program(settings: &str) -> (Program, tempfile::TempDir) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("models.toml");
    std::fs::write(&path, settings).expect("a file");
    let listen = [
        "--http-listen",
        "127.0.0.1:0",
        "--grpc-listen",
        "127.0.0.1:0",
    ];
    let program = tokenway().args(["serve", "--drain-grace", "0", "--config"]);
    (program.arg(path).args(listen), folder)
}

/// Starts a server with two models and waits until both are ready.
async fn serve_models(settings: &str) -> ServedModels {
    let (program, folder) = program(settings);
    let mut running = program.start();
    let (run_http, run_grpc) = (running.read_line().await, running.read_line().await);
    let ready = vec![running.read_line().await, running.read_line().await];
    let url = |line: &str| line.split_whitespace().nth(1).expect("a URL").to_owned();
    let client = InferenceClient::connect(url(&run_grpc)).await;
    ServedModels {
        running,
        http: url(&run_http).replace("http://", ""),
        grpc: client.expect("the server accepts connections"),
        ready,
        _folder: folder,
    }
}

impl ServedModels {
    /// Requests one token of a model over the HTTP API.
    async fn complete(&self, model: Option<&str>) -> (u16, Body) {
        let mut body = json!({"prompt": "a", "max_tokens": 1});
        if let Some(model) = model {
            body["model"] = json!(model);
        }
        let mut response = completion(&body).send_to(&self.http).await;
        (response.status, response.read_rest().await)
    }

    /// Starts a completion over the gRPC API. Returns once the request is admitted.
    async fn stream(
        &self,
        model: &str,
        max_tokens: u32,
    ) -> Result<Streaming<v1::CompletionEvent>, Status> {
        let request = v1::CompletionRequest {
            model: model.to_owned(),
            ..grpc::request("a", max_tokens)
        };
        let answer = self.grpc.clone().complete(request).await;
        answer.map(tonic::Response::into_inner)
    }

    async fn get(&self, path: &str) -> (u16, Value) {
        let mut response = get(path).send_to(&self.http).await;
        (response.status, response.read_rest().await.json())
    }
}

#[tokio::test]
async fn serve_prints_each_models_slots_and_aliases() {
    let server = serve_models(TWO_MODELS).await;
    assert_eq!(
        server.ready,
        [
            "ready    quick (llm_test; workers: 1, slots: 1024; also default, q:latest, test)",
            "ready    stuck (llm_test; workers: 1, slots: 1; also silent)",
        ]
    );
    assert_eq!(server.running.interrupt().await, Some(0));
}

#[tokio::test]
async fn both_apis_accept_names_and_aliases_and_return_the_name() {
    let server = serve_models(TWO_MODELS).await;
    for (requested, name) in [
        ("quick", "quick"),
        ("default", "quick"),
        ("q:latest", "quick"),
        ("silent", "stuck"),
    ] {
        let (status, body) = server.complete(Some(requested)).await;
        assert_eq!((status, &body.json()["model"]), (200, &json!(name)));
        let stream = server
            .stream(requested, 1)
            .await
            .expect("the request is admitted");
        let completion = grpc::collect(stream).await;
        assert_eq!(completion.started.expect("a `started` event").model, name);
        let (status, model) = server.get(&format!("/v1/models/{requested}")).await;
        assert_eq!((status, &model["id"]), (200, &json!(name)));
        let request = v1::GetModelRequest {
            model: requested.to_owned(),
        };
        let model = server.grpc.clone().get_model(request).await;
        let model = model.expect("the model exists").into_inner().model;
        assert_eq!(model.expect("a model").name, name);
    }
}

#[tokio::test]
async fn every_model_is_listed_once_under_its_name() {
    let server = serve_models(TWO_MODELS).await;
    let (_, list) = server.get("/v1/models").await;
    let data = list["data"].as_array().expect("a list");
    let ids: Vec<_> = data.iter().map(|model| &model["id"]).collect();
    assert_eq!(ids, ["quick", "stuck"]);
    let mut client = server.grpc.clone();
    let listed = client.list_models(v1::ListModelsRequest {}).await;
    let listed = listed.expect("the request succeeds").into_inner().models;
    let names: Vec<_> = listed.iter().map(|model| &*model.name).collect();
    assert_eq!(names, ["quick", "stuck"]);
}

#[tokio::test]
async fn missing_and_unknown_names_are_rejected_with_the_list_of_models() {
    let server = serve_models(TWO_MODELS).await;
    let (unnamed, unknown) = (ErrorKind::MissingParameter, ErrorKind::ModelNotFound);
    for (model, http, grpc_code, expected) in [
        (
            None,
            (400, "missing_parameter", unnamed),
            Code::InvalidArgument,
            "`model` is required. This server has: ",
        ),
        (
            Some("nobody"),
            (404, "model_not_found", unknown),
            Code::NotFound,
            "There is no model 'nobody'. This server has: ",
        ),
    ] {
        let (status, code, kind) = http;
        let message = format!("{expected}{MODEL_LIST}");
        let param = Some("model".to_owned());
        let (answered, body) = server.complete(model).await;
        assert_eq!(answered, status);
        assert_eq!(body.error(), (code.to_owned(), param.clone()));
        assert_eq!(body.json()["error"]["message"], message);
        let status = server.stream(model.unwrap_or(""), 1).await;
        let status = status.expect_err("the request is rejected");
        let error = Error::from(&status);
        assert_eq!((status.code(), error.kind), (grpc_code, kind));
        assert_eq!((error.param, error.message), (param, message));
    }
    let (status, body) = server.get("/v1/models/nobody").await;
    assert_eq!(status, 404);
    let message = body["error"]["message"].as_str().expect("a message");
    assert!(message.ends_with(MODEL_LIST), "{message}");
}

#[tokio::test]
async fn a_full_queue_of_one_model_does_not_affect_another() {
    let server = serve_models(TWO_MODELS).await;
    let mut running = server.stream("stuck", 9).await.expect("a slot is free");
    assert!(
        running
            .message()
            .await
            .expect("the stream continues")
            .is_some()
    );
    let _queued = server.stream("stuck", 9).await.expect("the queue has room");
    for model in ["stuck", "silent"] {
        let (status, body) = server.complete(Some(model)).await;
        assert_eq!((status, &*body.error().0), (429, "queue_full"));
        let status = server
            .stream(model, 1)
            .await
            .expect_err("the queue is full");
        assert_eq!(Error::from(&status).kind, ErrorKind::QueueFull);
    }
    assert_eq!(server.complete(Some("quick")).await.0, 200);
    let stream = server.stream("default", 3).await.expect("a slot is free");
    assert_eq!(grpc::collect(stream).await.usage().completion_tokens, 3);
}

#[tokio::test]
async fn single_model_settings_beside_model_tables_are_rejected() {
    let beside = |given: &str| format!("{given} cannot be set beside [[model]] tables");
    let assert_rejected = |outcome: &Outcome, expected: &str| {
        let ended = (outcome.code, &*outcome.stdout);
        assert_eq!(ended, (Some(2), ""), "{outcome:?}");
        assert!(outcome.stderr.contains(expected), "{outcome:?}");
    };
    for (variable, value) in [
        ("MODEL_RUNNER", "llm_test"),
        ("TEST_RUNNER_FREQUENCY_MS", "1"),
        ("TOKENWAY_MODEL_NAME", "a"),
        ("TOKENWAY_SLOTS", "1"),
    ] {
        let (program, _folder) = program(TWO_MODELS);
        let outcome = program.env(variable, value).run().await;
        assert_rejected(&outcome, &beside(variable));
    }
    let (flag, _folder) = program(TWO_MODELS);
    let flag = flag.args(["--runner", "llm_test"]);
    let outcome = flag.env("MODEL_RUNNER", "llm_test").run().await;
    assert_rejected(&outcome, &beside("--runner"));
    let (key, _folder) = program(&format!("workers = 2\n{TWO_MODELS}"));
    assert_rejected(&key.run().await, &beside("workers"));
    let (twice, _folder) = program(&TWO_MODELS.replace("silent\"", "quick\""));
    let expected = "model[1].name and model[2].aliases[1] are both 'quick'";
    assert_rejected(&twice.run().await, expected);
}

#[tokio::test]
async fn the_documented_models_are_served() {
    let server = serve_models(&documented_file("models.toml")).await;
    let page =
        std::fs::read_to_string("docs/configuration.md").expect("docs/configuration.md exists");
    for line in &server.ready {
        assert!(page.contains(line), "{line}");
    }
    for model in ["fast", "default", "slow"] {
        assert_eq!(server.complete(Some(model)).await.0, 200, "{model}");
    }
    assert_eq!(server.running.interrupt().await, Some(0));
}
