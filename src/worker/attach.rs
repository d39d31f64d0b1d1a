//! The worker's end of an `Attach` stream: a thread runs the device, and this connects it with an engine.
//!
//! What the device makes leaves by its outbox as soon as it is there, from the device's own thread. Nothing here waits
//! for the device: heartbeats go on while it computes. A worker that loses its engine drops what it runs, and dials again.

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

use self::engine_connection::EngineConnection;
use super::child::PARENT_VARIABLE;
use super::device_thread::DeviceThread;
use super::engine_address::EngineAddress;
use super::outbox::{OutboundMessages, Outbox, StepNotifier};
use super::tasks::Tasks;
use super::thread::{SpawnOptions, spawn};
use super::wire;
use super::{Generation, ServedModel, WorkerEvent, WorkerHandle, WorkerId};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as Said;
use crate::proto::worker::attach_response::Message;
use crate::proto::worker::device_worker_client::DeviceWorkerClient;
use crate::request::MAX_TIMEOUT;
use crate::runner::Loader;
use crate::telemetry::Telemetry;

mod engine_connection;

/// How long a worker waits before it dials again; doubled each time up to the last.
const BACK_OFF: Duration = Duration::from_millis(100);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(5);

/// The longest wait for the device's last call when the worker ends. The engine kills a child that takes longer.
const LAST_STEP: Duration = Duration::from_secs(1);

/// A worker that dials an engine.
pub struct AttachOptions {
    /// How the engine is reached.
    pub engine: EngineAddress,
    /// The model, as the engine names it; empty for its only one.
    pub model: String,
    /// Tells the worker apart in logs.
    pub name: String,
    /// What the engine gave it, where the engine has started it: then it ends with its stream.
    pub child_token: Option<String>,
    /// Loads the model.
    pub loader: Arc<dyn Loader>,
    /// How many sequences it runs at once.
    pub slots: usize,
}

/// What a worker of this device calls itself: as no other does, and in containers all processes have the same number.
#[must_use]
pub fn own_name(device: u16) -> String {
    let process = std::process::id();
    let system = uname();
    let host = system.nodename().to_string_lossy();
    let mut name = format!("device {device} of process {process} on {host}");
    name.truncate(name.floor_char_boundary(wire::MAX_NAME_BYTES));
    name
}

/// Why a worker ended.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// It cannot be made to end with its engine.
    #[error("cannot be tied to the engine's life: {0}")]
    Parent(std::io::Error),
    /// The system gives no signals.
    #[error("cannot hear signals: {0}")]
    Signals(std::io::Error),
    /// Its thread cannot be started.
    #[error("cannot start the device's thread: {0}")]
    Thread(std::io::Error),
    /// The engine does not take it, and never will.
    #[error("the engine refuses this worker: {0}")]
    Refused(String),
    /// The engine that started it is gone.
    #[error("the engine is gone: {0}")]
    Gone(String),
}

/// Runs a worker until SIGTERM or Ctrl-C, or until the engine lets it end. One that an engine has started ends
/// with that engine.
///
/// # Errors
/// When it cannot run, or the engine does not take it.
pub async fn until_signalled(
    parts: AttachOptions,
    stopping: CancellationToken,
) -> Result<(), AttachError> {
    if parts.child_token.is_some() {
        die_with_parent().map_err(AttachError::Parent)?;
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
        ended = run(parts, stopping.clone()) => ended,
        () = signalled => Ok(()),
    }
}

/// Has the kernel end this process with the one that started it, also where that is killed.
fn die_with_parent() -> std::io::Result<()> {
    set_parent_process_death_signal(Some(Signal::KILL))?;
    let parent = std::env::var(PARENT_VARIABLE).ok();
    let parent = parent.and_then(|parent| parent.parse().ok());
    let has_gone = parent.is_some_and(|parent: i32| {
        // It may have gone before the kernel was asked.
        getppid().is_none_or(|now| now.as_raw_nonzero().get() != parent)
    });
    if has_gone {
        return Err(std::io::Error::other(
            "the engine that started it has ended",
        ));
    }
    Ok(())
}

/// Runs a worker until the engine lets it end, or `stopping` is cancelled.
///
/// # Errors
/// When it cannot run, or the engine does not take it.
pub async fn run(parts: AttachOptions, stopping: CancellationToken) -> Result<(), AttachError> {
    let (events_sender, events) = mpsc::channel(parts.slots.saturating_mul(2) + 16);
    let bell = StepNotifier::default();
    let rung = bell.clone();
    let (handle, thread) = spawn(SpawnOptions {
        id: WorkerId(0),
        loader: Arc::clone(&parts.loader),
        slots: parts.slots,
        // The engine knows its readers.
        slow_reader_timeout: MAX_TIMEOUT,
        events: events_sender,
        telemetry: Telemetry::new(),
        after_step: Some(Box::new(move || rung.ring())),
    })
    .map_err(AttachError::Thread)?;
    let mut worker = Worker {
        handle,
        bell,
        events,
        ready: None,
        parts,
    };
    let ended = stopping.run_until_cancelled(worker.dial_on()).await;
    // The thread waits for nobody who took its events.
    drop(worker);
    let joined = tokio::task::spawn_blocking(move || join(thread));
    // It contains no panic of its own.
    let _ = joined.await;
    ended.unwrap_or(Ok(()))
}

/// Stops the device. Its last call is waited for, but not for long: it cannot be interrupted.
fn join(mut thread: DeviceThread) {
    thread.stop();
    if !thread.join_until(Instant::now() + LAST_STEP) {
        tracing::warn!("a device call did not return; the worker ends without it");
        thread.abandon();
    }
}

struct Worker {
    parts: AttachOptions,
    handle: WorkerHandle,
    bell: StepNotifier,
    events: mpsc::Receiver<WorkerEvent>,
    /// What is served, while the model is loaded.
    ready: Option<(Generation, ServedModel)>,
}

/// What came of a connection.
struct Held {
    end: End,
    /// Whether the engine took the worker on.
    was_welcome: bool,
}

/// How a connection ended.
enum End {
    /// The engine is ending.
    Drained,
    /// It broke, or could not be made.
    Broken(Status),
}

impl Worker {
    /// Dials until the engine lets the worker end.
    async fn dial_on(&mut self) -> Result<(), AttachError> {
        let mut back_off = BACK_OFF;
        loop {
            let Held { end, was_welcome } = self.dial().await;
            if was_welcome {
                back_off = BACK_OFF;
            }
            match end {
                End::Drained => return Ok(()),
                End::Broken(status) if is_final(status.code()) => {
                    return Err(AttachError::Refused(status.message().to_owned()));
                }
                End::Broken(status) if self.parts.child_token.is_some() => {
                    return Err(AttachError::Gone(status.message().to_owned()));
                }
                End::Broken(status) => {
                    let (engine, reason) = (&self.parts.engine, status.message());
                    tracing::warn!(%engine, reason, "no engine; it is dialled again");
                }
            }
            sleep(back_off).await;
            back_off = (back_off * 2).min(BACK_OFF_LIMIT);
        }
    }

    /// Holds one stream, and the tasks of its connection.
    async fn dial(&mut self) -> Held {
        let tasks = Tasks::new();
        let held = tokio::select! {
            held = self.hold(&tasks) => held,
            never = tasks.run() => match never {},
        };
        self.bell.ring_for_nobody();
        tasks.end();
        held
    }

    async fn hold(&mut self, tasks: &Tasks) -> Held {
        let refused = |status| Held {
            end: End::Broken(status),
            was_welcome: false,
        };
        let channel = match self.parts.engine.connect(tasks).await {
            Ok(channel) => channel,
            Err(error) => return refused(Status::from_error(error.into())),
        };
        let outbox = Arc::<Outbox>::default();
        outbox.say(Said::Hello(proto::Hello {
            protocol_version: wire::PROTOCOL_VERSION,
            model: self.parts.model.clone(),
            name: self.parts.name.clone(),
            child_token: self.parts.child_token.clone().unwrap_or_default(),
            // As long as the engine says: the heartbeats' task waits for no call of the device.
            heartbeat_timeout_ms: 0,
        }));
        let (mut inbound, welcome) = match attach(channel, &outbox).await {
            Ok(attached) => attached,
            Err(status) => return refused(status),
        };
        tracing::info!(engine = %self.parts.engine, "the engine has taken this worker on");
        self.bell.ring_for(&outbox, tasks);
        let reading = EngineConnection::new(&self.handle, outbox);
        let beat = Duration::from_millis(welcome.heartbeat_interval_ms.max(1).into());
        let end = tokio::select! {
            end = reading.read(&mut inbound) => end,
            end = self.tell_on(&reading, beat) => end,
        };
        // What ran for that engine runs for nobody now.
        reading.cancel_all();
        Held {
            end,
            was_welcome: true,
        }
    }

    /// Tells the engine of the device, besides what it makes.
    async fn tell_on(&mut self, reading: &EngineConnection, beat: Duration) -> End {
        if let Some((life, served)) = &self.ready {
            reading.begin(*life, &served.model);
            reading.outbox.say(self.offer(*life, served));
        }
        let mut heartbeat = interval(beat);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                event = self.events.recv() => match event {
                    Some(event) => self.tell(event, reading),
                    // The device's thread has ended, as it was told to.
                    None => return End::Drained,
                },
                _ = heartbeat.tick() => {
                    let step_ms = u32::try_from(self.handle.step_duration().as_millis());
                    let step_ms = step_ms.unwrap_or(u32::MAX);
                    reading.outbox.beat(proto::Heartbeat { step_ms });
                }
            }
        }
    }

    /// What the engine is told of this event.
    fn tell(&mut self, event: WorkerEvent, reading: &EngineConnection) {
        let said = match event {
            WorkerEvent::Loading(_, fraction) => Said::Loading(proto::Loading { fraction }),
            WorkerEvent::Ready(_, life, served) => {
                reading.begin(life, &served.model);
                let offer = self.offer(life, &served);
                self.ready = Some((life, served));
                offer
            }
            WorkerEvent::Lost(_, reason) => {
                self.ready = None;
                reading.cancel_all();
                let reason = wire::cut(&reason);
                Said::Crashed(proto::Crashed { reason })
            }
            WorkerEvent::LoadFailed(_, reason) => {
                let reason = wire::cut(&reason);
                Said::LoadFailed(proto::LoadFailed { reason })
            }
            // The engine sees the end of each sequence itself.
            WorkerEvent::Released(..)
            | WorkerEvent::SuspectCleared(..)
            | WorkerEvent::Stuck(..)
            | WorkerEvent::GivenUp(..)
            | WorkerEvent::Joined(..)
            | WorkerEvent::Left(..) => return,
        };
        reading.outbox.say(said);
    }

    fn offer(&self, Generation(life): Generation, served: &ServedModel) -> Said {
        Said::Ready(proto::Ready {
            model: Some(wire::model(served.model.facts(), self.parts.loader.name())),
            slots: u32::try_from(served.slots).unwrap_or(u32::MAX),
            life,
        })
    }
}

/// Opens the stream, and waits until the worker is taken on.
async fn attach(
    channel: Channel,
    outbox: &Arc<Outbox>,
) -> Result<(Streaming<proto::AttachResponse>, proto::Welcome), Status> {
    let mut client = DeviceWorkerClient::new(channel)
        .max_decoding_message_size(wire::MESSAGE_LIMIT)
        .max_encoding_message_size(wire::MESSAGE_LIMIT);
    let response = client.attach(OutboundMessages::of(outbox)).await?;
    let mut inbound = response.into_inner();
    match inbound.message().await?.and_then(|first| first.message) {
        Some(Message::Welcome(welcome)) => Ok((inbound, welcome)),
        Some(_) | None => Err(Status::failed_precondition("welcome comes first")),
    }
}

/// Whether an engine that answers so will never take this worker.
fn is_final(code: Code) -> bool {
    matches!(
        code,
        Code::FailedPrecondition
            | Code::NotFound
            | Code::PermissionDenied
            | Code::InvalidArgument
            | Code::Unimplemented
    )
}
