//! Reads completion streams: NDJSON and server-sent events over HTTP/1.1 and HTTP/2, and gRPC. The load generator
//! reads HTTP/1.1 with a smaller client, but with the same decoder.
//!
//! The reader checks that a stream is complete. Its callers check the tokens.

use clap::ValueEnum;
use http::header::CONTENT_TYPE;
use http::{HeaderMap, StatusCode};
use http_body_util::{BodyExt, Limited};
use hyper::body::Incoming;
use tonic::{Code, Status};

mod connection;
mod decoder;
mod failure;
mod messages;
mod object;
mod records;
mod request;

pub(crate) use connection::{Connection, Protocol, connect, connect_narrow, reset_on_close};
#[cfg(test)]
pub(crate) use decoder::Token;
pub(crate) use decoder::{Decoder, Event};
pub(crate) use object::{Timings, Usage};
pub(crate) use request::{
    ChatMessage, CompletionRequest, RequestInput, StreamOptions, grpc_request, http_request,
};

use crate::fault::Fault;
use connection::{ReadClock, Response, next_piece};
use failure::Failure;

/// Maximum number of body bytes that are read from a refusal.
const LONGEST_REFUSAL: usize = 64 * 1024;

/// Wire format of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// NDJSON over a raw socket.
    #[value(skip)]
    Raw,
    Ndjson,
    Sse,
    #[value(skip)]
    Grpc,
}

/// A stream whose response has started.
pub(crate) struct Stream {
    body: Incoming,
    trailers: HeaderMap,
    decoder: Decoder,
    format: Format,
    clock: ReadClock,
    count: u32,
    failure: Option<Failure>,
}

/// End of a stream.
#[derive(Debug)]
pub(crate) enum StreamOutcome {
    Complete,
    /// The server sent an error in the stream.
    Failed {
        failure: Failure,
        /// True if the body ended cleanly, as if the stream had succeeded.
        is_clean: bool,
    },
    /// The stream broke, or its end is missing.
    Incomplete(Fault),
}

impl Format {
    pub(crate) fn content_type(self) -> &'static str {
        match self {
            Self::Raw | Self::Ndjson => "application/x-ndjson",
            Self::Sse => "text/event-stream",
            Self::Grpc => "application/grpc",
        }
    }

    /// Returns a protocol that every server of this format supports.
    pub(crate) fn protocol(self) -> Protocol {
        match self {
            Self::Raw | Self::Ndjson | Self::Sse => Protocol::Http1,
            Self::Grpc => Protocol::Http2,
        }
    }
}

impl Stream {
    pub(crate) async fn open(
        connection: &mut Connection,
        format: Format,
        completion: &CompletionRequest<'_>,
    ) -> Result<Self, Fault> {
        let url = &connection.url;
        let request = match format {
            Format::Raw | Format::Ndjson | Format::Sse => {
                http_request(url, format.content_type(), completion)
            }
            Format::Grpc => request::grpc_completion_request(url, completion),
        };
        let response = connection.send(request).await?;
        if response.status() != StatusCode::OK {
            return Err(read_refusal(response).await);
        }
        if let Some(status) = failed_status(response.headers()) {
            return Err(Fault::Refused(Failure::of_status(&status).message));
        }
        let content_type = response.headers().get(CONTENT_TYPE);
        let content_type = content_type.map_or("", |value| value.to_str().unwrap_or("?"));
        if !content_type.starts_with(format.content_type()) {
            return Err(Fault::unexpected(
                format.content_type(),
                format!("'{content_type}'"),
            ));
        }
        Ok(Self {
            body: response.into_body(),
            trailers: HeaderMap::new(),
            decoder: Decoder::new(format),
            format,
            clock: connection.clock.clone(),
            count: 0,
            failure: None,
        })
    }

    pub(crate) fn token_count(&self) -> u32 {
        self.count
    }

    /// Returns the timings at the end of the stream, if they have arrived.
    pub(crate) fn timings(&self) -> Option<&Timings> {
        self.decoder.timings()
    }

    /// Reads the next piece of the body. Passes its events to `take`, with the time of the read in nanoseconds of
    /// CLOCK_MONOTONIC. Returns false at the end of the body.
    pub(crate) async fn read(
        &mut self,
        mut take: impl FnMut(Event<'_>, u64) -> Result<(), Fault>,
    ) -> Result<bool, Fault> {
        let Some(piece) = next_piece(&mut self.body, &mut self.trailers).await? else {
            return Ok(false);
        };
        self.decode(&piece, &mut take)?;
        Ok(true)
    }

    /// Reads to the end.
    /// Returns the errors of `take`, and an error if the body is not a completion. A broken stream is not an error but
    /// an [`StreamOutcome`].
    pub(crate) async fn read_to_end(
        &mut self,
        mut take: impl FnMut(Event<'_>, u64) -> Result<(), Fault>,
    ) -> Result<StreamOutcome, Fault> {
        let broken = loop {
            match next_piece(&mut self.body, &mut self.trailers).await {
                Ok(Some(piece)) => self.decode(&piece, &mut take)?,
                Ok(None) => break None,
                Err(fault) => break Some(fault),
            }
        };
        if let Some(failure) = self.failure.take() {
            let is_clean = broken.is_none();
            return Ok(StreamOutcome::Failed { failure, is_clean });
        }
        let after = self.count;
        if let Some(fault) = broken {
            let cause = fault.to_string();
            return Ok(StreamOutcome::Incomplete(Fault::Broken { after, cause }));
        }
        if self.format == Format::Grpc
            && let Some(status) = failed_status(&self.trailers)
        {
            let failure = Failure::of_status(&status);
            return Ok(StreamOutcome::Failed {
                failure,
                is_clean: false,
            });
        }
        Ok(match self.decoder.missing_part() {
            None => StreamOutcome::Complete,
            Some(missing) => StreamOutcome::Incomplete(Fault::cut_off(after, missing)),
        })
    }

    fn decode(
        &mut self,
        piece: &[u8],
        take: &mut impl FnMut(Event<'_>, u64) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        let received_ns = self.clock.last_read_ns();
        let Self {
            decoder,
            failure,
            count,
            ..
        } = self;
        take(Event::BytesRead(piece.len()), received_ns)?;
        decoder.read(piece, |event| {
            if let Event::Token(_) = event {
                *count += 1;
            } else if let Event::Error(error) = &event {
                *failure = Some(error.clone());
            }
            take(event, received_ns)
        })
    }
}

impl StreamOutcome {
    /// Returns a fault unless the stream ended completely. `after` is the number of tokens that arrived.
    pub(crate) fn complete(self, after: u32) -> Result<(), Fault> {
        match self {
            Self::Complete => Ok(()),
            Self::Failed { failure, .. } => Err(Fault::Error {
                after,
                message: failure.to_string(),
            }),
            Self::Incomplete(fault) => Err(fault),
        }
    }
}

/// Returns the status of a failed gRPC call, or `None` if the call succeeded or has not ended.
pub(crate) fn failed_status(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok)
}

async fn read_refusal(response: Response) -> Fault {
    let status = response.status();
    let body = Limited::new(response.into_body(), LONGEST_REFUSAL)
        .collect()
        .await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let failure = Failure::of_body(&body).map(|failure| failure.to_string());
    let text = failure.unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
    Fault::Refused(format!("{status}: {text}"))
}
