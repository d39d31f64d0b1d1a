//! The engine's side of the worker protocol. A worker process connects to the engine's worker socket and opens one
//! `Attach` stream, as `worker.proto` defines. For each stream, this module creates a [`WorkerHandle`] like that of a
//! worker thread.
//!
//! A child worker, which the engine has started itself, sends the token that the engine gave it, and keeps its worker
//! id when it restarts. Every other worker gets a new id for each stream.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status, Streaming};

use self::reconnect_penalty::ReconnectPenalties;
use self::registration::{ChildRegistration, Registration};
use self::session::Session;
use self::session_end::SessionEnd;
use self::timeouts::SessionTimeouts;
use super::wire;
use super::{Flags, WakeTarget, WorkerEvent, WorkerHandle, WorkerId, WorkerWaker};
use crate::models::{ModelId, ModelMap};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as WorkerMessage;
use crate::proto::worker::attach_response::Message as EngineMessage;
use crate::proto::worker::device_worker_server::{DeviceWorker, DeviceWorkerServer};
use crate::telemetry::Telemetry;

#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod fuzzing;
mod heartbeat;
mod reconnect_penalty;
mod registration;
mod remote_tokenizer;
mod sequences;
mod session;
mod session_end;
#[cfg(test)]
mod tests;
mod timeouts;
mod tokenizer_calls;

pub(crate) use self::registration::AttachableModel;
pub(super) use self::registration::CHILD_EXIT_TIMEOUT;
pub(super) use self::registration::{ChildState, ExitKind, ProcessExit};
pub(crate) use self::timeouts::TOKENIZER_CALL_TIMEOUT;
pub use self::timeouts::WorkerTimeouts;
pub(crate) use super::wire::MAX_HEARTBEAT_TIMEOUT;

/// Maximum time between the opening of a stream and the worker's `hello`.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);

/// Capacity of the queue of messages to one worker.
const OUTBOUND_CAPACITY: usize = 256;

/// Capacity of the queue of submissions to one session. It holds the maximum number of slots twice: for the worker's
/// current generation and for the previous one. The scheduler never submits more, so the queue is never full.
const COMMAND_CAPACITY: usize = 2 * 65_536;

/// Maximum number of workers that are connected at the same time.
const MAX_WORKERS: usize = 1_024;

/// Parts of an [`AttachService`].
pub(crate) struct AttachParts {
    /// The models that remote workers may serve.
    pub models: ModelMap<AttachableModel>,
    /// The first worker id for remote workers. Lower ids belong to the workers that the engine starts itself.
    pub first_worker: usize,
    /// The engine's timeouts for its workers.
    pub timeouts: WorkerTimeouts,
    /// Receives the events of all workers.
    pub events: mpsc::Sender<WorkerEvent>,
    /// The metrics that the sessions update.
    pub telemetry: Telemetry,
    /// Tracks the tasks of the sessions.
    pub tasks: TaskTracker,
}

/// The gRPC service `DeviceWorker`, to which worker processes connect. Clones share their state.
#[derive(Clone)]
pub(crate) struct AttachService(Arc<AttachState>);

struct AttachState {
    registrations: ModelMap<Arc<Registration>>,
    timeouts: WorkerTimeouts,
    next_worker: AtomicUsize,
    /// One permit per connected worker.
    connections: Arc<Semaphore>,
    penalties: ReconnectPenalties,
    events: mpsc::Sender<WorkerEvent>,
    telemetry: Telemetry,
    tasks: TaskTracker,
}

impl AttachService {
    /// Creates the service.
    #[must_use]
    pub(crate) fn new(parts: AttachParts) -> Self {
        let models = parts.models;
        Self(Arc::new(AttachState {
            registrations: models.map(|id, model| Arc::new(Registration::new(id, model))),
            timeouts: parts.timeouts,
            next_worker: AtomicUsize::new(parts.first_worker),
            connections: Arc::new(Semaphore::new(MAX_WORKERS)),
            penalties: ReconnectPenalties::default(),
            events: parts.events,
            telemetry: parts.telemetry,
            tasks: parts.tasks,
        }))
    }

    /// Wraps the service for tonic, with its message limits.
    #[must_use]
    pub(crate) fn into_server(self) -> DeviceWorkerServer<Self> {
        DeviceWorkerServer::new(self)
            .max_decoding_message_size(wire::MESSAGE_LIMIT)
            .max_encoding_message_size(wire::MESSAGE_LIMIT)
    }

    /// Registers a child worker. The worker that sends `token` in its `hello` gets the id `worker` and serves this
    /// model.
    pub(super) fn register_child(
        &self,
        model: ModelId,
        worker: WorkerId,
        token: String,
        exit: watch::Receiver<Option<ProcessExit>>,
    ) -> ChildState {
        let state = ChildState::default();
        let child = ChildRegistration {
            worker,
            state: state.clone(),
            exit,
        };
        self.0.registrations[model].children().insert(token, child);
        state
    }

    /// Removes the registration of a child worker.
    pub(super) fn unregister_child(&self, model: ModelId, token: &str) {
        self.0.registrations[model].children().remove(token);
    }

    /// Checks a worker's `hello`, and returns the registration of the model that the worker names.
    fn check_hello(&self, hello: &proto::Hello) -> Result<Arc<Registration>, Status> {
        if hello.protocol_version != wire::PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "this engine speaks protocol_version {}, but the worker speaks {}",
                wire::PROTOCOL_VERSION,
                hello.protocol_version
            )));
        }
        let checked = wire::check_name("hello.name", &hello.name);
        checked.map_err(|violation| Status::invalid_argument(violation.to_string()))?;
        self.registration_of(&hello.model)
    }

    fn registration_of(&self, model: &str) -> Result<Arc<Registration>, Status> {
        let has_name = |registration: &&Arc<Registration>| {
            registration.name == model || registration.aliases.iter().any(|alias| alias == model)
        };
        let found = match (self.0.registrations.as_slice(), model) {
            ([only], "") => Some(only),
            (registrations, _) => registrations.iter().find(has_name),
        };
        found.map(Arc::clone).ok_or_else(|| {
            let models = self.0.registrations.as_slice().iter();
            let names: Vec<_> = models.map(|model| &*model.name).collect();
            let names = names.join(", ");
            Status::not_found(format!(
                "hello.model must be one of: {names} (got '{model}')"
            ))
        })
    }

    /// Rejects a worker whose name has a reconnect penalty. Child workers have no penalties.
    fn check_penalty(&self, hello: &proto::Hello) -> Result<(), Status> {
        match self.0.penalties.remaining(&hello.name) {
            Some(wait) if hello.child_token.is_empty() => Err(Status::unavailable(format!(
                "a worker with this name violated the protocol; it may reconnect in {} ms",
                wait.as_millis()
            ))),
            Some(_) | None => Ok(()),
        }
    }

    /// Runs a worker's session to its end. Reports the end to the scheduler and to the worker.
    async fn serve(
        self,
        session: Session,
        name: String,
        inbound: Streaming<proto::AttachRequest>,
        _connection: OwnedSemaphorePermit,
    ) {
        let (worker, outbound) = (session.worker, session.outbound.clone());
        let child = session.child.clone();
        // The scheduler must learn that the worker is lost, even if the session panics. The state of a session that
        // panicked is not used again.
        let served = AssertUnwindSafe(session.run(inbound)).catch_unwind().await;
        let end = served.unwrap_or(SessionEnd::Panicked);
        let reason = end.reason();
        if let Some(status) = end.status() {
            // If the worker has stopped reading, the queue is full. The worker then does not receive the status.
            let _ = outbound.try_send(Err(status));
        }
        if matches!(end, SessionEnd::Violation(_)) {
            self.0.penalties.record_violation(name);
        }
        if !matches!(end, SessionEnd::Stopped) {
            self.0.telemetry.workers_lost.increment(1);
        }
        let event = match &child {
            Some(_) => WorkerEvent::Lost { worker, reason },
            None => WorkerEvent::Left { worker, reason },
        };
        // Sending fails only if the engine has ended.
        let _ = self.0.events.send(event).await;
        if let Some(child) = child {
            child.state.detached.cancel();
        }
    }
}

#[tonic::async_trait]
impl DeviceWorker for AttachService {
    type AttachStream = ReceiverStream<Result<proto::AttachResponse, Status>>;

    async fn attach(
        &self,
        request: Request<Streaming<proto::AttachRequest>>,
    ) -> Result<Response<Self::AttachStream>, Status> {
        let connection = Arc::clone(&self.0.connections).try_acquire_owned();
        let connection = connection.map_err(|_| {
            Status::resource_exhausted(format!("{MAX_WORKERS} workers are connected already"))
        })?;
        let mut inbound = request.into_inner();
        let first = timeout(HELLO_TIMEOUT, inbound.message()).await;
        let first = first
            .map_err(|_| Status::deadline_exceeded("the worker did not send hello in time"))??;
        let Some(WorkerMessage::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::failed_precondition(
                "hello must be the first message",
            ));
        };
        let declared_timeout = wire::heartbeat_timeout(&hello)
            .map_err(|violation| Status::invalid_argument(violation.to_string()))?;
        let timeouts = SessionTimeouts::new(self.0.timeouts, declared_timeout);
        let registration = self.check_hello(&hello)?;
        let child = registration.claim_child(&hello.child_token)?;
        self.check_penalty(&hello)?;
        let worker = match &child {
            Some(child) => child.worker,
            None => WorkerId(self.0.next_worker.fetch_add(1, Ordering::SeqCst)),
        };
        let (outbound, messages) = mpsc::channel(OUTBOUND_CAPACITY);
        let (commands, assignments) = mpsc::channel(COMMAND_CAPACITY);
        let (flags, wake) = (Arc::<Flags>::default(), Arc::new(Notify::new()));
        let waker = WorkerWaker {
            flags: Arc::clone(&flags),
            target: WakeTarget::Task(Arc::clone(&wake)),
        };
        let handle = WorkerHandle { commands, waker };
        let welcome = proto::AttachResponse {
            message: Some(EngineMessage::Welcome(timeouts.welcome())),
        };
        // `welcome` is the first message to the worker, so the queue has room.
        let _ = outbound.try_send(Ok(welcome));
        tracing::info!(
            worker = worker.0,
            model = registration.name,
            name = hello.name,
            "a worker has connected"
        );
        let joined = WorkerEvent::Joined {
            worker,
            model: registration.model,
            handle,
        };
        let joined = self.0.events.send(joined).await;
        joined.map_err(|_| Status::unavailable("the engine is shutting down"))?;
        let session = Session {
            worker,
            child,
            registration,
            timeouts,
            flags,
            wake,
            commands: assignments,
            outbound,
            events: self.0.events.clone(),
            telemetry: self.0.telemetry.clone(),
        };
        self.0
            .tasks
            .spawn(self.clone().serve(session, hello.name, inbound, connection));
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}
