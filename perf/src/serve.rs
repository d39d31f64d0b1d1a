//! The hidden subcommand `serve`: one server under test, either Tokenway or a floor, in its own process. It prints its
//! addresses on one line, and ends when its standard input closes, so that it never outlives its parent.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokenway::caller::PrefixSharing;
use tokenway::certificates::CertificateError;
use tokenway::cluster::{ClusterSpec, RoutePolicy, RouteSpec, ServerKind, TargetSpec};
use tokenway::keys::KeySources;
use tokenway::listen::{Address, Limits, ServerTls, ServerTlsFiles};
use tokenway::logging::{self, LogFormat, Timestamps};
use tokenway::models::UnknownModelPolicy;
use tokenway::output::Output;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::server::{
    DrainDurations, EngineParts, HttpFrontend, Isolation, ModelParts, Server, ServerParts, Source,
    WorkerParts,
};
use tokenway::worker::child::Program;
use tokio::io::AsyncReadExt;
use tokio::net::TcpListener;

use crate::arguments::format_ms;
use crate::device::Device;
use crate::{CommandResult, Verdict};

mod bare;
mod lines;
pub(crate) mod openai;
pub(crate) mod story;

use openai::Script;

/// Kind of server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Role {
    /// Tokenway with its HTTP API, its gRPC API and its engine in one process.
    Product,
    /// Tokenway without spans and access log.
    Unlogged,
    /// Tokenway with its worker in a separate process.
    Isolated,
    /// A Tokenway engine with its gRPC API.
    Engine,
    /// A Tokenway gateway in front of an engine.
    Gateway,
    /// A scripted engine with OpenAI's API.
    OpenAi,
    /// The floor of every API: NDJSON lines over a raw socket.
    Tcp,
    /// The floor of the HTTP API: axum with one handler.
    Axum,
    /// The floor of the gRPC API: tonic with one handler.
    Tonic,
}

/// Serve until standard input closes; the addresses are printed on one line.
#[derive(Args)]
pub(crate) struct Arguments {
    /// Configuration of the server, as JSON
    #[arg(value_parser = |text: &str| serde_json::from_str::<Options>(text))]
    options: Options,
}

/// Configuration of a server.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct Options {
    pub(crate) role: Role,
    /// Time between two tokens of a stream.
    pub(crate) interval: Duration,
    /// Number of streams that run concurrently.
    pub(crate) slots: usize,
    /// Number of requests that may wait for a slot.
    pub(crate) queue: usize,
    /// Address on which the gRPC API listens.
    pub(crate) grpc_listen: String,
    /// Addresses of the engines behind the gateway.
    #[serde(default)]
    pub(crate) engines: Vec<String>,
    /// Number of engines, from the first one, that are known to be vLLM, which reports token ids.
    #[serde(default)]
    pub(crate) vllm_engines: usize,
    /// Routes of the gateway. Without routes, every engine gets requests for each model.
    #[serde(default)]
    pub(crate) routes: Vec<RouteOptions>,
    /// Behaviour of the scripted engine.
    #[serde(default)]
    pub(crate) script: Script,
    /// Keys and certificates.
    #[serde(default)]
    pub(crate) credentials: Credentials,
    /// Time after which the server gives up a peer that sends no headers or reads too slowly. The timeout for bodies,
    /// and for sockets that accept nothing, is three times as long.
    pub(crate) peer_timeout: Duration,
}

/// Keys file and certificates of a Tokenway server. The default is no keys and no TLS.
#[derive(Clone, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Credentials {
    pub(crate) keys_file: Option<PathBuf>,
    /// Folder that `tokenway tls self-signed` has created.
    pub(crate) tls: Option<PathBuf>,
}

/// A route of a gateway to models of scripted engines.
#[derive(Clone, Debug, Deserialize, Serialize)]
pub(crate) struct RouteOptions {
    pub(crate) model: String,
    /// Addresses of the engines.
    pub(crate) engines: Vec<String>,
    /// Number of times that a request is sent without receiving a token.
    pub(crate) tries: u32,
}

/// Address to listen on any free port.
const ANY_PORT: &str = "127.0.0.1:0";

impl Options {
    /// Creates the configuration of a server on free ports, with Tokenway's default timeouts.
    pub(crate) fn new(role: Role, interval: Duration, slots: usize, queue: usize) -> Self {
        Self {
            role,
            interval,
            slots,
            queue,
            grpc_listen: ANY_PORT.to_owned(),
            engines: Vec::new(),
            vllm_engines: 0,
            routes: Vec::new(),
            script: Script::default(),
            credentials: Credentials::default(),
            peer_timeout: Duration::from_secs(10),
        }
    }
}

pub(crate) async fn run(Arguments { options }: &Arguments, out: &mut dyn Write) -> CommandResult {
    match options.role {
        Role::Product | Role::Unlogged | Role::Isolated | Role::Engine | Role::Gateway => {
            if options.role != Role::Unlogged {
                start_log()?;
            }
            let server = Server::start(server_parts(options)?).await?;
            server.ready(|_| ()).await?;
            let http = server.http_address().map(|http| format!("http={http}"));
            let grpc = server.grpc_address().map(|grpc| format!("grpc={grpc}"));
            let addresses: Vec<_> = http.into_iter().chain(grpc).collect();
            writeln!(out, "{}", addresses.join(" "))?;
            out.flush()?;
            wait_for_stdin_close().await;
        }
        Role::Tcp | Role::Axum | Role::Tonic | Role::OpenAi => {
            let device = Device::start(options.interval, options.slots).await?;
            let listener = TcpListener::bind(ANY_PORT).await?;
            let is_tonic = options.role == Role::Tonic;
            let api = if is_tonic { "grpc" } else { "http" };
            writeln!(out, "{api}={}", listener.local_addr()?)?;
            out.flush()?;
            tokio::select! {
                ended = serve_floor(options, listener, device) => ended?,
                () = wait_for_stdin_close() => {}
            }
        }
    }
    Ok(Verdict::Passed)
}

async fn serve_floor(options: &Options, listener: TcpListener, device: Device) -> io::Result<()> {
    if options.role == Role::Axum {
        bare::serve_axum(listener, device).await
    } else if options.role == Role::Tonic {
        bare::serve_tonic(listener, device).await
    } else if options.role == Role::OpenAi {
        openai::serve(listener, options.script.clone(), device).await
    } else {
        bare::serve_tcp(listener, device).await
    }
}

/// Starts the log as `tokenway` starts it, with the default filter and format. The lines are formatted but not written.
fn start_log() -> anyhow::Result<()> {
    let discarded = Output::to_writer("the log", io::sink())?;
    Ok(logging::init(
        &discarded,
        LogFormat::default(),
        Timestamps::On,
    )?)
}

async fn wait_for_stdin_close() {
    let _ = tokio::io::stdin().read(&mut [0]).await;
}

fn server_parts(options: &Options) -> io::Result<ServerParts> {
    let has_http = options.role != Role::Engine;
    let http = HttpFrontend::listening_on(Address::Tcp(ANY_PORT.to_owned()));
    let grpc = options.grpc_listen.parse().map_err(io::Error::other)?;
    Ok(ServerParts {
        http: has_http.then_some(http),
        grpc: Some(grpc),
        limits: Limits {
            header_timeout: options.peer_timeout,
            keep_alive_timeout: options.peer_timeout,
            body_timeout: options.peer_timeout * 3,
            write_timeout: options.peer_timeout * 3,
            ..Limits::default()
        },
        // No stream of a run may be cut off by a deadline.
        request_timeout: Duration::from_secs(24 * 60 * 60),
        access_log: options.role != Role::Unlogged,
        prefix_sharing: PrefixSharing::All,
        keys: options.credentials.key_sources(),
        tls: options.credentials.server_tls().map_err(io::Error::other)?,
        drain: DrainDurations {
            grace: Duration::ZERO,
            timeout: Duration::ZERO,
        },
        ..ServerParts::new(server_source(options)?)
    })
}

impl Credentials {
    fn key_sources(&self) -> Option<KeySources> {
        self.keys_file.clone().map(|file| KeySources {
            file: Some(file),
            variable: None,
            usage_file: None,
        })
    }

    fn server_tls(&self) -> Result<Option<ServerTls>, CertificateError> {
        let tls = self.tls.as_ref().map(|folder| {
            ServerTls::read(ServerTlsFiles {
                certificate: folder.join("server.pem"),
                key: folder.join("server.key"),
                client_ca: None,
            })
        });
        tls.transpose()
    }
}

fn server_source(options: &Options) -> io::Result<Source> {
    if options.role == Role::Gateway {
        return Ok(Source::Remote(gateway_spec(options)?));
    }
    let runner = TestRunnerOptions {
        interval: options.interval,
        ..TestRunnerOptions::default()
    };
    let model = ModelParts {
        name: "llm_test".to_owned(),
        loader: Arc::new(TestRunnerLoader::new(runner)),
        aliases: Vec::new(),
        workers: 1,
        isolation: worker_isolation(options)?,
        slots: options.slots,
        queue_depth: options.queue,
        slow_reader_timeout: options.peer_timeout,
    };
    Ok(Source::Engine(EngineParts {
        models: vec![model],
        unknown_model: UnknownModelPolicy::Refuse,
        workers: WorkerParts::default(),
    }))
}

/// Returns the engines and routes of a gateway. Its limits for silent engines are those for clients.
fn gateway_spec(options: &Options) -> io::Result<ClusterSpec> {
    let engines = options.engines.iter().map(|address| address.parse());
    let engines: Result<ClusterSpec, _> = engines.collect();
    let target = |engine: &String| TargetSpec {
        engine: engine.as_str().into(),
        model: Some(openai::MODEL.to_owned()),
        weight: 1,
    };
    let route = |route: &RouteOptions| RouteSpec {
        model: route.model.clone(),
        targets: route.engines.iter().map(target).collect(),
        fallback: Vec::new(),
        policy: RoutePolicy {
            tries: route.tries,
            first_token_timeout: options.peer_timeout,
            stall_timeout: options.peer_timeout,
            ..RoutePolicy::default()
        },
    };
    let mut spec = engines.map_err(io::Error::other)?;
    let known = spec.engines.iter_mut().take(options.vllm_engines);
    known.for_each(|engine| engine.server = Some(ServerKind::Vllm));
    spec.routes = options.routes.iter().map(route).collect();
    Ok(spec)
}

/// Returns the isolation of the worker: with the role `Child`, this executable runs it as a process.
fn worker_isolation(options: &Options) -> io::Result<Isolation> {
    if options.role != Role::Isolated {
        return Ok(Isolation::Thread);
    }
    let (interval_ms, slots) = (format_ms(options.interval), options.slots.to_string());
    let arguments = ["worker", "--interval-ms", &interval_ms, "--slots", &slots];
    Ok(Isolation::Process(Program {
        path: std::env::current_exe()?,
        arguments: arguments.map(OsString::from).to_vec(),
        settings: String::new(),
    }))
}
