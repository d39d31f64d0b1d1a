//! Doors that answer what they are told to.

#![allow(
    dead_code,
    reason = "each test file is a crate of its own and uses a part of this"
)]

use std::net::SocketAddr;
use std::pin::Pin;

use serde_json::json;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_server::{Inference, InferenceServer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// A line of an NDJSON stream, without a stamp.
pub(crate) fn token_line(index: u32, finish_reason: Option<&str>) -> String {
    let choice = json!({
        "index": 0, "text": format!("token_{index}"), "finish_reason": finish_reason,
    });
    format!("{}\n", json!({"choices": [choice]}))
}

/// The lines of a stream that ends as it should.
pub(crate) fn token_lines(indices: &[u32]) -> String {
    let last = indices.len() - 1;
    let lines = indices.iter().enumerate();
    lines
        .map(|(place, &index)| token_line(index, (place == last).then_some("length")))
        .collect()
}

/// An answer with this body in one chunk, and its last chunk.
pub(crate) fn chunked(body: &str) -> Vec<u8> {
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/x-ndjson\r\n\
                transfer-encoding: chunked\r\n\r\n";
    let size = body.len();
    format!("{head}{size:x}\r\n{body}\r\n0\r\n\r\n").into_bytes()
}

/// An HTTP door that answers one request with given bytes, and closes.
pub(crate) struct FakeHttpDoor(TcpListener);

impl FakeHttpDoor {
    pub(crate) async fn open() -> Self {
        Self(bind().await)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", address(&self.0))
    }

    /// Answers, and returns the request.
    pub(crate) async fn answer(self, answer: Vec<u8>) -> String {
        let (mut socket, _) = self.0.accept().await.expect("the client connects");
        let mut request = Vec::new();
        // The request's body ends with an object in an object, and has no other.
        while !request.ends_with(b"}}") {
            let read = socket
                .read_buf(&mut request)
                .await
                .expect("the request can be read");
            assert!(read > 0, "{}", String::from_utf8_lossy(&request));
        }
        socket
            .write_all(&answer)
            .await
            .expect("the answer is taken");
        String::from_utf8(request).expect("a request is text")
    }
}

/// Whether a stream of the gRPC door has its end.
#[derive(Clone, Copy)]
pub(crate) enum Summary {
    Sent,
    Missing,
}

/// A gRPC door that streams given tokens.
pub(crate) struct FakeGrpcDoor(TcpListener);

impl FakeGrpcDoor {
    pub(crate) async fn open() -> Self {
        Self(bind().await)
    }

    pub(crate) fn address(&self) -> String {
        address(&self.0).to_string()
    }

    /// Serves until the client is done, and returns what it has.
    pub(crate) async fn serve_while<T>(
        self,
        client: impl Future<Output = T>,
        indices: &[u32],
        summary: Summary,
    ) -> T {
        let script = Script {
            indices: indices.to_vec(),
            summary,
        };
        let served = tonic::transport::Server::builder()
            .add_service(InferenceServer::new(script))
            .serve_with_incoming(TcpListenerStream::new(self.0));
        tokio::select! {
            outcome = client => outcome,
            served = served => panic!("the door closed: {served:?}"),
        }
    }
}

struct Script {
    indices: Vec<u32>,
    summary: Summary,
}

#[tonic::async_trait]
impl Inference for Script {
    type CompleteStream = Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

    async fn complete(
        &self,
        _request: Request<v1::CompletionRequest>,
    ) -> Result<Response<Self::CompleteStream>, Status> {
        let started = Event::Started(v1::Started::default());
        let tokens = self.indices.iter().map(|&index| {
            let token = v1::Token {
                id: index,
                text: format!("token_{index}"),
                ..v1::Token::default()
            };
            Event::Tokens(v1::Tokens {
                first_index: index,
                tokens: [token].into_iter().collect(),
                ..v1::Tokens::default()
            })
        });
        let summary = match self.summary {
            Summary::Sent => Some(Event::Summary(v1::Summary::default())),
            Summary::Missing => None,
        };
        let events: Vec<_> = std::iter::once(started)
            .chain(tokens)
            .chain(summary)
            .map(|event| Ok(v1::CompletionEvent { event: Some(event) }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("the client does not need it"))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented("the client does not need it"))
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("the client does not need it"))
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("the client does not need it"))
    }
}

async fn bind() -> TcpListener {
    let bound = TcpListener::bind("127.0.0.1:0").await;
    bound.expect("a port is free")
}

fn address(listener: &TcpListener) -> SocketAddr {
    listener.local_addr().expect("it is bound")
}
