//! A test runner that records when its device admits and releases sequences.

use std::sync::Arc;

use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, LoadedModel, Loader, ModelError, NextStep, Runner, Sequence, SequenceStart, Slot,
    SlotCredit, Step, StepError,
};
use tokio::sync::mpsc;

use crate::support::Setup;

/// A change of the device's only slot.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum SlotEvent {
    Admitted,
    Released,
}

/// Returns the setup of a test runner with one slot, and the events of that slot.
pub(crate) fn slot_events(options: TestRunnerOptions) -> (Setup, mpsc::Receiver<SlotEvent>) {
    let (sender, events) = mpsc::channel(16);
    let loader = Recording {
        inner: TestRunnerLoader::new(options),
        events: sender,
    };
    (Setup::runner("llm_test", Arc::new(loader), 1), events)
}

struct Recording<T> {
    inner: T,
    events: mpsc::Sender<SlotEvent>,
}

impl Loader for Recording<TestRunnerLoader> {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.inner.load(slots, progress)?;
        let runner = Recording {
            inner: runner,
            events: self.events.clone(),
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
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        let admitted = self.inner.admit(slot, sequence);
        self.events
            .try_send(SlotEvent::Admitted)
            .expect("the test reads the events");
        admitted
    }

    fn release(&mut self, slot: Slot) {
        self.inner.release(slot);
        self.events
            .try_send(SlotEvent::Released)
            .expect("the test reads the events");
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        self.inner.next_step(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.inner.step(step)
    }
}
