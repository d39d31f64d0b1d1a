//! The test runner, with somebody who sees when its device takes a sequence and when it lets go of it.

use std::sync::Arc;

use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, Loaded, Loader, ModelError, Next, Room, Runner, Sequence, Slot, Step, StepError,
};
use tokio::sync::mpsc;

use crate::support::Setup;

/// What a device does with a sequence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Seen {
    Admitted,
    Released,
}

/// A server of a runner that behaves so, and what is seen of it.
pub(crate) fn watched(options: TestRunnerOptions) -> (Setup, mpsc::Receiver<Seen>) {
    let (seen, receiver) = mpsc::channel(16);
    let loader = Watched {
        inner: TestRunnerLoader::new(options),
        seen,
    };
    (Setup::runner("llm_test", Arc::new(loader), 1), receiver)
}

struct Watched<T> {
    inner: T,
    seen: mpsc::Sender<Seen>,
}

impl Loader for Watched<TestRunnerLoader> {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<Loaded, LoadError> {
        let Loaded { model, runner } = self.inner.load(slots, progress)?;
        let runner = Watched {
            inner: runner,
            seen: self.seen.clone(),
        };
        Ok(Loaded {
            model,
            runner: Box::new(runner),
        })
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

impl Runner for Watched<Box<dyn Runner>> {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError> {
        let admitted = self.inner.admit(slot, sequence);
        self.seen.try_send(Seen::Admitted).expect("it is looked at");
        admitted
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
        self.seen.try_send(Seen::Released).expect("it is looked at");
    }

    fn next(&mut self, room: &dyn Room) -> Next {
        self.inner.next(room)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.inner.step(step)
    }
}
