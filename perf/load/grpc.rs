//! A stream over gRPC: HTTP/2 by the crate `h2`, and no more of gRPC than a measurement needs.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, Uri};
use prost::Message;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::message::Messages;
use super::session::Asked;
use super::taker::Taker;
use super::{Fault, Load};
use crate::arguments::ServerUrl;
use crate::client::{ReadClock, TimedStream};

/// Windows that never hold up a reader who reads.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 28;

const HANDSHAKE: Duration = Duration::from_secs(10);

/// A connection to a gRPC door. Clones share it.
#[derive(Clone)]
pub(super) struct Connection {
    requests: SendRequest<Bytes>,
    clock: ReadClock,
    method: Uri,
}

impl Connection {
    /// Opens a connection, which a task of this thread drives from now on.
    pub(super) async fn open(url: &ServerUrl) -> Result<Self, Fault> {
        let method = format!("{url}/tokenway.v1.Inference/Complete");
        let method = method
            .parse()
            .map_err(|_| Fault::Malformed(method.clone()))?;
        let socket = TcpStream::connect(&url.authority).await?;
        socket.set_nodelay(true)?;
        let clock = ReadClock::default();
        let socket = TimedStream::new(socket, clock.clone());
        let mut builder = h2::client::Builder::new();
        builder
            .initial_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        let opened = timeout(HANDSHAKE, builder.handshake(socket)).await;
        let (requests, connection) =
            opened.map_err(|_| Fault::Refused("nothing to a connection".to_owned()))??;
        // It ends with the session, whose streams tell what went wrong with it.
        tokio::task::spawn_local(connection);
        Ok(Self {
            requests,
            clock,
            method,
        })
    }

    /// Makes a request.
    pub(super) async fn request(&self, asked: &Asked, taker: &mut impl Taker) -> Result<(), Fault> {
        let request = Request::post(self.method.clone())
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(|error| Fault::Malformed(error.to_string()))?;
        let mut requests = self.requests.clone().ready().await?;
        let (answer, mut upload) = requests.send_request(request, false)?;
        upload.send_data(asked.message.clone(), true)?;
        let answer = answer.await?;
        refused(answer.headers())?;
        let mut body = answer.into_body();
        asked.notes.borrow_mut().answered += 1;
        let mut messages = Messages::default();
        while let Some(piece) = body.data().await {
            let piece = piece?;
            body.flow_control().release_capacity(piece.len())?;
            let received_ns = self.clock.last_read_ns();
            let mut figures = asked.notes.borrow_mut();
            figures.read(piece.len());
            messages.read(&piece, received_ns, taker, &mut figures)?;
        }
        if let Some(trailers) = body.trailers().await? {
            refused(&trailers)?;
        }
        if messages.has_finished() {
            Ok(())
        } else {
            Err(Fault::CutOff(taker.count()))
        }
    }
}

/// What a status says that is not OK. A refusal has it in its headers, a stream after its end.
fn refused(headers: &HeaderMap) -> Result<(), Fault> {
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

/// The request as a message with its head. Without a model the server chooses.
pub(super) fn message(load: &Load, model: Option<&str>) -> Bytes {
    let request = v1::CompletionRequest {
        model: model.unwrap_or_default().to_owned(),
        input: Some(Input::Prompt("Count the tokens.".to_owned())),
        max_tokens: Some(load.tokens),
        include_stamps: load.timed,
        ..v1::CompletionRequest::default()
    };
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a request is short");
    [&[0][..], &length.to_be_bytes(), &message].concat().into()
}
