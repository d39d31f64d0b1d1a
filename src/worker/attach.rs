//! The worker's side of the worker protocol: connects a device thread to an engine in another process.
//!
//! The device thread itself sends its tokens, through the outbox. Nothing in this module waits for the device, so
//! heartbeats continue during device calls. A worker that loses its engine drops its sequences and reconnects.

use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Signal, getppid, set_parent_process_death_signal};
use rustix::system::uname;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tokio_util::sync::CancellationToken;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use self::engine_connection::{ConnectionEnd, EngineConnection};
use super::child::PARENT_VARIABLE;
use super::device_thread::DeviceThread;
use super::engine_address::WorkerSocketAddress;
use super::outbox::{OutboundMessages, Outbox, StepNotifier};
use super::tasks::Tasks;
use super::thread::{SpawnOptions, SpawnedWorker, spawn};
use super::wire;
use super::{Generation, ServedModel, WorkerEvent, WorkerHandle, WorkerId};
use crate::backoff::{Backoff, BackoffPolicy};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::proto::worker::device_worker_client::DeviceWorkerClient;
use crate::request::MAX_TIMEOUT;
use crate::runner::{Loader, PrefixCacheStats};
use crate::telemetry::Telemetry;

mod engine_connection;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;

/// Delays before a worker reconnects. If the engine had accepted the worker, the next delay is the first one again.
const RECONNECT_BACKOFF: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(100),
    max: Duration::from_secs(5),
    jitter: 0.5,
};

/// Maximum wait for the current device call when the worker process ends. If its engine started this process, the
/// engine kills it after this time anyway.
const JOIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Parameters of a worker that connects to an engine.
pub struct AttachOptions {
    /// The engine's address.
    pub engine: WorkerSocketAddress,
    /// The model's name at the engine; empty if the engine has only one model.
    pub model: String,
    /// The worker's name in logs.
    pub name: String,
    /// Secret that identifies a worker process to the engine that started it; `None` for any other worker. A worker
    /// with this token ends when its connection ends.
    pub child_token: Option<String>,
    /// Loads the model.
    pub loader: Arc<dyn Loader>,
    /// Number of sequences that the worker runs at once.
    pub slots: usize,
}

/// The default name of a worker for this device. It contains the host name, because workers in containers often have
/// the same process id.
#[must_use]
pub(crate) fn default_name(device: u16) -> String {
    let process = std::process::id();
    let system = uname();
    let host = system.nodename().to_string_lossy();
    let mut name = format!("device {device} of process {process} on {host}");
    name.truncate(name.floor_char_boundary(wire::MAX_NAME_BYTES));
    name
}

/// The error with which a worker process ends.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// Asking the kernel to kill this worker when its engine ends has failed.
    #[error("cannot end together with the engine: {0}")]
    ParentDeathSignal(std::io::Error),
    /// The signal handlers cannot be installed.
    #[error("cannot install signal handlers: {0}")]
    Signals(std::io::Error),
    /// The device thread cannot be started.
    #[error("cannot start the device thread: {0}")]
    Thread(std::io::Error),
    /// The engine rejected the worker for a reason that will not change.
    #[error("the engine rejected this worker: {0}")]
    Rejected(String),
    /// A worker that the engine started has lost its connection to the engine.
    #[error("the connection to the engine is lost: {0}")]
    EngineLost(String),
}

/// Runs a worker until SIGTERM or SIGINT, or until the engine drains it. A worker that an engine started also ends
/// when that engine ends.
///
/// # Errors
/// Returns an error if the worker cannot run, or the engine rejects it.
pub async fn run_until_signalled(
    options: AttachOptions,
    stopping: CancellationToken,
) -> Result<(), AttachError> {
    if options.child_token.is_some() {
        die_with_parent().map_err(AttachError::ParentDeathSignal)?;
    }
    let (mut terminate, mut interrupt) = (
        signal(SignalKind::terminate()).map_err(AttachError::Signals)?,
        signal(SignalKind::interrupt()).map_err(AttachError::Signals)?,
    );
    let signalled = async {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stopping.cancel();
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = run(options, stopping.clone()) => ended,
        () = signalled => Ok(()),
    }
}

/// Makes the kernel kill this process when its parent ends, even if the parent is killed.
fn die_with_parent() -> std::io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = std::env::var(PARENT_VARIABLE).ok();
    let parent = parent.and_then(|parent| parent.parse().ok());
    let parent_ended = parent.is_some_and(|parent: i32| {
        // The parent may have ended before the kernel was asked to send the signal. Then no signal will arrive, so the
        // parent's id is compared.
        getppid().is_none_or(|now| now.as_raw_nonzero().get() != parent)
    });
    if parent_ended {
        return Err(std::io::Error::other(
            "the engine that started this worker has ended",
        ));
    }
    Ok(())
}

/// Runs a worker until the engine drains it or `stopping` is cancelled.
///
/// # Errors
/// Returns an error if the worker cannot run, or the engine rejects it.
pub async fn run(options: AttachOptions, stopping: CancellationToken) -> Result<(), AttachError> {
    let (events_sender, events) = mpsc::channel(options.slots.saturating_mul(2) + 16);
    let step_notifier = StepNotifier::default();
    let after_step = step_notifier.clone();
    let SpawnedWorker { handle, thread } = spawn(SpawnOptions {
        id: WorkerId(0),
        loader: Arc::clone(&options.loader),
        slots: options.slots,
        // The engine itself detects slow readers.
        slow_reader_timeout: MAX_TIMEOUT,
        events: events_sender,
        telemetry: Telemetry::new(),
        after_step: Some(Box::new(move || after_step.notify())),
    })
    .map_err(AttachError::Thread)?;
    let mut worker = Worker {
        handle,
        step_notifier,
        events,
        ready: None,
        options,
    };
    let ended = stopping
        .run_until_cancelled(worker.connect_until_drained())
        .await;
    // Dropping the worker drops the receiver of the device thread's events. The thread then cannot block on sending
    // an event.
    drop(worker);
    let joined = tokio::task::spawn_blocking(move || join(thread));
    // `join` does not panic, so the blocking task cannot fail.
    let _ = joined.await;
    ended.unwrap_or(Ok(()))
}

/// Stops the device thread. Waits a short time for the current device call, which cannot be interrupted.
fn join(mut thread: DeviceThread) {
    thread.stop();
    if !thread.join_until(Instant::now() + JOIN_TIMEOUT) {
        tracing::warn!("a device call did not return; the worker exits without waiting for it");
        thread.abandon();
    }
}

struct Worker {
    options: AttachOptions,
    handle: WorkerHandle,
    step_notifier: StepNotifier,
    events: mpsc::Receiver<WorkerEvent>,
    /// The loaded model and its generation; `None` until the model is loaded.
    ready: Option<ReadyModel>,
}

/// A loaded model, and the worker's generation that loaded it.
struct ReadyModel {
    generation: Generation,
    served: ServedModel,
    /// Evictions from the prefix cache before the last message `ready`. Heartbeats report only later evictions.
    evictions: u64,
}

/// Result of one attempt to connect to the engine.
struct ConnectionOutcome {
    end: ConnectionEnd,
    /// True if the engine accepted the worker.
    was_accepted: bool,
}

impl Worker {
    /// Connects to the engine, and reconnects after each loss, until the engine drains the worker.
    async fn connect_until_drained(&mut self) -> Result<(), AttachError> {
        let mut backoff = Backoff::new(RECONNECT_BACKOFF);
        loop {
            let ConnectionOutcome { end, was_accepted } = self.connect_once().await;
            if was_accepted {
                backoff.reset();
            }
            match end {
                ConnectionEnd::Drained => return Ok(()),
                ConnectionEnd::Broken(status) if is_final_rejection(status.code()) => {
                    return Err(AttachError::Rejected(status.message().to_owned()));
                }
                ConnectionEnd::Broken(status) if self.options.child_token.is_some() => {
                    return Err(AttachError::EngineLost(status.message().to_owned()));
                }
                ConnectionEnd::Broken(status) => {
                    let (engine, reason) = (&self.options.engine, status.message());
                    tracing::warn!(%engine, reason, "no connection to the engine; reconnecting");
                }
            }
            sleep(backoff.next_delay()).await;
        }
    }

    /// Runs one connection and its tasks until the connection ends.
    async fn connect_once(&mut self) -> ConnectionOutcome {
        let tasks = Tasks::new();
        let outcome = tokio::select! {
            outcome = self.run_connection(&tasks) => outcome,
            never = tasks.run() => match never {},
        };
        self.step_notifier.disconnect();
        tasks.abort_all();
        outcome
    }

    async fn run_connection(&mut self, tasks: &Tasks) -> ConnectionOutcome {
        let failed = |status| ConnectionOutcome {
            end: ConnectionEnd::Broken(status),
            was_accepted: false,
        };
        let channel = match self.options.engine.connect(tasks).await {
            Ok(channel) => channel,
            Err(error) => return failed(Status::from_error(error.into())),
        };
        let outbox = Arc::<Outbox>::default();
        outbox.send(WorkerMessage::Hello(proto::Hello {
            protocol_version: wire::PROTOCOL_VERSION,
            model: self.options.model.clone(),
            name: self.options.name.clone(),
            child_token: self.options.child_token.clone().unwrap_or_default(),
            // 0 selects the engine's own timeout. It suits this worker, because device calls never delay its
            // heartbeats.
            heartbeat_timeout_ms: 0,
        }));
        let (mut inbound, welcome) = match attach(channel, &outbox).await {
            Ok(attached) => attached,
            Err(status) => return failed(status),
        };
        tracing::info!(engine = %self.options.engine, "the engine has accepted this worker");
        self.step_notifier.connect(&outbox, tasks);
        let connection = EngineConnection::new(&self.handle, outbox);
        let heartbeat_interval = Duration::from_millis(welcome.heartbeat_interval_ms.max(1).into());
        let end = tokio::select! {
            end = connection.handle_messages(&mut inbound) => end,
            end = self.report_events(&connection, heartbeat_interval) => end,
        };
        // The lost engine no longer reads these sequences.
        connection.cancel_all();
        ConnectionOutcome {
            end,
            was_accepted: true,
        }
    }

    /// Reports the device thread's events to the engine, and sends heartbeats.
    async fn report_events(
        &mut self,
        connection: &EngineConnection,
        heartbeat_interval: Duration,
    ) -> ConnectionEnd {
        if let Some(ready) = &mut self.ready {
            ready.evictions = self.handle.prefix_cache().evictions;
        }
        if let Some(ready) = &self.ready {
            connection.start_generation(ready.generation, &ready.served.model);
            connection.outbox.send(self.ready_message(ready));
        }
        let mut heartbeat = interval(heartbeat_interval);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.report(event, connection),
                    // The device thread ends only after the engine has drained this worker.
                    None => return ConnectionEnd::Drained,
                },
                _ = heartbeat.tick() => {
                    let step_ms = u32::try_from(self.handle.step_duration().as_millis());
                    let step_ms = step_ms.unwrap_or(u32::MAX);
                    let PrefixCacheStats { bytes, evictions } = self.handle.prefix_cache();
                    let before = self.ready.as_ref().map_or(0, |ready| ready.evictions);
                    let evictions = evictions.saturating_sub(before);
                    let prefix_cache = Some(proto::PrefixCache { bytes, evictions });
                    let heartbeat = proto::Heartbeat { step_ms, prefix_cache };
                    connection.outbox.set_heartbeat(heartbeat);
                }
            }
        }
    }

    /// Reports one event to the engine.
    fn report(&mut self, event: WorkerEvent, connection: &EngineConnection) {
        let message = match event {
            WorkerEvent::Loading { fraction, .. } => {
                WorkerMessage::Loading(proto::Loading { fraction })
            }
            WorkerEvent::Ready {
                generation, served, ..
            } => {
                connection.start_generation(generation, &served.model);
                let evictions = 0;
                let ready = ReadyModel {
                    generation,
                    served,
                    evictions,
                };
                let message = self.ready_message(&ready);
                self.ready = Some(ready);
                message
            }
            WorkerEvent::Lost { reason, .. } => {
                self.ready = None;
                connection.cancel_all();
                let reason = wire::sanitize(&reason);
                WorkerMessage::Crashed(proto::Crashed { reason })
            }
            WorkerEvent::LoadFailed { reason, .. } => {
                let reason = wire::sanitize(&reason);
                WorkerMessage::LoadFailed(proto::LoadFailed { reason })
            }
            // The engine learns about ended sequences from their steps. A worker thread never sends the other events.
            WorkerEvent::Released { .. }
            | WorkerEvent::SuspectCleared { .. }
            | WorkerEvent::Stuck { .. }
            | WorkerEvent::GivenUp { .. }
            | WorkerEvent::Joined { .. }
            | WorkerEvent::Left { .. } => return,
        };
        connection.outbox.send(message);
    }

    fn ready_message(&self, ready: &ReadyModel) -> WorkerMessage {
        let ReadyModel {
            generation, served, ..
        } = ready;
        WorkerMessage::Ready(proto::Ready {
            model: Some(wire::model_message(
                served.model.facts(),
                self.options.loader.name(),
            )),
            slots: u32::try_from(served.slots).unwrap_or(u32::MAX),
            generation: generation.0,
        })
    }
}

/// Opens the stream to the engine, and waits until the engine accepts the worker.
async fn attach(
    channel: Channel,
    outbox: &Arc<Outbox>,
) -> Result<(Streaming<proto::AttachResponse>, proto::Welcome), Status> {
    let mut client = DeviceWorkerClient::new(channel)
        .max_decoding_message_size(wire::MESSAGE_LIMIT)
        .max_encoding_message_size(wire::MESSAGE_LIMIT);
    let response = client.attach(OutboundMessages::new(outbox)).await?;
    let mut inbound = response.into_inner();
    match inbound.message().await?.and_then(|first| first.message) {
        Some(EngineMessage::Welcome(welcome)) => Ok((inbound, welcome)),
        Some(_) | None => Err(Status::failed_precondition(
            "welcome must be the first message",
        )),
    }
}

/// Returns true if an engine that rejects a worker with this code would reject it again.
fn is_final_rejection(code: Code) -> bool {
    matches!(
        code,
        Code::FailedPrecondition
            | Code::NotFound
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::Unimplemented
    )
}
