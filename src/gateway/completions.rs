//! `POST /v1/completions` and `POST /v1/chat/completions`.
//!
//! A request passes through four stages: [`BufferedRequest`], [`ParsedRequest`], [`AdmittedRequest`] and
//! [`StartedCompletion`]. The last becomes a streamed body or one JSON response.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::VARY;
use axum::response::Response;
use bytes::BytesMut;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Gateway;
use super::accept::{StreamFormat, negotiate};
use super::body::chat::ChatBody;
use super::body::completions::CompletionsBody;
use super::body::{ParsedBody, Route, StreamOptions};
use super::buffered_request::BufferedRequest;
use super::completion_stream::{CompletionStream, MergedStreams, deadline_exceeded};
use super::echo::Echo;
use super::error_response::ErrorResponse;
use super::fields::Fields;
use super::lines::{LineWriter, ResponseMetadata};
use super::queued_body::{QueuedBody, QueuedStream, StartFuture};
use super::response::{ChatCompletion, Completion, ServerSentEvent};
use super::stream::{self, StreamParts, TokenBody};
use super::unary::{self, Collecting};
use super::unknown::IgnoredFields;
use crate::cluster::CallContext;
use crate::context::RequestContext;
use crate::error::Error;
use crate::request::RequestId;
use crate::telemetry::ResponseFormat;

/// Extra time for the engine to report a passed deadline itself, before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// Completes prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionsBody,
    responses((
        status = 200,
        description = "The completion. With `stream: true`, one line or server-sent event per \
            token. The headers of a stream are sent when a worker starts the request, or after the \
            server's `--headers-after`. A later rejection is an error record in the stream.",
        content(
            (Completion = "application/json"),
            (String = "application/x-ndjson"),
            (ServerSentEvent = "text/event-stream"),
        ),
        headers(
            ("vary" = String, description = "`accept`."),
            ("cache-control" = String, description = "Streams only: disables caching."),
            ("x-accel-buffering" = String, description = "Streams only: disables buffering.")
        )
    ))
)]
pub(super) async fn complete(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    request: Request,
) -> Result<Response, ErrorResponse> {
    handle(&gateway, context, request, Route::Completions).await
}

/// Completes a chat.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatBody,
    responses((
        status = 200,
        description = "The completion. With `stream: true`, one line or server-sent event per \
            token. The headers of a stream are sent when a worker starts the request, or after the \
            server's `--headers-after`. A later rejection is an error record in the stream.",
        content(
            (ChatCompletion = "application/json"),
            (String = "application/x-ndjson"),
            (ServerSentEvent = "text/event-stream"),
        ),
        headers(
            ("vary" = String, description = "`accept`."),
            ("cache-control" = String, description = "Streams only: disables caching."),
            ("x-accel-buffering" = String, description = "Streams only: disables buffering.")
        )
    ))
)]
pub(super) async fn chat(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    request: Request,
) -> Result<Response, ErrorResponse> {
    handle(&gateway, context, request, Route::Chat).await
}

async fn handle(
    gateway: &Gateway,
    context: RequestContext,
    request: Request,
    route: Route,
) -> Result<Response, ErrorResponse> {
    let mut parsed = ParsedRequest::read(gateway, &context, request, route).await?;
    context.record().set_format(parsed.format());
    let ignored = std::mem::take(&mut parsed.ignored);
    ignored.count_in(&gateway.telemetry);
    let names = parsed.body.names;
    let response = complete_parsed(gateway, context, parsed).await;
    let response = response.map_err(|error| names.with_client_field_name(error))?;
    Ok(ignored.name_in(response))
}

/// Completes a parsed request. The headers of a stream are returned when a worker has started the request, or when
/// it has been queued for `headers_after`.
async fn complete_parsed(
    gateway: &Gateway,
    context: RequestContext,
    parsed: ParsedRequest,
) -> Result<Response, Error> {
    let (names, stream) = (parsed.body.names, parsed.stream);
    let route = parsed.route;
    let admitted = AdmittedRequest::admit(gateway, &context, parsed).await?;
    let mut start: StartFuture = Box::pin(admitted.wait_for_start());
    let started = match (gateway.headers_after, stream) {
        (Some(after), Some(stream)) => match timeout(after, &mut start).await {
            Ok(started) => started?,
            Err(_) => {
                // The model is not known yet. Keep-alives and error records do not contain it.
                let writer = LineWriter::new(stream.0, stream.1, metadata(route, context.id(), ""));
                let parts = StreamParts::new(writer, names, context);
                let body = Body::new(QueuedBody::new(QueuedStream::new(start, stream, parts)));
                return Ok(stream::response(body, stream.0));
            }
        },
        (None, _) | (_, None) => start.await?,
    };
    started.respond().await
}

/// A request with a valid body.
struct ParsedRequest {
    route: Route,
    body: ParsedBody,
    /// Unknown fields of the body.
    ignored: IgnoredFields,
    /// Format and options of the stream; `None` for a response that is not streamed.
    stream: Option<(StreamFormat, StreamOptions)>,
}

impl ParsedRequest {
    async fn read(
        gateway: &Gateway,
        context: &RequestContext,
        request: Request,
        route: Route,
    ) -> Result<Self, Error> {
        let request = BufferedRequest::read(context, request).await?;
        let mut fields = Fields::parse(&request.body, gateway.unknown_fields)?;
        let (body, default_format) = match route {
            Route::Completions => (CompletionsBody::parse(&mut fields)?, gateway.stream_format),
            // Chat clients expect server-sent events unless they ask for another format.
            Route::Chat => (ChatBody::parse(&mut fields)?, StreamFormat::Sse),
        };
        let stream = match body.stream {
            Some(options) => Some((negotiate(&request.headers, default_format)?, options)),
            None => None,
        };
        (gateway.check_accepting)()?;
        Ok(Self {
            route,
            body,
            ignored: fields.into_ignored(),
            stream,
        })
    }

    /// Prepares to repeat the prompts; `None` unless the request sets `echo`.
    ///
    /// # Errors
    /// If the response would be too large.
    fn echo(&self, stream: &CompletionStream) -> Result<Option<Echo>, Error> {
        if !self.body.messages.iter().any(|message| message.echo) {
            return Ok(None);
        }
        let prompts = self.body.messages.len();
        let echo = Echo::new(prompts, stream.choices() / prompts.max(1));
        if let Some(top) = self.body.response.logprobs {
            echo.check_logprobs(stream.first_started().prompt_tokens, top)?;
        }
        Ok(Some(echo))
    }

    fn format(&self) -> ResponseFormat {
        match self.stream {
            Some((StreamFormat::Ndjson, _)) => ResponseFormat::HttpNdjson,
            Some((StreamFormat::Sse, _)) => ResponseFormat::HttpSse,
            None => ResponseFormat::HttpUnary,
        }
    }
}

/// A request whose prompts have all been checked and queued by an engine.
struct AdmittedRequest {
    parsed: ParsedRequest,
    merged: MergedStreams,
    context: RequestContext,
    /// Cancelled when the server stops waiting for running requests.
    stopping: CancellationToken,
}

impl AdmittedRequest {
    /// Opens an RPC for each prompt, one after the other, so that the prompts are queued in order.
    async fn admit(
        gateway: &Gateway,
        context: &RequestContext,
        parsed: ParsedRequest,
    ) -> Result<Self, Error> {
        let call = CallContext::new(context);
        let admitting = async {
            let mut merged = MergedStreams::new(parsed.body.candidates);
            for message in &parsed.body.messages {
                merged.push(gateway.cluster.complete(message, &call).await?);
            }
            Ok(merged)
        };
        let stopping = gateway.stopping.clone();
        let merged = in_time(context.deadline(), &stopping, admitting).await?;
        Ok(Self {
            parsed,
            merged,
            context: context.clone(),
            stopping,
        })
    }

    /// Waits until a worker starts one of the prompts. An error before that is a response with its own status;
    /// afterwards it can only be an error record in the stream.
    async fn wait_for_start(self) -> Result<StartedCompletion, Error> {
        let (deadline, stopping) = (self.context.deadline(), self.stopping);
        let stream = CompletionStream::wait_for_start(
            self.merged,
            deadline + DEADLINE_GRACE,
            stopping.clone(),
        );
        let stream = in_time(deadline, &stopping, stream).await?;
        let started = stream.first_started();
        // An engine reports the name under which it serves the model.
        self.context.record().set_model(&started.model);
        self.context.started(started.prompt_tokens);
        Ok(StartedCompletion {
            metadata: metadata(self.parsed.route, self.context.id(), &started.model),
            echo: self.parsed.echo(&stream)?,
            parsed: self.parsed,
            stream,
            context: self.context,
        })
    }
}

/// Runs `future` until the server stops, or [`DEADLINE_GRACE`] after the deadline.
async fn in_time<T>(
    deadline: Instant,
    stopping: &CancellationToken,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        result = timeout_at(deadline + DEADLINE_GRACE, future) => {
            result.unwrap_or_else(|_| Err(deadline_exceeded()))
        }
        () = stopping.cancelled() => Err(Error::shutting_down()),
    }
}

/// A request that a worker has started.
pub(super) struct StartedCompletion {
    parsed: ParsedRequest,
    stream: CompletionStream,
    metadata: ResponseMetadata,
    /// Prompts to repeat, if the request sets `echo`.
    echo: Option<Echo>,
    context: RequestContext,
}

impl StartedCompletion {
    async fn respond(self) -> Result<Response, Error> {
        if let Some(stream) = self.parsed.stream {
            let body = Body::new(self.into_body(stream));
            return Ok(stream::response(body, stream.0));
        }
        let collecting = Collecting {
            stream: self.stream,
            echo: self.echo,
            metadata: self.metadata,
            context: self.context,
        };
        let mut response = unary::collect(collecting, &self.parsed.body).await?;
        let headers = response.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept"));
        Ok(response)
    }

    /// The body of the streamed response.
    pub(super) fn into_body(self, (format, options): (StreamFormat, StreamOptions)) -> TokenBody {
        let Self {
            parsed,
            stream,
            metadata,
            echo,
            context,
        } = self;
        let is_chat = metadata.route == Route::Chat;
        let mut writer = LineWriter::new(format, options, metadata);
        if parsed.body.response.logprobs.is_some() {
            writer = writer.with_logprobs();
        }
        writer.add_prompt(stream.first_started().prompt_tokens);
        let mut preamble = BytesMut::new();
        if is_chat {
            for choice in 0..parsed.body.candidates {
                writer.role(&mut preamble, choice);
            }
        }
        let parts = StreamParts {
            echo,
            preamble,
            ..StreamParts::new(writer, parsed.body.names, context)
        };
        TokenBody::new(stream, parts)
    }
}

fn metadata(route: Route, id: &RequestId, model: &str) -> ResponseMetadata {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let prefix = match route {
        Route::Completions => "cmpl",
        Route::Chat => "chatcmpl",
    };
    ResponseMetadata {
        route,
        id: format!("{prefix}-{}", id.0),
        created: since_epoch.as_secs(),
        model: model.to_owned(),
    }
}
