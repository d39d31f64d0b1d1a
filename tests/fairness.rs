//! Slots and queue are shared among API keys, on both APIs alike.

mod support;

use std::time::Duration;

use serde_json::json;
use support::grpc;
use support::http::{Request, Response, completion, get};
use support::keys::KeysFile;
use support::program::start_server;
use support::running_program::RunningProgram;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request as GrpcRequest, Status, Streaming};

type Stream = Streaming<v1::CompletionEvent>;

/// Settings with which every sequence pauses after its first token, and keeps its slot until its client disconnects.
const KEEPS_SLOT: [&str; 4] = [
    "--test-runner-silent-at",
    "1",
    "--test-runner-frequency-ms",
    "0",
];

/// A server with keys.
struct Server {
    _running: RunningProgram,
    http: String,
    client: InferenceClient<Channel>,
    /// Key that may read metrics.
    metrics: String,
    _keys: KeysFile,
}

impl Server {
    /// Starts a server with one slot, and a key for each of these arguments of `tokenway keys new`.
    async fn start<const N: usize>(new: [&str; N], arguments: &[&str]) -> (Self, [String; N]) {
        let keys = KeysFile::new();
        let mut secrets = [const { String::new() }; N];
        for (secret, new) in secrets.iter_mut().zip(new) {
            *secret = keys.secret(&format!("new {new}")).await;
        }
        let metrics = keys.secret("new metrics --scope metrics").await;
        let path = keys.path.to_str().expect("a UTF-8 path");
        // Nobody reads the log.
        let common = ["--access-log", "false", "--slots", "1", "--keys-file", path];
        let arguments = [&common[..], arguments].concat();
        let (running, [http, grpc]) = start_server(&arguments).await;
        let channel = Channel::from_shared(grpc).expect("a URL").connect().await;
        let server = Self {
            _running: running,
            http: http.trim_start_matches("http://").to_owned(),
            client: InferenceClient::new(channel.expect("a connection")),
            metrics,
            _keys: keys,
        };
        (server, secrets)
    }

    /// Sends a completion request over gRPC. Returns once it is admitted.
    async fn stream(
        &self,
        key: &str,
        request: impl Into<GrpcRequest<v1::CompletionRequest>>,
    ) -> Result<Stream, Status> {
        let mut request = request.into();
        let key = format!("Bearer {key}").parse().expect("a metadata value");
        request.metadata_mut().insert("authorization", key);
        Ok(self.client.clone().complete(request).await?.into_inner())
    }

    /// Starts this many requests over gRPC, one after the other.
    async fn streams(&self, key: &str, max_tokens: u32, count: usize) -> Vec<Stream> {
        let mut streams = Vec::new();
        for _ in 0..count {
            let stream = self.stream(key, request(max_tokens)).await;
            streams.push(stream.expect("the request is admitted"));
        }
        streams
    }

    /// Sends a request over HTTP. Returns once it has a response.
    fn send(&self, key: &str, request: Request) -> impl Future<Output = Response> + use<> {
        let request = request.header("authorization", &format!("Bearer {key}"));
        let address = self.http.clone();
        async move { request.send_to(&address).await }
    }

    /// Waits until this many requests wait in the queue.
    async fn wait_for_queued(&self, queued: usize) {
        let line = format!("tokenway_requests_queued {queued}\n");
        let reached = async {
            loop {
                let metrics = self.send(&self.metrics, get("/metrics"));
                if metrics.await.read_rest().await.text.contains(&line) {
                    return;
                }
            }
        };
        let reached = timeout(Duration::from_secs(20), reached).await;
        assert!(reached.is_ok(), "{queued} requests are not in the queue");
    }
}

fn request(max_tokens: u32) -> GrpcRequest<v1::CompletionRequest> {
    GrpcRequest::new(grpc::request("a", max_tokens))
}

fn http_request() -> Request {
    completion(&json!({"prompt": "a", "max_tokens": 100, "stream": true}))
}

/// Asserts that `first` completes before `other` gets a slot.
async fn assert_runs_before<T>(first: impl Future<Output = T>, other: &mut Stream) -> T {
    tokio::select! {
        biased;
        event = other.message() => panic!("another request was served first: {event:?}"),
        output = first => output,
    }
}

/// Completes when a worker has started the request.
async fn started(stream: &mut Stream) {
    let event = stream.message().await.expect("the stream continues");
    assert!(event.is_some());
}

#[tokio::test]
async fn a_flood_of_one_key_delays_another_keys_request_by_one_slot() {
    let (server, [flooding, single]) = Server::start(["a", "b"], &KEEPS_SLOT).await;
    let mut flood = server.streams(&flooding, 100, 1_001).await.into_iter();
    let mut running = flood.next().expect("a stream");
    let mut waiting = flood.next().expect("a stream");
    started(&mut running).await;

    let over_http = tokio::spawn(server.send(&single, http_request()));
    server.wait_for_queued(1_001).await;
    drop(running);
    let response = assert_runs_before(over_http, &mut waiting).await;
    let response = response.expect("the task does not panic");
    assert_eq!(response.status, 200);
    drop(response);
    started(&mut waiting).await;

    let mut next = flood.next().expect("a stream");
    let over_grpc = server.stream(&single, request(100)).await;
    let mut over_grpc = over_grpc.expect("the request is admitted");
    drop(waiting);
    assert_runs_before(started(&mut over_grpc), &mut next).await;
}

#[tokio::test]
async fn a_queue_full_of_one_keys_requests_has_room_for_another_key() {
    let arguments = [&KEEPS_SLOT[..], &["--queue-depth", "4"]].concat();
    let (server, [flooding, other]) = Server::start(["a", "b"], &arguments).await;
    let mut flood = server.streams(&flooding, 100, 3).await;
    started(&mut flood[0]).await;
    let displaced_http = tokio::spawn(server.send(&flooding, http_request()));
    server.wait_for_queued(3).await;
    let displaced = server.streams(&flooding, 100, 1).await.remove(0);
    let full = server.stream(&flooding, request(1)).await;
    assert_eq!(kind(&full.expect_err("it is full")), ErrorKind::QueueFull);

    // Each request of the other key takes the place of the newest one.
    let mut first = server.streams(&other, 100, 1).await.remove(0);
    let displaced = grpc::collect(displaced).await;
    assert!(displaced.started.is_none());
    let status = displaced.error.expect("an error");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(kind(&status), ErrorKind::QueueFull);
    assert!(Error::from(&status).retry_after.is_some());
    let second = tokio::spawn(server.send(&other, http_request()));
    let mut displaced = displaced_http.await.expect("a response");
    assert_eq!(displaced.status, 429);
    assert!(displaced.header("retry-after").is_some());
    assert_eq!(displaced.read_rest().await.error().0, "queue_full");

    // Now each key has half of the queue.
    for key in [&flooding, &other] {
        let full = server.stream(key, request(1)).await;
        assert_eq!(kind(&full.expect_err("it is full")), ErrorKind::QueueFull);
        assert_eq!(server.send(key, http_request()).await.status, 429);
    }
    drop(flood);
    started(&mut first).await;
    drop(first);
    assert_eq!(second.await.expect("a response").status, 200);
}

fn kind(status: &Status) -> ErrorKind {
    Error::from(status).kind
}

#[tokio::test]
async fn a_priority_acts_against_other_keys_only_with_the_scope() {
    let keys = ["a", "b", "c", "d --scope inference,priority"];
    let (server, [runs, waits, without, with]) = Server::start(keys, &KEEPS_SLOT).await;
    for (key, is_first) in [(&with, true), (&without, false)] {
        let mut running = server.streams(&runs, 100, 1).await.remove(0);
        started(&mut running).await;
        let mut earlier = server.streams(&waits, 100, 1).await.remove(0);
        let mut later = request(100);
        later.get_mut().priority = Some(-1);
        let later = server.stream(key, later).await;
        let mut later = later.expect("the request is admitted");
        drop(running);
        let [first, second] = match is_first {
            true => [&mut later, &mut earlier],
            false => [&mut earlier, &mut later],
        };
        assert_runs_before(started(first), second).await;
        // In the next round, both keys have had no slot.
        match is_first {
            true => drop(earlier),
            false => drop(later),
        }
        server.wait_for_queued(0).await;
    }
}

#[tokio::test]
async fn a_deadline_that_the_queue_cannot_meet_is_refused_at_once() {
    let frequency = ["--test-runner-frequency-ms", "40"];
    let (server, [flooding, other]) = Server::start(["a", "b"], &frequency).await;
    // Each request takes at least 40 ms, so 500 of them take at least 20 s.
    let mut flood = server.streams(&flooding, 2, 600).await;
    // After 40 of them, the server knows how fast slots become free.
    started(&mut flood[40]).await;
    let in_2_s = || {
        let mut request = request(1);
        request.set_timeout(Duration::from_secs(2));
        request
    };
    let status = server.stream(&flooding, in_2_s()).await;
    let status = status.expect_err("the request is refused");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(
        status.message().contains("would wait for about"),
        "{status}"
    );
    let request = http_request().header("x-request-timeout", "2");
    let mut response = server.send(&flooding, request).await;
    assert_eq!(response.status, 504);
    let body = response.read_rest().await;
    assert_eq!(body.error().0, "deadline_exceeded");
    assert!(body.text.contains("would wait for about"), "{}", body.text);
    // Another key does not wait for these requests.
    let served = server
        .stream(&other, in_2_s())
        .await
        .expect("it is admitted");
    assert_eq!(grpc::collect(served).await.token_count(0), 1);
}
