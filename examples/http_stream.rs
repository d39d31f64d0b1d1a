//! Streams a completion over HTTP as NDJSON, one line per token, with a plain hyper client.
//!
//! With a server on its default addresses (`tokenway serve`):
//!
//! ```console
//! cargo run --example http_stream -- "The capital of France is" --max-tokens 32
//! ```
//!
//! The exit code is 1 if the server rejects the request, or if the stream reports an error or ends without a finish
//! reason (which means that it was truncated).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example prints its output"
)]

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;

use bytes::{Bytes, BytesMut};
use clap::Parser;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::header::{ACCEPT, CONTENT_TYPE};
use hyper::{Request, Response, StatusCode};
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use serde::Deserialize;
use serde_json::json;

/// Streams a completion over HTTP.
#[derive(Parser)]
struct Args {
    /// The prompt.
    prompt: String,
    /// Maximum number of tokens to generate.
    #[arg(long, default_value_t = 32)]
    max_tokens: u32,
    /// URL of the server's HTTP API.
    #[arg(long, default_value = "http://127.0.0.1:8000")]
    url: String,
}

/// A line of the stream: either a part of the completion, or the error that ends the stream.
#[derive(Deserialize)]
#[serde(untagged)]
enum Line {
    Error { error: ErrorObject },
    Part { choices: Vec<Choice> },
}

#[derive(Deserialize)]
struct Choice {
    text: String,
    finish_reason: Option<String>,
}

/// OpenAI's error object. The body of every error response contains one too.
#[derive(Deserialize)]
struct ErrorObject {
    message: String,
    code: String,
}

#[derive(Deserialize)]
struct ErrorResponse {
    error: ErrorObject,
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {}", with_causes(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let response = send(args).await?;
    if response.status() != StatusCode::OK {
        let status = response.status();
        let body = response.into_body().collect().await?.to_bytes();
        let Ok(ErrorResponse { error }) = serde_json::from_slice(&body) else {
            return Err(format!("{status}, and the response is not from Tokenway").into());
        };
        return Err(format!("{status}: {} ({})", error.message, error.code).into());
    }
    let finish_reason = print_stream(response.into_body()).await?;
    println!("\nfinish reason: {finish_reason}");
    Ok(())
}

async fn send(args: &Args) -> Result<Response<Incoming>, Box<dyn Error>> {
    let body = json!({"prompt": args.prompt, "max_tokens": args.max_tokens, "stream": true});
    let request = Request::post(format!("{}/v1/completions", args.url))
        .header(CONTENT_TYPE, "application/json")
        // With `text/event-stream`, the server would send the same stream as server-sent events.
        .header(ACCEPT, "application/x-ndjson")
        .body(Full::new(Bytes::from(body.to_string())))?;
    let client = Client::builder(TokioExecutor::new()).build_http();
    let response = client
        .request(request)
        .await
        .map_err(|error| no_answer_error(&args.url, &error))?;
    Ok(response)
}

/// Prints the text of each token as it arrives.
///
/// Dropping the body before its end cancels the request, and the server frees its slot at once.
async fn print_stream(mut body: Incoming) -> Result<String, Box<dyn Error>> {
    let mut received = BytesMut::new();
    let mut finish_reason = None;
    while let Some(frame) = body.frame().await {
        // A frame may contain many lines, or only a part of a line.
        if let Ok(data) = frame?.into_data() {
            received.extend_from_slice(&data);
        }
        while let Some(end) = received.iter().position(|byte| *byte == b'\n') {
            match serde_json::from_slice(&received.split_to(end + 1))? {
                Line::Error { error } => {
                    return Err(format!("{} ({})", error.message, error.code).into());
                }
                Line::Part { choices } => {
                    for choice in choices {
                        print!("{}", choice.text);
                        finish_reason = choice.finish_reason.or(finish_reason);
                    }
                }
            }
        }
        io::stdout().flush()?;
    }
    finish_reason.ok_or_else(|| "the stream ended without a finish reason: it was truncated".into())
}

fn no_answer_error(url: &str, error: &dyn Error) -> String {
    let causes = with_causes(error);
    format!("no answer from {url}: {causes}\nIs the server running? Start it with `make run`.")
}

/// Formats an error with its causes on one line.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
