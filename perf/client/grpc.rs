//! The gRPC door's client: one RPC on a connection of its own.

use std::error::Error;
use std::io;

use hyper_util::rt::TokioIo;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::completion_request::Input;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::proto::v1::{CompletionEvent, CompletionRequest, Tokens};
use tokenway::runner::monotonic_ns;
use tokenway::tokens::TextToken;
use tonic::transport::{Channel, Endpoint};
use tonic::{Status, Streaming};
use tower::service_fn;

use super::{
    LlmStreamingClient, PROMPT, ReadClock, Received, StreamError, StreamRequest, connect,
    with_causes,
};
use crate::arguments::ServerUrl;
use crate::stamp::Stamp;

/// A client of the gRPC door.
pub(crate) struct GrpcStreamingClient {
    url: ServerUrl,
}

impl GrpcStreamingClient {
    /// A client of the door there.
    pub(crate) fn new(url: ServerUrl) -> Self {
        Self { url }
    }

    /// A channel over one connection, which is made now so that a door that is not there is told
    /// apart from one that does not answer.
    async fn channel(&self) -> Result<(Channel, ReadClock), StreamError> {
        let (socket, clock) = connect(&self.url).await?;
        let mut socket = Some(socket);
        let once = service_fn(move |_| {
            let socket = socket.take().map(TokioIo::new);
            async { socket.ok_or_else(|| io::Error::other("the connection was lost")) }
        });
        let no_answer = |error: tonic::transport::Error| StreamError::NoAnswer(with_causes(&error));
        let channel = Endpoint::from_shared(self.url.to_string())
            .map_err(no_answer)?
            .connect_with_connector(once)
            .await
            .map_err(no_answer)?;
        Ok((channel, clock))
    }
}

impl LlmStreamingClient for GrpcStreamingClient {
    const DOOR: &'static str = "gRPC";

    async fn stream(
        &self,
        request: &StreamRequest,
        received: &mut Received,
    ) -> Result<(), StreamError> {
        let (channel, clock) = self.channel().await?;
        let request = CompletionRequest {
            model: request.model.clone().unwrap_or_default(),
            input: Some(Input::Prompt(PROMPT.to_owned())),
            max_tokens: Some(request.tokens),
            include_stamps: true,
            ..CompletionRequest::default()
        };
        received.requested_at(monotonic_ns());
        let events = InferenceClient::new(channel).complete(request).await;
        let events = events.map_err(|status| StreamError::Refused(status_text(&status)))?;
        read(events.into_inner(), &clock, received).await
    }
}

async fn read(
    mut events: Streaming<CompletionEvent>,
    clock: &ReadClock,
    received: &mut Received,
) -> Result<(), StreamError> {
    let mut has_summary = false;
    loop {
        let event = events.message().await;
        let received_ns = clock.last_read_ns();
        let Some(event) = event.map_err(|status| failure(&status, received))? else {
            break;
        };
        match event.event {
            Some(_) if has_summary => return Err(received.malformed("an event after the summary")),
            Some(Event::Started(_) | Event::Prompt(_)) => {}
            Some(Event::Tokens(tokens)) => take(&tokens, received_ns, received)?,
            Some(Event::Summary(_)) => has_summary = true,
            None => return Err(received.malformed("an event of no known kind")),
        }
    }
    if has_summary {
        Ok(())
    } else {
        Err(received.cut_off("there is no summary"))
    }
}

fn take(tokens: &Tokens, received_ns: u64, received: &mut Received) -> Result<(), StreamError> {
    for (token, index) in tokens.tokens.iter().zip(tokens.first_index..) {
        let index_of_text = received.token(token.text, received_ns, stamp_of(token))?;
        if index_of_text != index {
            let text = token.text;
            return Err(received.malformed(format!("{text} under the index {index}")));
        }
    }
    Ok(())
}

/// What ended a stream in the middle: a status that the server sent, or, where it has a cause on this
/// side, a connection that broke.
fn failure(status: &Status, received: &Received) -> StreamError {
    match status.source() {
        Some(cause) => received.cut_off(with_causes(cause)),
        None => received.error_record(status_text(status)),
    }
}

fn stamp_of(token: TextToken<'_>) -> Option<Stamp> {
    let tokenway::tokens::Timestamps { due_ns, emitted_ns } = token.timestamps;
    let known = |ns: u64| Some(ns).filter(|ns| *ns > 0);
    Some(Stamp {
        due_ns: known(due_ns),
        emitted_ns: known(emitted_ns)?,
    })
}

fn status_text(status: &Status) -> String {
    format!("{:?}: {}", status.code(), status.message())
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressBar;
    use tokenway::proto::v1::Token;

    use super::*;

    #[test]
    fn a_token_under_another_index_than_its_texts_is_told() {
        let token = |index| Token {
            text: format!("token_{index}"),
            ..Token::default()
        };
        let tokens = Tokens {
            first_index: 4,
            tokens: [token(4), token(6)].into_iter().collect(),
            ..Tokens::default()
        };
        let mut received = Received::of(10, ProgressBar::hidden());
        let error = take(&tokens, 1, &mut received).unwrap_err();
        assert_eq!(
            error.to_string(),
            "after 2 tokens came what belongs to no stream: token_6 under the index 5"
        );
    }
}
