//! A scripted engine for tests: the test defines its responses.

use std::pin::Pin;

use tokio_stream::Stream;
use tonic::{Request, Response, Status};

use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::proto::v1::inference_server::Inference;

/// Event stream that a test defines.
pub(crate) type ScriptedStream =
    Pin<Box<dyn Stream<Item = Result<v1::CompletionEvent, Status>> + Send>>;

type Respond = dyn Fn(&v1::CompletionRequest) -> Result<ScriptedStream, Status> + Send + Sync;

/// Creates a remote engine that responds to completion requests with `respond`. All other calls fail.
pub(crate) fn engine(
    respond: impl Fn(&v1::CompletionRequest) -> Result<ScriptedStream, Status> + Send + Sync + 'static,
) -> ScriptedEngine {
    ScriptedEngine(Box::new(respond))
}

/// Creates the first event of a completion.
pub(crate) fn started(model: &str) -> Result<v1::CompletionEvent, Status> {
    let started = v1::Started {
        model: model.to_owned(),
        ..v1::Started::default()
    };
    Ok(event(Event::Started(started)))
}

/// Creates the event for one token of choice 0.
pub(crate) fn token(index: u32, text: &str) -> Result<v1::CompletionEvent, Status> {
    let token = v1::Token {
        text: text.to_owned(),
        ..v1::Token::default()
    };
    Ok(event(Event::Tokens(v1::Tokens {
        first_index: index,
        tokens: [token].into_iter().collect(),
        ..v1::Tokens::default()
    })))
}

/// Creates the event that ends choice 0.
pub(crate) fn end() -> Result<v1::CompletionEvent, Status> {
    Ok(event(Event::Tokens(v1::Tokens {
        finish_reason: v1::FinishReason::Stop.into(),
        ..v1::Tokens::default()
    })))
}

/// Creates the last event of a completion.
pub(crate) fn summary() -> Result<v1::CompletionEvent, Status> {
    Ok(event(Event::Summary(v1::Summary::default())))
}

fn event(event: Event) -> v1::CompletionEvent {
    v1::CompletionEvent { event: Some(event) }
}

/// Engine that responds to completion requests with a closure.
pub(crate) struct ScriptedEngine(Box<Respond>);

#[tonic::async_trait]
impl Inference for ScriptedEngine {
    type CompleteStream = ScriptedStream;

    async fn complete(
        &self,
        request: Request<v1::CompletionRequest>,
    ) -> Result<Response<ScriptedStream>, Status> {
        (self.0)(request.get_ref()).map(Response::new)
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented(
            "the scripted engine only supports Complete",
        ))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented(
            "the scripted engine only supports Complete",
        ))
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented(
            "the scripted engine only supports Complete",
        ))
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented(
            "the scripted engine only supports Complete",
        ))
    }
}
