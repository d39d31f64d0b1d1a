//! New keys and certificates under running streams, on both APIs.

mod support;

use std::path::Path;

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::json;
use support::certificates::{CertificateAuthority, CertificateFiles};
use support::grpc;
use support::http::{BodyEnd, Request, Response, completion, get, texts};
use support::keys::KeysFile;
use support::program::start_server;
use tokenway::proto::v1::CompletionEvent;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request as GrpcRequest, Streaming};

/// Number of streams on each API.
const STREAMS: usize = 100;

/// Number of tokens of each stream. At 5 ms per token, a stream takes four seconds, and a reload much less.
const TOKENS: u32 = 800;

/// A server with TLS that needs a key.
struct Server {
    http: String,
    grpc: String,
    authority: CertificateAuthority,
    secret: String,
}

impl Server {
    async fn send(&self, request: Request) -> Response {
        let stream = self.authority.client().connect(&self.http).await;
        let request = request.header("authorization", &format!("Bearer {}", self.secret));
        request.send_on(stream.expect("a TLS connection")).await
    }

    async fn start_over_http(&self) -> Response {
        let body = json!({"prompt": "a", "max_tokens": TOKENS, "stream": true});
        let response = self.send(completion(&body)).await;
        assert_eq!(response.status, 200);
        response
    }

    async fn client(&self) -> InferenceClient<Channel> {
        let endpoint = Endpoint::from_shared(format!("https://{}", self.grpc)).expect("a URL");
        let endpoint = endpoint.tls_config(self.authority.grpc_config());
        let channel = endpoint.expect("the settings of TLS").connect().await;
        InferenceClient::new(channel.expect("a connection"))
    }

    async fn start_over_grpc(&self) -> Streaming<CompletionEvent> {
        let mut request = GrpcRequest::new(grpc::request("a", TOKENS));
        let key = format!("Bearer {}", self.secret).parse();
        let key = key.expect("a metadata value");
        request.metadata_mut().insert("authorization", key);
        let stream = self.client().await.complete(request).await;
        stream.expect("a stream").into_inner()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path in UTF-8")
}

/// Replaces a file in one step.
fn replace(path: &Path, contents: &[u8]) {
    let new = path.with_extension("new");
    std::fs::write(&new, contents).expect("a new file");
    std::fs::rename(new, path).expect("the file is replaced");
}

fn copy(from: &Path, to: &Path) {
    replace(to, &std::fs::read(from).expect("a file"));
}

#[tokio::test]
async fn two_hundred_streams_are_whole_after_their_key_and_certificate_are_replaced() {
    let keys = KeysFile::new();
    let secret = keys.secret("new a").await;
    let authority = CertificateAuthority::new(keys.folder.path(), "ca");
    let CertificateFiles { certificate, key } = authority.sign("server");
    let arguments = [
        "--keys-file",
        text(&keys.path),
        "--tls-cert",
        text(&certificate),
        "--tls-key",
        text(&key),
        "--slots",
        "200",
        "--test-runner-frequency-ms",
        "5",
    ];
    let (mut running, urls) = start_server(&arguments).await;
    let [http, grpc] = urls.map(|url| url.replace("https://", ""));
    let server = Server {
        http,
        grpc,
        authority,
        secret,
    };
    let over_http = join_all((0..STREAMS).map(|_| server.start_over_http())).await;
    let over_grpc = join_all((0..STREAMS).map(|_| server.start_over_grpc())).await;

    let renewed = server.authority.sign("renewed");
    copy(&renewed.key, &key);
    copy(&renewed.certificate, &certificate);
    replace(&keys.path, b"");
    running.signal(Signal::HUP);
    running.wait_for_log("the keys were reloaded").await;
    let reloaded = "the TLS certificates were reloaded";
    running.wait_for_log(reloaded).await;
    assert_eq!(server.send(get("/v1/models")).await.status, 401);

    let expected: Vec<_> = (0..TOKENS).map(|index| format!("token_{index}")).collect();
    let read_http = over_http.into_iter().map(|mut response| async move {
        let body = response.read_rest().await;
        assert_eq!(body.end, BodyEnd::Clean);
        texts(&body.lines(), 0)
    });
    let read_grpc = over_grpc.into_iter().map(async |stream| {
        let whole = grpc::collect(stream).await;
        assert!(whole.summary.is_some());
        let texts = whole.texts(0).into_iter();
        texts.map(str::to_owned).collect::<Vec<_>>()
    });
    let (over_http, over_grpc) = tokio::join!(join_all(read_http), join_all(read_grpc));
    for texts in over_http.iter().chain(&over_grpc) {
        assert_eq!(texts, &expected);
    }
    assert_eq!(over_http.len() + over_grpc.len(), 200);
}
