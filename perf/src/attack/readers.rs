//! Clients that read a fast stream slowly.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, interval, timeout_at};

use super::attacker::{AttackTarget, Outcome};
use super::server::FAST_MODEL;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{CompletionRequest, connect_narrow};

const READERS: u32 = 500;
/// Number of bytes in each read, and the time between two reads.
const PIECE_BYTES: usize = 500;
const READ_INTERVAL: Duration = Duration::from_millis(100);
const TOKENS: u32 = 1_000_000;

pub(super) async fn read_slowly(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let completion = CompletionRequest {
        model: Some(FAST_MODEL),
        ..CompletionRequest::of_tokens(TOKENS)
    };
    let body = completion.to_json();
    let request: &'static str = format!(
        "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n\
         accept: application/x-ndjson\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    )
    .leak();
    let end = target.start().await?;
    let mut tasks = JoinSet::new();
    for _ in 0..READERS {
        let url = target.http.clone();
        tasks.spawn(async move { read_until(&url, request, end).await });
    }
    let mut outcome = Outcome::default();
    while let Some(ended) = tasks.join_next().await {
        outcome.add(ended.expect("no attacker panics"), 1);
    }
    Ok(outcome)
}

async fn read_until(url: &ServerUrl, request: &str, end: Instant) -> &'static str {
    let Ok(mut socket) = connect_narrow(url).await else {
        return "not connected";
    };
    let read = async {
        socket.write_all(request.as_bytes()).await?;
        let mut pauses = interval(READ_INTERVAL);
        let mut piece = [0; PIECE_BYTES];
        while socket.read(&mut piece).await? > 0 {
            pauses.tick().await;
        }
        Ok::<_, std::io::Error>(())
    };
    match timeout_at(end, read).await {
        Ok(_) => "ended",
        Err(_) => "open",
    }
}
