//! `POST /v1/completions` and `POST /v1/chat/completions`, from the request's head to the response's.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::body::Body;
use axum::extract::{Extension, Request, State};
use axum::http::HeaderValue;
use axum::http::header::VARY;
use axum::response::Response;
use bytes::BytesMut;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::Gateway;
use super::accept::{StreamFormat, negotiate};
use super::answer::{ChatCompletion, Completion, ServerSentEvent};
use super::body::chat::ChatBody;
use super::body::completions::CompletionsBody;
use super::body::{ParsedBody, Route, StreamOptions};
use super::buffered_request::BufferedRequest;
use super::completion_stream::{CompletionStream, MergedStreams, deadline_exceeded, stopped};
use super::echo::Echo;
use super::error_response::ErrorResponse;
use super::fields::Fields;
use super::lines::{LineWriter, ResponseMetadata};
use super::queued_body::{QueuedBody, QueuedStream, StartFuture};
use super::stream::{self, DeliveryTracker, StreamParts, TokenBody};
use super::unary;
use super::unknown::IgnoredFields;
use crate::delivery::{DeliveryTimer, FlushHandle};
use crate::error::Error;
use crate::request::RequestId;
use crate::telemetry::{CountedRequest, DeliveryContext, Frontend, ResponseFormat, StreamCount};

/// How long the engine may take to tell of a deadline that has passed before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// Completes prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionsBody,
    responses((
        status = 200,
        description = "The completion; with `stream: true` its tokens, one a line or one an event. The headers \
            of a stream are sent when a worker begins, or after the server's `--headers-after`: from \
            then on a error_response is an error record in the stream.",
        content(
            (Completion = "application/json"),
            (String = "application/x-ndjson"),
            (ServerSentEvent = "text/event-stream"),
        ),
        headers(
            ("vary" = String, description = "`accept`."),
            ("cache-control" = String, description = "Of a stream: that no proxy keeps it."),
            ("x-accel-buffering" = String, description = "Of a stream: that no proxy holds it up.")
        )
    ))
)]
pub(super) async fn complete(
    State(gateway): State<Arc<Gateway>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    answer(&gateway, &id, request, Route::Completions).await
}

/// Goes on with a conversation.
#[utoipa::path(
    post,
    path = "/v1/chat/completions",
    request_body = ChatBody,
    responses((
        status = 200,
        description = "The answer; with `stream: true` its tokens, one a line or one an event. The headers \
            of a stream are sent when a worker begins, or after the server's `--headers-after`: from \
            then on a error_response is an error record in the stream.",
        content(
            (ChatCompletion = "application/json"),
            (String = "application/x-ndjson"),
            (ServerSentEvent = "text/event-stream"),
        ),
        headers(
            ("vary" = String, description = "`accept`."),
            ("cache-control" = String, description = "Of a stream: that no proxy keeps it."),
            ("x-accel-buffering" = String, description = "Of a stream: that no proxy holds it up.")
        )
    ))
)]
pub(super) async fn chat(
    State(gateway): State<Arc<Gateway>>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    answer(&gateway, &id, request, Route::Chat).await
}

async fn answer(
    gateway: &Gateway,
    id: &RequestId,
    request: Request,
    route: Route,
) -> Result<Response, ErrorResponse> {
    let counted = gateway.telemetry.track_request(Frontend::Http);
    let flush = request.extensions().get::<FlushHandle>().cloned();
    let mut parsed = match ParsedRequest::read(gateway, request, route).await {
        Ok(parsed) => parsed,
        Err(error) => return Err(refuse(gateway, counted, error)),
    };
    let ignored = std::mem::take(&mut parsed.ignored);
    ignored.count_in(&gateway.telemetry);
    let leaving = DeliveryTracker {
        clock: DeliveryTimer::new(&gateway.telemetry, parsed.format(), flush.clone()),
        flush,
    };
    let response = respond(gateway, id, parsed, leaving, counted).await?;
    Ok(ignored.name_in(response))
}

/// Answers a request whose body is valid. The headers of a stream are sent when a worker has begun, or when the
/// request has waited for `headers_after`.
async fn respond(
    gateway: &Gateway,
    id: &RequestId,
    parsed: ParsedRequest,
    leaving: DeliveryTracker,
    counted: CountedRequest,
) -> Result<Response, ErrorResponse> {
    let (names, stream) = (parsed.body.names, parsed.stream);
    let route = parsed.route;
    let admitted = match AdmittedRequest::admit(gateway, id, parsed, counted.stream()).await {
        Ok(admitted) => admitted,
        Err(error) => {
            return Err(refuse(
                gateway,
                counted,
                names.with_client_field_name(error),
            ));
        }
    };
    let mut beginning: StartFuture = Box::pin(admitted.begin());
    let begun = match (gateway.headers_after, stream) {
        (Some(after), Some(stream)) => match timeout(after, &mut beginning).await {
            Ok(begun) => begun,
            Err(_) => {
                // Neither a comment nor a error_response has the model in it.
                let lines = LineWriter::new(stream.0, stream.1, head(route, id, ""));
                let queued_body =
                    QueuedStream::new(beginning, stream, StreamParts::new(lines, names));
                let body = Body::new(QueuedBody::new(queued_body, leaving, counted));
                return Ok(stream::response(body, stream.0));
            }
        },
        (None, _) | (_, None) => beginning.await,
    };
    match begun {
        Ok(begun) => begun.respond(leaving, counted).await,
        Err(error) => Err(refuse(
            gateway,
            counted,
            names.with_client_field_name(error),
        )),
    }
}

/// Counts a request that is refused before anything was sent.
fn refuse(gateway: &Gateway, mut counted: CountedRequest, error: Error) -> ErrorResponse {
    counted.ended(Err(&error));
    gateway.telemetry.refused(Frontend::Http, &error);
    error.into()
}

/// A request whose body is valid.
struct ParsedRequest {
    route: Route,
    body: ParsedBody,
    /// The fields of the body that are unknown.
    ignored: IgnoredFields,
    /// The form of its stream, if it is to be one.
    stream: Option<(StreamFormat, StreamOptions)>,
    /// When the client no longer waits.
    deadline: Instant,
}

impl ParsedRequest {
    async fn read(gateway: &Gateway, request: Request, route: Route) -> Result<Self, Error> {
        let buffered_request = BufferedRequest::read(gateway, request).await?;
        let mut fields = Fields::parse(&buffered_request.body, gateway.unknown_fields)?;
        let (body, default_format) = match route {
            Route::Completions => (CompletionsBody::parse(&mut fields)?, gateway.stream_format),
            // What every client of a chat reads.
            Route::Chat => (ChatBody::parse(&mut fields)?, StreamFormat::Sse),
        };
        let stream = match body.stream {
            Some(options) => Some((
                negotiate(&buffered_request.headers, default_format)?,
                options,
            )),
            None => None,
        };
        (gateway.open)()?;
        Ok(Self {
            route,
            body,
            ignored: fields.into_ignored(),
            stream,
            deadline: buffered_request.deadline,
        })
    }

    /// The prompts that the answer repeats, where it does.
    ///
    /// # Errors
    /// When the answer would be too long.
    fn echo(&self, completion_stream: &CompletionStream) -> Result<Option<Echo>, Error> {
        if !self.body.messages.iter().any(|message| message.echo) {
            return Ok(None);
        }
        let prompts = self.body.messages.len();
        let echo = Echo::new(prompts, completion_stream.choices() / prompts.max(1));
        if let Some(top) = self.body.response.logprobs {
            echo.check(completion_stream.first().prompt_tokens, top)?;
        }
        Ok(Some(echo))
    }

    /// How the tokens of its answer leave.
    fn format(&self) -> ResponseFormat {
        match self.stream {
            Some((StreamFormat::Ndjson, _)) => ResponseFormat::HttpNdjson,
            Some((StreamFormat::Sse, _)) => ResponseFormat::HttpSse,
            None => ResponseFormat::HttpUnary,
        }
    }
}

/// A request whose prompts are all admitted: checked, and in a queue.
struct AdmittedRequest {
    parsed: ParsedRequest,
    merged: MergedStreams,
    id: RequestId,
    /// Cancelled when the server waits no longer for the request.
    stopping: CancellationToken,
}

impl AdmittedRequest {
    /// Opens an RPC for each prompt, one after the other, so that the first prompt is first in the queue.
    async fn admit(
        gateway: &Gateway,
        id: &RequestId,
        parsed: ParsedRequest,
        stream: StreamCount,
    ) -> Result<Self, Error> {
        let delivery_context = DeliveryContext {
            format: parsed.format(),
            stream: Some(stream),
        };
        let admitting = async {
            let mut merged = MergedStreams::new(parsed.body.candidates);
            for message in &parsed.body.messages {
                let left = parsed.deadline.saturating_duration_since(Instant::now());
                let events = gateway
                    .cluster
                    .complete(message, id, left, &delivery_context);
                merged.push(events.await?);
            }
            Ok(merged)
        };
        let stopping = gateway.stopping.clone();
        let merged = in_time(parsed.deadline, &stopping, admitting).await?;
        Ok(Self {
            parsed,
            merged,
            id: id.clone(),
            stopping,
        })
    }

    /// Waits until a worker has taken one of the prompts: from then on there is something to stream, and until
    /// then a error_response has a status of its own.
    async fn begin(self) -> Result<StartedCompletion, Error> {
        let (deadline, stopping) = (self.parsed.deadline, self.stopping);
        let started = CompletionStream::wait_for_start(
            self.merged,
            deadline + DEADLINE_GRACE,
            stopping.clone(),
        );
        let completion_stream = in_time(deadline, &stopping, started).await?;
        let begun = StartedCompletion {
            head: head(
                self.parsed.route,
                &self.id,
                &completion_stream.first().model,
            ),
            echo: self.parsed.echo(&completion_stream)?,
            parsed: self.parsed,
            completion_stream,
        };
        Ok(begun)
    }
}

/// Gives up where the server stops, or where the engine does not tell of a deadline that has passed.
async fn in_time<T>(
    deadline: Instant,
    stopping: &CancellationToken,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        answer = timeout_at(deadline + DEADLINE_GRACE, answer) => {
            answer.unwrap_or_else(|_| Err(deadline_exceeded()))
        }
        () = stopping.cancelled() => Err(stopped()),
    }
}

/// A request of which a worker has begun.
pub(super) struct StartedCompletion {
    parsed: ParsedRequest,
    completion_stream: CompletionStream,
    head: ResponseMetadata,
    /// The prompts, where they are echoed.
    echo: Option<Echo>,
}

impl StartedCompletion {
    async fn respond(
        self,
        leaving: DeliveryTracker,
        mut counted: CountedRequest,
    ) -> Result<Response, ErrorResponse> {
        if let Some(stream) = self.parsed.stream {
            let body = Body::new(self.into_body(stream, leaving, counted));
            return Ok(stream::response(body, stream.0));
        }
        let body = &self.parsed.body;
        let answer = unary::collect(self.completion_stream, body, self.echo, self.head).await;
        let answer = answer.map_err(|error| body.names.with_client_field_name(error));
        counted.ended(answer.as_ref().map(|_| ()));
        let mut response = answer?;
        let headers = response.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept"));
        Ok(response)
    }

    /// The body of its stream, in this form.
    pub(super) fn into_body(
        self,
        (format, options): (StreamFormat, StreamOptions),
        leaving: DeliveryTracker,
        counted: CountedRequest,
    ) -> TokenBody {
        let Self {
            parsed,
            completion_stream,
            head,
            echo,
        } = self;
        let is_chat = head.route == Route::Chat;
        let mut lines = LineWriter::new(format, options, head);
        if parsed.body.response.logprobs.is_some() {
            lines = lines.with_logprobs();
        }
        lines.begun(completion_stream.first().prompt_tokens);
        let mut first = BytesMut::new();
        if is_chat {
            for choice in 0..parsed.body.candidates {
                lines.role(&mut first, choice);
            }
        }
        let told = StreamParts {
            echo,
            first,
            ..StreamParts::new(lines, parsed.body.names)
        };
        TokenBody::new(completion_stream, told, leaving, counted)
    }
}

fn head(route: Route, id: &RequestId, model: &str) -> ResponseMetadata {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let kind = match route {
        Route::Completions => "cmpl",
        Route::Chat => "chatcmpl",
    };
    ResponseMetadata {
        route,
        id: format!("{kind}-{}", id.0),
        created: since_epoch.as_secs(),
        model: model.to_owned(),
    }
}
