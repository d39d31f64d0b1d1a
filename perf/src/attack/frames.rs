//! Hand-written HTTP/2 frames, for sequences that no library sends.

use prost::Message;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::attacker::AttackTarget;
use super::server::FAST_MODEL;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{CompletionRequest, connect};

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GO_AWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const ACK: u8 = 1;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;
/// SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113, section 6.5.2).
pub(super) const INITIAL_WINDOW_SIZE: u16 = 4;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Error code CANCEL.
const CANCEL: u32 = 8;
const TOKENS: u32 = 1_000_000;

/// One of the two APIs, and the request for an endless stream on it.
#[derive(Clone)]
pub(super) struct Api {
    pub(super) url: ServerUrl,
    /// HPACK block of a completion request.
    pub(super) headers: Vec<u8>,
    pub(super) body: Vec<u8>,
}

/// Header of a received frame.
pub(super) struct FrameHead {
    pub(super) kind: u8,
    pub(super) flags: u8,
    pub(super) stream: u32,
}

impl Api {
    pub(super) fn both(target: &AttackTarget<'_>) -> [Self; 2] {
        let completion = CompletionRequest {
            model: Some(FAST_MODEL),
            ..CompletionRequest::of_tokens(TOKENS)
        };
        let message = completion.to_message().encode_to_vec();
        let length = u32::try_from(message.len()).expect("a short message");
        let http = Self {
            url: target.http.clone(),
            headers: encode_headers("/v1/completions", "application/json"),
            body: completion.to_json().into_bytes(),
        };
        let grpc = Self {
            url: target.grpc.clone(),
            headers: encode_headers("/tokenway.v1.Inference/Complete", "application/grpc"),
            body: [&[0][..], &length.to_be_bytes(), &message].concat(),
        };
        [http, grpc]
    }

    /// Returns the frames of a whole request.
    pub(super) fn request(&self, stream: u32) -> Vec<u8> {
        let headers = frame(HEADERS, END_HEADERS, stream, &self.headers);
        [headers, frame(DATA, END_STREAM, stream, &self.body)].concat()
    }

    /// Opens a connection with this initial window of streams, and sends its preface.
    pub(super) async fn open(&self, window: u32) -> Result<TcpStream, Fault> {
        let mut socket = connect(&self.url).await?;
        let window = [
            &INITIAL_WINDOW_SIZE.to_be_bytes()[..],
            &window.to_be_bytes(),
        ];
        let settings = frame(SETTINGS, 0, 0, &window.concat());
        socket.write_all(&[PREFACE, &settings].concat()).await?;
        Ok(socket)
    }
}

pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame");
    let head = [&length.to_be_bytes()[1..], &[kind, flags]].concat();
    [&head, &stream.to_be_bytes()[..], payload].concat()
}

pub(super) fn reset(stream: u32) -> Vec<u8> {
    frame(RST_STREAM, 0, stream, &CANCEL.to_be_bytes())
}

/// Reads the next frame, and skips its payload.
pub(super) async fn read_frame(
    socket: &mut (impl AsyncReadExt + Unpin),
    payload: &mut Vec<u8>,
) -> std::io::Result<FrameHead> {
    let mut head = [0; 9];
    socket.read_exact(&mut head).await?;
    let [high, middle, low, kind, flags, stream @ ..] = head;
    let length = usize::try_from(u32::from_be_bytes([0, high, middle, low]))
        .expect("a frame's length has 24 bits");
    payload.resize(length, 0);
    socket.read_exact(payload).await?;
    Ok(FrameHead {
        kind,
        flags,
        stream: u32::from_be_bytes(stream),
    })
}

/// Encodes the headers of a `POST` request with HPACK: `:method POST` and `:scheme http` are indexed fields, the
/// others literals, most of them with an indexed name.
fn encode_headers(path: &str, content_type: &str) -> Vec<u8> {
    [
        b"\x83\x86".to_vec(),
        literal(b"\x04", path),
        literal(b"\x01", "localhost"),
        literal(b"\x0f\x10", content_type),
        literal(b"\x00\x02te", "trailers"),
    ]
    .concat()
}

fn literal(name: &[u8], value: &str) -> Vec<u8> {
    let length = u8::try_from(value.len()).expect("a short value");
    [name, &[length], value.as_bytes()].concat()
}
