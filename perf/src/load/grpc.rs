//! A stream over gRPC: HTTP/2 by the crate `h2`, and no more of gRPC than the measurement needs.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, Uri};
use prost::Message;
use tokio::time::timeout;

use super::consumer::Consumer;
use super::messages::Messages;
use super::session::Shared;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{CompletionRequest, ReadClock, connect, framed};

/// HTTP/2 windows that never hold up a client that keeps reading.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 28;

const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection. Its clones share it.
#[derive(Clone)]
pub(super) struct Connection {
    requests: SendRequest<Bytes>,
    clock: ReadClock,
    method: Uri,
}

impl Connection {
    /// Opens a connection, which a task of this thread drives until the session ends.
    pub(super) async fn open(url: &ServerUrl) -> Result<Self, Fault> {
        let method = format!("{url}/tokenway.v1.Inference/Complete");
        let method = method.parse();
        let method = method.map_err(|_| Fault::Malformed(url.to_string()))?;
        let clock = ReadClock::default();
        let socket = clock.timing(connect(url).await?);
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let opened = timeout(HANDSHAKE_TIMEOUT, builder.handshake(socket)).await;
        let timed_out = |_| Fault::TimedOut(HANDSHAKE_TIMEOUT.as_secs());
        let (requests, connection) = opened.map_err(timed_out)??;
        // Its result is dropped: the streams under way report a broken connection.
        tokio::task::spawn_local(connection);
        Ok(Self {
            requests,
            clock,
            method,
        })
    }

    /// Makes a request.
    pub(super) async fn request(
        &self,
        shared: &Shared,
        consumer: &mut impl Consumer,
    ) -> Result<(), Fault> {
        let request = Request::post(self.method.clone())
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .expect("the request is valid");
        let mut requests = self.requests.clone().ready().await?;
        let (response, mut upload) = requests.send_request(request, false)?;
        upload.send_data(shared.request.clone(), true)?;
        let response = response.await?;
        check_status(response.headers())?;
        let mut body = response.into_body();
        shared.figures.borrow_mut().answered += 1;
        let mut messages = Messages::default();
        while let Some(piece) = body.data().await {
            let piece = piece?;
            body.flow_control().release_capacity(piece.len())?;
            let received_ns = self.clock.last_read_ns();
            let mut figures = shared.figures.borrow_mut();
            figures.read(piece.len());
            messages.read(&piece, received_ns, consumer, &mut figures)?;
        }
        if let Some(trailers) = body.trailers().await? {
            check_status(&trailers)?;
        }
        if messages.has_finished() {
            return Ok(());
        }
        Err(Fault::cut_off(consumer.count(), "its summary"))
    }
}

/// Checks the status. A refusal has it in its headers, a stream in its trailers.
fn check_status(headers: &HeaderMap) -> Result<(), Fault> {
    let text = |name| {
        let value = headers.get(name)?;
        Some(String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    match text("grpc-status").as_deref() {
        None | Some("0") => Ok(()),
        Some(status) => {
            let message = text("grpc-message").unwrap_or_default();
            Err(Fault::Refused(format!("gRPC status {status}: {message}")))
        }
    }
}

/// The request as it is written to a stream.
pub(super) fn request(completion: &CompletionRequest<'_>) -> Bytes {
    framed(&completion.message().encode_to_vec())
}
