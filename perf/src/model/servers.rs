//! The compared servers, each in a process with the same model, slots, context and threads. Each scenario of each round
//! starts a new process, so that a server reuses nothing between scenarios.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use serde::Serialize;
use tokio::process::Command;

use super::client::Client;
use super::completions::STREAMS;
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::foreign_server::ForeignServer;
use crate::server::free_port;

/// Maximum number of tokens in one slot. It is Tokenway's default for the model.
pub(super) const CONTEXT: u32 = 2_048;
/// Maximum time from the start of a server to its first reply.
const START_TIMEOUT: Duration = Duration::from_secs(300);
/// Request that warms a server up. No other prompt begins like this one, so a scenario cannot reuse it.
const WARM_UP_PROMPT: &str =
    "0123456789. The server is warm after these words, and its model is in memory.";
const WARM_UP_TOKENS: u32 = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum ServerKind {
    Tokenway,
    LlamaCpp,
    Vllm,
}

/// Program of a server, and the settings with which it is started.
#[derive(Clone, Debug)]
pub(super) struct ServerPlan {
    pub(super) kind: ServerKind,
    pub(super) program: PathBuf,
    pub(super) model_path: PathBuf,
    pub(super) threads: u16,
}

pub(super) struct RunningServer {
    pub(super) client: Client,
    pub(super) process: ForeignServer,
}

impl ServerKind {
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Tokenway => "Tokenway",
            Self::LlamaCpp => "llama.cpp's server",
            Self::Vllm => "vLLM",
        }
    }
}

impl ServerPlan {
    /// Starts the server and waits until it has completed a request.
    pub(super) async fn start(&self) -> anyhow::Result<RunningServer> {
        let port = free_port()?;
        let client = Client {
            url: ServerUrl::from_authority(&format!("127.0.0.1:{port}")),
        };
        let answers = async || match client.complete(WARM_UP_PROMPT, WARM_UP_TOKENS).await {
            Ok(_) => Ok(true),
            Err(fault) if is_still_loading(&fault) => Ok(false),
            Err(fault) => Err(fault),
        };
        let process = ForeignServer::start(self.command(port), START_TIMEOUT, answers).await?;
        Ok(RunningServer { client, process })
    }

    /// Runs the program to get its version. Returns the first line of its output that contains a digit.
    pub(super) async fn version(&self) -> anyhow::Result<String> {
        let program = &self.program;
        let argument = match self.kind {
            ServerKind::Tokenway | ServerKind::LlamaCpp => "--version",
            ServerKind::Vllm => "version",
        };
        let output = Command::new(program).arg(argument).output().await;
        let output = output.with_context(|| format!("cannot run {}", program.display()))?;
        // llama.cpp's server writes its version to standard error.
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        let line = text
            .lines()
            .find(|line| line.contains(|c: char| c.is_ascii_digit()));
        let line = line.unwrap_or("unknown version").trim();
        Ok(line.trim_start_matches("version: ").to_owned())
    }

    /// Describes the weights that the server computes, if they are not those of the model's file.
    pub(super) fn other_weights(&self) -> Option<String> {
        match self.kind {
            ServerKind::Tokenway | ServerKind::LlamaCpp => None,
            ServerKind::Vllm => {
                let script = self.program.display();
                Some(format!(
                    "the weights that its script has converted ({script})"
                ))
            }
        }
    }

    fn command(&self, port: u16) -> Command {
        let mut command = Command::new(&self.program);
        // Variables of this process must not change a server's settings. vLLM's script needs its own.
        let is_script = self.kind == ServerKind::Vllm;
        let variables = std::env::vars_os().filter(|(name, _)| is_setting(name) && !is_script);
        for (name, _) in variables {
            command.env_remove(name);
        }
        command
            .args(self.arguments(port))
            // vLLM has no flag for the number of threads.
            .env("OMP_NUM_THREADS", self.threads.to_string());
        command
    }

    fn arguments(&self, port: u16) -> Vec<OsString> {
        let Self {
            kind,
            program: _,
            model_path,
            threads,
        } = self;
        let (settings, model_path) = match kind {
            ServerKind::Tokenway => (
                format!(
                    "serve --runner llama --http-listen 127.0.0.1:{port} --grpc-listen 127.0.0.1:0 \
                     --slots {STREAMS} --context-length {CONTEXT} --threads {threads} --model-path"
                ),
                Some(model_path),
            ),
            // llama.cpp's server divides `--ctx-size` evenly among the slots. All other settings are its defaults. So
            // it caches prompts, also those that had to leave their slot.
            ServerKind::LlamaCpp => (
                format!(
                    "--host 127.0.0.1 --port {port} --parallel {STREAMS} --ctx-size {} --threads {threads} \
                     --threads-batch {threads} --model",
                    CONTEXT * STREAMS
                ),
                Some(model_path),
            ),
            // The script chooses the model, which it has converted, and the context length. The number of threads is in
            // the environment.
            ServerKind::Vllm => (
                format!(
                    "serve --port {port} --max-num-seqs {STREAMS} --enable-prompt-tokens-details"
                ),
                None,
            ),
        };
        let settings = settings.split(' ').map(OsString::from);
        settings
            .chain(model_path.map(|path| path.clone().into()))
            .collect()
    }
}

/// Returns true for an environment variable that Tokenway or llama.cpp's server reads as a setting.
fn is_setting(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let prefixes = [
        "TOKENWAY_",
        "TEST_RUNNER_",
        "MODEL_RUNNER",
        "LLAMA_",
        "GGML_",
    ];
    prefixes.iter().any(|prefix| name.starts_with(prefix))
}

/// Returns true if a server that is still loading its model causes this fault.
fn is_still_loading(fault: &Fault) -> bool {
    matches!(fault, Fault::Connect { .. })
        || matches!(fault, Fault::Refused(why) if why.starts_with("503"))
}

/// Returns the path of the program `tokenway` in the directory of this program.
pub(super) fn own_tokenway() -> anyhow::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("tokenway"))
}
