//! Streams a completion over gRPC with the crate's generated client, then prints usage and timings.
//!
//! With a server on its default addresses (`tokenway serve`):
//!
//! ```console
//! cargo run --example grpc_stream -- "The capital of France is" --max-tokens 32
//! ```
//!
//! The exit code is 1 if the server rejects the request, or if the stream ends with an error or without a summary
//! (which means that it was truncated).
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example prints its output"
)]

use std::error::Error;
use std::io::{self, Write};
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::completion_request::Input;
use tokenway::proto::v1::inference_client::InferenceClient;
use tokenway::proto::v1::{CompletionEvent, CompletionRequest, FinishReason, Summary};
use tonic::{Request, Status, Streaming};

/// Streams a completion over gRPC.
#[derive(Parser)]
struct Args {
    /// The prompt.
    prompt: String,
    /// Maximum number of tokens to generate.
    #[arg(long, default_value_t = 32)]
    max_tokens: u32,
    /// URL of the server's gRPC API.
    #[arg(long, default_value = "http://127.0.0.1:50051")]
    url: String,
    /// Deadline of the whole stream, in seconds.
    #[arg(long, default_value_t = 60)]
    timeout: u64,
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
    let mut client = InferenceClient::connect(args.url.clone())
        .await
        .map_err(|error| no_answer_error(&args.url, &error))?;
    let mut request = Request::new(CompletionRequest {
        input: Some(Input::Prompt(args.prompt.clone())),
        max_tokens: Some(args.max_tokens),
        ..CompletionRequest::default()
    });
    // The deadline is sent with the request. The server enforces it for the whole stream.
    request.set_timeout(Duration::from_secs(args.timeout));
    let response = client
        .complete(request)
        .await
        .map_err(|status| format_status(&status))?;
    let summary = print_stream(response.into_inner()).await?;
    print_summary(&summary);
    Ok(())
}

/// Prints the text of each token as it arrives.
///
/// Dropping the stream before its end cancels the request, and the server frees its slot at once.
async fn print_stream(mut stream: Streaming<CompletionEvent>) -> Result<Summary, Box<dyn Error>> {
    let mut next_index = 0;
    while let Some(event) = stream
        .message()
        .await
        .map_err(|status| format_status(&status))?
    {
        match event.event {
            Some(Event::Tokens(tokens)) => {
                if tokens.first_index != next_index {
                    return Err(format!("token {next_index} is missing").into());
                }
                for token in tokens.tokens.iter() {
                    print!("{}", token.text);
                    next_index += 1;
                }
                io::stdout().flush()?;
                if tokens.finish_reason() != FinishReason::Unspecified {
                    println!(
                        "\nfinish reason: {}",
                        finish_reason_name(tokens.finish_reason())
                    );
                }
            }
            Some(Event::Summary(summary)) => return Ok(summary),
            // `Started` contains the seed. An event of an unknown type comes from a newer server.
            Some(Event::Started(_) | Event::Prompt(_) | Event::Chat(_)) | None => {}
        }
    }
    Err("the stream ended without a summary: it was truncated".into())
}

fn print_summary(summary: &Summary) {
    let usage = summary.usage.unwrap_or_default();
    println!(
        "usage: {} prompt tokens, {} completion tokens",
        usage.prompt_tokens, usage.completion_tokens
    );
    let timings = summary.timings.unwrap_or_default();
    println!(
        "timings: {:?} in the queue, {:?} to the first token, {:?} in all",
        Duration::from_nanos(timings.queue_ns),
        Duration::from_nanos(timings.first_token_ns),
        Duration::from_nanos(timings.total_ns)
    );
}

fn finish_reason_name(reason: FinishReason) -> &'static str {
    match reason {
        FinishReason::Unspecified => "none",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::ContentFilter => "content filter",
        FinishReason::ToolCalls => "tool calls",
    }
}

/// Formats a status for the user: the message, and the error code that programs check.
fn format_status(status: &Status) -> Box<dyn Error> {
    let error = tokenway::error::Error::from(status);
    format!("{} ({})", error.message, error.kind.mapping().code).into()
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
