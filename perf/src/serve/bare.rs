//! The floors: minimal servers with a raw socket, axum or tonic, and one handler that reads from the device. They send
//! the same bytes as Tokenway, in as many pieces.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response as HttpResponse};
use axum::routing::post;
use axum::serve::ListenerExt;
use futures_core::Stream;
use futures_util::StreamExt;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_server::{Inference, InferenceServer};
use tokenway::runner::Token;
use tokenway::tokens::{TextToken, Timestamps, TokenBatch};
use tokenway::worker::token_channel::{Output, TokenReceiver};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tonic::transport::server::TcpIncoming;
use tonic::{Request, Response, Status};

use super::lines::{LineStream, RequestBody};
use crate::device::{Device, READ_BATCH};

/// Estimated length of a token's text, in bytes.
const TEXT_BYTES: usize = 8;

/// Serves NDJSON lines over raw sockets. Each request is a line of JSON, and connections stay open.
pub(super) async fn serve_tcp(listener: TcpListener, device: Device) -> io::Result<()> {
    loop {
        let (socket, _) = listener.accept().await?;
        socket.set_nodelay(true)?;
        // A client that disconnects ends its own task only.
        tokio::spawn(answer_lines(socket, device.clone()));
    }
}

async fn answer_lines(mut socket: TcpStream, device: Device) -> io::Result<()> {
    let (read, mut write) = socket.split();
    let mut requests = BufReader::new(read).lines();
    while let Some(request) = requests.next_line().await? {
        let request: RequestBody = serde_json::from_str(&request)?;
        let mut lines = LineStream::open(&device, &request);
        while let Some(Ok(lines)) = lines.next().await {
            write.write_all(&lines).await?;
        }
    }
    Ok(())
}

pub(super) async fn serve_axum(listener: TcpListener, device: Device) -> io::Result<()> {
    let router = Router::new()
        .route("/v1/completions", post(stream_lines))
        .with_state(device);
    let listener = listener.tap_io(|socket| {
        // If setting this option fails, the connection is only slower, which the report shows.
        let _ = socket.set_nodelay(true);
    });
    axum::serve(listener, router).await
}

async fn stream_lines(State(device): State<Device>, body: Bytes) -> HttpResponse {
    let Ok(request) = serde_json::from_slice::<RequestBody>(&body) else {
        return StatusCode::BAD_REQUEST.into_response();
    };
    let content_type = [(CONTENT_TYPE, "application/x-ndjson")];
    let lines = Body::from_stream(LineStream::open(&device, &request));
    (content_type, lines).into_response()
}

pub(super) async fn serve_tonic(listener: TcpListener, device: Device) -> io::Result<()> {
    tonic::transport::Server::builder()
        .add_service(InferenceServer::new(BareTonic(device)))
        .serve_with_incoming(TcpIncoming::from(listener).with_nodelay(Some(true)))
        .await
        .map_err(io::Error::other)
}

struct BareTonic(Device);

/// Events of one sequence. Tokens that are ready together share a message.
struct BoxedEventStream {
    tokens: Option<TokenReceiver>,
    outputs: Vec<Output>,
    next_index: u32,
    stamps: bool,
    has_started: bool,
    has_finished: bool,
}

#[tonic::async_trait]
impl Inference for BareTonic {
    type CompleteStream = BoxedEventStream;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<BoxedEventStream>, Status> {
        let request = request.into_inner();
        let stamps = request.include_stamps;
        Ok(Response::new(BoxedEventStream {
            tokens: Some(self.0.open_sequence(request.max_tokens(), stamps)),
            outputs: Vec::new(),
            next_index: 0,
            stamps,
            has_started: false,
            has_finished: false,
        }))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("a floor has only `Complete`"))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented("a floor has only `Complete`"))
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("a floor has only `Complete`"))
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("a floor has only `Complete`"))
    }
}

impl BoxedEventStream {
    /// Converts the received outputs into an event.
    fn take_event(&mut self) -> Event {
        let mut tokens = TokenBatch::default();
        tokens.reserve(self.outputs.len(), self.outputs.len() * TEXT_BYTES);
        for output in self.outputs.drain(..) {
            for token in output.completion_tokens() {
                push_token(&mut tokens, token, self.stamps);
            }
            match output {
                Output::Accepted { .. } => return Event::Started(v1::Started::default()),
                Output::Token(_) | Output::Tokens(_) => {}
                Output::Finished(..) => self.has_finished = true,
                // No request here includes the prompt.
                Output::Prompt(_) | Output::Failed(_) => self.tokens = None,
            }
        }
        let first_index = self.next_index;
        self.next_index += u32::try_from(tokens.len()).expect("a batch is small");
        let finish_reason = if self.has_finished {
            v1::FinishReason::Length
        } else {
            v1::FinishReason::Unspecified
        };
        Event::Tokens(v1::Tokens {
            choice: 0,
            first_index,
            tokens,
            finish_reason: finish_reason.into(),
        })
    }
}

impl Stream for BoxedEventStream {
    type Item = Result<v1::CompletionEvent, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        let Some(tokens) = &mut this.tokens else {
            return Poll::Ready(None);
        };
        let event = if this.has_finished {
            this.tokens = None;
            Event::Summary(v1::Summary::default())
        } else {
            // The start is an event of its own.
            let limit = if this.has_started { READ_BATCH } else { 1 };
            if ready!(tokens.poll_recv_many(cx, &mut this.outputs, limit)) == 0 {
                return Poll::Ready(None);
            }
            this.has_started = true;
            this.take_event()
        };
        Poll::Ready(Some(Ok(v1::CompletionEvent { event: Some(event) })))
    }
}

fn push_token(tokens: &mut TokenBatch, token: &Token, stamps: bool) {
    let mut timestamps = Timestamps::default();
    if stamps {
        timestamps.due_ns = token.due_ns;
        timestamps.emitted_ns = token.emitted_ns;
    }
    tokens.push(TextToken {
        id: token.id,
        text: &String::from_utf8_lossy(&token.bytes),
        timestamps,
        logprobs: None,
    });
}
