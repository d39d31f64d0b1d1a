//! One server under test, of the product or a floor, as a process of its own. It prints its addresses on
//! one line, and ends when its standard input closes, so that it never outlives its parent.

use std::ffi::OsString;
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;

use clap::{Args, ValueEnum};
use tokenway::listen::{Address, Limits};
use tokenway::models::UnknownModel;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::server::{
    Drain, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    WorkerParts,
};
use tokenway::worker::child::Program;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use crate::arguments::{duration_ms, to_ms};
use crate::device::Device;
use crate::{Outcome, Verdict};

mod bare;
mod lines;

/// Kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, ValueEnum)]
pub(crate) enum Role {
    /// The product: HTTP API and gRPC API over an engine in the same process.
    Product,
    /// The product with its worker in a process of its own.
    Isolated,
    /// The product's engine behind its gRPC API.
    Engine,
    /// The product's gateway in front of an engine.
    Gateway,
    /// The floor of every API: lines over a socket.
    Tcp,
    /// The floor of the HTTP API.
    Axum,
    /// The floor of the gRPC API.
    Tonic,
}

/// Serve until standard input closes; the addresses are printed on one line.
#[derive(Args, Clone, Debug)]
pub(crate) struct Options {
    /// Kind of server.
    pub(crate) role: Role,
    /// Time between two tokens of a stream, in milliseconds.
    #[arg(long, value_name = "MS", value_parser = duration_ms)]
    pub(crate) interval_ms: Duration,
    /// Streams that run at once.
    #[arg(long)]
    pub(crate) slots: usize,
    /// Requests that may wait for a slot.
    #[arg(long)]
    pub(crate) queue: usize,
    /// Listening address of the gRPC API.
    #[arg(long, default_value = ANY_PORT)]
    pub(crate) grpc_listen: String,
    /// Engine behind the gateway.
    #[arg(long)]
    pub(crate) engine: Option<tokenway::cluster::EngineAddress>,
    /// Time until the product gives up a peer that sends no headers or reads too slowly, in
    /// milliseconds. For bodies, and for sockets that accept nothing, it is three times as long.
    #[arg(long, value_name = "MS", default_value = "10000", value_parser = duration_ms)]
    pub(crate) peer_timeout_ms: Duration,
}

/// Listening address on a free port.
const ANY_PORT: &str = "127.0.0.1:0";

impl Options {
    /// A server on any free ports, with the product's default timeouts.
    pub(crate) fn new(role: Role, interval: Duration, slots: usize, queue: usize) -> Self {
        Self {
            role,
            interval_ms: interval,
            slots,
            queue,
            grpc_listen: ANY_PORT.to_owned(),
            engine: None,
            peer_timeout_ms: Duration::from_secs(10),
        }
    }

    /// Arguments by which this executable runs as the server.
    pub(crate) fn command_line(&self) -> Vec<String> {
        let role = self
            .role
            .to_possible_value()
            .expect("every role has a name");
        let mut arguments = vec![
            "serve".to_owned(),
            role.get_name().to_owned(),
            format!("--interval-ms={}", to_ms(self.interval_ms)),
            format!("--slots={}", self.slots),
            format!("--queue={}", self.queue),
            format!("--grpc-listen={}", self.grpc_listen),
            format!("--peer-timeout-ms={}", to_ms(self.peer_timeout_ms)),
        ];
        arguments.extend(
            self.engine
                .iter()
                .map(|engine| format!("--engine={engine}")),
        );
        arguments
    }
}

/// Serves, in the process that was started for it.
pub(crate) async fn run(options: &Options, out: &mut dyn Write) -> Outcome {
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
            let addresses: Vec<_> = http.into_iter().chain(grpc).collect();
            writeln!(out, "{}", addresses.join(" "))?;
            out.flush()?;
            stdin_closed().await;
        }
        Role::Tcp | Role::Axum | Role::Tonic => {
            let device = Device::start(options.interval_ms, options.slots).await?;
            let listener = TcpListener::bind(ANY_PORT).await?;
            let api = if options.role == Role::Tonic {
                "grpc"
            } else {
                "http"
            };
            writeln!(out, "{api}={}", listener.local_addr()?)?;
            out.flush()?;
            tokio::select! {
                ended = serve_floor(options.role, listener, device) => ended?,
                () = stdin_closed() => {}
            }
        }
    }
    Ok(Verdict::Passed)
}

async fn serve_floor(role: Role, listener: TcpListener, device: Device) -> io::Result<()> {
    match role {
        Role::Axum => bare::serve_axum(listener, device).await,
        Role::Tonic => bare::serve_tonic(listener, device).await,
        Role::Tcp | Role::Product | Role::Isolated | Role::Engine | Role::Gateway => {
            bare::serve_tcp(listener, device).await
        }
    }
}

/// Waits until standard input closes. Nothing is ever written to it.
async fn stdin_closed() {
    let _ = tokio::io::stdin().read(&mut [0]).await;
}

fn parts(options: &Options) -> io::Result<ServerParts> {
    let has_http = options.role != Role::Engine;
    let has_grpc = options.role != Role::Gateway;
    let http = HttpFrontend::at(Address::Tcp(ANY_PORT.to_owned()));
    let grpc = options.grpc_listen.parse().map_err(io::Error::other)?;
    Ok(ServerParts {
        source: source(options)?,
        http: has_http.then_some(http),
        grpc: has_grpc.then_some(grpc),
        limits: Limits {
            header_timeout: options.peer_timeout_ms,
            keep_alive_timeout: options.peer_timeout_ms,
            body_timeout: options.peer_timeout_ms * 3,
            write_timeout: options.peer_timeout_ms * 3,
            ..Limits::default()
        },
        // A run may be long, and ends by itself.
        request_timeout: Duration::from_secs(24 * 60 * 60),
        access_log: false,
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
        slow_reader_timeout: options.peer_timeout_ms,
    };
    Ok(Source::Engine(EngineParts {
        models: vec![model],
        unknown_model: UnknownModel::Refuse,
        workers: WorkerParts::default(),
    }))
}

/// Runs an isolated worker with this executable.
fn isolation(options: &Options) -> io::Result<Isolation> {
    if options.role != Role::Isolated {
        return Ok(Isolation::Thread);
    }
    let (interval_ms, slots) = (to_ms(options.interval_ms), options.slots.to_string());
    let arguments = ["worker", "--interval-ms", &interval_ms, "--slots", &slots];
    Ok(Isolation::Process(Program {
        path: std::env::current_exe()?,
        arguments: arguments.map(OsString::from).to_vec(),
        settings: String::new(),
    }))
}
