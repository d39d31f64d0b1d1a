//! Attacks with large request bodies, and with small ones whose responses are large.

use std::fmt::Write;

use bytes::Bytes;
use http_body_util::BodyExt;
use prost::Message;
use tokenway::proto::v1::{self, completion_request::Input};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout_at};

use super::attacker::{AttackTarget, Outcome};
use super::server::{FAST_MODEL, PACED_MODEL};
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{Connection, Protocol, connect, failed_status, grpc_request};

/// Size limit of a body, in bytes.
const MAX_BODY_BYTES: usize = 4 * 1024 * 1024;
/// Number of bytes of a body that are held back.
const HELD_BACK_BYTES: usize = 3;
/// Number of tokens of a resumed stream that were delivered before, and that are still to come.
const RESUMED_TOKENS: u32 = 1_000_000;
const FURTHER_TOKENS: u32 = 10;

pub(super) async fn complete_many_lists(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let list = format!("[{}]", repeat("1", 15_000));
    let prompts = repeat(&list, 128);
    let body = format!("{{\"model\":\"{PACED_MODEL}\",\"max_tokens\":1,\"prompt\":[{prompts}]}}");
    send_bodies(target, "/v1/completions", body, 200).await
}

pub(super) async fn complete_long_lists(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let prompt = repeat("1", 2_000_000);
    let body = format!("{{\"model\":\"{PACED_MODEL}\",\"max_tokens\":1,\"prompt\":[{prompt}]}}");
    send_bodies(target, "/v1/completions", body, 200).await
}

pub(super) async fn detokenize(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let tokens = repeat("1", 2_000_000);
    let body = format!("{{\"model\":\"{PACED_MODEL}\",\"tokens\":[{tokens}]}}");
    send_bodies(target, "/detokenize", body, 50).await
}

pub(super) async fn tokenize(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let head = format!("{{\"model\":\"{PACED_MODEL}\",\"prompt\":\"");
    let words = "a ".repeat((MAX_BODY_BYTES - head.len()) / 2 - 1);
    send_bodies(target, "/tokenize", format!("{head}{words}\"}}"), 50).await
}

/// Requests responses of nearly 64 MiB, the limit of a response.
pub(super) async fn request_logprobs(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let body = format!(
        "{{\"model\":\"{FAST_MODEL}\",\"prompt\":\"a\",\"n\":128,\"max_tokens\":850,\"logprobs\":5}}"
    );
    send_bodies(target, "/v1/completions", body, 6).await
}

pub(super) async fn hold_back(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let body = "a".repeat(MAX_BODY_BYTES);
    let mut request = encode_request(&target.http, "/v1/completions", &body);
    request.truncate(request.len() - HELD_BACK_BYTES);
    send_requests(target, request.into(), 300).await
}

pub(super) async fn resume(target: &AttackTarget<'_>) -> Result<Outcome, Fault> {
    let message = v1::CompletionRequest {
        model: PACED_MODEL.to_owned(),
        input: Some(Input::Prompt("a".to_owned())),
        max_tokens: Some(RESUMED_TOKENS + FURTHER_TOKENS),
        seed: Some(1),
        resume: vec![v1::ResumedChoice {
            choice: 0,
            token_ids: (0..RESUMED_TOKENS).collect(),
        }],
        ..v1::CompletionRequest::default()
    };
    let request = grpc_request(&target.grpc, "Complete", &message.encode_to_vec());
    let end = target.start().await?;
    let mut tasks = JoinSet::new();
    for _ in 0..60 {
        let (url, request) = (target.grpc.clone(), request.clone());
        tasks.spawn(async move {
            let call = async {
                let mut connection = Connection::open(&url, Protocol::Http2).await?;
                let response = connection.send(request).await?;
                let in_headers = failed_status(response.headers());
                let body = response.collect().await?;
                let status = in_headers.or_else(|| body.trailers().and_then(failed_status));
                Ok::<_, Fault>(
                    status.map_or("Ok".to_owned(), |status| format!("{:?}", status.code())),
                )
            };
            match timeout_at(end, call).await {
                Ok(Ok(end)) => end,
                Ok(Err(_)) => "broken".to_owned(),
                Err(_) => "not answered".to_owned(),
            }
        });
    }
    Ok(count_ends(tasks).await)
}

/// Sends a body in this number of requests at once.
async fn send_bodies(
    target: &AttackTarget<'_>,
    path: &str,
    body: String,
    count: u32,
) -> Result<Outcome, Fault> {
    let request = encode_request(&target.http, path, &body);
    drop(body);
    send_requests(target, request.into(), count).await
}

/// Writes these bytes to this number of connections at once, and waits for the responses.
async fn send_requests(
    target: &AttackTarget<'_>,
    request: Bytes,
    count: u32,
) -> Result<Outcome, Fault> {
    let end = target.start().await?;
    let mut tasks = JoinSet::new();
    for _ in 0..count {
        let (url, request) = (target.http.clone(), request.clone());
        tasks.spawn(async move { send_request(&url, &request, end).await });
    }
    Ok(count_ends(tasks).await)
}

/// Returns the status of the response.
async fn send_request(url: &ServerUrl, request: &[u8], end: Instant) -> String {
    let Ok(socket) = connect(url).await else {
        return "not connected".to_owned();
    };
    let (mut reading, mut writing) = socket.into_split();
    // The server may answer before it has read the whole request.
    let write = async { writing.write_all(request).await };
    let read = async {
        let mut head = [0; 12];
        reading.read_exact(&mut head).await?;
        let mut piece = vec![0; 64 * 1024];
        while reading.read(&mut piece).await? > 0 {}
        Ok::<_, std::io::Error>(String::from_utf8_lossy(&head[9..]).into_owned())
    };
    let exchange = async {
        tokio::pin!(read);
        tokio::select! {
            read = &mut read => read,
            _ = write => read.await,
        }
    };
    match timeout_at(end, exchange).await {
        Ok(Ok(status)) => status,
        Ok(Err(_)) => "broken".to_owned(),
        Err(_) => "not answered".to_owned(),
    }
}

async fn count_ends(mut tasks: JoinSet<String>) -> Outcome {
    let mut outcome = Outcome::default();
    while let Some(end) = tasks.join_next().await {
        outcome.add(end.expect("no attacker panics"), 1);
    }
    outcome
}

/// Returns the bytes of a request. The server closes the connection after its response.
fn encode_request(url: &ServerUrl, path: &str, body: &str) -> Vec<u8> {
    let (path, host, length) = (url.path(path), &url.authority, body.len());
    let mut request = String::with_capacity(body.len() + 256);
    write!(
        request,
        "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
         connection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .expect("a string accepts all text");
    request.into_bytes()
}

/// Repeats a JSON value, separated by commas.
fn repeat(value: &str, count: usize) -> String {
    vec![value; count].join(",")
}
