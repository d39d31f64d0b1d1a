//! API keys: what a request with or without a key gets on both APIs.

mod support;

use rustix::process::Signal;
use serde_json::json;
use support::grpc;
use support::http::{BodyEnd, Request, completion, get};
use support::keys::KeysFile;
use support::program::{Program, start_serving, tokenway};
use support::running_program::RunningProgram;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;
use tonic::{Request as GrpcRequest, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_client::HealthClient;

/// A server that accepts the keys in a file.
struct Server {
    running: RunningProgram,
    http: String,
    grpc: String,
    channel: Channel,
}

impl Server {
    async fn start(keys: &KeysFile, arguments: &[&str]) -> Self {
        let path = keys.path.to_str().expect("a UTF-8 path");
        Self::start_as(tokenway(), &[&["--keys-file", path], arguments].concat()).await
    }

    async fn start_as(program: Program, arguments: &[&str]) -> Self {
        let (running, [http, grpc]) = start_serving(program, arguments).await;
        let endpoint = Channel::from_shared(grpc.clone()).expect("a URL");
        Self {
            running,
            http: http.trim_start_matches("http://").to_owned(),
            grpc,
            channel: endpoint.connect().await.expect("a connection"),
        }
    }

    /// Sends a request over HTTP, and returns the status of the response.
    async fn status(&self, request: Request) -> u16 {
        request.send_to(&self.http).await.status
    }

    /// Sends a completion request over gRPC with this key.
    async fn complete(&self, key: Option<&str>, model: &str) -> Result<grpc::Completion, Status> {
        let mut request = grpc::request("a", 3);
        model.clone_into(&mut request.model);
        let request = with_metadata(request, key);
        let stream = self.client().complete(request).await?;
        Ok(grpc::collect(stream.into_inner()).await)
    }

    fn client(&self) -> InferenceClient<Channel> {
        InferenceClient::new(self.channel.clone())
    }
}

fn with_metadata<T>(message: T, key: Option<&str>) -> GrpcRequest<T> {
    let mut request = GrpcRequest::new(message);
    if let Some(key) = key {
        let value = format!("Bearer {key}").parse().expect("a metadata value");
        request.metadata_mut().insert("authorization", value);
    }
    request
}

fn bearer(request: Request, key: &str) -> Request {
    request.header("authorization", &format!("Bearer {key}"))
}

fn short_completion() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 3}))
}

fn kind(result: Result<grpc::Completion, Status>) -> ErrorKind {
    Error::from(&result.expect_err("the request is rejected")).kind
}

#[tokio::test]
async fn a_request_without_a_valid_key_has_one_response_on_each_api() {
    let keys = KeysFile::new();
    let key = keys.secret("new alice").await;
    keys.run("new bob --expires-in 0s").await.expect_success();
    let expired = keys.secret("rotate bob --expires-in 0s").await;
    let server = Server::start(&keys, &[]).await;
    assert_eq!(server.status(bearer(short_completion(), &key)).await, 200);
    let x_api_key = short_completion().header("x-api-key", &key);
    assert_eq!(server.status(x_api_key).await, 200);
    let completion = server.complete(Some(&key), "").await.expect("a completion");
    assert_eq!(completion.token_count(0), 3);
    let mut bodies = Vec::new();
    for request in [
        short_completion(),
        bearer(short_completion(), "tw_wrong"),
        bearer(short_completion(), &expired),
        short_completion().header("authorization", "Basic YTpi"),
        get("/v1/models"),
        get("/openapi.json"),
        get("/metrics"),
        get("/no/such/path"),
    ] {
        let mut response = request.send_to(&server.http).await;
        assert_eq!(response.status, 401);
        assert_eq!(response.header("www-authenticate"), Some("Bearer"));
        assert_eq!(response.header("x-should-retry"), Some("false"));
        bodies.push(response.read_rest().await.json());
    }
    assert_eq!(bodies[0]["error"]["code"], "invalid_api_key");
    assert!(bodies.iter().all(|body| *body == bodies[0]), "{bodies:?}");
    for key in [None, Some("tw_wrong"), Some(&*expired)] {
        let status = server.complete(key, "").await.expect_err("a rejection");
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
        assert_eq!(status.message(), bodies[0]["error"]["message"]);
    }
}

#[tokio::test]
async fn health_and_reflection_need_no_key() {
    let keys = KeysFile::new();
    keys.secret("new alice").await;
    let server = Server::start(&keys, &[]).await;
    for path in ["/livez", "/readyz", "/health"] {
        assert_eq!(server.status(get(path)).await, 200, "{path}");
    }
    let mut health = HealthClient::new(server.channel.clone());
    let check = HealthCheckRequest::default();
    health.check(check).await.expect("the health service");
}

#[tokio::test]
async fn a_key_may_do_what_its_scopes_say() {
    let keys = KeysFile::new();
    let inference = keys.secret("new app").await;
    let metrics = keys.secret("new prometheus --scope metrics").await;
    let admin = keys.secret("new operator --scope admin,inference").await;
    let server = Server::start(&keys, &[]).await;
    for (key, of_metrics, of_models) in [
        (&inference, 403, 200),
        (&metrics, 200, 403),
        (&admin, 200, 200),
    ] {
        let status = server.status(bearer(get("/metrics"), key)).await;
        assert_eq!(status, of_metrics);
        let status = server.status(bearer(get("/v1/models"), key)).await;
        assert_eq!(status, of_models);
    }
    let rejected = server.complete(Some(&metrics), "").await;
    assert_eq!(kind(rejected), ErrorKind::InsufficientScope);
}

#[tokio::test]
async fn a_key_may_use_and_see_only_its_models() {
    let keys = KeysFile::new();
    let restricted = keys.secret("new a --model one").await;
    let stranger = keys.secret("new b --model other").await;
    let all = keys.secret("new c").await;
    let name = ["--model-name", "one", "--model-alias", "first"];
    let engine = Server::start(&keys, &name).await;
    for (key, model, expected) in [
        (&restricted, "one", 200),
        (&restricted, "first", 200),
        (&restricted, "none", 403),
        (&stranger, "one", 403),
        (&stranger, "other", 404),
        (&all, "none", 404),
    ] {
        let body = json!({"model": model, "prompt": "a", "max_tokens": 3});
        let status = engine.status(bearer(completion(&body), key)).await;
        assert_eq!(status, expected, "{model}");
        let completed = engine.complete(Some(key), model).await;
        let expected = match expected {
            200 => None,
            403 => Some(ErrorKind::InsufficientScope),
            _ => Some(ErrorKind::ModelNotFound),
        };
        assert_eq!(
            completed.err().map(|status| Error::from(&status).kind),
            expected
        );
    }
    for (key, expected) in [(&restricted, 1), (&stranger, 0), (&all, 1)] {
        let mut response = bearer(get("/v1/models"), key).send_to(&engine.http).await;
        let models = response.read_rest().await.json();
        assert_eq!(models["data"].as_array().map(Vec::len), Some(expected));
        let request = with_metadata(v1::ListModelsRequest {}, Some(key));
        let listed = engine.client().list_models(request).await;
        let listed = listed.expect("a list").into_inner().models.len();
        assert_eq!(listed, expected);
        let model = bearer(get("/v1/models/one"), key);
        let status = if expected == 0 { 403 } else { 200 };
        assert_eq!(engine.status(model).await, status);
    }
}

#[tokio::test]
async fn a_revoked_key_is_rejected_while_its_stream_goes_on() {
    let keys = KeysFile::new();
    let (old, other) = (keys.secret("new old").await, keys.secret("new other").await);
    let mut server = Server::start(&keys, &["--test-runner-frequency-ms", "20"]).await;
    let long = json!({"prompt": "a", "max_tokens": 150, "stream": true});
    let accept = "application/x-ndjson";
    let request = bearer(completion(&long), &old).accept(accept);
    let mut stream = request.send_to(&server.http).await;
    stream.read_json_line().await.expect("the first token");
    keys.run("revoke old").await.expect_success();
    server.running.wait_for_log("the keys were reloaded").await;
    assert_eq!(server.status(bearer(short_completion(), &old)).await, 401);
    assert_eq!(server.status(bearer(short_completion(), &other)).await, 200);
    let invalid = keys.folder.path().join("invalid.toml");
    std::fs::write(&invalid, "key = 1").expect("a file");
    std::fs::rename(&invalid, &keys.path).expect("a renamed file");
    server.running.wait_for_log("cannot reload the keys").await;
    assert_eq!(server.status(bearer(short_completion(), &other)).await, 200);
    server.running.signal(Signal::HUP);
    server.running.wait_for_log("cannot reload the keys").await;
    let rest = stream.read_rest().await;
    assert_eq!((rest.lines().len(), rest.end), (149, BodyEnd::Clean));
}

#[tokio::test]
async fn a_rotated_key_has_two_secrets_until_the_old_one_expires() {
    let keys = KeysFile::new();
    let first = keys
        .secret("new app --scope inference,metrics --model llm_test")
        .await;
    let second = keys.secret("rotate app --overlap 1h").await;
    let third = keys.secret("rotate app --overlap 0s").await;
    let server = Server::start(&keys, &[]).await;
    for (key, expected) in [(&first, 401), (&second, 401), (&third, 200)] {
        let status = server.status(bearer(short_completion(), key)).await;
        assert_eq!(status, expected);
    }
    let fourth = keys.secret("rotate app --overlap 1h").await;
    let text = keys.text();
    assert!(
        text.contains("scopes = [\"inference\", \"metrics\"]"),
        "{text}"
    );
    // The two that had expired are gone.
    assert_eq!(text.matches("sha256").count(), 2, "{text}");
    let again = Server::start(&keys, &[]).await;
    for key in [&third, &fourth] {
        let status = again.status(bearer(short_completion(), key)).await;
        assert_eq!(status, 200);
    }
}

#[tokio::test]
async fn log_and_metrics_show_the_keys_name_and_never_a_secret() {
    let keys = KeysFile::new();
    let canary = keys.secret("new alice").await;
    let operator = keys.secret("new operator --scope metrics").await;
    let mut server = Server::start(&keys, &[]).await;
    let body = json!({"prompt": "a", "max_tokens": 3, "user": "mallory"});
    let request = bearer(completion(&body), &canary);
    assert_eq!(server.status(request).await, 200);
    server.running.wait_for_log("key=\"alice\"").await;
    server
        .complete(Some(&canary), "")
        .await
        .expect("a completion");
    let wrong = "tw_canary-of-a-wrong-key";
    assert_eq!(server.status(bearer(short_completion(), wrong)).await, 401);
    let mut response = bearer(get("/metrics"), &operator)
        .send_to(&server.http)
        .await;
    let metrics = response.read_rest().await.text;
    for line in [
        "tokenway_key_requests_total{key=\"alice\",outcome=\"ok\"} 2",
        "tokenway_key_tokens_total{key=\"alice\",kind=\"completion\"} 6",
        "tokenway_authentication_failures_total{api=\"http\",reason=\"invalid_key\"} 1",
    ] {
        assert!(metrics.contains(line), "{line}\n{metrics}");
    }
    for secret in [&*canary, &*operator, wrong, "mallory"] {
        assert!(!metrics.contains(secret), "{metrics}");
    }
}

#[tokio::test]
async fn one_key_may_come_from_the_environment_of_server_and_client() {
    let program = || tokenway().env("TOKENWAY_API_KEY", "a-key-of-the-environment");
    let server = Server::start_as(program(), &[]).await;
    assert_eq!(server.status(short_completion()).await, 401);
    let metrics = bearer(get("/metrics"), "a-key-of-the-environment");
    assert_eq!(server.status(metrics).await, 200);
    let client = |program: Program| {
        let arguments = [
            "complete",
            "a",
            "--max-tokens",
            "3",
            "--server",
            &server.http,
        ];
        program.args(arguments).run()
    };
    assert_eq!(
        client(program()).await.expect_success(),
        "token_0token_1token_2\n"
    );
    let error = client(tokenway()).await.expect_failure();
    assert!(error.contains("invalid_api_key"), "{error}");
}

#[tokio::test]
async fn a_server_with_keys_may_listen_on_all_addresses() {
    let keys = KeysFile::new();
    keys.secret("new a").await;
    let path = keys.path.to_str().expect("a UTF-8 path");
    let listen = [
        "serve",
        "--http-listen",
        "0.0.0.0:0",
        "--grpc-listen",
        "127.0.0.1:0",
    ];
    let mut serving = tokenway().args(listen).args(["--keys-file", path]).start();
    let line = serving.read_line().await;
    assert!(line.starts_with("HTTP     http://0.0.0.0:"), "{line}");
    let refused = tokenway().args(listen).run().await;
    assert_eq!(refused.code, Some(2));
    assert!(
        refused.stderr.contains("tokenway keys new"),
        "{}",
        refused.stderr
    );
    let missing = tokenway()
        .args(listen)
        .args(["--keys-file", "/nowhere/keys.toml"]);
    let error = missing.run().await.expect_failure();
    assert!(
        error.contains("keys file /nowhere/keys.toml: No such file"),
        "{error}"
    );
}

#[tokio::test]
async fn a_gateway_sends_its_own_key_to_an_engine() {
    let of_engine = KeysFile::new();
    let secret = of_engine.secret("new gateway").await;
    let mut engine = Server::start(&of_engine, &[]).await;
    let of_gateway = KeysFile::new();
    let alice = of_gateway.secret("new alice").await;
    let settings = of_gateway.folder.path().join("gateway.toml");
    let address = engine.grpc.as_str();
    let table = format!(
        "[[engine]]\nname = \"a\"\naddress = \"{address}\"\napi_key_env = \"ENGINE_KEY\"\n"
    );
    std::fs::write(&settings, table).expect("a file");
    let free = "127.0.0.1:0";
    let gateway = tokenway().args(["gateway", "--http-listen", free, "--grpc-listen", free]);
    let gateway = gateway.env("ENGINE_KEY", &secret);
    let gateway = gateway.arg("--config").arg(&settings).arg("--keys-file");
    let mut gateway = gateway.arg(&of_gateway.path).start();
    let line = gateway.read_line().await;
    let http = line.split_whitespace().nth(1).expect("an address");
    let http = http.trim_start_matches("http://").to_owned();
    while !gateway.read_line().await.starts_with("ready ") {}
    let response = bearer(short_completion(), &alice).send_to(&http).await;
    assert_eq!(response.status, 200);
    engine.running.wait_for_log("key=\"gateway\"").await;
    let response = bearer(short_completion(), &secret).send_to(&http).await;
    assert_eq!(response.status, 401);
}

#[tokio::test]
async fn a_server_with_keys_accepts_any_host_name() {
    let keys = KeysFile::new();
    let key = keys.secret("new a").await;
    let server = Server::start(&keys, &[]).await;
    let request = bearer(get("/v1/models"), &key).header("host", "llm.example");
    assert_eq!(server.status(request).await, 200);
    let request = bearer(get("/v1/models"), &key).header("origin", "http://evil.example");
    assert_eq!(server.status(request).await, 403);
}
