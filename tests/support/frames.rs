//! An HTTP/2 client that writes frames by hand. It can send many frames at once, and in sequences that no library
//! sends.

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub const DATA: u8 = 0;
pub const RST_STREAM: u8 = 3;
pub const GO_AWAY: u8 = 7;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const WINDOW_UPDATE: u8 = 8;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// The bytes of a connection, with or without TLS.
trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// An HTTP/2 connection with a receive window of 1 GiB.
pub struct Frames {
    stream: Box<dyn Stream>,
    /// The API to which the connection sends requests.
    api: Api,
}

#[derive(Clone, Copy, Debug)]
pub enum Api {
    Http,
    Grpc,
}

#[derive(Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

impl Frame {
    /// Returns the error code of a GOAWAY frame.
    pub fn error_code(&self) -> u32 {
        assert_eq!(self.kind, GO_AWAY);
        u32::from_be_bytes(self.payload[4..8].try_into().expect("four bytes"))
    }

    pub fn ends_stream(&self, stream: u32) -> bool {
        let has_end_flag = matches!(self.kind, DATA | HEADERS);
        self.stream == stream && has_end_flag && self.flags & END_STREAM != 0
    }
}

impl Frames {
    pub async fn open(address: &str, api: Api) -> Self {
        let stream = TcpStream::connect(address)
            .await
            .expect("the server accepts connections");
        Self::open_on(stream, api).await
    }

    /// Opens an HTTP/2 connection on a stream that is connected, such as a TLS session.
    pub async fn open_on(
        mut stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        api: Api,
    ) -> Self {
        let window = encode_frame(WINDOW_UPDATE, 0, 0, &(1_u32 << 30).to_be_bytes());
        let opening = [PREFACE, &encode_frame(SETTINGS, 0, 0, &[]), &window].concat();
        stream
            .write_all(&opening)
            .await
            .expect("the preface is written");
        Self {
            stream: Box::new(stream),
            api,
        }
    }

    /// Returns the bytes of a completion request on this stream.
    pub fn encode_request(&self, stream: u32, body: &[u8]) -> Vec<u8> {
        let (path, kind, prefix) = match self.api {
            Api::Http => ("/v1/completions", "application/json", Vec::new()),
            Api::Grpc => {
                let length = u32::try_from(body.len()).expect("a short message");
                let prefix = [&[0][..], &length.to_be_bytes()].concat();
                (
                    "/tokenway.v1.Inference/Complete",
                    "application/grpc",
                    prefix,
                )
            }
        };
        let text = |prefix: &[u8], text: &str| {
            let length = u8::try_from(text.len()).expect("a short text");
            [prefix, &[length], text.as_bytes()].concat()
        };
        // HPACK: `:method POST` and `:scheme http` are indexed fields. The others are literals, most of them with an
        // indexed name.
        let head = [
            b"\x83\x86".to_vec(),
            text(b"\x04", path),
            text(b"\x01", "localhost"),
            text(b"\x0f\x10", kind),
            text(b"\x00\x02te", "trailers"),
        ];
        let headers = encode_frame(HEADERS, END_HEADERS, stream, &head.concat());
        let body = [&prefix, body].concat();
        [headers, encode_frame(DATA, END_STREAM, stream, &body)].concat()
    }

    /// Returns the bytes of a request whose headers never end.
    pub fn encode_endless_headers(stream: u32) -> Vec<u8> {
        encode_frame(HEADERS, 0, stream, b"\x83\x86")
    }

    /// Returns the bytes of `count` requests on the odd streams from `first` on, each followed by its RST_STREAM.
    pub fn encode_cancelled_requests(&self, first: u32, count: u32, body: &[u8]) -> Vec<u8> {
        let streams = (0..count).map(|number| first + 2 * number);
        let cancelled = streams
            .flat_map(|stream| [self.encode_request(stream, body), encode_reset(stream)].concat());
        cancelled.collect()
    }

    /// Returns the RST_STREAM frames of `count` streams from `first` on.
    pub fn encode_resets(first: u32, count: u32) -> Vec<u8> {
        let streams = (0..count).map(|number| first + 2 * number);
        streams.flat_map(encode_reset).collect()
    }

    pub async fn write(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.stream.write_all(bytes).await?;
        self.stream.flush().await
    }

    /// Reads the next frame. Returns `None` at the end of the connection.
    pub async fn read_frame(&mut self) -> Option<Frame> {
        read_next_frame(&mut self.stream).await
    }

    /// Writes `bytes` and at the same time reads, until the first frame of this kind arrives.
    pub async fn write_until(&mut self, bytes: &[u8], kind: u8) -> Frame {
        let (mut reading, mut writing) = tokio::io::split(&mut self.stream);
        let write = async {
            // Writing fails if the server has closed the connection.
            let _ = writing.write_all(bytes).await;
            let _ = writing.flush().await;
            std::future::pending::<()>().await;
        };
        let read = async {
            loop {
                let frame = read_next_frame(&mut reading)
                    .await
                    .expect("the frame arrives before the connection ends");
                if frame.kind == kind {
                    return frame;
                }
            }
        };
        tokio::select! {
            frame = read => frame,
            () = write => unreachable!("the write future never completes"),
        }
    }
}

async fn read_next_frame(stream: &mut (impl AsyncReadExt + Unpin)) -> Option<Frame> {
    let mut head = [0; 9];
    stream.read_exact(&mut head).await.ok()?;
    let [high, middle, low, kind, flags, stream_id @ ..] = head;
    let length = u32::from_be_bytes([0, high, middle, low]);
    let mut payload = vec![0; usize::try_from(length).expect("a short frame")];
    stream.read_exact(&mut payload).await.ok()?;
    let stream = u32::from_be_bytes(stream_id);
    Some(Frame {
        kind,
        flags,
        stream,
        payload,
    })
}

fn encode_frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame");
    let head = [&length.to_be_bytes()[1..], &[kind, flags]].concat();
    [&head, &stream.to_be_bytes()[..], payload].concat()
}

fn encode_reset(stream: u32) -> Vec<u8> {
    encode_frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes())
}
