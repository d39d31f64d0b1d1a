//! Child workers: worker processes that the engine starts, supervises and restarts.
//!
//! A child worker connects like any other worker process. In addition, the engine learns how the process ended, kills
//! it after its stream has ended, and makes sure that it does not outlive the engine.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::pin::pin;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use serde_json::{Map, Value};
use std::os::unix::process::ExitStatusExt;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncWriteExt, BufReader};
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

use super::attached::{AttachService, ChildState, ExitKind, ProcessExit};
use super::{WorkerEvent, WorkerId};
use crate::backoff::{Backoff, BackoffPolicy};
use crate::logging;
use crate::models::ModelId;

/// Environment variable with the token that a child worker sends in its `hello`.
pub const TOKEN_VARIABLE: &str = "TOKENWAY_CHILD_TOKEN";

/// Environment variable with the process id of the engine. The child worker ends when that process ends.
pub(crate) const PARENT_VARIABLE: &str = "TOKENWAY_CHILD_PARENT";

/// Delays before a child worker is restarted. If the child had become ready, the next delay is the first one again.
const RESTART_BACKOFF: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    max: Duration::from_secs(10),
    jitter: 0.5,
};

/// Maximum number of starts in a row in which a child worker does not become ready. The engine then gives it up.
const MAX_FAILED_STARTS: u32 = 10;

/// Time that a child worker has to exit after the engine has asked it to drain. The engine then kills it.
const DRAIN_EXIT_TIMEOUT: Duration = Duration::from_secs(2);

/// Signals with which an operator or the system ends a process: SIGHUP, SIGINT, SIGKILL and SIGTERM. An exit by one
/// of them is not a crash.
const KILL_SIGNALS: [i32; 4] = [1, 2, 9, 15];

/// Maximum length of a child's log line in bytes. Longer lines are forwarded in pieces.
const MAX_LINE_BYTES: usize = 32 * 1024;

/// The program that the engine starts as a child worker.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Program {
    /// Path of the executable.
    pub path: PathBuf,
    /// Arguments of the program. The engine adds `--engine`, `--device` and `--name`.
    pub arguments: Vec<OsString>,
    /// Settings of the worker as TOML, for its standard input.
    pub settings: String,
}

/// The model, device and engine of one child.
pub(crate) struct ChildSpec {
    pub(crate) worker: WorkerId,
    pub(crate) model: ModelId,
    pub(crate) model_name: String,
    /// Index of the device, from 0.
    pub(crate) device: usize,
    /// Address of the engine's worker socket.
    pub(crate) engine: String,
}

/// Runs a child worker. Restarts it whenever it ends, until `stopping` is cancelled or the child is given up.
pub(crate) async fn supervise(
    program: Program,
    spec: ChildSpec,
    service: AttachService,
    events: mpsc::Sender<WorkerEvent>,
    stopping: CancellationToken,
) {
    let (worker, model) = (spec.worker, spec.model_name.clone());
    let mut backoff = Backoff::new(RESTART_BACKOFF);
    let mut failed_starts = 0;
    loop {
        let outcome = run_once(&program, &spec, &service, &stopping).await;
        if stopping.is_cancelled() {
            return;
        }
        let failed_start = match outcome {
            RunOutcome::BecameReady => {
                backoff.reset();
                failed_starts = 0;
                None
            }
            RunOutcome::NeverReady(exit) => {
                failed_starts += 1;
                Some(exit)
            }
        };
        if let Some(ProcessExit {
            reason, was_killed, ..
        }) = failed_start
        {
            if failed_starts >= MAX_FAILED_STARTS {
                let reason = format!(
                    "{reason}; the worker failed to start {MAX_FAILED_STARTS} times in a row"
                );
                // Sending fails only if the engine has ended.
                let _ = events.send(WorkerEvent::GivenUp { worker, reason }).await;
                return;
            }
            if was_killed {
                // A process that was killed may still be able to load the model next time, so this is no load
                // failure.
                tracing::warn!(
                    worker = worker.0,
                    model,
                    reason,
                    "a worker was killed while loading its model"
                );
            } else {
                let _ = events
                    .send(WorkerEvent::LoadFailed { worker, reason })
                    .await;
            }
        }
        if stopping
            .run_until_cancelled(sleep(backoff.next_delay()))
            .await
            .is_none()
        {
            return;
        }
    }
}

/// Result of one run of a child worker's process.
enum RunOutcome {
    /// The model was loaded. The worker's session has already reported the end of its sequences.
    BecameReady,
    /// The process ended before its model was loaded.
    NeverReady(ProcessExit),
}

async fn run_once(
    program: &Program,
    spec: &ChildSpec,
    service: &AttachService,
    stopping: &CancellationToken,
) -> RunOutcome {
    let token = uuid::Uuid::new_v4().simple().to_string();
    let (exit_sender, exit_receiver) = watch::channel(None);
    let state = service.register_child(spec.model, spec.worker, token.clone(), exit_receiver);
    let outcome = match start_process(program, spec, &token).await {
        Ok(child) => {
            let exit = wait_for_exit(child, spec, &state, &exit_sender, stopping).await;
            if state.was_ready() {
                RunOutcome::BecameReady
            } else {
                RunOutcome::NeverReady(exit)
            }
        }
        Err(error) => {
            let path = program.path.display();
            RunOutcome::NeverReady(ProcessExit {
                kind: ExitKind::Ended,
                was_killed: false,
                reason: format!("{path} cannot be started: {error}"),
            })
        }
    };
    service.unregister_child(spec.model, &token);
    outcome
}

async fn start_process(program: &Program, spec: &ChildSpec, token: &str) -> std::io::Result<Child> {
    let mut command = Command::new(&program.path);
    // The arguments and standard input configure the worker completely. It must not inherit the engine's settings.
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_setting(name)) {
        command.env_remove(name);
    }
    let mut child = command
        .args(&program.arguments)
        .arg("--engine")
        .arg(&spec.engine)
        .arg("--device")
        .arg(spec.device.to_string())
        .arg("--name")
        .arg(worker_name(spec))
        .env(TOKEN_VARIABLE, token)
        .env(PARENT_VARIABLE, std::process::id().to_string())
        .env(logging::FORMAT_VARIABLE, logging::format().name())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        // Ctrl-C in a terminal signals the whole process group. Only the engine decides when its workers end.
        .process_group(0)
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        // The settings fit into the pipe's buffer, so this write does not block. It fails if the worker has closed
        // the pipe unread.
        let _ = stdin.write_all(program.settings.as_bytes()).await;
    }
    Ok(child)
}

/// Returns true if an environment variable is a setting of the server. `TOKENWAY_LOG` is not: it also applies to
/// workers, so they inherit it.
fn is_setting(name: &OsStr) -> bool {
    let name = name.to_string_lossy();
    let prefixes = ["TOKENWAY_", "TEST_RUNNER_", "MODEL_RUNNER"];
    name != "TOKENWAY_LOG" && prefixes.iter().any(|prefix| name.starts_with(prefix))
}

fn worker_name(spec: &ChildSpec) -> String {
    format!("worker-{}", spec.worker.0)
}

/// Waits until a child's process exits. Kills the process if it does not exit soon after its stream has ended or
/// `stopping` is cancelled.
async fn wait_for_exit(
    mut child: Child,
    spec: &ChildSpec,
    state: &ChildState,
    exit_sender: &watch::Sender<Option<ProcessExit>>,
    stopping: &CancellationToken,
) -> ProcessExit {
    let log = child.stderr.take();
    let name = worker_name(spec);
    let mut forwarding = pin!(async {
        if let Some(log) = log {
            forward_log(log, &name).await;
        }
    });
    let mut log_ended = false;
    let status = loop {
        tokio::select! {
            status = child.wait() => break Some(status),
            () = state.detached() => break None,
            // The session has asked the child to drain.
            () = stopping.cancelled() => break timeout(DRAIN_EXIT_TIMEOUT, child.wait()).await.ok(),
            () = &mut forwarding, if !log_ended => log_ended = true,
        }
    };
    let status = match status {
        Some(status) => status,
        None => match timeout(super::attached::CHILD_EXIT_TIMEOUT, child.wait()).await {
            Ok(status) => status,
            Err(_) => {
                // The kill fails only if the process has already ended.
                let _ = child.start_kill();
                child.wait().await
            }
        },
    };
    let exit = classify_exit(status);
    // Publish the exit first: the session must not wait until the rest of the log is read.
    exit_sender.send_replace(Some(exit.clone()));
    if !log_ended {
        let _ = timeout(super::attached::CHILD_EXIT_TIMEOUT, forwarding).await;
    }
    exit
}

fn classify_exit(status: std::io::Result<ExitStatus>) -> ProcessExit {
    let status = match status {
        Ok(status) => status,
        Err(error) => {
            return ProcessExit {
                kind: ExitKind::Ended,
                was_killed: false,
                reason: format!("the exit status of the worker's process is unknown: {error}"),
            };
        }
    };
    let kind = match (status.code(), status.signal()) {
        // Rust exits with 101 after a panic.
        (Some(101), _) => ExitKind::Crashed,
        (Some(_), _) => ExitKind::Ended,
        (None, Some(signal)) if KILL_SIGNALS.contains(&signal) => ExitKind::Ended,
        (None, _) => ExitKind::Crashed,
    };
    let was_killed = status.signal().is_some() && kind == ExitKind::Ended;
    ProcessExit {
        kind,
        was_killed,
        reason: if was_killed {
            format!("the worker's process was killed: {status}")
        } else {
            format!("the worker's process ended: {status}; see its log lines")
        },
    }
}

/// Forwards the log of a child's process line by line, with the worker's name.
async fn forward_log(log: impl AsyncRead + Unpin, worker: &str) {
    let mut log = BufReader::with_capacity(MAX_LINE_BYTES, log);
    let mut line = Vec::new();
    loop {
        let taken = match log.fill_buf().await {
            Ok([]) | Err(_) => break,
            Ok(bytes) => {
                let end = memchr::memchr(b'\n', bytes);
                let taken = end.map_or(bytes.len(), |end| end + 1);
                line.extend_from_slice(&bytes[..taken]);
                taken
            }
        };
        log.consume(taken);
        // A line that exceeds the limit is forwarded in pieces.
        if line.ends_with(b"\n") || line.len() >= MAX_LINE_BYTES {
            log_line(worker, &line);
            line.clear();
        }
    }
    log_line(worker, &line);
}

/// Adds one line of a child's log to this process's log, at the same level.
fn log_line(worker: &str, line: &[u8]) {
    let text = String::from_utf8_lossy(line);
    let text = text.trim();
    if text.is_empty() {
        return;
    }
    let line = ChildLine::parse_json(text).unwrap_or_else(|| ChildLine::parse_human(text));
    let ChildLine {
        message, fields, ..
    } = &line;
    let fields = fields.as_deref();
    // tracing's macros need a constant level.
    macro_rules! forward {
        ($level:ident) => {
            tracing::event!(
                target: "tokenway::worker",
                tracing::Level::$level,
                worker,
                worker_fields = fields,
                "{message}"
            )
        };
    }
    match &*line.level {
        "ERROR" => forward!(ERROR),
        "INFO" => forward!(INFO),
        "DEBUG" => forward!(DEBUG),
        "TRACE" => forward!(TRACE),
        _ => forward!(WARN),
    }
}

/// A parsed line of a child's log.
struct ChildLine<'a> {
    level: Cow<'a, str>,
    message: Cow<'a, str>,
    /// All other fields of the line, as a JSON object. `None` if they are part of the message.
    fields: Option<String>,
}

impl<'a> ChildLine<'a> {
    /// Parses a line in JSON format. Returns `None` for any other line.
    fn parse_json(text: &str) -> Option<Self> {
        let mut fields: Map<String, Value> = serde_json::from_str(text).ok()?;
        let mut take = |name| match fields.remove(name) {
            Some(Value::String(text)) => Some(Cow::Owned(text)),
            Some(_) | None => None,
        };
        let (level, message) = (take("level")?, take("message")?);
        if let Some(target) = fields.remove("target") {
            fields.insert("worker_target".to_owned(), target);
        }
        Some(Self {
            level,
            message,
            fields: Some(Value::Object(fields).to_string()),
        })
    }

    /// Parses a line in human format, which starts with its level. A line without a level comes from a panic or a
    /// library.
    fn parse_human(text: &'a str) -> Self {
        let (level, rest) = text.split_once(' ').unwrap_or((text, ""));
        let has_level = ["ERROR", "WARN", "INFO", "DEBUG", "TRACE"].contains(&level);
        Self {
            level: if has_level { level } else { "WARN" }.into(),
            message: if has_level { rest.trim_start() } else { text }.into(),
            fields: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::task::TaskTracker;

    use super::*;
    use crate::models::Models;
    use crate::telemetry::Telemetry;
    use crate::worker::attached::{AttachParts, AttachableModel, WorkerTimeouts};

    #[tokio::test(start_paused = true)]
    async fn a_child_that_failed_to_start_ten_times_is_given_up() {
        let (events, mut received) = mpsc::channel(16);
        let models = Models::for_test(&["m"]);
        let model = AttachableModel {
            name: "m".to_owned(),
            aliases: Vec::new(),
            slow_reader_timeout: Duration::from_secs(10),
        };
        let timeouts = WorkerTimeouts {
            heartbeat_timeout: Duration::from_secs(2),
            step_limit: None,
            tokenizer_call_timeout: Duration::from_secs(10),
        };
        let service = AttachService::new(AttachParts {
            models: models.map_values([model]),
            first_worker: 1,
            timeouts,
            events: events.clone(),
            telemetry: Telemetry::new(),
            tasks: TaskTracker::new(),
        });
        let program = Program {
            path: "/there/is/no/such/program".into(),
            arguments: Vec::new(),
            settings: String::new(),
        };
        let spec = ChildSpec {
            worker: WorkerId(0),
            model: models.entries()[0].id,
            model_name: "m".to_owned(),
            device: 0,
            engine: "unix:/there/is/no/such/socket".to_owned(),
        };
        supervise(program, spec, service, events, CancellationToken::new()).await;
        for _ in 1..MAX_FAILED_STARTS {
            assert!(matches!(
                received.recv().await,
                Some(WorkerEvent::LoadFailed { .. })
            ));
        }
        let Some(WorkerEvent::GivenUp { reason, .. }) = received.recv().await else {
            panic!("expected the event GivenUp");
        };
        assert!(reason.contains("cannot be started"), "{reason}");
    }
}
