//! Workers that are elsewhere: they dial the engine's worker socket and hold one stream each, by the
//! contract of `worker.proto`. This is where such a stream becomes the same handle that a thread has.
//!
//! A worker that the engine has started itself shows the token that it was given, and is that worker; every
//! other is a new one, for as long as its stream lasts.

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
use self::session_end::End;
use self::timeouts::SessionTimeouts;
use super::wire;
use super::{Flags, Wake, WakeTarget, WorkerEvent, WorkerHandle, WorkerId};
use crate::proto::worker as proto;
use crate::proto::worker::attach_request::Message as Said;
use crate::proto::worker::attach_response::Message;
use crate::proto::worker::device_worker_server::{DeviceWorker, DeviceWorkerServer};
use crate::telemetry::Telemetry;

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

pub(super) use self::registration::{ChildState, Ended, Exit};
pub use super::wire::MAX_HEARTBEAT_TIMEOUT;

/// How long a worker may take to say who it is.
const HELLO: Duration = Duration::from_secs(5);

/// How many messages may wait for a worker to read them.
const OUTBOUND: usize = 256;

/// How many sequences may wait for a session to take them: as many as there may be slots, in the worker's life and in
/// the one before it. The scheduler has counted each, so none may find it full.
const COMMANDS: usize = 2 * 65_536;

/// How many workers may be dialled in at once.
const WORKERS: usize = 1_024;

/// How long a child that has ended its stream may take to end, before it is made to.
pub(super) const CHILD_EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// How long the engine waits for a worker.
#[derive(Clone, Copy, Debug)]
pub struct WorkerTimeouts {
    /// After so long without a message it is lost. Workers send a heartbeat four times as often. A worker may declare
    /// another limit of its own.
    pub heartbeat_timeout: Duration,
    /// How long one call of its device may last; `None` is as long as it likes.
    pub step_limit: Option<Duration>,
    /// How long a worker may take to answer a question: [`TOKENIZER_CALL_TIMEOUT`], by the contract. Tests wait less.
    pub tokenizer_call_timeout: Duration,
}

/// How long a worker may take to answer what only its tokenizer or template knows.
pub const TOKENIZER_CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// A model that workers may dial in for.
pub struct AttachableModel {
    /// Its name.
    pub name: String,
    /// Its other names.
    pub aliases: Vec<String>,
    /// How long a reader of it may make no progress.
    pub slow_reader_timeout: Duration,
}

/// Takes on the workers that dial in. Clones share them.
#[derive(Clone)]
pub struct AttachService(Arc<Inner>);

struct Inner {
    seats: Vec<Arc<Registration>>,
    patience: WorkerTimeouts,
    next_worker: AtomicUsize,
    places: Arc<Semaphore>,
    offenders: ReconnectPenalties,
    events: mpsc::Sender<WorkerEvent>,
    telemetry: Telemetry,
    tasks: TaskTracker,
}

impl AttachService {
    /// A door for workers of these models, in the catalog's order. The engine's own workers have the ids below
    /// `first_worker`.
    #[must_use]
    pub fn new(
        models: Vec<AttachableModel>,
        first_worker: usize,
        patience: WorkerTimeouts,
        events: mpsc::Sender<WorkerEvent>,
        (telemetry, tasks): (Telemetry, TaskTracker),
    ) -> Self {
        let seats = models.into_iter().enumerate();
        let seats = seats.map(|(place, offered)| Arc::new(Registration::new(place, offered)));
        Self(Arc::new(Inner {
            seats: seats.collect(),
            patience,
            next_worker: AtomicUsize::new(first_worker),
            places: Arc::new(Semaphore::new(WORKERS)),
            offenders: ReconnectPenalties::default(),
            events,
            telemetry,
            tasks,
        }))
    }

    /// The door as a service, with its limits.
    #[must_use]
    pub fn into_server(self) -> DeviceWorkerServer<Self> {
        DeviceWorkerServer::new(self)
            .max_decoding_message_size(wire::MESSAGE_LIMIT)
            .max_encoding_message_size(wire::MESSAGE_LIMIT)
    }

    /// Expects a child with this token, as this worker of the model of this place.
    pub(super) fn expect(
        &self,
        place: usize,
        worker: WorkerId,
        token: String,
        exit: watch::Receiver<Option<Ended>>,
    ) -> ChildState {
        let watch = ChildState::default();
        let child = ChildRegistration {
            worker,
            watch: watch.clone(),
            exit,
        };
        self.0.seats[place].children().insert(token, child);
        watch
    }

    /// Expects that child no more.
    pub(super) fn forget(&self, place: usize, token: &str) {
        self.0.seats[place].children().remove(token);
    }

    /// Where a worker with these first words belongs.
    fn seat(
        &self,
        hello: &proto::Hello,
    ) -> Result<(Arc<Registration>, Option<ChildRegistration>), Status> {
        if hello.protocol_version != wire::PROTOCOL_VERSION {
            return Err(Status::failed_precondition(format!(
                "this engine speaks protocol_version {}, and the worker {}",
                wire::PROTOCOL_VERSION,
                hello.protocol_version
            )));
        }
        let checked = wire::check_name("hello.name", &hello.name);
        checked.map_err(|violation| Status::invalid_argument(violation.to_string()))?;
        let seat = self.seat_of(&hello.model)?;
        if hello.child_token.is_empty() {
            return Ok((seat, None));
        }
        let child = seat.children().get(&hello.child_token).cloned();
        let child = child.ok_or_else(|| Status::permission_denied("there is no such child"))?;
        if !child.watch.attach() {
            let message = "this child has had its stream";
            return Err(Status::permission_denied(message));
        }
        Ok((seat, Some(child)))
    }

    fn seat_of(&self, model: &str) -> Result<Arc<Registration>, Status> {
        let named = |seat: &&Arc<Registration>| {
            seat.name == model || seat.aliases.iter().any(|alias| alias == model)
        };
        let found = match (&self.0.seats[..], model) {
            ([only], "") => Some(only),
            (seats, _) => seats.iter().find(named),
        };
        found.map(Arc::clone).ok_or_else(|| {
            let names: Vec<_> = self.0.seats.iter().map(|seat| &*seat.name).collect();
            let names = names.join(", ");
            Status::not_found(format!("there is no model '{model}'; there are: {names}"))
        })
    }

    /// Whether a worker that says this may dial in now.
    fn check_offences(&self, hello: &proto::Hello) -> Result<(), Status> {
        match self.0.offenders.wait_of(&hello.name) {
            Some(wait) if hello.child_token.is_empty() => Err(Status::unavailable(format!(
                "a worker of this name broke the contract; it may dial in again in {} ms",
                wait.as_millis()
            ))),
            Some(_) | None => Ok(()),
        }
    }

    /// Serves a worker to its end, and tells of it.
    async fn serve(
        self,
        session: Session,
        (child, called): (Option<ChildRegistration>, String),
        inbound: Streaming<proto::AttachRequest>,
        _place: OwnedSemaphorePermit,
    ) {
        let (worker, outbound) = (session.worker, session.outbound.clone());
        // The scheduler has to know that the worker is lost, whatever ends its session. Nothing of a session that
        // panicked is used.
        let served = AssertUnwindSafe(session.run(inbound)).catch_unwind().await;
        let end = served.unwrap_or(End::Panicked);
        let reason = end.reason();
        if let Some(status) = end.status() {
            // One that does not read any more is not told.
            let _ = outbound.try_send(Err(status));
        }
        if matches!(end, End::Broke(_)) {
            self.0.offenders.add(called);
        }
        if !matches!(end, End::Stopped) {
            self.0.telemetry.workers_lost.increment(1);
        }
        let event = match &child {
            Some(_) => WorkerEvent::Lost(worker, reason),
            None => WorkerEvent::Left(worker, reason),
        };
        // Nobody listens any more once the engine has ended.
        let _ = self.0.events.send(event).await;
        if let Some(child) = child {
            child.watch.detached.cancel();
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
        let place = Arc::clone(&self.0.places).try_acquire_owned();
        let place = place.map_err(|_| {
            Status::resource_exhausted(format!("there are {WORKERS} workers already"))
        })?;
        let mut inbound = request.into_inner();
        let first = timeout(HELLO, inbound.message()).await;
        let first =
            first.map_err(|_| Status::deadline_exceeded("hello did not come in time"))??;
        let Some(Said::Hello(hello)) = first.and_then(|first| first.message) else {
            return Err(Status::failed_precondition("hello comes first"));
        };
        let silence = wire::heartbeat_timeout(&hello)
            .map_err(|violation| Status::invalid_argument(violation.to_string()))?;
        let timeouts = SessionTimeouts::new(self.0.patience, silence);
        let (seat, child) = self.seat(&hello)?;
        self.check_offences(&hello)?;
        let worker = match &child {
            Some(child) => child.worker,
            None => WorkerId(self.0.next_worker.fetch_add(1, Ordering::SeqCst)),
        };
        let (outbound, messages) = mpsc::channel(OUTBOUND);
        let (commands, assignments) = mpsc::channel(COMMANDS);
        let (flags, attention) = (Arc::<Flags>::default(), Arc::new(Notify::new()));
        let wake = Wake {
            flags: Arc::clone(&flags),
            sleeper: WakeTarget::Task(Arc::clone(&attention)),
        };
        let handle = WorkerHandle { commands, wake };
        let welcome = proto::AttachResponse {
            message: Some(Message::Welcome(timeouts.welcome())),
        };
        // It is the first message of a queue that has room.
        let _ = outbound.try_send(Ok(welcome));
        tracing::info!(
            worker = worker.0,
            model = seat.name,
            name = hello.name,
            "a worker has dialled in"
        );
        let joined = WorkerEvent::Joined(worker, seat.place, handle);
        let joined = self.0.events.send(joined).await;
        joined.map_err(|_| Status::unavailable("the engine is ending"))?;
        let session = Session {
            worker,
            child: child.clone(),
            seat,
            timeouts,
            flags,
            attention,
            commands: assignments,
            outbound,
            events: self.0.events.clone(),
            telemetry: self.0.telemetry.clone(),
        };
        self.0.tasks.spawn(
            self.clone()
                .serve(session, (child, hello.name), inbound, place),
        );
        Ok(Response::new(ReceiverStream::new(messages)))
    }
}
