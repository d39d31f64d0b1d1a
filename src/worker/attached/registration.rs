//! What is known of a model's workers, and of those that the engine starts itself.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::remote_tokenizer::RemoteTokenizers;
use super::{AttachableModel, CHILD_EXIT_TIMEOUT};
use crate::runner::ModelFacts;
use crate::worker::WorkerId;
use crate::worker::wire::{ReadyReport, Violation};

/// What is known of a model's workers.
pub(super) struct Registration {
    /// Its place in the catalog.
    pub(super) place: usize,
    pub(super) name: String,
    pub(super) aliases: Vec<String>,
    pub(super) slow_reader_timeout: Duration,
    pub(super) interpreters: Arc<RemoteTokenizers>,
    /// What the first worker said of the model: every other says the same.
    known: Mutex<Option<(ModelFacts, String)>>,
    /// The workers that the engine starts itself, by their tokens.
    children: Mutex<HashMap<String, ChildRegistration>>,
}

impl Registration {
    /// That of the model of this place, of which no worker has said anything.
    pub(super) fn new(place: usize, offered: AttachableModel) -> Self {
        Self {
            place,
            name: offered.name,
            aliases: offered.aliases,
            slow_reader_timeout: offered.slow_reader_timeout,
            interpreters: Arc::default(),
            known: Mutex::default(),
            children: Mutex::default(),
        }
    }

    /// Whether a worker's offer fits what other workers have said of the model.
    pub(super) fn agree(&self, offer: &ReadyReport) -> Result<(), Violation> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let (facts, runner) =
            known.get_or_insert_with(|| (offer.facts.clone(), offer.runner.clone()));
        if *runner == offer.runner && are_alike(facts, &offer.facts) {
            return Ok(());
        }
        Err(Violation(format!(
            "ready.model differs from what another worker of '{}' has said",
            self.name
        )))
    }

    /// Held for a look or a change.
    pub(super) fn children(&self) -> MutexGuard<'_, HashMap<String, ChildRegistration>> {
        self.children.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A worker that the engine starts itself.
#[derive(Clone)]
pub(super) struct ChildRegistration {
    pub(super) worker: WorkerId,
    pub(super) watch: ChildState,
    /// How the process has ended, once it has.
    pub(super) exit: watch::Receiver<Option<Ended>>,
}

impl ChildRegistration {
    /// How its process ended, which has or is about to. It is asked by what the session has: who starts the process
    /// again has forgotten this life by then.
    pub(super) async fn ended(&mut self) -> Option<Ended> {
        let exit = timeout(CHILD_EXIT_TIMEOUT, self.exit.wait_for(Option::is_some)).await;
        exit.ok()?.ok()?.clone()
    }
}

/// What becomes of one life of a child.
#[derive(Clone, Default)]
pub(in crate::worker) struct ChildState {
    /// Cancelled when its stream has ended: then it is of no use.
    pub(super) detached: CancellationToken,
    was_attached: Arc<AtomicBool>,
    was_ready: Arc<AtomicBool>,
}

impl ChildState {
    /// Waits until its stream has ended.
    pub(in crate::worker) async fn detached(&self) {
        self.detached.cancelled().await;
    }

    /// Takes its seat, which it has once: who shows its token after it is another.
    pub(super) fn attach(&self) -> bool {
        !self.was_attached.swap(true, Ordering::SeqCst)
    }

    pub(super) fn is_ready(&self) {
        self.was_ready.store(true, Ordering::SeqCst);
    }

    /// Whether its model was loaded.
    pub(in crate::worker) fn was_ready(&self) -> bool {
        self.was_ready.load(Ordering::SeqCst)
    }
}

/// How a child's process ended, and how that is told.
#[derive(Clone, Debug)]
pub(in crate::worker) struct Ended {
    pub(in crate::worker) kind: Exit,
    /// Whether somebody ended it from outside, by a signal.
    pub(in crate::worker) was_killed: bool,
    pub(in crate::worker) reason: String,
}

/// Whose fault a child's end was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::worker) enum Exit {
    /// By a fault of its own.
    Crashed,
    /// It was killed, or was told to end.
    Ended,
}

/// Whether two workers of a model say the same of it.
fn are_alike(one: &ModelFacts, other: &ModelFacts) -> bool {
    one.context_length == other.context_length
        && one.max_prompt_bytes == other.max_prompt_bytes
        && one.vocabulary_size == other.vocabulary_size
        && one.resumption == other.resumption
        && one.unsupported == other.unsupported
        && one.bos_token == other.bos_token
        && one.eos_token == other.eos_token
}
