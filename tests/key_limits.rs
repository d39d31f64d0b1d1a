//! Limits of API keys, on both APIs alike.

mod support;

use std::time::Duration;

use serde_json::json;
use support::grpc;
use support::http::{Request, Response, completion, get};
use support::program::{start_gateway, start_server, start_serving, tokenway};
use support::running_program::RunningProgram;
use support::{Setup, with_interval};
use tempfile::TempDir;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1::CompletionEvent;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;
use tonic::{Request as GrpcRequest, Status, Streaming};

/// A keys file with one key.
struct Key {
    secret: String,
    path: String,
    _folder: TempDir,
}

impl Key {
    /// Creates a key with the limits of these flags of `tokenway keys new`.
    async fn new(limits: &[&str]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("keys.toml");
        let path = path.to_str().expect("a UTF-8 path").to_owned();
        let new = tokenway().args(["keys", "new", "a", "--keys-file", &path]);
        let new = new.args(["--scope", "inference,metrics"]).args(limits);
        let secret = new.run().await.expect_success();
        Self {
            secret: secret.trim_end().to_owned(),
            path,
            _folder: folder,
        }
    }

    fn flags(&self) -> [&str; 2] {
        ["--keys-file", &self.path]
    }
}

/// A server, or a gateway, with one key.
struct Server {
    running: RunningProgram,
    http: String,
    client: InferenceClient<Channel>,
    key: Key,
}

impl Server {
    /// Starts a server whose only key has the limits of these flags of `tokenway keys new`.
    async fn start(limits: &[&str], arguments: &[&str]) -> Self {
        let key = Key::new(limits).await;
        let arguments = [&key.flags()[..], arguments].concat();
        let (running, urls) = start_server(&arguments).await;
        Self::connect(key, running, urls).await
    }

    /// Starts a gateway in front of this engine, with a key like [`Server::start`].
    async fn start_gateway(limits: &[&str], engine: &str) -> Self {
        let key = Key::new(limits).await;
        let arguments = [&key.flags()[..], &["--engine", engine]].concat();
        let (running, urls) = start_gateway(&arguments).await;
        Self::connect(key, running, urls).await
    }

    async fn connect(key: Key, running: RunningProgram, [http, grpc]: [String; 2]) -> Self {
        let channel = Channel::from_shared(grpc).expect("a URL").connect().await;
        Self {
            running,
            http: http.trim_start_matches("http://").to_owned(),
            client: InferenceClient::new(channel.expect("a connection")),
            key,
        }
    }

    async fn send(&self, request: Request) -> Response {
        let key = format!("Bearer {}", self.key.secret);
        request
            .header("authorization", &key)
            .send_to(&self.http)
            .await
    }

    /// Sends a completion request over HTTP, and reads the whole response.
    async fn complete(&self, max_tokens: u32) -> Response {
        let body = json!({"prompt": "a b c", "max_tokens": max_tokens});
        let mut response = self.send(completion(&body)).await;
        response.read_rest().await;
        response
    }

    /// Sends a completion request over gRPC.
    async fn start_over_grpc(
        &self,
        max_tokens: u32,
    ) -> Result<tonic::Response<Streaming<CompletionEvent>>, Status> {
        let mut request = GrpcRequest::new(grpc::request("a b c", max_tokens));
        let key = format!("Bearer {}", self.key.secret).parse();
        let key = key.expect("a metadata value");
        request.metadata_mut().insert("authorization", key);
        self.client.clone().complete(request).await
    }

    /// Sends a completion request over gRPC, and reads the whole response.
    async fn complete_over_grpc(&self, max_tokens: u32) -> Result<grpc::Completion, Status> {
        let stream = self.start_over_grpc(max_tokens).await?;
        Ok(grpc::collect(stream.into_inner()).await)
    }
}

fn header<'a>(response: &'a Response, name: &str) -> &'a str {
    let value = response.header(&format!("x-ratelimit-{name}"));
    value.unwrap_or_else(|| panic!("the response has no x-ratelimit-{name}"))
}

fn assert_rate_limited(response: &Response) {
    assert_eq!(response.status, 429);
    let seconds: u64 = response
        .header("retry-after")
        .expect("retry-after")
        .parse()
        .expect("seconds");
    assert!((1..=60).contains(&seconds), "{seconds}");
}

fn rejection(result: Result<grpc::Completion, Status>) -> Error {
    let error = Error::from(&result.expect_err("the request is rejected"));
    assert_eq!(error.kind, ErrorKind::RateLimited);
    error
}

#[tokio::test]
async fn both_apis_share_the_limit_of_requests_per_minute() {
    let server = Server::start(&["--requests-per-minute", "3"], &[]).await;
    let first = server.complete(1).await;
    assert_eq!(first.status, 200);
    assert_eq!(header(&first, "limit-requests"), "3");
    assert_eq!(header(&first, "remaining-requests"), "2");
    assert_eq!(first.header("x-ratelimit-limit-tokens"), None);
    let second = server.start_over_grpc(1).await.expect("a completion");
    let remaining = second.metadata().get("x-ratelimit-remaining-requests");
    assert_eq!(remaining.expect("metadata"), "1");
    assert_eq!(server.send(get("/v1/models")).await.status, 200);

    let rejected = server.complete(1).await;
    assert_rate_limited(&rejected);
    assert_eq!(header(&rejected, "remaining-requests"), "0");
    let error = rejection(server.complete_over_grpc(1).await);
    assert!(error.retry_after.expect("a delay") > Duration::from_secs(1));
    let metrics = server.send(get("/metrics")).await;
    assert_eq!(metrics.status, 200, "metrics have no limit");
}

#[tokio::test]
async fn a_requests_tokens_are_held_until_it_ends() {
    let limits = ["--tokens-per-minute", "1000"];
    let server = Server::start(&limits, &["--test-runner-frequency-ms", "0"]).await;
    let first = server.complete(10).await;
    assert_eq!(header(&first, "limit-tokens"), "1000");
    assert_eq!(header(&first, "remaining-tokens"), "987");

    // A running stream holds its whole `max_tokens`.
    let body = json!({"prompt": "a b c", "max_tokens": 900, "stream": true, "stop": ["token_5"]});
    let mut stream = server.send(completion(&body)).await;
    assert_eq!(stream.status, 200);
    stream.read_rest().await;
    // Now only the six generated tokens and the three of the prompt count.
    let next = server.complete_over_grpc(900).await.expect("a completion");
    assert_eq!(next.token_count(0), 900);
    assert_rate_limited(&server.complete(200).await);
    rejection(server.complete_over_grpc(200).await);
    let never = server.complete(1_000).await;
    assert_eq!(never.status, 400, "1,003 tokens never fit");
}

#[tokio::test]
async fn a_request_is_concurrent_until_its_stream_ends() {
    let limits = ["--concurrent-requests", "2"];
    let mut server = Server::start(&limits, &["--test-runner-frequency-ms", "5"]).await;
    let endless = completion(&json!({"prompt": "a", "max_tokens": 100_000, "stream": true}));
    let first = server.send(endless.clone()).await;
    let _second = server.send(endless).await;
    assert_rate_limited(&server.complete(1).await);
    rejection(server.complete_over_grpc(1).await);
    drop(first);
    server.running.wait_for_log("outcome=\"cancelled\"").await;
    // Complete responses free their place before their last byte, so a client that waits for each is never rejected.
    for _ in 0..50 {
        assert_eq!(server.complete(1).await.status, 200);
        server.complete_over_grpc(1).await.expect("a completion");
    }
}

#[tokio::test]
async fn a_changed_limit_applies_to_what_was_used_before() {
    let mut server = Server::start(&["--requests-per-minute", "2"], &[]).await;
    for _ in 0..2 {
        assert_eq!(server.complete(1).await.status, 200);
    }
    assert_rate_limited(&server.complete(1).await);
    let text = std::fs::read_to_string(&server.key.path).expect("the keys file");
    let changed = text.replace("requests_per_minute = 2", "requests_per_minute = 5");
    assert_ne!(changed, text);
    let reload = async |server: &mut Server, text: &str| {
        // A keys file that is written in place may be read before it is whole.
        let new = format!("{}.new", server.key.path);
        std::fs::write(&new, text).expect("the keys file");
        std::fs::rename(&new, &server.key.path).expect("the keys file is replaced");
        server.running.wait_for_log("the keys were reloaded").await;
    };
    reload(&mut server, &changed).await;
    let third = server.complete(1).await;
    assert_eq!(third.status, 200);
    assert_eq!(header(&third, "remaining-requests"), "2");

    let of_all = format!("[limits]\nrequests_per_minute = 1\n{changed}");
    reload(&mut server, &of_all).await;
    let fourth = server.complete(1).await;
    assert_eq!(fourth.status, 200);
    assert_eq!(header(&fourth, "limit-requests"), "1");
    let error = rejection(server.complete_over_grpc(1).await);
    assert!(error.message.starts_with("The server's limit"), "{error}");
}

#[tokio::test]
async fn a_gateway_counts_the_tokens_of_prompts_when_the_request_ends() {
    let engine = Setup::test_runner(with_interval(Duration::ZERO))
        .start()
        .await;
    let limits = ["--tokens-per-minute", "20"];
    let gateway = Server::start_gateway(&limits, &engine.grpc_url()).await;
    let first = gateway.complete(2).await;
    assert_eq!(header(&first, "remaining-tokens"), "15");
    let second = gateway.complete(12).await;
    assert_eq!(second.status, 200);
    let third = gateway.complete(2).await;
    assert_rate_limited(&third);
    // Two prompts of three tokens each count, too.
    assert_eq!(header(&third, "remaining-tokens"), "0");
}

#[tokio::test]
async fn each_choice_of_each_prompt_counts_toward_the_tokens_per_minute() {
    let limits = ["--tokens-per-minute", "1000"];
    let server = Server::start(&limits, &["--test-runner-frequency-ms", "0"]).await;
    let body = |max_tokens: u32, stream: bool| {
        let stop = ["token_5"];
        let prompts = ["a b c", "a b"];
        let body = json!({"prompt": prompts, "n": 2, "max_tokens": max_tokens, "stream": stream, "stop": stop});
        completion(&body)
    };
    // The prompts have five tokens together. Each of the four choices may generate 249 tokens, or 248.
    assert_eq!(server.send(body(249, false)).await.status, 400);
    let mut stream = server.send(body(248, true)).await;
    assert_eq!(stream.status, 200);
    assert_eq!(header(&stream, "remaining-tokens"), "3");
    stream.read_rest().await;
    // Each choice has generated six tokens, up to its stop string.
    let next = server.complete(1).await;
    assert_eq!(next.status, 200);
    assert_eq!(header(&next, "remaining-tokens"), "967");
}

#[tokio::test]
async fn the_limits_of_all_keys_apply_to_the_key_of_the_environment() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("keys.toml");
    let limits = "[limits]\nrequests_per_minute = 2\n";
    std::fs::write(&path, limits).expect("the keys file");
    let secret = "a-key-of-the-environment";
    let program = tokenway().env("TOKENWAY_API_KEY", secret);
    let program = program.env("TOKENWAY_KEYS_FILE", &path);
    let (running, urls) = start_serving(program, &[]).await;
    let key = Key {
        secret: secret.to_owned(),
        path: path.to_str().expect("a UTF-8 path").to_owned(),
        _folder: folder,
    };
    let server = Server::connect(key, running, urls).await;
    let first = server.complete(1).await;
    assert_eq!(first.status, 200);
    assert_eq!(header(&first, "limit-requests"), "2");
    server.complete_over_grpc(1).await.expect("a completion");
    assert_rate_limited(&server.complete(1).await);
    let error = rejection(server.complete_over_grpc(1).await);
    assert!(error.message.starts_with("The server's limit"), "{error}");
}
