//! A server as a program runs it: it says where it listens, shows how far its models are loaded, and
//! drains when it is told to end.

use std::io;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use super::{EngineParts, HttpFrontend, ModelParts, Server, ServerParts, Source, StartError};
use crate::critical::TaskPanicked;
use crate::listen::Address;
use crate::output::Output;

mod progress;

/// Within so long the same signal is the same order: who stops a process and its group, as `timeout`
/// does, tells it twice.
const DUPLICATE_SIGNAL_WINDOW: Duration = Duration::from_millis(500);

/// How finely the progress of loading is shown.
const PROGRESS_STEPS: f32 = 1_000.0;

/// Why a server did not run to an orderly end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// It did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The system gives no signals.
    #[error("cannot install signal handlers: {0}")]
    Signals(#[from] io::Error),
    /// A second signal came before it had drained.
    #[error("stopped before the drain was over; what was running was cut off")]
    StoppedAtOnce,
    /// A task that it cannot work without has panicked. It has drained, as far as it could.
    #[error(transparent)]
    Panicked(#[from] TaskPanicked),
}

/// Serves until SIGTERM or Ctrl-C, then drains; a second signal ends it at once. Standard output, the first of the
/// streams, is told where the server listens and when it is ready; a bar is drawn on standard error, the second, where
/// that is a terminal.
///
/// # Errors
/// When it cannot start, or is not left to drain, or a task that it needs has panicked.
pub async fn until_signalled(
    parts: ServerParts,
    (out, err): (&Output, &Output),
) -> Result<(), RunError> {
    let mut signals = Signals::new()?;
    let (drain, source) = (parts.drain, parts.source.clone());
    let rejects_host_names = parts
        .http
        .as_ref()
        .is_some_and(HttpFrontend::rejects_host_names);
    let server = Server::start(parts).await?;
    announce(&server, out);
    if rejects_host_names {
        out.line(format_args!("hosts    {HOSTS_NOTE}"));
    }
    match &source {
        Source::Remote(engines) => {
            let engines = engines.join(", ");
            out.line(format_args!("waiting  for an engine: {engines}"));
        }
        Source::Engine(engine) => announce_workers(&server, engine, out),
    }
    let serving = tokio::select! {
        loaded = ready(&server, err) => match loaded {
            Ok(()) => Serving::Ready,
            Err(error) => Serving::Over(Err(error.into())),
        },
        over = over(&server, &mut signals) => Serving::Over(over),
    };
    let outcome = match serving {
        Serving::Ready => {
            for line in ready_lines(&source) {
                out.line(format_args!("ready    {line}"));
            }
            over(&server, &mut signals).await
        }
        Serving::Over(outcome) => outcome,
    };
    if !matches!(outcome, Err(RunError::Start(_))) {
        let seconds = drain.grace.as_secs_f64();
        out.line(format_args!(
            "draining new work is refused; the listeners close in {seconds} s"
        ));
    }
    end(server, &mut signals).await?;
    outcome
}

/// What came first.
enum Serving {
    /// The models are loaded.
    Ready,
    /// The server is to end, and whether that is a failure.
    Over(Result<(), RunError>),
}

/// Waits until the server is to end.
async fn over(server: &Server, signals: &mut Signals) -> Result<(), RunError> {
    tokio::select! {
        () = signals.next() => Ok(()),
        panicked = server.panicked() => Err(panicked.into()),
    }
}

async fn end(mut server: Server, signals: &mut Signals) -> Result<(), RunError> {
    tokio::select! {
        () = server.end() => match server.first_panic() {
            None => Ok(()),
            Some(panicked) => Err(panicked.into()),
        },
        () = signals.next() => {
            server.abandon();
            Err(RunError::StoppedAtOnce)
        }
    }
}

/// One line for each model, or one for the engines.
fn ready_lines(source: &Source) -> Vec<String> {
    match source {
        Source::Remote(engines) => vec![format!("in front of {}", engines.join(", "))],
        Source::Engine(engine) => engine.models.iter().map(ready_line).collect(),
    }
}

fn ready_line(model: &ModelParts) -> String {
    let (name, runner) = (&model.name, model.loader.name());
    let (workers, slots) = (model.workers, model.slots);
    let of_workers = match workers {
        0 => "remote workers".to_owned(),
        _ => format!("workers: {workers}, slots: {slots}"),
    };
    let aliases = match &model.aliases[..] {
        [] => String::new(),
        aliases => format!("; also {}", aliases.join(", ")),
    };
    format!("{name} ({runner}; {of_workers}{aliases})")
}

/// What the HTTP door answers; its description names the rest.
const HTTP_PATHS: &str = "/v1/completions /v1/chat/completions /v1/models /tokenize /detokenize \
     /health /metrics /openapi.json";

/// What an operator has to know whose clients come from other machines by a name.
const HOSTS_NOTE: &str =
    "the HTTP API answers to localhost and to IP addresses; --allowed-hosts NAME adds a host name";

/// One line for each open address.
fn announce(server: &Server, out: &Output) {
    for address in server.http_addresses() {
        let url = url(address);
        out.line(format_args!("HTTP     {url}  {HTTP_PATHS}"));
    }
    for address in server.grpc_addresses() {
        let hint = match address {
            Address::Tcp(_) => "",
            // Their libraries take the socket's path for the name of the host (docs/deployment.md).
            Address::Unix(_) => "; in Python, C++ and Java set grpc.default_authority to localhost",
        };
        let url = url(address);
        out.line(format_args!(
            "gRPC     {url}  tokenway.v1.Inference, health, reflection{hint}"
        ));
    }
}

/// One line for the socket that workers dial, and one for the models that have no others.
fn announce_workers(server: &Server, engine: &EngineParts, out: &Output) {
    if engine.workers.listen.is_none() {
        return;
    }
    for address in server.worker_addresses() {
        out.line(format_args!(
            "workers  {address}  tokenway.worker.v1.DeviceWorker"
        ));
    }
    let models = engine.models.iter().filter(|model| model.workers == 0);
    let names: Vec<_> = models.map(|model| &*model.name).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        out.line(format_args!("waiting  for workers of {names}"));
    }
}

fn url(address: &Address) -> String {
    match address {
        Address::Tcp(address) => format!("http://{address}"),
        Address::Unix(_) => address.to_string(),
    }
}

/// Waits for the models, with a bar where somebody looks.
async fn ready(server: &Server, err: &Output) -> Result<(), StartError> {
    let bar = ProgressBar::new(1_000);
    bar.set_draw_target(progress::target(err));
    let style = ProgressStyle::with_template("loading  {bar:40} {percent}% {elapsed}");
    bar.set_style(style.expect("the template is valid"));
    bar.enable_steady_tick(Duration::from_millis(100));
    let loaded = server
        .ready(|fraction| bar.set_position(position(fraction)))
        .await;
    bar.finish_and_clear();
    loaded
}

fn position(fraction: f32) -> u64 {
    // Progress is for the eye: a whole number of thousandths between 0 and 1,000.
    (0..=1_000_u16)
        .rev()
        .find(|step| f32::from(*step) <= fraction * PROGRESS_STEPS)
        .map_or(0, u64::from)
}

/// What tells a program to end.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    last: Last,
}

/// The last signal that came.
#[derive(Default)]
struct Last(Option<(SignalKind, Instant)>);

impl Last {
    /// Notes a signal; true where it is not the one before, told twice.
    fn is_new(&mut self, kind: SignalKind) -> bool {
        let now = Instant::now();
        if self
            .0
            .is_some_and(|(last, at)| last == kind && now - at < DUPLICATE_SIGNAL_WINDOW)
        {
            return false;
        }
        self.0 = Some((kind, now));
        true
    }
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            last: Last::default(),
        })
    }

    async fn next(&mut self) {
        loop {
            let kind = tokio::select! {
                _ = self.terminate.recv() => SignalKind::terminate(),
                _ = self.interrupt.recv() => SignalKind::interrupt(),
            };
            if self.last.is_new(kind) {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_signal_repeated_within_half_a_second_counts_once() {
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        let mut last = Last::default();
        assert!(last.is_new(terminate));
        tokio::time::advance(Duration::from_millis(499)).await;
        assert!(!last.is_new(terminate));
        assert!(last.is_new(interrupt), "another signal is another order");
        tokio::time::advance(Duration::from_millis(500)).await;
        assert!(last.is_new(interrupt), "this is said again");
    }
}
