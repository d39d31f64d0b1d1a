//! The child's side of a measurement: one server, of the product or a floor, in a process of its own.
//! It says where it listens on one line, and ends when its standard input closes, so that it never
//! outlives the process that started it.

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokenway::listen::{Address, Limits};
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::scheduler::UnknownModel;
use tokenway::server::{
    Drain, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    StartError, WorkerParts,
};
use tokenway::worker::child::Program;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use crate::arguments::duration_ms;
use crate::device::Device;

mod bare;
mod lines;

/// What is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Role {
    /// The product: both doors over an engine in the same process.
    Product,
    /// The same, with its worker in a process of its own.
    Isolated,
    /// The product's engine alone, behind its gRPC door.
    Engine,
    /// The product's HTTP door alone, in front of an engine.
    Gateway,
    /// The floor of every door: lines over a socket.
    Tcp,
    /// The floor of the HTTP door.
    Axum,
    /// The floor of the gRPC door.
    Tonic,
}

/// Serve until standard input closes; the addresses are printed on one line.
#[derive(Args)]
pub(crate) struct Options {
    /// What to serve.
    role: Role,
    /// The time between two tokens of a stream, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    interval_ms: Duration,
    /// How many streams run at a time.
    #[arg(long)]
    slots: usize,
    /// How many requests may wait for a slot.
    #[arg(long)]
    queue: usize,
    /// Where the gRPC door listens.
    #[arg(long, default_value = "127.0.0.1:0")]
    grpc_listen: Address,
    /// The gateway's engine.
    #[arg(long)]
    engine: Option<String>,
    /// How long the product waits for a peer that does nothing, in milliseconds: for headers, and for a
    /// slow reader. For bodies and for sockets that take nothing it waits three times as long.
    #[arg(long, value_name = "MS", default_value = "10000", value_parser = duration_ms)]
    patience_ms: Duration,
}

/// Why nothing is served.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Start(#[from] StartError),
}

/// Is the server, in the process that was started for it.
pub(crate) fn run(options: &Options, out: &mut dyn Write, err: &mut dyn Write) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build();
    let served = runtime
        .map_err(ServeError::from)
        .and_then(|runtime| runtime.block_on(serve(options, out)));
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // There is nobody else to tell when even that fails.
            let _ = writeln!(err, "error: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn serve(options: &Options, out: &mut dyn Write) -> Result<(), ServeError> {
    match options.role {
        Role::Product | Role::Isolated | Role::Engine | Role::Gateway => {
            let server = Server::start(parts(options)?).await?;
            server.ready(|_| ()).await?;
            let http = server
                .http_address()
                .map(|address| format!("http={address}"));
            let grpc = server
                .grpc_address()
                .map(|address| format!("grpc={address}"));
            let doors: Vec<_> = http.into_iter().chain(grpc).collect();
            writeln!(out, "{}", doors.join(" "))?;
            out.flush()?;
            closed().await;
        }
        Role::Tcp | Role::Axum | Role::Tonic => {
            let device = Device::start(options.interval_ms, options.slots).await?;
            let listener = TcpListener::bind("127.0.0.1:0").await?;
            let door = if options.role == Role::Tonic {
                "grpc"
            } else {
                "http"
            };
            writeln!(out, "{door}={}", listener.local_addr()?)?;
            out.flush()?;
            tokio::select! {
                ended = floor(options.role, listener, device) => ended?,
                () = closed() => {}
            }
        }
    }
    Ok(())
}

async fn floor(role: Role, listener: TcpListener, device: Device) -> io::Result<()> {
    match role {
        Role::Axum => bare::serve_axum(listener, device).await,
        Role::Tonic => bare::serve_tonic(listener, device).await,
        Role::Tcp | Role::Product | Role::Isolated | Role::Engine | Role::Gateway => {
            bare::serve_tcp(listener, device).await
        }
    }
}

/// Waits until standard input closes. Nothing is ever written to it.
async fn closed() {
    let _ = tokio::io::stdin().read(&mut [0]).await;
}

fn parts(options: &Options) -> io::Result<ServerParts> {
    let has_http = options.role != Role::Engine;
    let has_grpc = options.role != Role::Gateway;
    let http = HttpFrontend::at(Address::Tcp("127.0.0.1:0".to_owned()));
    Ok(ServerParts {
        source: source(options)?,
        http: has_http.then_some(http),
        grpc: has_grpc.then(|| options.grpc_listen.clone()),
        limits: Limits {
            header_timeout: options.patience_ms,
            keep_alive_timeout: options.patience_ms,
            body_timeout: options.patience_ms * 3,
            write_timeout: options.patience_ms * 3,
            ..Limits::default()
        },
        // A run may be long, and ends by itself.
        request_timeout: Duration::from_secs(24 * 60 * 60),
        drain: Drain {
            grace: Duration::ZERO,
            timeout: Duration::ZERO,
        },
    })
}

fn source(options: &Options) -> io::Result<Source> {
    if options.role == Role::Gateway {
        return Ok(Source::Remote(options.engine.iter().cloned().collect()));
    }
    let runner = TestRunnerOptions {
        interval: options.interval_ms,
        ..TestRunnerOptions::default()
    };
    let model = ModelParts {
        name: "llm_test".to_owned(),
        loader: Arc::new(TestRunnerLoader::new(runner)),
        aliases: Vec::new(),
        workers: 1,
        isolation: isolation(options)?,
        slots: options.slots,
        queue_depth: options.queue,
        slow_reader_timeout: options.patience_ms,
    };
    Ok(Source::Engine(EngineParts {
        models: vec![model],
        unknown_model: UnknownModel::Refuse,
        workers: WorkerParts::default(),
    }))
}

/// This program as its own worker, where that is to be a process.
fn isolation(options: &Options) -> io::Result<Isolation> {
    if options.role != Role::Isolated {
        return Ok(Isolation::Thread);
    }
    let interval_ms = (options.interval_ms.as_secs_f64() * 1e3).to_string();
    let slots = options.slots.to_string();
    let arguments = ["worker", "--interval-ms", &interval_ms, "--slots", &slots];
    Ok(Isolation::Process(Program {
        path: std::env::current_exe()?,
        arguments: arguments.map(OsString::from).to_vec(),
        settings: String::new(),
    }))
}
