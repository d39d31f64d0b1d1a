//! A gRPC server that streams given tokens, on a thread of its own.

use std::net::{SocketAddr, TcpListener};
use std::pin::Pin;
use std::thread;

use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_server::{Inference, InferenceServer};
use tokio_stream::Stream;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

/// End of the server's streams.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    Summary,
    /// A clean end without a summary.
    Missing,
    /// A status.
    Error,
}

/// A server that runs until the test ends.
pub(crate) struct PlantedGrpcServer(SocketAddr);

struct Script {
    indices: &'static [u32],
    end: End,
}

impl PlantedGrpcServer {
    /// Answers every request with the tokens of these indices.
    pub(crate) fn streaming(indices: &'static [u32], end: End) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
        let address = listener.local_addr().expect("it is bound");
        listener.set_nonblocking(true).expect("it is a socket");
        thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.expect("a runtime").block_on(async {
                let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
                tonic::transport::Server::builder()
                    .add_service(InferenceServer::new(Script { indices, end }))
                    .serve_with_incoming(TcpListenerStream::new(listener))
                    .await
            })
        });
        Self(address)
    }

    pub(crate) fn address(&self) -> String {
        self.0.to_string()
    }
}

#[tonic::async_trait]
impl Inference for Script {
    type CompleteStream = Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

    async fn complete(
        &self,
        _request: Request<v1::CompletionRequest>,
    ) -> Result<Response<Self::CompleteStream>, Status> {
        let started = Event::Started(v1::Started::default());
        let last = self.indices.len() - 1;
        let is_whole = self.end != End::Error;
        let tokens = self.indices.iter().enumerate().map(|(place, &index)| {
            let token = v1::Token {
                id: index,
                text: format!("token_{index}"),
                ..v1::Token::default()
            };
            let finish_reason = if place == last && is_whole {
                v1::FinishReason::Length
            } else {
                v1::FinishReason::Unspecified
            };
            Event::Tokens(v1::Tokens {
                first_index: index,
                tokens: [token].into_iter().collect(),
                finish_reason: finish_reason.into(),
                ..v1::Tokens::default()
            })
        });
        let end = match self.end {
            End::Summary => Some(Ok(Event::Summary(v1::Summary::default()))),
            End::Missing => None,
            End::Error => Some(Err(Status::internal("planted"))),
        };
        let events: Vec<_> = std::iter::once(started)
            .chain(tokens)
            .map(Ok)
            .chain(end)
            .map(|event| event.map(|event| v1::CompletionEvent { event: Some(event) }))
            .collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(events))))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("no client here needs it"))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented("no client here needs it"))
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("no client here needs it"))
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("no client here needs it"))
    }
}
