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
use super::body::{Asked, Route, StreamOptions};
use super::echo::Echo;
use super::fields::Fields;
use super::incoming::Incoming;
use super::lines::{Head, Lines};
use super::opened::{Merged, Opened, deadline_exceeded, stopped};
use super::refusal::Refusal;
use super::stream::{self, Leaving, TokenBody, Told};
use super::unary;
use super::unknown::IgnoredFields;
use super::waiting::{Beginning, Waiting, WaitingBody};
use crate::delivery::{DoorClock, Flush};
use crate::error::Error;
use crate::request::RequestId;
use crate::telemetry::{CountedRequest, Door, Lane, Origin, StreamCount};

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
            then on a refusal is an error record in the stream.",
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
) -> Result<Response, Refusal> {
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
            then on a refusal is an error record in the stream.",
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
) -> Result<Response, Refusal> {
    answer(&gateway, &id, request, Route::Chat).await
}

async fn answer(
    gateway: &Gateway,
    id: &RequestId,
    request: Request,
    route: Route,
) -> Result<Response, Refusal> {
    let counted = gateway.telemetry.request_admitted(Door::Http);
    let flush = request.extensions().get::<Flush>().cloned();
    let mut parsed = match Parsed::read(gateway, request, route).await {
        Ok(parsed) => parsed,
        Err(error) => return Err(refuse(gateway, counted, error)),
    };
    let ignored = std::mem::take(&mut parsed.ignored);
    ignored.count_in(&gateway.telemetry);
    let leaving = Leaving {
        clock: DoorClock::new(&gateway.telemetry, parsed.lane(), flush.clone()),
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
    parsed: Parsed,
    leaving: Leaving,
    counted: CountedRequest,
) -> Result<Response, Refusal> {
    let (names, stream) = (parsed.asked.names, parsed.stream);
    let route = parsed.route;
    let admitted = match Admitted::admit(gateway, id, parsed, counted.stream()).await {
        Ok(admitted) => admitted,
        Err(error) => return Err(refuse(gateway, counted, names.client_error(error))),
    };
    let mut beginning: Beginning = Box::pin(admitted.begin());
    let begun = match (gateway.headers_after, stream) {
        (Some(after), Some(stream)) => match timeout(after, &mut beginning).await {
            Ok(begun) => begun,
            Err(_) => {
                // Neither a comment nor a refusal has the model in it.
                let lines = Lines::new(stream.0, stream.1, head(route, id, ""));
                let waiting = Waiting::new(beginning, stream, Told::new(lines, names));
                let body = Body::new(WaitingBody::new(waiting, leaving, counted));
                return Ok(stream::response(body, stream.0));
            }
        },
        (None, _) | (_, None) => beginning.await,
    };
    match begun {
        Ok(begun) => begun.respond(leaving, counted).await,
        Err(error) => Err(refuse(gateway, counted, names.client_error(error))),
    }
}

/// Counts a request that is refused before anything was sent.
fn refuse(gateway: &Gateway, mut counted: CountedRequest, error: Error) -> Refusal {
    counted.ended(Err(&error));
    gateway.telemetry.refused(Door::Http, &error);
    error.into()
}

/// A request whose body is valid.
struct Parsed {
    route: Route,
    asked: Asked,
    /// The fields of the body that are unknown.
    ignored: IgnoredFields,
    /// The form of its stream, if it is to be one.
    stream: Option<(StreamFormat, StreamOptions)>,
    /// When the client no longer waits.
    deadline: Instant,
}

impl Parsed {
    async fn read(gateway: &Gateway, request: Request, route: Route) -> Result<Self, Error> {
        let incoming = Incoming::read(gateway, request).await?;
        let mut fields = Fields::parse(&incoming.body, gateway.unknown_fields)?;
        let (asked, default_format) = match route {
            Route::Completions => (CompletionsBody::parse(&mut fields)?, gateway.stream_format),
            // What every client of a chat reads.
            Route::Chat => (ChatBody::parse(&mut fields)?, StreamFormat::Sse),
        };
        let stream = match asked.stream {
            Some(options) => Some((negotiate(&incoming.headers, default_format)?, options)),
            None => None,
        };
        (gateway.open)()?;
        Ok(Self {
            route,
            asked,
            ignored: fields.into_ignored(),
            stream,
            deadline: incoming.deadline,
        })
    }

    /// The prompts that the answer repeats, where it does.
    ///
    /// # Errors
    /// When the answer would be too long.
    fn echo(&self, opened: &Opened) -> Result<Option<Echo>, Error> {
        if !self.asked.messages.iter().any(|message| message.echo) {
            return Ok(None);
        }
        let prompts = self.asked.messages.len();
        let echo = Echo::new(prompts, opened.choices() / prompts.max(1));
        if let Some(top) = self.asked.shown.logprobs {
            echo.check(opened.first().prompt_tokens, top)?;
        }
        Ok(Some(echo))
    }

    /// How the tokens of its answer leave.
    fn lane(&self) -> Lane {
        match self.stream {
            Some((StreamFormat::Ndjson, _)) => Lane::HttpNdjson,
            Some((StreamFormat::Sse, _)) => Lane::HttpSse,
            None => Lane::HttpUnary,
        }
    }
}

/// A request whose prompts are all admitted: checked, and in a queue.
struct Admitted {
    parsed: Parsed,
    merged: Merged,
    id: RequestId,
    /// Cancelled when the server waits no longer for the request.
    stopping: CancellationToken,
}

impl Admitted {
    /// Opens an RPC for each prompt, one after the other, so that the first prompt is first in the queue.
    async fn admit(
        gateway: &Gateway,
        id: &RequestId,
        parsed: Parsed,
        stream: StreamCount,
    ) -> Result<Self, Error> {
        let origin = Origin {
            lane: parsed.lane(),
            stream: Some(stream),
        };
        let admitting = async {
            let mut merged = Merged::new(parsed.asked.candidates);
            for message in &parsed.asked.messages {
                let left = parsed.deadline.saturating_duration_since(Instant::now());
                let events = gateway.cluster.complete(message, id, left, &origin);
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
    /// then a refusal has a status of its own.
    async fn begin(self) -> Result<Begun, Error> {
        let (deadline, stopping) = (self.parsed.deadline, self.stopping);
        let started =
            Opened::wait_for_start(self.merged, deadline + DEADLINE_GRACE, stopping.clone());
        let opened = in_time(deadline, &stopping, started).await?;
        let begun = Begun {
            head: head(self.parsed.route, &self.id, &opened.first().model),
            echo: self.parsed.echo(&opened)?,
            parsed: self.parsed,
            opened,
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
pub(super) struct Begun {
    parsed: Parsed,
    opened: Opened,
    head: Head,
    /// The prompts, where they are echoed.
    echo: Option<Echo>,
}

impl Begun {
    async fn respond(
        self,
        leaving: Leaving,
        mut counted: CountedRequest,
    ) -> Result<Response, Refusal> {
        if let Some(stream) = self.parsed.stream {
            let body = Body::new(self.into_body(stream, leaving, counted));
            return Ok(stream::response(body, stream.0));
        }
        let asked = &self.parsed.asked;
        let answer = unary::collect(self.opened, asked, self.echo, self.head).await;
        let answer = answer.map_err(|error| asked.names.client_error(error));
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
        leaving: Leaving,
        counted: CountedRequest,
    ) -> TokenBody {
        let Self {
            parsed,
            opened,
            head,
            echo,
        } = self;
        let is_chat = head.route == Route::Chat;
        let mut lines = Lines::new(format, options, head);
        if parsed.asked.shown.logprobs.is_some() {
            lines = lines.with_logprobs();
        }
        lines.begun(opened.first().prompt_tokens);
        let mut first = BytesMut::new();
        if is_chat {
            for choice in 0..parsed.asked.candidates {
                lines.role(&mut first, choice);
            }
        }
        let told = Told {
            echo,
            first,
            ..Told::new(lines, parsed.asked.names)
        };
        TokenBody::new(opened, told, leaving, counted)
    }
}

fn head(route: Route, id: &RequestId, model: &str) -> Head {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let kind = match route {
        Route::Completions => "cmpl",
        Route::Chat => "chatcmpl",
    };
    Head {
        route,
        id: format!("{kind}-{}", id.0),
        created: since_epoch.as_secs(),
        model: model.to_owned(),
    }
}
