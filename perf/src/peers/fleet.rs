//! The compared servers: a scripted engine, and the gateways in front of it, each in its own process.

use std::ffi::OsStr;
use std::io::Write;
use std::time::Duration;

use tempfile::NamedTempFile;
use tokio::process::Command;

use super::Options;
use crate::access::Access;
use crate::arguments::ServerUrl;
use crate::foreign_server::ForeignServer;
use crate::load::{ConnectionPlan, Load, LoadGenerator, Target};
use crate::process::ResourceUsage;
use crate::serve::openai::{MODEL, Script};
use crate::serve::{self, Role};
use crate::server::{ServerProcess, free_port};
use crate::stream::Format;

/// Names of the servers that are always there.
pub(super) const ENGINE: &str = "engine alone";
pub(super) const TOKENWAY: &str = "Tokenway";
/// Time between two tokens of a paced stream: 100 tokens/s.
pub(super) const INTERVAL: Duration = Duration::from_millis(10);
const SLOTS: usize = 256;
/// Key that LiteLLM requires of its clients. It is no secret: the proxy runs only for the comparison.
const LITELLM_KEY: &str = "sk-compared-with-tokenway-0123456789";
const LITELLM_SLOWNESS: u32 = 50;
/// Time within which a gateway must answer its first request.
const START_TIMEOUT: Duration = Duration::from_secs(120);

/// A compared server. Its process ends when this is dropped.
pub(super) struct Peer {
    pub(super) name: &'static str,
    pub(super) target: Target,
    /// Divisor of its loads, except the paced one.
    slowness: u32,
    process: Process,
}

enum Process {
    Own(ServerProcess),
    Foreign(ForeignServer),
}

impl Peer {
    pub(super) fn usage(&self) -> anyhow::Result<ResourceUsage> {
        match &self.process {
            Process::Own(process) => process.usage(),
            Process::Foreign(process) => process.usage(),
        }
    }

    async fn own(name: &'static str, options: &serve::Options) -> anyhow::Result<Self> {
        let process = ServerProcess::start(options).await?;
        let target = Target::Server(process.http_url()?, Format::Sse);
        Ok(Self {
            name,
            target,
            slowness: 1,
            process: Process::Own(process),
        })
    }

    /// Returns the part of a load that this server gets.
    pub(super) fn part_of(&self, load: &Load) -> Load {
        let slowness = match load.prompt {
            Some(_) => self.slowness,
            None => 1,
        };
        Load {
            tokens: load.tokens.div_ceil(slowness),
            requests: load.requests.div_ceil(slowness),
            ..load.clone()
        }
    }

    async fn foreign(
        name: &'static str,
        program: &OsStr,
        port: u16,
        arguments: &[&str],
        key: Option<&'static str>,
    ) -> anyhow::Result<Self> {
        let mut command = Command::new(program);
        command
            .args(arguments)
            // LiteLLM would fetch its list of prices, and use a proxy for the engine.
            .envs([("LITELLM_LOCAL_MODEL_COST_MAP", "True"), ("NO_PROXY", "*")]);
        let access = Access {
            key: key.map(Into::into),
            ..Access::default()
        };
        let url = ServerUrl::from_authority(&format!("127.0.0.1:{port}"));
        let target = Target::Server(url.with_access(access), Format::Sse);
        let answers = async || Ok(completes_request(&target).await);
        let process = ForeignServer::start(command, START_TIMEOUT, answers).await?;
        Ok(Self {
            name,
            target,
            slowness: 1,
            process: Process::Foreign(process),
        })
    }
}

/// Starts the engine, Tokenway's gateway, and the other gateways whose programs are given, in this order.
pub(super) async fn start(options: &Options) -> anyhow::Result<Vec<Peer>> {
    let mut engine = serve::Options::new(Role::OpenAi, INTERVAL, SLOTS, SLOTS);
    engine.script = Script {
        stamps: true,
        tokens_per_chunk: options.tokens_per_chunk,
        ..Script::default()
    };
    let engine = Peer::own(ENGINE, &engine).await?;
    let Target::Server(url, _) = &engine.target else {
        unreachable!("an engine is a server");
    };
    let (url, port) = (
        url.to_string(),
        url.authority.rsplit(':').next().unwrap_or_default(),
    );
    let mut gateway = serve::Options::new(Role::Gateway, INTERVAL, SLOTS, SLOTS);
    gateway.engines = vec![format!("openai+{url}/v1")];
    let mut peers = vec![Peer::own(TOKENWAY, &gateway).await?];
    if let Some(program) = &options.smg {
        let (port, metrics) = (free_port()?, free_port()?.to_string());
        let own = port.to_string();
        let listen = ["launch", "--host", "127.0.0.1", "--port", &own];
        let metrics = [
            "--prometheus-host",
            "127.0.0.1",
            "--prometheus-port",
            &metrics,
        ];
        let engine = ["--policy", "round_robin", "--worker-urls", &url];
        let arguments: Vec<_> = listen.into_iter().chain(metrics).chain(engine).collect();
        peers.push(Peer::foreign("SMG", program.as_os_str(), port, &arguments, None).await?);
    }
    if let Some(program) = &options.litellm {
        let own = free_port()?;
        let settings = include_str!("../../templates/litellm.yaml");
        let settings = settings.replace("ENGINE_PORT", port);
        let mut file = NamedTempFile::new()?;
        file.write_all(settings.replace("KEY", LITELLM_KEY).as_bytes())?;
        let (path, own_port) = (file.path().to_string_lossy(), own.to_string());
        let listen = ["--host", "127.0.0.1", "--port", &own_port];
        let arguments: Vec<_> = ["--config", &path, "--telemetry", "False"]
            .into_iter()
            .chain(listen)
            .collect();
        let program = program.as_os_str();
        let peer = Peer::foreign("LiteLLM", program, own, &arguments, Some(LITELLM_KEY));
        peers.push(Peer {
            slowness: LITELLM_SLOWNESS,
            ..peer.await?
        });
    }
    if let Some(program) = &options.envoy {
        let own = free_port()?;
        let settings = include_str!("../../templates/envoy.yaml");
        let settings = settings.replace("LISTEN_PORT", &own.to_string());
        let settings = settings.replace("ENGINE_PORT", port);
        let arguments = [
            "--disable-hot-restart",
            "--log-level",
            "off",
            "--config-yaml",
            &settings,
        ];
        peers.push(Peer::foreign("Envoy", program.as_os_str(), own, &arguments, None).await?);
    }
    peers.insert(0, engine);
    Ok(peers)
}

/// Returns true if the server completes a request.
async fn completes_request(target: &Target) -> bool {
    let load = Load {
        model: Some(MODEL.to_owned()),
        timeout: Some(START_TIMEOUT),
        ..Load::of_test_runner(1, 1)
    };
    match LoadGenerator::open(target, ConnectionPlan::for_streams(1)).await {
        Ok(generator) => generator.run(&load).await.requests == 1,
        Err(_) => false,
    }
}
