//! Settings of workers in other processes: the engine's worker socket and timeouts, and the command
//! `tokenway worker`.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tonic::transport::Endpoint;

use super::downloads::{AfterDownload, downloads};
use super::error::ConfigError;
use super::log::FormatSettings;
use super::runner::{RunnerPlace, RunnerSettings, resolve, use_downloaded};
use super::settings::Settings;
use super::values::{FilePath, ParsedText, Seconds};
use crate::certificates::{ClientTls, ClientTlsFiles};
use crate::listen::{Address, ServerTls, ServerTlsFiles};
use crate::logging::LogFormat;
use crate::scheduler::ResumptionLimits;
use crate::server::WorkerParts;
use crate::server::run::ModelFiles;
use crate::worker::attach::{self, AttachOptions};
use crate::worker::attached::{TOKENIZER_CALL_TIMEOUT, WorkerTimeouts};
use crate::worker::engine_address::WorkerSocketAddress;

/// The shortest heartbeat timeout, 0.1 s in nanoseconds.
const MIN_HEARTBEAT_TIMEOUT: u64 = 100_000_000;

/// The TLS files of an engine or a worker process. Either all three are set, or none.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "TLS of worker connections")]
struct TlsSettings {
    /// CA certificates (PEM file) that verify the certificate of the other end of worker connections. Worker
    /// connections over TCP require mutual TLS: the engine and the workers each need all three files
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CA", value_name = "FILE")]
    worker_tls_ca: Option<FilePath>,
    /// Certificate (PEM file) that this process presents on worker connections
    #[arg(long, env = "TOKENWAY_WORKER_TLS_CERT", value_name = "FILE")]
    worker_tls_cert: Option<FilePath>,
    /// Private key (PEM file) of the certificate in --worker-tls-cert
    #[arg(long, env = "TOKENWAY_WORKER_TLS_KEY", value_name = "FILE")]
    worker_tls_key: Option<FilePath>,
}

/// Paths of the TLS files of one end of worker connections.
struct WorkerTlsFiles {
    ca: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
}

impl TlsSettings {
    fn files(self) -> Result<Option<WorkerTlsFiles>, ConfigError> {
        match (
            self.worker_tls_ca,
            self.worker_tls_cert,
            self.worker_tls_key,
        ) {
            (None, None, None) => Ok(None),
            (Some(ca), Some(certificate), Some(key)) => Ok(Some(WorkerTlsFiles {
                ca: ca.value,
                certificate: certificate.value,
                key: key.value,
            })),
            _ => {
                let message =
                    "set all of --worker-tls-ca, --worker-tls-cert and --worker-tls-key, or none";
                Err(ConfigError::Invalid(message.to_owned()))
            }
        }
    }
}

/// Checks that worker connections over TCP use mutual TLS. Otherwise everyone who can connect to the port could act
/// as a worker and receive prompts.
fn check_transport(
    key: &str,
    address: &Address,
    files: Option<&WorkerTlsFiles>,
    settings: &Settings,
) -> Result<(), ConfigError> {
    let problem = match (address, files) {
        (Address::Tcp(_), Some(_)) | (Address::Unix(_), None) => return Ok(()),
        (Address::Tcp(_), None) => {
            "worker connections over TCP require mutual TLS. Set --worker-tls-ca, --worker-tls-cert \
             and --worker-tls-key, or use unix:/path"
        }
        (Address::Unix(_), Some(_)) => "a Unix socket has no TLS; remove the --worker-tls-… flags",
    };
    let name = settings.name(key);
    Err(settings.error(key, format!("{name} {address}: {problem}")))
}

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Remote workers")]
pub(super) struct WorkerSettings {
    /// Address of the worker socket, to which workers connect: `unix:/path` in a folder that only workers can
    /// enter, or `host:port` with mutual TLS. Do not expose it to clients [default: none, or a private Unix
    /// socket with --isolation process]
    #[arg(long, env = "TOKENWAY_WORKER_LISTEN", value_name = "ADDRESS")]
    worker_listen: Option<ParsedText<Address>>,
    /// Time in seconds without a message after which a worker process counts as lost. A worker may declare
    /// another timeout for itself. At least 0.1
    #[arg(
        long,
        env = "TOKENWAY_HEARTBEAT_TIMEOUT",
        value_name = "SECONDS",
        default_value = "2"
    )]
    heartbeat_timeout: Seconds<MIN_HEARTBEAT_TIMEOUT>,
    /// Maximum time in seconds of one device call. A worker process whose call takes longer counts as lost. A
    /// worker thread gets no new sequences until the call returns. If a worker has declared a longer heartbeat
    /// timeout, that time applies. 0: no limit
    #[arg(
        long,
        env = "TOKENWAY_STEP_LIMIT",
        value_name = "SECONDS",
        default_value = "30"
    )]
    step_limit: Seconds,
    /// Maximum number of times in a row that a completion is resumed without a new token in between. Losses
    /// before the worker accepted the completion do not count, except crashes. A completion also ends after 2
    /// crashes in a row, after 8 crashes in all, and after 8 resumptions (or this many, if that is more) in which
    /// no worker generated 16 tokens
    #[arg(
        long,
        env = "TOKENWAY_MAX_RESUMPTIONS",
        value_name = "N",
        default_value = "2"
    )]
    max_resumptions: u32,
    /// Time in seconds that an interrupted completion waits for another worker, each time it is resumed
    #[arg(
        long,
        env = "TOKENWAY_RESUME_TIMEOUT",
        value_name = "SECONDS",
        default_value = "60"
    )]
    resume_timeout: Seconds,
    #[command(flatten)]
    #[serde(flatten)]
    tls: TlsSettings,
}

impl WorkerSettings {
    pub(super) fn worker_parts(self, settings: &Settings) -> Result<WorkerParts, ConfigError> {
        let files = self.tls.files()?;
        let listen = self.worker_listen.map(|address| address.value);
        match &listen {
            Some(address) => check_transport("worker_listen", address, files.as_ref(), settings)?,
            None if files.is_some() => {
                let message = "--worker-tls-… requires --worker-listen host:port; set it, or remove the \
                               --worker-tls-… flags";
                return Err(ConfigError::Invalid(message.to_owned()));
            }
            None => {}
        }
        let tls = files.map(|files| {
            ServerTls::read(ServerTlsFiles {
                certificate: files.certificate,
                key: files.key,
                client_ca: Some(files.ca),
            })
        });
        let tls = tls.transpose();
        let tls = tls.map_err(|error| ConfigError::Invalid(format!("--worker-tls-…: {error}")))?;
        let step_limit = Duration::from(self.step_limit);
        Ok(WorkerParts {
            listen,
            tls,
            timeouts: WorkerTimeouts {
                heartbeat_timeout: self.heartbeat_timeout.into(),
                step_limit: Some(step_limit).filter(|limit| !limit.is_zero()),
                tokenizer_call_timeout: TOKENIZER_CALL_TIMEOUT,
            },
            resumption: ResumptionLimits {
                max_consecutive: self.max_resumptions,
                acceptance_timeout: self.resume_timeout.into(),
            },
        })
    }
}

/// The settings of `tokenway worker`.
#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Engine")]
pub(super) struct AttachSettings {
    /// Address of the engine's worker socket: `unix:/path` or `host:port`
    #[arg(long, env = "TOKENWAY_WORKER_ENGINE", value_name = "ADDRESS")]
    engine: ParsedText<Address>,
    /// Name that the engine gives the model to serve [default: the engine's only model]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Number that distinguishes the workers of this machine, for example the index of a device. It is part of
    /// the worker's default name
    #[arg(long, env = "TOKENWAY_DEVICE", value_name = "N", default_value_t = 0)]
    device: u16,
    /// Name of this worker in the engine's log, up to 64 printable ASCII characters [default: its device,
    /// process id and host]
    #[arg(long, env = "TOKENWAY_WORKER_NAME", value_name = "NAME")]
    name: Option<String>,
    /// Secret that an engine gives to a worker process that it starts
    #[arg(long, env = "TOKENWAY_CHILD_TOKEN", hide = true)]
    child_token: Option<String>,
    #[command(flatten)]
    #[serde(flatten)]
    runner: RunnerSettings,
    #[command(flatten)]
    #[serde(flatten)]
    tls: TlsSettings,
    #[command(flatten)]
    #[serde(flatten)]
    log: FormatSettings,
}

/// A `tokenway worker` process to run: it connects to an engine and serves a model.
pub struct WorkerTask {
    /// Address of the engine, name of the model, and loader.
    pub parts: AfterDownload<AttachOptions>,
    /// True if an engine has started this process.
    pub is_child: bool,
    /// Cancelled to stop the worker.
    pub stopping: CancellationToken,
    /// Format of the worker's log.
    pub log_format: LogFormat,
}

impl AttachSettings {
    /// Builds the worker process from its settings.
    pub(super) fn worker_task(settings: Settings) -> Result<WorkerTask, ConfigError> {
        let parts = Self::attach_options(settings.clone(), &ModelFiles::new())?;
        let log_format = settings.get::<FormatSettings>()?.format();
        let downloads = downloads(std::slice::from_ref(&settings))?;
        Ok(WorkerTask {
            is_child: parts.child_token.is_some(),
            parts: AfterDownload::new(parts, downloads, move |files| {
                Self::attach_options(settings, files)
            }),
            stopping: CancellationToken::new(),
            log_format,
        })
    }

    fn attach_options(
        mut settings: Settings,
        files: &ModelFiles,
    ) -> Result<AttachOptions, ConfigError> {
        use_downloaded(&mut settings, files);
        let runner: RunnerSettings = settings.get()?;
        if runner.kind().place == RunnerPlace::Remote {
            let name = settings.name("runner");
            let problem = format!(
                "{name} attached is for engines only; set --runner llama or --runner llm_test for a worker"
            );
            return Err(settings.error("runner", problem));
        }
        // Read before `resolve` adds the runner's default name. Without --model-name, the worker serves the engine's
        // only model.
        let model = settings.get::<Self>()?.model_name;
        let (_, loader) = resolve(&mut settings)?;
        let attach: Self = settings.get()?;
        let default_name = || attach::default_name(attach.device);
        Ok(AttachOptions {
            name: attach.name.unwrap_or_else(default_name),
            engine: engine_address(attach.engine.value, attach.tls, &settings)?,
            model: model.unwrap_or_default(),
            child_token: attach.child_token,
            loader,
            slots: attach.runner.slots(),
        })
    }
}

fn engine_address(
    address: Address,
    tls: TlsSettings,
    settings: &Settings,
) -> Result<WorkerSocketAddress, ConfigError> {
    let files = tls.files()?;
    check_transport("engine", &address, files.as_ref(), settings)?;
    let address = match address {
        Address::Unix(path) => return Ok(WorkerSocketAddress::Unix(path)),
        Address::Tcp(address) => address,
    };
    let invalid = |error| {
        let name = settings.name("engine");
        settings.error("engine", format!("{name} {address}: {error}"))
    };
    let files = files.map_or_else(ClientTlsFiles::default, |files| ClientTlsFiles {
        ca: Some(files.ca),
        identity: Some((files.certificate, files.key)),
    });
    let tls = ClientTls::read(&files)
        .map_err(|error| ConfigError::Invalid(format!("--worker-tls-…: {error}")))?;
    let endpoint = Endpoint::from_shared(format!("https://{address}"))
        .and_then(|endpoint| endpoint.tls_config(tls.tonic_config()));
    endpoint
        .map(|endpoint| WorkerSocketAddress::Tls(Box::new(endpoint)))
        .map_err(invalid)
}
