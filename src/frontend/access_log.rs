//! The tracing span of a request, and the request's line in the access log.
//!
//! The handler and the response body run in the span, so every line that they log has the request's id. The line in
//! the access log is written when the response body has ended or was dropped.

use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::response::Response;
use http_body::{Body as _, Frame, SizeHint};
use tracing::field::Empty;
use tracing::{Instrument, Span, Value};

use super::layers::Layers;
use super::response;
use crate::context::RequestContext;
use crate::error::ErrorKind;
use crate::logging::REQUEST_SPAN_TARGET;
use crate::runner::monotonic_ns;
use crate::telemetry::{Api, RouteKind, outcome_label};

/// Tracing target of the access log's lines.
const TARGET: &str = "tokenway::access";

/// Runs a request in its span, and logs it when it ends.
pub(super) async fn log_request(
    layers: &Layers,
    context: &RequestContext,
    handled: impl Future<Output = Response>,
) -> Response {
    // `logging` enables this target in every log filter, so every line about the request has the request's id.
    let span = tracing::error_span!(
        target: REQUEST_SPAN_TARGET,
        "request",
        id = %context.id().0,
        api = context.api().label(),
        route = context.route().name,
    );
    // If the client disconnects, the handler is dropped before `end`, so that the handler can still report to the
    // context.
    let mut end = RequestEnd {
        context: context.clone(),
        is_logged: layers.settings.access_log,
        status: None,
        bytes: 0,
        is_over: false,
    };
    let response = handled.instrument(span.clone()).await;
    end.report_response(&response);
    response.map(|body| {
        let body = LoggedBody { body, span, end };
        Body::new(body.ended_if_empty())
    })
}

/// Counts and logs the end of a request, once.
struct RequestEnd {
    context: RequestContext,
    is_logged: bool,
    status: Option<StatusSent>,
    /// Number of bytes of the response body sent so far.
    bytes: u64,
    is_over: bool,
}

/// The HTTP or gRPC status of a response, as far as it has been sent.
#[derive(Clone, Copy)]
enum StatusSent {
    Http(u16),
    Grpc(&'static str),
}

impl RequestEnd {
    /// Reports the response's status to the context, before the body is sent.
    fn report_response(&mut self, response: &Response) {
        let context = &self.context;
        self.status = match context.api() {
            Api::Http => Some(StatusSent::Http(response.status().as_u16())),
            Api::Grpc => response::grpc_status(response.headers()).map(StatusSent::Grpc),
        };
        match response::rejection_kind(context.api(), response) {
            // The client has disconnected. The end of the response counts the cancellation.
            Some(ErrorKind::Cancelled) => {}
            Some(kind) => context.record_rejection(kind),
            None if context.route().kind == RouteKind::Completion => {}
            None => context.record_end(Ok(())),
        }
    }

    fn report_end(&mut self) {
        if std::mem::replace(&mut self.is_over, true) {
            return;
        }
        self.context.record_close();
        let cancelled = ErrorKind::Cancelled;
        if self.status.is_none()
            && self.context.api() == Api::Http
            && self.context.record().outcome() == Some(Err(cancelled))
        {
            // The client disconnected before it got a status.
            self.status = Some(StatusSent::Http(cancelled.mapping().http.as_u16()));
        }
        if self.is_logged {
            self.log();
        }
    }

    /// Returns the status as a number or a name.
    fn status(&self) -> &dyn Value {
        match &self.status {
            None => &Empty,
            Some(StatusSent::Http(status)) => status,
            Some(StatusSent::Grpc(name)) => name,
        }
    }

    fn log(&self) {
        let (context, record) = (&self.context, self.context.record());
        let outcome = record.outcome().map_or("unknown", outcome_label);
        let usage = record.usage();
        // Rounded to microseconds, so that no digits of floating-point error appear.
        let milliseconds = |ns| (Duration::from_nanos(ns).as_secs_f64() * 1e6).round() / 1e3;
        // tracing's macros need a constant level.
        macro_rules! line {
            ($level:ident) => {
                tracing::event!(
                    target: TARGET,
                    parent: None,
                    tracing::Level::$level,
                    id = %context.id().0,
                    api = context.api().label(),
                    route = context.route().name,
                    key = record.key().map(|key| key.as_str()),
                    model = Some(record.model_label()).filter(|model| *model != "none"),
                    status = self.status(),
                    outcome,
                    prompt_tokens = usage.map(|usage| usage.prompt),
                    completion_tokens = usage.map(|usage| usage.completion),
                    queue_ms = record.queue_ns().map(milliseconds),
                    resumed = record.resumption(),
                    first_token_ms = record.first_token_ns().map(milliseconds),
                    total_ms = milliseconds(record.age_ns(monotonic_ns())),
                    bytes = self.bytes,
                    "request"
                )
            };
        }
        match context.route().kind {
            RouteKind::Probe => line!(DEBUG),
            RouteKind::Completion | RouteKind::Unary | RouteKind::Admin | RouteKind::Unmatched => {
                line!(INFO)
            }
        }
    }
}

impl Drop for RequestEnd {
    fn drop(&mut self) {
        self.report_end();
    }
}

/// A response body that is polled in the span of its request. The request ends with the last frame of the body.
struct LoggedBody {
    body: Body,
    span: Span,
    end: RequestEnd,
}

impl LoggedBody {
    /// Ends the request at once if the body is empty, because hyper may never poll an empty body.
    fn ended_if_empty(mut self) -> Self {
        if self.body.is_end_stream() {
            self.end.report_end();
        }
        self
    }
}

impl http_body::Body for LoggedBody {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        let this = self.get_mut();
        let entered = this.span.enter();
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        drop(entered);
        if let Some(Ok(frame)) = &frame {
            if let Some(data) = frame.data_ref() {
                this.end.bytes += u64::try_from(data.len()).unwrap_or(0);
            } else if let Some(status) = frame.trailers_ref().and_then(response::grpc_status) {
                this.end.status = Some(StatusSent::Grpc(status));
            }
        }
        // A body of known length is not polled again after its last frame.
        if !matches!(frame, Some(Ok(_))) || this.body.is_end_stream() {
            this.end.report_end();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for LoggedBody {
    fn drop(&mut self) {
        let _entered = self.span.enter();
        // The handler's body reports to the context when it is dropped, so it must be dropped before `end`.
        self.body = Body::empty();
    }
}
