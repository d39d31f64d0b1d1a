//! Settings of workers in other processes: the engine's worker socket and timeouts, and the command
//! `tokenway worker`.

use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::model::Origin;
use super::runner::{LoaderSettings, RunnerSettings};
use super::values::Seconds;
use super::{ConfigError, seconds};
use crate::listen::{Address, MutualTls, TlsFiles};
use crate::scheduler::ResumptionLimits;
use crate::server::WorkerParts;
use crate::worker::attach::{self, AttachOptions};
use crate::worker::attached::{TOKENIZER_CALL_TIMEOUT, WorkerTimeouts};
use crate::worker::engine_address::EngineAddress;

/// The TLS files of an engine or a worker: all three or none.
#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
struct TlsSettings {
    /// CA certificates (PEM file) that verify the certificate of the other end of worker connections. Worker
    /// connections over TCP require mutual TLS: the engine and the workers each need all three files
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CA", value_name = "FILE")]
    worker_tls_ca: Option<PathBuf>,
    /// Certificate (PEM file) that this process presents on worker connections
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CERT", value_name = "FILE")]
    worker_tls_cert: Option<PathBuf>,
    /// Private key (PEM file) of the certificate in --worker-tls-cert
    #[arg(long, env = "TOKENWAY_WORKER_TLS_KEY", value_name = "FILE")]
    worker_tls_key: Option<PathBuf>,
}

impl TlsSettings {
    fn or(self, file: Self) -> Self {
        Self {
            worker_tls_ca: self.worker_tls_ca.or(file.worker_tls_ca),
            worker_tls_cert: self.worker_tls_cert.or(file.worker_tls_cert),
            worker_tls_key: self.worker_tls_key.or(file.worker_tls_key),
        }
    }

    fn files(self) -> Result<Option<TlsFiles>, ConfigError> {
        match (
            self.worker_tls_ca,
            self.worker_tls_cert,
            self.worker_tls_key,
        ) {
            (None, None, None) => Ok(None),
            (Some(ca), Some(certificate), Some(key)) => Ok(Some(TlsFiles {
                ca,
                certificate,
                key,
            })),
            _ => {
                let message =
                    "set all of --worker-tls-ca, --worker-tls-cert and --worker-tls-key, or none";
                Err(ConfigError::Invalid(message.to_owned()))
            }
        }
    }
}

/// Requires mutual TLS over TCP: otherwise everyone who can connect to the port could act as a worker and
/// receive prompts.
fn check_transport(
    flag: &str,
    address: &Address,
    files: Option<&TlsFiles>,
) -> Result<(), ConfigError> {
    match (address, files) {
        (Address::Tcp(_), None) => Err(ConfigError::Invalid(format!(
            "--{flag} {address}: worker connections over TCP require mutual TLS. Set \
             --worker-tls-ca, --worker-tls-cert and --worker-tls-key, or use unix:/path"
        ))),
        (Address::Unix(_), Some(_)) => Err(ConfigError::Invalid(format!(
            "--{flag} {address}: a Unix socket has no TLS; remove the --worker-tls-… flags"
        ))),
        (Address::Tcp(_), Some(_)) | (Address::Unix(_), None) => Ok(()),
    }
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct WorkerSettings {
    /// Address of the worker socket, to which workers connect: `unix:/path` in a folder that only workers can
    /// enter, or `host:port` with mutual TLS. Do not expose it to clients [default: none, or a private Unix
    /// socket with --isolation process]
    #[arg(long, env = "TOKENWAY_WORKER_LISTEN", value_name = "ADDRESS")]
    worker_listen: Option<Address>,
    #[command(flatten)]
    #[serde(flatten)]
    tls: TlsSettings,
    /// Time in seconds without a message after which a worker process counts as lost. A worker may declare
    /// another timeout for itself. At least 0.1 [default: 2]
    #[arg(
        long,
        env = "TOKENWAY_HEARTBEAT_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    heartbeat_timeout: Option<Seconds>,
    /// Maximum time in seconds of one device call. A worker process whose call takes longer counts as lost. If
    /// the worker has declared a longer heartbeat timeout, that time applies. 0: no limit [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_STEP_LIMIT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    step_limit: Option<Seconds>,
    /// Maximum number of times in a row that a completion is resumed on another worker without a new token in
    /// between. A completion that generates fewer than 16 tokens on each worker is resumed at most 8 times, or
    /// this many times if that is more [default: 2]
    #[arg(long, env = "TOKENWAY_MAX_RESUMPTIONS", value_name = "N")]
    max_resumptions: Option<u32>,
    /// Time in seconds that an interrupted completion waits for another worker, each time it is resumed
    /// [default: 60]
    #[arg(
        long,
        env = "TOKENWAY_RESUME_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    resume_timeout: Option<Seconds>,
}

impl WorkerSettings {
    pub(super) fn or(self, file: Self) -> Self {
        Self {
            worker_listen: self.worker_listen.or(file.worker_listen),
            tls: self.tls.or(file.tls),
            heartbeat_timeout: self.heartbeat_timeout.or(file.heartbeat_timeout),
            step_limit: self.step_limit.or(file.step_limit),
            max_resumptions: self.max_resumptions.or(file.max_resumptions),
            resume_timeout: self.resume_timeout.or(file.resume_timeout),
        }
    }

    pub(super) fn parts(self) -> Result<WorkerParts, ConfigError> {
        let files = self.tls.files()?;
        match &self.worker_listen {
            Some(address) => check_transport("worker-listen", address, files.as_ref())?,
            None if files.is_some() => {
                let message = "--worker-tls-… requires --worker-listen host:port; set it, or remove the \
                               --worker-tls-… flags";
                return Err(ConfigError::Invalid(message.to_owned()));
            }
            None => {}
        }
        let tls = files.as_ref().map(MutualTls::server).transpose();
        let tls = tls.map_err(|error| ConfigError::Invalid(format!("--worker-tls-…: {error}")))?;
        let heartbeat_timeout = seconds(self.heartbeat_timeout, 2);
        if heartbeat_timeout.as_millis() < 100 {
            let got = heartbeat_timeout.as_secs_f64();
            let message = format!("--heartbeat-timeout must be at least 0.1 seconds (got {got})");
            return Err(ConfigError::Invalid(message));
        }
        let step_limit = seconds(self.step_limit, 30);
        Ok(WorkerParts {
            listen: self.worker_listen,
            tls,
            timeouts: WorkerTimeouts {
                heartbeat_timeout,
                step_limit: Some(step_limit).filter(|limit| !limit.is_zero()),
                tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
            },
            resumption: ResumptionLimits {
                max_consecutive: self.max_resumptions.unwrap_or(2),
                acceptance_timeout: seconds(self.resume_timeout, 60),
            },
        })
    }
}

#[derive(Args)]
pub(super) struct WorkerCommand {
    /// Address of the engine's worker socket: `unix:/path` or `host:port`
    #[arg(long, env = "TOKENWAY_WORKER_ENGINE", value_name = "ADDRESS")]
    engine: Address,
    /// Name that the engine gives the model to serve [default: the engine's only model]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model: Option<String>,
    /// Number that distinguishes the workers of this machine, for example the index of a device. It is part of
    /// the worker's default name
    #[arg(long, env = "TOKENWAY_DEVICE", value_name = "N", default_value_t = 0)]
    device: u16,
    /// Name of this worker in the engine's logs, up to 64 bytes [default: its device, process id and host]
    #[arg(long, env = "TOKENWAY_WORKER_NAME", value_name = "NAME")]
    name: Option<String>,
    /// Secret that an engine gives to a worker process that it starts
    #[arg(long, env = "TOKENWAY_CHILD_TOKEN", hide = true)]
    child_token: Option<String>,
    #[command(flatten)]
    tls: TlsSettings,
    #[command(flatten)]
    runner: RunnerSettings,
}

/// The settings of a worker that connects to an engine.
pub struct WorkerTask {
    /// The engine's address, the model, and the loader.
    pub parts: AttachOptions,
    /// Cancelled to stop the worker.
    pub stopping: CancellationToken,
}

impl WorkerCommand {
    pub(super) fn task(self) -> Result<WorkerTask, ConfigError> {
        if self.runner.is_attached() {
            let message =
                "--runner attached is for engines; a worker needs --runner llama or llm_test";
            return Err(ConfigError::Invalid(message.to_owned()));
        }
        let LoaderSettings { loader, slots, .. } = self.runner.loader(&Origin::Flags)?;
        let default_name = || attach::default_name(self.device);
        Ok(WorkerTask {
            parts: AttachOptions {
                engine: engine_address(self.engine, self.tls)?,
                model: self.model.unwrap_or_default(),
                name: self.name.unwrap_or_else(default_name),
                child_token: self.child_token,
                loader,
                slots,
            },
            stopping: CancellationToken::new(),
        })
    }
}

fn engine_address(address: Address, tls: TlsSettings) -> Result<EngineAddress, ConfigError> {
    let files = tls.files()?;
    check_transport("engine", &address, files.as_ref())?;
    let address = match address {
        Address::Unix(path) => return Ok(EngineAddress::Unix(path)),
        Address::Tcp(address) => address,
    };
    let invalid = |error| ConfigError::Invalid(format!("--engine {address}: {error}"));
    let read = |path: &PathBuf| {
        std::fs::read(path).map_err(|error| {
            ConfigError::Invalid(format!("--worker-tls-…: {}: {error}", path.display()))
        })
    };
    let mut tls = ClientTlsConfig::new();
    if let Some(files) = files {
        tls = tls
            .ca_certificate(Certificate::from_pem(read(&files.ca)?))
            .identity(Identity::from_pem(
                read(&files.certificate)?,
                read(&files.key)?,
            ));
    }
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .and_then(|endpoint| endpoint.tls_config(tls));
    endpoint
        .map(|endpoint| EngineAddress::Tls(Box::new(endpoint)))
        .map_err(invalid)
}
