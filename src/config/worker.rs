//! The settings of workers in other processes: where they dial in, how long they are waited for, and how a
//! worker is run that dials.

use std::path::PathBuf;

use clap::Args;
use serde::Deserialize;
use tokio_util::sync::CancellationToken;
use tonic::transport::{Certificate, ClientTlsConfig, Endpoint, Identity};

use super::model::Origin;
use super::runner::{Loading, RunnerSettings};
use super::values::Seconds;
use super::{ConfigError, seconds};
use crate::listen::{Address, MutualTls, TlsFiles};
use crate::scheduler::ResumptionLimits;
use crate::server::WorkerParts;
use crate::worker::attach::{self, AttachOptions};
use crate::worker::attached::{TOKENIZER_CALL_TIMEOUT, WorkerTimeouts};
use crate::worker::engine_address::EngineAddress;

/// The certificates of one side, all or none.
#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
struct TlsSettings {
    /// The authorities of the other side's certificate, a PEM file: between an engine and workers that dial in
    /// over TCP both sides show one
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CA", value_name = "FILE")]
    worker_tls_ca: Option<PathBuf>,
    /// This side's certificate, a PEM file
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CERT", value_name = "FILE")]
    worker_tls_cert: Option<PathBuf>,
    /// Its private key, a PEM file
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
                let message = "--worker-tls-ca, --worker-tls-cert and --worker-tls-key go together";
                Err(ConfigError::Invalid(message.to_owned()))
            }
        }
    }
}

/// Whoever can open a TCP port of this machine could be a worker, and would be sent prompts.
fn check_transport(
    flag: &str,
    address: &Address,
    files: Option<&TlsFiles>,
) -> Result<(), ConfigError> {
    match (address, files) {
        (Address::Tcp(_), None) => Err(ConfigError::Invalid(format!(
            "--{flag} {address}: over TCP both sides must show certificates. Give --worker-tls-ca, \
             --worker-tls-cert and --worker-tls-key, or use unix:/path"
        ))),
        (Address::Unix(_), Some(_)) => Err(ConfigError::Invalid(format!(
            "--{flag} {address}: a Unix socket has no TLS; leave --worker-tls-… out"
        ))),
        (Address::Tcp(_), Some(_)) | (Address::Unix(_), None) => Ok(()),
    }
}

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct WorkerSettings {
    /// Where workers dial in: `unix:/path` in a folder that only they can enter, or `host:port` with certificates
    /// on both sides. Never a public door [default: none, or a private Unix socket with --isolation process]
    #[arg(long, env = "TOKENWAY_WORKER_LISTEN", value_name = "ADDRESS")]
    worker_listen: Option<Address>,
    #[command(flatten)]
    #[serde(flatten)]
    tls: TlsSettings,
    /// After so many seconds without a message a worker in another process is lost, unless it has declared a silence
    /// limit of its own; at least 0.1 [default: 2]
    #[arg(
        long,
        env = "TOKENWAY_HEARTBEAT_TIMEOUT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    heartbeat_timeout: Option<Seconds>,
    /// A worker in another process is lost when one call of its device takes longer, in seconds, or as long as the
    /// heartbeat timeout that it has declared; 0 is no limit [default: 30]
    #[arg(
        long,
        env = "TOKENWAY_STEP_LIMIT",
        value_name = "SECONDS",
        allow_negative_numbers = true
    )]
    step_limit: Option<Seconds>,
    /// How often in a row a choice whose worker is lost goes on elsewhere without having made a token in between; with
    /// fewer than 16 tokens each time it goes on 8 times, or this often if that is more [default: 2]
    #[arg(long, env = "TOKENWAY_MAX_RESUMPTIONS", value_name = "N")]
    max_resumptions: Option<u32>,
    /// How long it waits each time for a worker that takes it, in seconds [default: 60]
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
                let message = "--worker-tls-… is for --worker-listen host:port, which is not given";
                return Err(ConfigError::Invalid(message.to_owned()));
            }
            None => {}
        }
        let tls = files.as_ref().map(MutualTls::server).transpose();
        let tls = tls.map_err(|error| ConfigError::Invalid(format!("--worker-tls-…: {error}")))?;
        let heartbeat_timeout = seconds(self.heartbeat_timeout, 2);
        if heartbeat_timeout.as_millis() < 100 {
            let message = "--heartbeat-timeout must be at least 0.1 seconds";
            return Err(ConfigError::Invalid(message.to_owned()));
        }
        let step_limit = seconds(self.step_limit, 30);
        Ok(WorkerParts {
            listen: self.worker_listen,
            tls,
            patience: WorkerTimeouts {
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
    /// The engine's worker socket: `unix:/path` or `host:port`
    #[arg(long, env = "TOKENWAY_WORKER_ENGINE", value_name = "ADDRESS")]
    engine: Address,
    /// The model to serve, by the name that the engine gives it [default: the engine's only one]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model: Option<String>,
    /// Which of the machine's devices this worker is for, from 0: by it workers are told apart
    #[arg(long, env = "TOKENWAY_DEVICE", value_name = "N", default_value_t = 0)]
    device: u16,
    /// What this worker is called in logs, up to 64 bytes [default: its device, process and host]
    #[arg(long, env = "TOKENWAY_WORKER_NAME", value_name = "NAME")]
    name: Option<String>,
    /// What an engine gives a worker that it starts itself
    #[arg(long, env = "TOKENWAY_CHILD_TOKEN", hide = true)]
    child_token: Option<String>,
    #[command(flatten)]
    tls: TlsSettings,
    #[command(flatten)]
    runner: RunnerSettings,
}

/// A worker that dials an engine.
pub struct WorkerTask {
    /// How it dials.
    pub parts: AttachOptions,
    /// Cancelled when it is to end.
    pub stopping: CancellationToken,
}

impl WorkerCommand {
    pub(super) fn task(self) -> Result<WorkerTask, ConfigError> {
        if self.runner.is_attached() {
            let message = "--runner attached is for an engine; a worker needs one of its own";
            return Err(ConfigError::Invalid(message.to_owned()));
        }
        let Loading { loader, slots, .. } = self.runner.loading(&Origin::Flags)?;
        let own_name = || attach::own_name(self.device);
        Ok(WorkerTask {
            parts: AttachOptions {
                engine: engine_address(self.engine, self.tls)?,
                model: self.model.unwrap_or_default(),
                name: self.name.unwrap_or_else(own_name),
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
