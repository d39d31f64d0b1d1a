//! `POST /v1/completions`, from the request's head to the response's.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Extension, Request, State};
use axum::http::HeaderMap;
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE, VARY};
use axum::response::Response;
use bytes::Bytes;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use tokio::time::{Instant, timeout_at};

use super::accept::{StreamFormat, negotiate};
use super::body::CompletionBody;
use super::lines::{Head, Lines};
use super::opened::{Merged, Opened, deadline_exceeded, stopped};
use super::refusal::Refusal;
use super::stream::{Leaving, TokenBody};
use super::unary;
use super::{BODY_LIMIT, Gateway};
use crate::delivery::{DoorClock, Flush};
use crate::error::{Error, ErrorKind};
use crate::request::{LONGEST_TIMEOUT, RequestId};
use crate::telemetry::{Door, Lane};

/// How long the engine may take to tell of a deadline that has passed before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// Answers a request for completions.
pub(super) async fn complete(
    State(gateway): State<Gateway>,
    Extension(id): Extension<RequestId>,
    request: Request,
) -> Result<Response, Refusal> {
    let mut counted = gateway.telemetry.request_admitted(Door::Http);
    let arrived = Instant::now();
    let flush = request.extensions().get::<Flush>().cloned();
    let answer = async {
        let timeout = request_timeout(request.headers())?.unwrap_or(gateway.request_timeout);
        let accept = request.headers().clone();
        let body = timeout_at(arrived + timeout, read_body(request)).await;
        let body = body.map_err(|_| deadline_exceeded())??;
        let body = CompletionBody::parse(&body)?;
        let format = body
            .stream
            .map(|options| Ok::<_, Error>((negotiate(&accept, gateway.stream_format)?, options)))
            .transpose()?;
        (gateway.open)()?;
        let lane = match format {
            Some((StreamFormat::Ndjson, _)) => Lane::HttpNdjson,
            Some((StreamFormat::Sse, _)) => Lane::HttpSse,
            None => Lane::HttpUnary,
        };
        let opening = Opening {
            deadline: arrived + timeout,
            lane,
        };
        let opened = tokio::select! {
            opened = opening.open(&gateway, &body, &id) => opened?,
            () = gateway.stopping.cancelled() => return Err(stopped()),
        };
        Ok((opened, format, lane))
    };
    let (opened, format, lane) = match answer.await {
        Ok(opened) => opened,
        Err(error) => {
            counted.ended(Err(&error));
            gateway.telemetry.refused(Door::Http, &error);
            return Err(error.into());
        }
    };
    let head = head(&id, &opened);
    match format {
        Some((format, options)) => {
            let lines = Lines::new(format, options, head);
            let clock = DoorClock::new(&gateway.telemetry, lane, flush.clone());
            let leaving = Leaving { flush, clock };
            Ok(TokenBody::new(opened, lines, leaving, counted).into_response(format))
        }
        None => {
            let answer = unary::collect(opened, head).await;
            counted.ended(answer.as_ref().map(|_| ()));
            let mut response = super::json_response(&answer?);
            let headers = response.headers_mut();
            headers.insert(VARY, HeaderValue::from_static("accept"));
            Ok(response)
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
    async fn open(
        self,
        gateway: &Gateway,
        body: &CompletionBody,
        id: &RequestId,
    ) -> Result<Opened, Error> {
        let Self { deadline, lane } = self;
        let opening = async {
            let mut merged = Merged::new(body.choices_per_prompt);
            for message in &body.messages {
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

fn head(id: &RequestId, opened: &Opened) -> Head {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    Head {
        id: format!("cmpl-{}", id.0),
        created: since_epoch.as_secs(),
        model: opened.model().to_owned(),
    }
}

/// The client's own limit, in seconds.
fn request_timeout(headers: &HeaderMap) -> Result<Option<Duration>, Error> {
    const NAME: &str = "x-request-timeout";
    let Some(value) = headers.get(NAME) else {
        return Ok(None);
    };
    let seconds = value
        .to_str()
        .ok()
        .and_then(|text| text.parse::<f64>().ok());
    seconds
        .filter(|seconds| *seconds > 0.0)
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .map(|timeout| Some(timeout.min(LONGEST_TIMEOUT)))
        .ok_or_else(|| {
            Error::invalid_value(
                NAME,
                "x-request-timeout must be a number of seconds above 0.",
            )
        })
}

async fn read_body(request: Request) -> Result<Bytes, Error> {
    check_content_type(request.headers())?;
    let declared = request
        .headers()
        .get(CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok());
    if declared
        .and_then(|text| text.parse::<u64>().ok())
        .is_some_and(is_too_large)
    {
        return Err(too_large());
    }
    match Limited::new(request.into_body(), BODY_LIMIT)
        .collect()
        .await
    {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(too_large()),
        Err(error) => {
            tracing::debug!(%error, "a request's body could not be read");
            Err(Error::new(
                ErrorKind::InvalidJson,
                "The body could not be read to its end.",
            ))
        }
    }
}

fn is_too_large(length: u64) -> bool {
    usize::try_from(length).map_or(true, |length| length > BODY_LIMIT)
}

fn check_content_type(headers: &HeaderMap) -> Result<(), Error> {
    let content_type = headers
        .get(CONTENT_TYPE)
        .and_then(|value| value.to_str().ok());
    let essence = content_type
        .unwrap_or("")
        .split(';')
        .next()
        .unwrap_or("")
        .trim();
    if essence.eq_ignore_ascii_case("application/json") {
        return Ok(());
    }
    let message = "The body must be declared as content-type: application/json.";
    Err(Error::new(ErrorKind::UnsupportedMediaType, message))
}

fn too_large() -> Error {
    let message = format!("The body is larger than {BODY_LIMIT} bytes.");
    Error::new(ErrorKind::RequestTooLarge, message)
}
