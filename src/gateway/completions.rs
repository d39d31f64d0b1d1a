//! `POST /v1/completions` and `POST /v1/chat/completions`, from the request's head to the response's.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Extension, Request, State};
use axum::http::HeaderValue;
use axum::http::header::VARY;
use axum::response::Response;
use bytes::BytesMut;
use tokio::time::{Instant, timeout_at};

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
use super::stream::{Leaving, TokenBody, Told};
use super::unary;
use super::unknown::IgnoredFields;
use crate::delivery::{DoorClock, Flush};
use crate::error::Error;
use crate::request::RequestId;
use crate::telemetry::{CountedRequest, Door, Lane};

/// How long the engine may take to tell of a deadline that has passed before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// Completes prompts.
#[utoipa::path(
    post,
    path = "/v1/completions",
    request_body = CompletionsBody,
    responses((
        status = 200,
        description = "The completion; with `stream: true` its tokens, one a line or one an event.",
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
        description = "The answer; with `stream: true` its tokens, one a line or one an event.",
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
    let mut counted = gateway.telemetry.request_admitted(Door::Http);
    let flush = request.extensions().get::<Flush>().cloned();
    let begun = async {
        let parsed = Parsed::read(gateway, request, route).await?;
        parsed.ignored.count_in(&gateway.telemetry);
        Begun::begin(gateway, id, parsed).await
    };
    match begun.await {
        Ok(begun) => begun.respond(gateway, flush, counted).await,
        Err(error) => {
            counted.ended(Err(&error));
            gateway.telemetry.refused(Door::Http, &error);
            Err(error.into())
        }
    }
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

    /// How the tokens of its answer leave.
    fn lane(&self) -> Lane {
        match self.stream {
            Some((StreamFormat::Ndjson, _)) => Lane::HttpNdjson,
            Some((StreamFormat::Sse, _)) => Lane::HttpSse,
            None => Lane::HttpUnary,
        }
    }
}

/// A request of which a worker has begun.
struct Begun {
    parsed: Parsed,
    opened: Opened,
    head: Head,
}

impl Begun {
    async fn begin(gateway: &Gateway, id: &RequestId, parsed: Parsed) -> Result<Self, Error> {
        let opening = Opening {
            deadline: parsed.deadline,
            lane: parsed.lane(),
        };
        let opened = tokio::select! {
            opened = opening.open(gateway, &parsed.asked, id) => opened,
            () = gateway.stopping.cancelled() => Err(stopped()),
        };
        let opened = opened.map_err(|error| parsed.asked.names.client_error(error))?;
        Ok(Self {
            head: head(parsed.route, id, &opened),
            parsed,
            opened,
        })
    }

    async fn respond(
        self,
        gateway: &Gateway,
        flush: Option<Flush>,
        mut counted: CountedRequest,
    ) -> Result<Response, Refusal> {
        let asked = &self.parsed.asked;
        let is_echoed = asked.messages.iter().any(|message| message.echo);
        let echo = is_echoed.then(|| {
            let prompts = asked.messages.len();
            Echo::new(prompts, self.opened.choices() / prompts.max(1))
        });
        if let (Some(echo), Some(top)) = (&echo, asked.shown.logprobs) {
            let tokens = self.opened.first().prompt_tokens;
            if let Err(error) = echo.check(tokens, top) {
                counted.ended(Err(&error));
                gateway.telemetry.refused(Door::Http, &error);
                return Err(error.into());
            }
        }
        let Some((format, options)) = self.parsed.stream else {
            let answer = unary::collect(self.opened, asked, echo, self.head).await;
            let answer = answer.map_err(|error| asked.names.client_error(error));
            counted.ended(answer.as_ref().map(|_| ()));
            let mut response = answer?;
            let headers = response.headers_mut();
            headers.insert(VARY, HeaderValue::from_static("accept"));
            return Ok(self.parsed.ignored.name_in(response));
        };
        let told = self.told(format, options, echo);
        let clock = DoorClock::new(&gateway.telemetry, self.parsed.lane(), flush.clone());
        let leaving = Leaving { flush, clock };
        let response = TokenBody::new(self.opened, told, leaving, counted).into_response(format);
        Ok(self.parsed.ignored.name_in(response))
    }

    /// How the events of its stream are told.
    fn told(&self, format: StreamFormat, options: StreamOptions, echo: Option<Echo>) -> Told {
        let mut lines = Lines::new(format, options, self.head.clone());
        if self.parsed.asked.shown.logprobs.is_some() {
            lines = lines.with_logprobs();
        }
        lines.begun(self.opened.first().prompt_tokens);
        let mut first = BytesMut::new();
        if self.head.route == Route::Chat {
            for choice in 0..self.parsed.asked.candidates {
                lines.role(&mut first, choice);
            }
        }
        Told {
            lines,
            echo,
            names: self.parsed.asked.names,
            first,
        }
    }
}

/// How a request's RPCs are opened.
struct Opening {
    deadline: Instant,
    /// How its tokens will leave.
    lane: Lane,
}

impl Opening {
    /// Opens an RPC for each prompt, and waits until a worker has taken one of them: from then on there
    /// is something to stream, and until then a refusal has a status of its own.
    ///
    /// The RPCs are opened one after the other, so that the first prompt is first in the queue.
    async fn open(self, gateway: &Gateway, asked: &Asked, id: &RequestId) -> Result<Opened, Error> {
        let Self { deadline, lane } = self;
        let opening = async {
            let mut merged = Merged::new(asked.candidates);
            for message in &asked.messages {
                let left = deadline.saturating_duration_since(Instant::now());
                merged.push(gateway.cluster.complete(message, id, left, lane).await?);
            }
            let stopping = gateway.stopping.clone();
            Opened::wait_for_start(merged, deadline + DEADLINE_GRACE, stopping).await
        };
        let opened = timeout_at(deadline + DEADLINE_GRACE, opening).await;
        opened.unwrap_or_else(|_| Err(deadline_exceeded()))
    }
}

fn head(route: Route, id: &RequestId, opened: &Opened) -> Head {
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
        model: opened.first().model.clone(),
    }
}
