//! Clients that request tokens. Some read to the end, some leave early, and some stop reading.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use tokenway::error::ErrorKind;
use tokio::time::{Instant, sleep, timeout};

use super::checked::{CheckedStream, StreamEnd};
use super::client::{Server, SharedState};
use super::tally::End;
use crate::fault::Fault;
use crate::stream::{CompletionRequest, Connection, Format, Protocol, http_request};

/// Possible lengths, in tokens, of streams that are read to their end.
const STREAM_LENGTHS: [u32; 5] = [1, 16, 100, 400, 1_000];
/// Number of tokens that no client reads to its end.
const ENDLESS_TOKENS: u32 = 1_000_000;
/// Maximum time that a client reads before it leaves.
const MAX_STAY: Duration = Duration::from_millis(300);

/// Reads a few streams on one connection, one after the other.
pub(super) async fn read_in_sequence(
    shared: &SharedState,
    format: Format,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let mut connection = Connection::open(&shared.server.http, Protocol::Http1).await?;
    for tokens in random_lengths(random) {
        let stream = CheckedStream::open(&mut connection, format, tokens).await?;
        stream.read_complete(tokens).await?;
        shared.tally.borrow_mut().streams += 1;
    }
    Ok("whole")
}

/// Reads a few streams concurrently on one HTTP/2 connection.
pub(super) async fn read_concurrently(
    shared: &SharedState,
    format: Format,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let mut connection = Connection::open(shared.server.api_url(format), Protocol::Http2).await?;
    let mut streams = Vec::new();
    for tokens in random_lengths(random) {
        let stream = CheckedStream::open(&mut connection, format, tokens).await?;
        streams.push((stream, tokens));
    }
    for (stream, tokens) in streams {
        stream.read_complete(tokens).await?;
        shared.tally.borrow_mut().streams += 1;
    }
    Ok("whole")
}

pub(super) async fn request_unary(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let mut connection = Connection::open(&server.http, random_protocol(random)).await?;
    let tokens = random.random_range(1..=16_u32);
    let completion = CompletionRequest {
        stream: false,
        ..CompletionRequest::of_tokens(tokens)
    };
    let request = http_request(&server.http, "application/json", &completion);
    let (status, body, parsed) = connection.send_for_json(request).await?;
    let text: String = (0..tokens).map(|index| format!("token_{index}")).collect();
    let is_right = parsed["choices"][0]["text"] == text
        && parsed["usage"]["completion_tokens"] == tokens
        && status.is_success();
    if is_right {
        return Ok("whole");
    }
    Err(Fault::unexpected(
        format!("{tokens} tokens"),
        format!("{status}: {body}"),
    ))
}

/// Leaves a stream, before or after its first token, by closing the sending half of the connection.
pub(super) async fn leave_with_fin(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let mut connection = Connection::open(&server.http, Protocol::Http1).await?;
    let stream = read_for_a_while(&mut connection, random_http_format(random), random).await?;
    connection.end_sending();
    let Some(mut stream) = stream else {
        return Ok("left before the answer");
    };
    match stream.read_to_end().await? {
        StreamEnd::Incomplete(_) => Ok("left in the middle"),
        StreamEnd::Whole => Err(Fault::unexpected("an end of the connection", "more tokens")),
        StreamEnd::Failed(kind) => Err(Fault::unexpected("no answer", kind.mapping().code)),
    }
}

/// Leaves a stream, before or after its first token, by resetting the connection.
pub(super) async fn leave_with_rst(server: &Server, random: &mut StdRng) -> Result<End, Fault> {
    let (format, protocol) = *[
        (Format::Ndjson, Protocol::Http1),
        (Format::Sse, Protocol::Http1),
        (Format::Ndjson, Protocol::Http2),
        (Format::Grpc, Protocol::Http2),
    ]
    .choose(random)
    .expect("the list is not empty");
    let mut connection = Connection::open(server.api_url(format), protocol).await?;
    let stream = read_for_a_while(&mut connection, format, random).await?;
    connection.set_reset_on_close();
    Ok(leaving_end(stream.as_ref()))
}

/// Leaves an HTTP/2 stream, before or after its first token, by resetting it. The connection must still work.
pub(super) async fn leave_one_stream(
    server: &Server,
    format: Format,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let mut connection = Connection::open(server.api_url(format), Protocol::Http2).await?;
    let stream = read_for_a_while(&mut connection, format, random).await?;
    let left = leaving_end(stream.as_ref());
    drop(stream);
    let tokens = random.random_range(1..=16);
    let next = CheckedStream::open(&mut connection, format, tokens).await?;
    next.read_complete(tokens).await?;
    Ok(left)
}

/// Reads a few tokens, pauses, and then leaves or resumes reading.
pub(super) async fn stop_reading(
    server: &Server,
    format: Format,
    protocol: Protocol,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let mut connection = Connection::open_narrow(server.api_url(format), protocol).await?;
    // The server's timeout starts once its buffers are full, which is soon. The client may still read their contents.
    let (requested, peer_timeout) = (Instant::now(), server.peer_timeout);
    let mut stream = CheckedStream::open(&mut connection, format, ENDLESS_TOKENS).await?;
    stream.read_until(random.random_range(1..=20)).await?;
    // The pause may exceed the time after which the server closes a connection that accepts nothing.
    sleep(peer_timeout.mul_f64(random.random_range(0.5..5.0))).await;
    if random.random_bool(0.3) {
        return Ok("left");
    }
    let Ok(ended) = timeout(peer_timeout * 2, stream.read_to_end()).await else {
        return Ok("came back in time");
    };
    let took = requested.elapsed();
    let early =
        |what: &str| Fault::unexpected("a longer timeout", format!("{what} after {took:?}"));
    match ended? {
        StreamEnd::Failed(ErrorKind::SlowReader) if took < peer_timeout => {
            Err(early("slow_reader"))
        }
        StreamEnd::Failed(ErrorKind::SlowReader) => Ok("slow_reader"),
        StreamEnd::Failed(kind) => Err(Fault::unexpected("slow_reader", kind.mapping().code)),
        // The server closes a connection that accepts nothing. It cannot send an error record on it.
        StreamEnd::Incomplete(fault) if took < peer_timeout * 3 => Err(early(&fault.to_string())),
        StreamEnd::Incomplete(_) => Ok("cut off"),
        StreamEnd::Whole => stream.check_count(ENDLESS_TOKENS).map(|()| "whole"),
    }
}

/// Requests an endless stream and reads it for a while. Returns `None` if no response arrived in time.
async fn read_for_a_while(
    connection: &mut Connection,
    format: Format,
    random: &mut StdRng,
) -> Result<Option<CheckedStream>, Fault> {
    // Some clients leave while their request is still in the queue.
    let stay = if random.random_bool(0.2) {
        Duration::ZERO
    } else {
        random.random_range(Duration::ZERO..MAX_STAY)
    };
    let mut opened = None;
    let reading = async {
        let stream = opened.insert(CheckedStream::open(connection, format, ENDLESS_TOKENS).await?);
        stream.read_until(ENDLESS_TOKENS).await
    };
    match timeout(stay, reading).await {
        Ok(ended) => ended.map(|()| opened),
        Err(_) => Ok(opened),
    }
}

fn leaving_end(stream: Option<&CheckedStream>) -> End {
    stream.map_or("left before the answer", |_| "left in the middle")
}

fn random_lengths(random: &mut StdRng) -> Vec<u32> {
    let streams = random.random_range(1..=4);
    let length = |_| STREAM_LENGTHS[random.random_range(0..STREAM_LENGTHS.len())];
    (0..streams).map(length).collect()
}

pub(super) fn random_http_format(random: &mut StdRng) -> Format {
    use Format::{Ndjson, Sse};
    if random.random() { Ndjson } else { Sse }
}

pub(super) fn random_protocol(random: &mut StdRng) -> Protocol {
    use Protocol::{Http1, Http2};
    if random.random() { Http1 } else { Http2 }
}
