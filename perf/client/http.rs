//! The HTTP door's client: HTTP/1.1 on a connection of its own, one JSON object on each line.

use std::pin::pin;

use futures_util::future::{Either, select};
use http::header::{ACCEPT, CONTENT_TYPE, HOST};
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokenway::runner::monotonic_ns;

use super::lines::{Lines, error_text};
use super::{
    LlmStreamingClient, PROMPT, ReadClock, Received, StreamError, StreamRequest, connect,
    with_causes,
};
use crate::arguments::ServerUrl;

const NDJSON: &str = "application/x-ndjson";

/// How much of a refusal is read.
const REFUSAL: usize = 64 * 1024;

/// A client of the HTTP door.
pub(crate) struct HttpStreamingClient {
    url: ServerUrl,
}

impl HttpStreamingClient {
    /// A client of the door there.
    pub(crate) fn new(url: ServerUrl) -> Self {
        Self { url }
    }

    fn request(&self, request: &StreamRequest) -> Result<Request<Full<Bytes>>, StreamError> {
        let mut body = json!({
            "prompt": PROMPT,
            "max_tokens": request.tokens,
            "stream": true,
            "stream_options": {"include_stamps": true},
        });
        if let Some(model) = &request.model {
            body["model"] = json!(model);
        }
        Request::post(self.url.path("/v1/completions"))
            .header(HOST, &self.url.authority)
            .header(CONTENT_TYPE, "application/json")
            .header(ACCEPT, NDJSON)
            .body(Full::new(body.to_string().into()))
            .map_err(|error| StreamError::NoAnswer(error.to_string()))
    }
}

impl LlmStreamingClient for HttpStreamingClient {
    const DOOR: &'static str = "HTTP";

    async fn stream(
        &self,
        request: &StreamRequest,
        received: &mut Received,
    ) -> Result<(), StreamError> {
        let request = self.request(request)?;
        let (socket, clock) = connect(&self.url).await?;
        let (sender, connection) = http1::handshake(TokioIo::new(socket))
            .await
            .map_err(|error| StreamError::NoAnswer(with_causes(&error)))?;
        let exchange = exchange(sender, request, &clock, received);
        // Both in one task, so that no token waits for another task to wake up. When the connection
        // has ended there is still what it read.
        match select(pin!(exchange), pin!(connection)).await {
            Either::Left((ended, _)) => ended,
            Either::Right((_, exchange)) => exchange.await,
        }
    }
}

async fn exchange(
    mut sender: SendRequest<Full<Bytes>>,
    request: Request<Full<Bytes>>,
    clock: &ReadClock,
    received: &mut Received,
) -> Result<(), StreamError> {
    received.requested_at(monotonic_ns());
    let response = sender
        .send_request(request)
        .await
        .map_err(|error| StreamError::NoAnswer(with_causes(&error)))?;
    if response.status() != StatusCode::OK {
        return Err(refusal(response).await);
    }
    let content_type = response.headers().get(CONTENT_TYPE);
    let content_type = content_type.map_or("", |value| value.to_str().unwrap_or("?"));
    if !content_type.starts_with(NDJSON) {
        return Err(StreamError::WrongForm(content_type.to_owned()));
    }
    let mut body = response.into_body();
    let mut lines = Lines::default();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| received.cut_off(with_causes(&error)))?;
        let received_ns = clock.last_read_ns();
        if let Some(data) = frame.data_ref() {
            lines.read(data, received_ns, received)?;
        }
    }
    lines.end(received)
}

/// What a server says that will not stream.
async fn refusal(response: Response<Incoming>) -> StreamError {
    let status = response.status();
    let body = Limited::new(response.into_body(), REFUSAL).collect().await;
    let body = body.map(|body| body.to_bytes()).unwrap_or_default();
    let message = error_text(&body).unwrap_or_else(|| String::from_utf8_lossy(&body).into_owned());
    StreamError::Refused(format!("{status}: {message}"))
}
