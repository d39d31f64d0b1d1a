//! The test runner, with somebody who sees when its device takes a sequence and when it lets go of it.

use std::sync::Arc;

use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, LoadedModel, Loader, ModelError, Next, Runner, Sequence, Slot, SlotCredit, Step,
    StepError,
};
use tokio::sync::mpsc;

use crate::support::Setup;

/// What a device does with a sequence.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SlotEvent {
    Admitted,
    Released,
}

/// A server of a runner that behaves so, and what is seen of it.
pub(crate) fn slot_events(options: TestRunnerOptions) -> (Setup, mpsc::Receiver<SlotEvent>) {
    let (seen, receiver) = mpsc::channel(16);
    let loader = Recording {
        inner: TestRunnerLoader::new(options),
        seen,
    };
    (Setup::runner("llm_test", Arc::new(loader), 1), receiver)
}

struct Recording<T> {
    inner: T,
    seen: mpsc::Sender<SlotEvent>,
}

impl Loader for Recording<TestRunnerLoader> {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.inner.load(slots, progress)?;
        let runner = Recording {
            inner: runner,
            seen: self.seen.clone(),
        };
        Ok(LoadedModel {
            model,
            runner: Box::new(runner),
        })
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
}

impl Runner for Recording<Box<dyn Runner>> {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<(), ModelError> {
        let admitted = self.inner.admit(slot, sequence);
        self.seen
            .try_send(SlotEvent::Admitted)
            .expect("it is looked at");
        admitted
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
        self.seen
            .try_send(SlotEvent::Released)
            .expect("it is looked at");
    }

    fn next(&mut self, credit: &dyn SlotCredit) -> Next {
        self.inner.next(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.inner.step(step)
    }
}
