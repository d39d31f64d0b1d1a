//! A stream over gRPC: HTTP/2 by the crate `h2`, and no more of gRPC than a measurement needs.

use std::time::Duration;

use bytes::Bytes;
use h2::client::SendRequest;
use http::Request;
use prost::Message;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::figures::Progress;
use super::message::Messages;
use super::{Fault, Load, Notes};
use crate::arguments::ServerUrl;
use crate::client::{ReadClock, TimedStream};

/// How many streams share a connection.
const STREAMS: u32 = 64;

/// Windows that never hold up a reader who reads.
const STREAM_WINDOW: u32 = 1 << 20;
const CONNECTION_WINDOW: u32 = 1 << 28;

const HANDSHAKE: Duration = Duration::from_secs(10);

/// A connection to a gRPC door. Clones share it.
#[derive(Clone)]
pub(super) struct Connection {
    requests: SendRequest<Bytes>,
    clock: ReadClock,
}

/// As many connections as so many streams need.
pub(super) async fn connect(url: &ServerUrl, streams: u32) -> Result<Vec<Connection>, Fault> {
    let mut connections = Vec::new();
    for _ in 0..streams.div_ceil(STREAMS) {
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
        // It ends with the load, whose streams tell what went wrong with it.
        tokio::task::spawn_local(connection);
        connections.push(Connection { requests, clock });
    }
    Ok(connections)
}

/// The connection of this stream.
pub(super) fn of_stream(connections: &[Connection], stream: u32) -> Option<Connection> {
    let at = usize::try_from(stream / STREAMS).ok()?;
    connections.get(at).cloned()
}

/// Makes the stream's requests, one after the other.
pub(super) async fn stream(
    url: &ServerUrl,
    connection: Connection,
    load: &Load,
    notes: &Notes,
) -> Result<(), Fault> {
    let message = message(load);
    for _ in 0..load.requests {
        let request = Request::post(format!("{url}/tokenway.v1.Inference/Complete"))
            .header("content-type", "application/grpc")
            .header("te", "trailers")
            .body(())
            .map_err(|error| Fault::Malformed(error.to_string()))?;
        let mut progress = Progress::begin();
        let mut requests = connection.requests.clone().ready().await?;
        let (answer, mut upload) = requests.send_request(request, false)?;
        upload.send_data(message.clone(), true)?;
        let mut body = answer.await?.into_body();
        let mut messages = Messages::default();
        while let Some(piece) = body.data().await {
            let piece = piece?;
            body.flow_control().release_capacity(piece.len())?;
            let received_ns = connection.clock.last_read_ns();
            let mut figures = notes.borrow_mut();
            figures.read(piece.len());
            messages.read(&piece, received_ns, &mut progress, &mut figures)?;
        }
        if let Some(status) = body.trailers().await?.and_then(|trailers| {
            let status = trailers.get("grpc-status")?;
            (status != "0").then(|| String::from_utf8_lossy(status.as_bytes()).into_owned())
        }) {
            return Err(Fault::Refused(format!("gRPC status {status}")));
        }
        if !messages.has_finished() || progress.next_index != load.tokens {
            return Err(Fault::CutOff(progress.next_index));
        }
        notes.borrow_mut().requests += 1;
    }
    Ok(())
}

/// The request as a message with its head.
fn message(load: &Load) -> Bytes {
    let request = v1::CompletionRequest {
        input: Some(Input::Prompt("Count the tokens.".to_owned())),
        max_tokens: Some(load.tokens),
        include_stamps: load.timed,
        ..v1::CompletionRequest::default()
    };
    let message = request.encode_to_vec();
    let length = u32::try_from(message.len()).expect("a request is short");
    [&[0][..], &length.to_be_bytes(), &message].concat().into()
}
