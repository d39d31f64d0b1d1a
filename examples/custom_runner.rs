//! A custom runner served over HTTP and gRPC: `echo` repeats the prompt, one character per token, at a fixed interval.
//!
//! A runner consists of a [`Loader`], which loads it on its worker's thread, a [`Model`], which every thread may
//! call, and a [`Runner`], which runs the device. Tokenway does the rest: queue, slots, back-pressure, cancellation,
//! stop strings and both APIs.
//!
//! ```console
//! cargo run --example custom_runner
//! ```
//!
//! It serves until Ctrl-C. In another terminal:
//!
//! ```console
//! curl -N http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \
//!   -d '{"prompt": "The capital of France is", "max_tokens": 64, "stream": true}'
//! ```
#![expect(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "an example prints its output"
)]

use std::error::Error;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tokenway::listen::Address;
use tokenway::models::UnknownModelPolicy;
use tokenway::request::{ChatMessage, Parameter, TokenId};
use tokenway::runner::{
    BosPolicy, LoadError, LoadedModel, Loader, Model, ModelError, ModelFacts, NextStep, Resumption,
    Runner, Sequence, SequenceStart, Slot, SlotCredit, Step, StepError, Token, TokenBytes,
    monotonic_ns,
};
use tokenway::server::{
    DrainDurations, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    WorkerParts,
};
use tokio::signal::unix::{SignalKind, signal};

/// End-of-sequence token: the control character "end of transmission".
const END_OF_SEQUENCE: TokenId = 4;

/// Serves the echo runner over HTTP and gRPC.
#[derive(Parser)]
struct Args {
    /// Address of the HTTP API.
    #[arg(long, default_value = "127.0.0.1:8000")]
    http_listen: Address,
    /// Address of the gRPC API.
    #[arg(long, default_value = "127.0.0.1:50051")]
    grpc_listen: Address,
    /// Time between two tokens of a sequence, in milliseconds.
    #[arg(long, default_value_t = 20)]
    interval_ms: u64,
}

#[tokio::main]
async fn main() -> ExitCode {
    match serve(Args::parse()).await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(args: Args) -> Result<(), Box<dyn Error>> {
    // From this line on, Ctrl-C no longer ends the process by itself.
    let mut interrupt = signal(SignalKind::interrupt())?;
    let server = Server::start(server_parts(args)).await?;
    server.ready(|_| ()).await?;
    if let (Some(http), Some(grpc)) = (server.http_address(), server.grpc_address()) {
        println!("echo serves HTTP at http://{http} and gRPC at http://{grpc}");
    }
    interrupt.recv().await;
    server.drain().await;
    Ok(())
}

/// Builds the parts of a server with one model on one worker, served over HTTP and gRPC.
fn server_parts(args: Args) -> ServerParts {
    let model = ModelParts {
        name: "echo".to_owned(),
        loader: Arc::new(EchoLoader {
            interval: Duration::from_millis(args.interval_ms),
        }),
        aliases: Vec::new(),
        workers: 1,
        isolation: Isolation::Thread,
        slots: 8,
        queue_depth: 1024,
        slow_reader_timeout: Duration::from_secs(10),
    };
    let engine = EngineParts {
        models: vec![model],
        unknown_model: UnknownModelPolicy::Refuse,
        workers: WorkerParts::default(),
    };
    ServerParts {
        http: Some(HttpFrontend::listening_on(args.http_listen)),
        grpc: Some(args.grpc_listen),
        drain: DrainDurations {
            grace: Duration::ZERO,
            timeout: Duration::from_secs(10),
        },
        ..ServerParts::new(Source::Engine(engine))
    }
}

/// Creates the runner on its worker's thread: when the worker starts, and again after a crash.
struct EchoLoader {
    interval: Duration,
}

impl Loader for EchoLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        progress(1.0);
        let interval_ns = u64::try_from(self.interval.as_nanos())
            .map_err(|_| LoadError("the interval is longer than 584 years".to_owned()))?;
        Ok(LoadedModel {
            model: Arc::new(EchoModel {
                facts: ModelFacts {
                    name: "echo".to_owned(),
                    context_length: 4096,
                    max_prompt_bytes: 16 * 1024,
                    vocabulary_size: u32::from(char::MAX) + 1,
                    // The same prompt always gives the same tokens, so a resumed sequence continues exactly.
                    resumption: Resumption::Exact,
                    reuses_prefixes: false,
                    device: None,
                    // The output does not depend on sampling, so requests with sampling parameters are rejected.
                    unsupported: Parameter::ALL.to_vec(),
                    bos_token: None,
                    eos_token: None,
                },
            }),
            runner: Box::new(EchoRunner {
                interval_ns,
                sequences: (0..slots).map(|_| None).collect(),
            }),
        })
    }

    fn name(&self) -> &'static str {
        "echo"
    }
}

/// A model whose vocabulary is Unicode: a token's id is the code point of its character.
struct EchoModel {
    facts: ModelFacts,
}

impl Model for EchoModel {
    fn facts(&self) -> &ModelFacts {
        &self.facts
    }

    fn tokenize(&self, text: &str, _: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        Ok(text.chars().map(TokenId::from).collect())
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let no_character =
            |id: &TokenId| ModelError::Invalid(format!("Token id {id} is not a character."));
        let piece = |id: &TokenId| character_bytes(*id).ok_or_else(|| no_character(id));
        ids.iter().map(piece).collect()
    }

    fn render_chat(&self, _messages: &[ChatMessage]) -> Result<String, ModelError> {
        let message = "echo has no chat template; send it a prompt.";
        Err(ModelError::Invalid(message.to_owned()))
    }
}

/// The device: one sequence per slot, or none.
struct EchoRunner {
    interval_ns: u64,
    sequences: Vec<Option<EchoSequence>>,
}

/// A running sequence.
struct EchoSequence {
    prompt: Arc<[TokenId]>,
    /// Index of the next token.
    next: usize,
    /// Time at which the next token is due. The times are fixed when the sequence starts, so a delayed sequence
    /// catches up.
    due_ns: u64,
}

impl Runner for EchoRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.sequences[slot.0] = Some(EchoSequence {
            prompt: sequence.prompt,
            // The client received these tokens before a crash, so they are not repeated.
            next: sequence.delivered.len(),
            due_ns: monotonic_ns().saturating_add(self.interval_ns),
        });
        Ok(SequenceStart::default())
    }

    fn release(&mut self, slot: Slot) {
        self.sequences[slot.0] = None;
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        let running = (0..).map(Slot).zip(&self.sequences);
        let with_room = running.filter(|(slot, _)| credit.credit(*slot) > 0);
        let due = with_room.filter_map(|(_, echo)| Some(echo.as_ref()?.due_ns));
        due.min().map_or(NextStep::Idle, NextStep::At)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        let now_ns = monotonic_ns();
        for (slot, echo) in (0..).map(Slot).zip(&mut self.sequences) {
            let Some(echo) = echo else { continue };
            if echo.due_ns > now_ns || step.credit(slot) == 0 {
                continue;
            }
            match echo.prompt.get(echo.next) {
                Some(id) => step.emit(slot, token(*id, echo.due_ns)),
                None => step.end(slot, token(END_OF_SEQUENCE, echo.due_ns)),
            }
            echo.next += 1;
            echo.due_ns = echo.due_ns.saturating_add(self.interval_ns);
        }
        Ok(())
    }
}

fn token(id: TokenId, due_ns: u64) -> Token {
    Token {
        id,
        bytes: character_bytes(id).unwrap_or_default(),
        due_ns,
        // With 0, the worker sets the emission time.
        emitted_ns: 0,
        logprobs: None,
    }
}

fn character_bytes(id: TokenId) -> Option<TokenBytes> {
    let character = char::from_u32(id)?;
    Some(TokenBytes::from_slice(
        character.encode_utf8(&mut [0; 4]).as_bytes(),
    ))
}
