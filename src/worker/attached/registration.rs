//! The registration of each model that remote workers serve, and of each child worker.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tonic::Status;

use super::remote_tokenizer::RemoteTokenizers;
use crate::models::ModelId;
use crate::runner::ModelFacts;
use crate::worker::WorkerId;
use crate::worker::wire::{ReadyReport, Violation};

/// Time that a child worker has to exit after its stream has ended. The engine then kills it.
pub(in crate::worker) const CHILD_EXIT_TIMEOUT: Duration = Duration::from_millis(200);

/// A model that remote workers may serve.
pub(crate) struct AttachableModel {
    /// The model's name.
    pub name: String,
    /// Other names that a worker may use for the model.
    pub aliases: Vec<String>,
    /// Maximum time for which a reader may leave its full token channel unread.
    pub slow_reader_timeout: Duration,
}

/// A model that remote workers serve, its child workers, and the workers that answer its tokenizer calls.
pub(super) struct Registration {
    pub(super) model: ModelId,
    pub(super) name: String,
    pub(super) aliases: Vec<String>,
    pub(super) slow_reader_timeout: Duration,
    pub(super) tokenizers: Arc<RemoteTokenizers>,
    /// The model's facts and runner, as the first worker reported them. All other workers must report the same.
    known: Mutex<Option<(ModelFacts, String)>>,
    /// The child workers of this model. The key is the child's token.
    children: Mutex<HashMap<String, ChildRegistration>>,
}

impl Registration {
    /// Returns the child worker with this token, and invalidates the token. Returns `None` for a worker without a
    /// token.
    pub(super) fn claim_child(&self, token: &str) -> Result<Option<ChildRegistration>, Status> {
        if token.is_empty() {
            return Ok(None);
        }
        let child = self.children().get(token).cloned();
        let child =
            child.ok_or_else(|| Status::permission_denied("hello.child_token is unknown"))?;
        if !child.state.claim_token() {
            let message = "hello.child_token has been used before";
            return Err(Status::permission_denied(message));
        }
        Ok(Some(child))
    }

    /// Registers a model.
    pub(super) fn new(id: ModelId, model: AttachableModel) -> Self {
        Self {
            model: id,
            name: model.name,
            aliases: model.aliases,
            slow_reader_timeout: model.slow_reader_timeout,
            tokenizers: Arc::default(),
            known: Mutex::default(),
            children: Mutex::default(),
        }
    }

    /// Checks that a worker reports the same facts as the model's other workers.
    pub(super) fn check_facts(&self, ready: &ReadyReport) -> Result<(), Violation> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (facts, runner) =
            known.get_or_insert_with(|| (ready.facts.clone(), ready.runner.clone()));
        if *runner == ready.runner && are_equivalent(facts, &ready.facts) {
            return Ok(());
        }
        Err(Violation(format!(
            "ready.model differs from the facts that another worker of '{}' has reported",
            self.name
        )))
    }

    pub(super) fn children(&self) -> MutexGuard<'_, HashMap<String, ChildRegistration>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A child worker: a worker process that the engine has started.
#[derive(Clone)]
pub(super) struct ChildRegistration {
    pub(super) worker: WorkerId,
    pub(super) state: ChildState,
    /// Exit of the process; `None` while the process runs.
    pub(super) exit: watch::Receiver<Option<ProcessExit>>,
}

impl ChildRegistration {
    /// Waits for the exit of a process that has ended or is about to end. Returns `None` if it does not exit in time.
    pub(super) async fn wait_for_exit(&mut self) -> Option<ProcessExit> {
        let exit = timeout(CHILD_EXIT_TIMEOUT, self.exit.wait_for(Option::is_some)).await;
        exit.ok()?.ok()?.clone()
    }
}

/// State of one run of a child worker's process. Clones share the state.
#[derive(Clone, Default)]
pub(in crate::worker) struct ChildState {
    /// Cancelled when the child's stream has ended. The process is then useless, and the engine kills it if it does
    /// not exit.
    pub(super) detached: CancellationToken,
    was_attached: Arc<AtomicBool>,
    was_ready: Arc<AtomicBool>,
}

impl ChildState {
    /// Waits until the child's stream has ended.
    pub(in crate::worker) async fn detached(&self) {
        self.detached.cancelled().await;
    }

    /// Records that a stream presents this child's token. Returns false if an earlier stream has already used it.
    pub(super) fn claim_token(&self) -> bool {
        !self.was_attached.swap(true, Ordering::SeqCst)
    }

    pub(super) fn set_ready(&self) {
        self.was_ready.store(true, Ordering::SeqCst);
    }

    /// Returns true if the child has loaded its model.
    pub(in crate::worker) fn was_ready(&self) -> bool {
        self.was_ready.load(Ordering::SeqCst)
    }
}

/// Exit of a child worker's process.
#[derive(Clone, Debug)]
pub(in crate::worker) struct ProcessExit {
    pub(in crate::worker) kind: ExitKind,
    /// True if a signal from outside ended the process.
    pub(in crate::worker) was_killed: bool,
    /// Description of the exit, for the operator.
    pub(in crate::worker) reason: String,
}

/// Kind of a child worker's exit. After a crash, the sequences that were running become crash suspects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::worker) enum ExitKind {
    /// The process panicked, or died by a signal such as SIGSEGV.
    Crashed,
    /// The process exited or was killed from outside.
    Ended,
}

/// Compares the facts of a model that two workers report. The name is not compared, because it comes from the engine.
fn are_equivalent(one: &ModelFacts, other: &ModelFacts) -> bool {
    one.context_length == other.context_length
        && one.max_prompt_bytes == other.max_prompt_bytes
        && one.vocabulary_size == other.vocabulary_size
        && one.resumption == other.resumption
        && one.unsupported == other.unsupported
        && one.bos_token == other.bos_token
        && one.eos_token == other.eos_token
}
