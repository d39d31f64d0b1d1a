//! Runs a server as a program: prints its addresses, shows the progress of loading models, and drains on a signal.

use std::io;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use sd_notify::NotifyState;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::Instant;

use self::reload::reload_on_each_hangup;
use self::surfaces::Surfaces;
use super::{EngineParts, ModelParts, Server, ServerParts, Source, StartError};
use crate::cluster::ClusterSpec;
use crate::critical::TaskPanicked;
use crate::output::Output;

mod download;
mod progress;
mod reload;
mod surfaces;

pub use download::{DownloadError, Downloads, ModelFiles, PendingModel, download_until_signalled};
pub use reload::{OnHangup, ReloadedSettings};

/// Time within which a repeated signal is ignored. For example, `timeout` signals both a process and its process
/// group, so the process receives the signal twice.
const DUPLICATE_SIGNAL_WINDOW: Duration = Duration::from_millis(500);

/// Number of steps of the progress bar.
const PROGRESS_STEPS: u16 = 1_000;

/// Reason why a server did not shut down in order.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The server did not start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// Signal handlers cannot be installed.
    #[error("cannot install signal handlers: {0}")]
    Signals(#[from] io::Error),
    /// A second signal arrived before the drain was finished.
    #[error(
        "stopped by a second signal before the drain was finished; running requests were cut off"
    )]
    StoppedAtOnce,
    /// A critical task panicked. The server has drained as far as it could.
    #[error(transparent)]
    Panicked(#[from] TaskPanicked),
}

/// Serves until SIGTERM, Ctrl-C or `POST /admin/drain`, then drains. A second signal stops the server at once. SIGHUP
/// does what `on_hangup` says.
///
/// `out` (standard output) receives the addresses and the readiness of the models. `err` (standard error) receives a
/// progress bar if it is a terminal.
///
/// # Errors
/// Returns an error if the server cannot start, a second signal interrupts the drain, or a critical task
/// panics.
pub async fn serve_until_signalled(
    parts: ServerParts,
    on_hangup: OnHangup,
    out: &Output,
    err: &Output,
) -> Result<(), RunError> {
    let mut signals = Signals::new()?;
    let mut hangups = signal(SignalKind::hangup())?;
    let (drain, source) = (parts.drain, parts.source.clone());
    let surfaces = Surfaces::of(&parts);
    let server = Server::start(parts).await?;
    surfaces.print(&server, out);
    let outcome = tokio::select! {
        outcome = run_until_shutdown(&server, &source, &mut signals, (out, err)) => outcome,
        never = reload_on_each_hangup(&server, &mut hangups, &on_hangup) => match never {},
    };
    if !matches!(outcome, Err(RunError::Start(_))) {
        let seconds = drain.grace.as_secs_f64();
        out.write_line(format_args!(
            "draining new requests are rejected; the listeners close in {seconds} s"
        ));
    }
    notify_systemd(NotifyState::Stopping);
    let stop = async {
        match outcome {
            Ok(()) => signals.second().await,
            Err(_) => signals.next().await,
        }
    };
    drain_server(server, stop).await?;
    outcome
}

/// Reports a state to systemd, if it started this process with `Type=notify`.
fn notify_systemd(state: NotifyState<'_>) {
    if let Err(error) = sd_notify::notify(&[state]) {
        tracing::warn!(%error, "cannot notify systemd");
    }
}

/// Prints the readiness of the server. Returns when the server must shut down: because of a signal, a critical task
/// that panicked, or a model that cannot be loaded.
async fn run_until_shutdown(
    server: &Server,
    source: &Source,
    signals: &mut Signals,
    (out, err): (&Output, &Output),
) -> Result<(), RunError> {
    match source {
        Source::Remote(spec) => {
            let engines = engine_names(spec);
            out.write_line(format_args!("waiting  for an engine: {engines}"));
        }
        Source::Engine(engine) => print_worker_addresses(server, engine, out),
    }
    tokio::select! {
        loaded = wait_until_ready(server, err) => loaded?,
        outcome = wait_for_shutdown(server, signals) => return outcome,
    }
    for line in ready_lines(server, source) {
        out.write_line(format_args!("ready    {line}"));
    }
    notify_systemd(NotifyState::Ready);
    wait_for_shutdown(server, signals).await
}

/// Waits until a signal or `POST /admin/drain` arrives, or a critical task panics.
async fn wait_for_shutdown(server: &Server, signals: &mut Signals) -> Result<(), RunError> {
    tokio::select! {
        () = signals.next() => Ok(()),
        () = server.drain_requested() => Ok(()),
        panicked = server.panicked() => Err(panicked.into()),
    }
}

/// Drains the server. The drain ends at once when `stop` is ready.
async fn drain_server(mut server: Server, stop: impl Future<Output = ()>) -> Result<(), RunError> {
    tokio::select! {
        () = server.shut_down() => match server.first_panic() {
            None => Ok(()),
            Some(panicked) => Err(panicked.into()),
        },
        () = stop => {
            server.abandon();
            Err(RunError::StoppedAtOnce)
        }
    }
}

/// Returns the "ready" lines that are printed when the models are loaded: one per model, or one for all remote
/// engines.
fn ready_lines(server: &Server, source: &Source) -> Vec<String> {
    match source {
        Source::Remote(at_start) => {
            // The engines may have been replaced while the server waited for them.
            let spec = server.cluster();
            let engines = engine_names(spec.as_ref().unwrap_or(at_start));
            vec![format!("in front of {engines}")]
        }
        Source::Engine(engine) => engine.models.iter().map(ready_line).collect(),
    }
}

fn engine_names(spec: &ClusterSpec) -> String {
    let names: Vec<_> = spec.engines.iter().map(|engine| &*engine.name).collect();
    names.join(", ")
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

/// Prints the addresses for remote workers, and the models that have only remote workers.
fn print_worker_addresses(server: &Server, engine: &EngineParts, out: &Output) {
    if engine.workers.listen.is_none() {
        return;
    }
    for address in server.worker_addresses() {
        out.write_line(format_args!(
            "workers  {address}  tokenway.worker.v1.DeviceWorker"
        ));
    }
    let models = engine.models.iter().filter(|model| model.workers == 0);
    let names: Vec<_> = models.map(|model| &*model.name).collect();
    if !names.is_empty() {
        let names = names.join(", ");
        out.write_line(format_args!("waiting  for workers of {names}"));
    }
}

/// Waits until all models are loaded, and shows a progress bar.
async fn wait_until_ready(server: &Server, err: &Output) -> Result<(), StartError> {
    let bar = ProgressBar::new(PROGRESS_STEPS.into());
    bar.set_draw_target(progress::draw_target(err));
    let style = ProgressStyle::with_template("loading  {bar:40} {percent}% {elapsed}");
    bar.set_style(style.expect("the progress bar's template is valid"));
    bar.enable_steady_tick(Duration::from_millis(100));
    let loaded = server
        .ready(|fraction| bar.set_position(progress_position(fraction)))
        .await;
    bar.finish_and_clear();
    loaded
}

fn progress_position(fraction: f32) -> u64 {
    #[expect(
        clippy::as_conversions,
        reason = "the cast rounds down, and makes 0 of a fraction that is negative or not a number"
    )]
    let step = (fraction * f32::from(PROGRESS_STEPS)) as u64;
    step.min(PROGRESS_STEPS.into())
}

/// Signals that stop the program.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    last: LastSignal,
}

/// The last signal and its time, to recognise a repetition of the same signal.
#[derive(Default)]
struct LastSignal(Option<(SignalKind, Instant)>);

impl LastSignal {
    /// Records a signal. Returns false if the signal repeats the last one within [`DUPLICATE_SIGNAL_WINDOW`].
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
            last: LastSignal::default(),
        })
    }

    /// Waits for the next signal, ignoring repetitions.
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

    /// Waits for the second signal since the start of the program. The first signal may come after `POST
    /// /admin/drain`, as Kubernetes sends SIGTERM after a `preStop` hook, and must not end the drain.
    async fn second(&mut self) {
        if self.last.0.is_none() {
            self.next().await;
        }
        self.next().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_progress_bar_rounds_down_and_stays_within_its_steps() {
        let positions = [0.0, 0.0009, 0.5, 0.9999, 1.0, 1.5, -1.0, f32::NAN].map(progress_position);
        assert_eq!(positions, [0, 0, 500, 999, 1_000, 1_000, 0, 0]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_signal_repeated_within_half_a_second_counts_once() {
        let (terminate, interrupt) = (SignalKind::terminate(), SignalKind::interrupt());
        let mut last = LastSignal::default();
        assert!(last.is_new(terminate));
        tokio::time::advance(Duration::from_millis(499)).await;
        assert!(!last.is_new(terminate));
        assert!(last.is_new(interrupt), "a different signal counts");
        tokio::time::advance(Duration::from_millis(500)).await;
        assert!(last.is_new(interrupt), "a later repetition counts");
    }
}
