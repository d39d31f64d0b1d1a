//! Clients that ask for tokens: those that read to the end, those that leave, and those that stand
//! still.

use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use serde_json::Value;
use tokenway::error::ErrorKind;
use tokio::time::{Instant, sleep, timeout};

use super::Fault;
use super::client::{Doors, Place};
use super::connection::{Connection, Protocol, Room};
use super::stream::{self, Ended, Stream};
use super::tally::End;
use super::tokens::Form;
use crate::arguments::ServerUrl;

/// How long streams are that are read to their end.
const LENGTHS: [u32; 5] = [1, 16, 100, 400, 1_000];

/// Longer than any client reads.
const ENDLESS: u32 = 1_000_000;

/// How long a client reads at most before it leaves.
const STAY: Duration = Duration::from_millis(300);

/// What stands still with a reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Still {
    /// A socket of HTTP/1.1.
    Socket,
    /// A window of HTTP/2 on the HTTP door.
    Http2,
    /// One on the gRPC door.
    Grpc,
}

/// A few whole streams in one connection, each begun when the one before has ended.
pub(super) async fn one_after_the_other(
    place: &Place,
    form: Form,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let url = &place.doors.http;
    let mut connection = Connection::open(url, Protocol::Http1, Room::Wide).await?;
    for tokens in lengths(random) {
        let stream = Stream::open(&mut connection, url, form, tokens).await?;
        stream.read_whole(tokens).await?;
        place.tally.borrow_mut().whole_streams(1);
    }
    Ok("whole")
}

/// A few whole streams that share a connection of HTTP/2.
pub(super) async fn at_once(place: &Place, form: Form, random: &mut StdRng) -> Result<End, Fault> {
    let url = door(&place.doors, form);
    let mut connection = Connection::open(url, Protocol::Http2, Room::Wide).await?;
    let mut streams = Vec::new();
    for tokens in lengths(random) {
        let stream = Stream::open(&mut connection, url, form, tokens).await?;
        streams.push((stream, tokens));
    }
    for (stream, tokens) in streams {
        stream.read_whole(tokens).await?;
        place.tally.borrow_mut().whole_streams(1);
    }
    Ok("whole")
}

/// A completion in one JSON body.
pub(super) async fn unary(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let protocol = protocol(random);
    let mut connection = Connection::open(&doors.http, protocol, Room::Wide).await?;
    let tokens = random.random_range(1..=16_u32);
    let request = stream::http(&doors.http, "application/json", tokens, false);
    let answer = connection.send(request).await?;
    let status = answer.status;
    let body = answer.body.whole().await?;
    let parsed: Value = serde_json::from_slice(&body).unwrap_or_default();
    let text: String = (0..tokens).map(|index| format!("token_{index}")).collect();
    let is_right = parsed["choices"][0]["text"] == text
        && parsed["usage"]["completion_tokens"] == tokens
        && status.is_success();
    if is_right {
        Ok("whole")
    } else {
        let body = String::from_utf8_lossy(&body);
        let expected = format!("{tokens} tokens");
        Err(Fault::answer(&expected, format!("{status}: {body}")))
    }
}

/// A stream whose client closes its half of the connection in the middle of it, or before.
pub(super) async fn leave_by_fin(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let url = &doors.http;
    let mut connection = Connection::open(url, Protocol::Http1, Room::Wide).await?;
    let stream = read_for_a_while(&mut connection, url, form(random), random).await?;
    connection.end_sending();
    match stream {
        Some(mut stream) => match stream.read_to_end().await? {
            Ended::CutOff(_) => Ok("left in the middle"),
            Ended::Whole => Err(Fault::answer("an end of the connection", "more tokens")),
            Ended::Failed(kind) => Err(Fault::answer("no answer", kind.row().code)),
        },
        None => Ok("left before the answer"),
    }
}

/// A stream whose client resets the connection in the middle of it, or before.
pub(super) async fn leave_by_rst(doors: &Doors, random: &mut StdRng) -> Result<End, Fault> {
    let (form, protocol) = *[
        (Form::Ndjson, Protocol::Http1),
        (Form::Sse, Protocol::Http1),
        (Form::Ndjson, Protocol::Http2),
        (Form::Grpc, Protocol::Http2),
    ]
    .choose(random)
    .expect("there are some");
    let url = door(doors, form);
    let mut connection = Connection::open(url, protocol, Room::Wide).await?;
    let stream = read_for_a_while(&mut connection, url, form, random).await?;
    connection.close_with_reset();
    Ok(where_left(stream.as_ref()))
}

/// A stream of HTTP/2 that is reset in the middle, or before; its connection must still be good.
pub(super) async fn leave_one_stream(
    doors: &Doors,
    form: Form,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let url = door(doors, form);
    let mut connection = Connection::open(url, Protocol::Http2, Room::Wide).await?;
    let left = where_left(
        read_for_a_while(&mut connection, url, form, random)
            .await?
            .as_ref(),
    );
    let tokens = random.random_range(1..=16);
    let next = Stream::open(&mut connection, url, form, tokens).await?;
    next.read_whole(tokens).await?;
    Ok(left)
}

/// A reader that takes a little and then nothing, and goes away or comes back.
pub(super) async fn stand_still(
    doors: &Doors,
    still: Still,
    random: &mut StdRng,
) -> Result<End, Fault> {
    let (form, protocol) = match still {
        Still::Socket => (form(random), Protocol::Http1),
        Still::Http2 => (Form::Ndjson, Protocol::Http2),
        Still::Grpc => (Form::Grpc, Protocol::Http2),
    };
    let url = door(doors, form);
    let mut connection = Connection::open(url, protocol, Room::Narrow).await?;
    // A server's patience begins when its buffers are full, which is soon: their client may still read
    // what is in them.
    let (asked, patience) = (Instant::now(), doors.patience);
    let mut stream = Stream::open(&mut connection, url, form, ENDLESS).await?;
    stream.read_until(random.random_range(1..=20)).await?;
    // Up to and beyond the time at which a server closes a connection that takes nothing.
    sleep(patience.mul_f64(random.random_range(0.5..5.0))).await;
    if random.random_bool(0.3) {
        return Ok("left");
    }
    let Ok(ended) = timeout(patience * 2, stream.read_to_end()).await else {
        return Ok("came back in time");
    };
    let took = asked.elapsed();
    let early = |what: &str| Fault::answer("more patience", format!("{what} after {took:?}"));
    match ended? {
        Ended::Failed(ErrorKind::SlowReader) if took < patience => Err(early("slow_reader")),
        Ended::Failed(ErrorKind::SlowReader) => Ok("slow_reader"),
        Ended::Failed(kind) => Err(Fault::answer("slow_reader", kind.row().code)),
        // A connection that takes nothing is closed then, and a record cannot be told any more.
        Ended::CutOff(fault) if took < patience * 3 => Err(early(&fault.to_string())),
        Ended::CutOff(_) => Ok("cut off"),
        Ended::Whole if stream.count() == ENDLESS => Ok("whole"),
        Ended::Whole => Err(Fault::CutOff(stream.count())),
    }
}

/// Asks for a stream without an end and reads it for a moment; `None` where no answer came in time.
async fn read_for_a_while(
    connection: &mut Connection,
    url: &ServerUrl,
    form: Form,
    random: &mut StdRng,
) -> Result<Option<Stream>, Fault> {
    // Some leave while their request is still in the queue.
    let stay = if random.random_bool(0.2) {
        Duration::ZERO
    } else {
        random.random_range(Duration::ZERO..STAY)
    };
    let mut opened = None;
    let reading = async {
        let stream = opened.insert(Stream::open(connection, url, form, ENDLESS).await?);
        stream.read_until(ENDLESS).await
    };
    match timeout(stay, reading).await {
        Ok(ended) => ended.map(|()| opened),
        Err(_) => Ok(opened),
    }
}

fn where_left(stream: Option<&Stream>) -> End {
    if stream.is_some() {
        "left in the middle"
    } else {
        "left before the answer"
    }
}

fn door(doors: &Doors, form: Form) -> &ServerUrl {
    match form {
        Form::Ndjson | Form::Sse => &doors.http,
        Form::Grpc => &doors.grpc,
    }
}

fn lengths(random: &mut StdRng) -> Vec<u32> {
    let streams = random.random_range(1..=4);
    let length = |_| *LENGTHS.choose(random).expect("there are some");
    (0..streams).map(length).collect()
}

fn form(random: &mut StdRng) -> Form {
    if random.random() {
        Form::Ndjson
    } else {
        Form::Sse
    }
}

pub(super) fn protocol(random: &mut StdRng) -> Protocol {
    if random.random() {
        Protocol::Http1
    } else {
        Protocol::Http2
    }
}
