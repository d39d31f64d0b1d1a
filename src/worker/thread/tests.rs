//! Tests of the worker thread: which sequences reach the device, the restart delay, and joining the thread.

use std::cell::Cell;
use std::future::poll_fn;
use std::sync::{Mutex, mpsc as std_mpsc};

use super::*;
use crate::request::{ChatMessage, TokenId};
use crate::runner::{
    BosPolicy, LoadError, Model, ModelError, ModelFacts, NextStep, Resumption, Runner, Sequence,
    SequenceStart, Slot, SlotCredit, Step, StepError, TokenBytes,
};
use crate::worker::token_channel::{Failure, Output};
use crate::worker::{Assignment, WorkerId};

/// `max_tokens` of each sequence.
const MAX_TOKENS: u32 = 7;

/// A device that reports each sequence it admits and runs none of them.
struct RecordingDevice(mpsc::Sender<Sequence>);

struct NoModel(ModelFacts);

impl Loader for RecordingDevice {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let facts = ModelFacts {
            name: "recording".to_owned(),
            context_length: 100,
            max_prompt_bytes: 100,
            vocabulary_size: 1,
            resumption: Resumption::No,
            reuses_prefixes: false,
            device: None,
            unsupported: Vec::new(),
            bos_token: None,
            eos_token: None,
        };
        Ok(LoadedModel {
            model: Arc::new(NoModel(facts)),
            runner: Box::new(Self(self.0.clone())),
        })
    }

    fn name(&self) -> &'static str {
        "recording"
    }
}

impl Runner for RecordingDevice {
    fn admit(&mut self, _slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.0.blocking_send(sequence).expect("the test receives");
        Ok(SequenceStart::default())
    }

    fn release(&mut self, _slot: Slot) {}

    fn next_step(&mut self, _room: &dyn SlotCredit) -> NextStep {
        NextStep::Idle
    }

    fn step(&mut self, _step: &mut Step<'_>) -> Result<(), StepError> {
        Ok(())
    }
}

impl Model for NoModel {
    fn facts(&self) -> &ModelFacts {
        &self.0
    }

    fn tokenize(&self, _text: &str, _: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        Ok(Vec::new())
    }

    fn token_bytes(&self, _ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        Ok(Vec::new())
    }

    fn render_chat(&self, _messages: &[ChatMessage]) -> Result<String, ModelError> {
        Ok(String::new())
    }
}

/// A ready worker with one slot.
struct StartedWorker {
    handle: WorkerHandle,
    _thread: DeviceThread,
    generation: Generation,
    events: mpsc::Receiver<WorkerEvent>,
    admitted: mpsc::Receiver<Sequence>,
}

async fn start() -> StartedWorker {
    let (recorder, admitted) = mpsc::channel(16);
    let (sender, mut events) = mpsc::channel(16);
    let SpawnedWorker { handle, thread } =
        spawn(settings(RecordingDevice(recorder), sender)).expect("a thread");
    let Some(WorkerEvent::Ready { generation, .. }) = events.recv().await else {
        panic!("expected Ready");
    };
    StartedWorker {
        handle,
        _thread: thread,
        generation,
        events,
        admitted,
    }
}

fn settings(loader: impl Loader + 'static, events: mpsc::Sender<WorkerEvent>) -> SpawnOptions {
    SpawnOptions {
        id: WorkerId(0),
        loader: Arc::new(loader),
        slots: 1,
        slow_reader_timeout: Duration::from_secs(10),
        events,
        telemetry: Telemetry::new(),
        after_step: None,
    }
}

impl StartedWorker {
    /// Submits a sequence that must not reach the device, and waits until the worker has released its slot.
    async fn submit_unrunnable(mut self, assignment: Assignment) {
        let submitted = self.handle.submit(self.generation, assignment);
        assert!(submitted.is_ok(), "a slot is free");
        tokio::select! {
            biased;
            Some(sequence) = self.admitted.recv() => panic!("the sequence reached the device: {sequence:?}"),
            released = self.events.recv() => {
                assert!(matches!(released, Some(WorkerEvent::Released { assignment: Assignment::TEST_ID, .. })));
            }
        }
        self.handle.stop();
    }
}

#[tokio::test]
async fn an_expired_sequence_fails_before_it_reaches_the_device() {
    let (expired, mut receiver) = Assignment::for_test(MAX_TOKENS, Instant::now());
    start().await.submit_unrunnable(expired).await;
    let mut outputs = Vec::new();
    poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, 16)).await;
    assert!(
        matches!(&outputs[..], [Output::Failed(Failure::DeadlineExceeded)]),
        "{outputs:?}"
    );
}

#[tokio::test]
async fn a_sequence_without_a_reader_never_reaches_the_device() {
    let (abandoned, receiver) =
        Assignment::for_test(MAX_TOKENS, Instant::now() + Duration::from_secs(3_600));
    drop(receiver);
    start().await.submit_unrunnable(abandoned).await;
}

#[tokio::test]
async fn a_crash_suspect_that_ends_before_it_runs_makes_room_for_the_next_suspect() {
    let (mut suspect, _receiver) = Assignment::for_test(MAX_TOKENS, Instant::now());
    suspect.is_suspect = true;
    let mut started = start().await;
    let submitted = started.handle.submit(started.generation, suspect);
    assert!(submitted.is_ok(), "a slot is free");
    let event = started.events.recv().await;
    assert!(matches!(event, Some(WorkerEvent::SuspectCleared { .. })));
    started.handle.stop();
}

#[test]
fn a_worker_stopped_during_its_restart_delay_ends_at_once() {
    let (sender, outcome) = std_mpsc::channel();
    std::thread::spawn(move || {
        let stopped = Cell::new(false);
        // The worker is stopped after its first check, but before it sleeps.
        let is_ending = || {
            std::thread::current().unpark();
            stopped.replace(true)
        };
        let continues = wait_backoff(Duration::from_secs(3_600), is_ending);
        sender.send(continues).expect("the test receives");
    });
    assert_eq!(outcome.recv_timeout(Duration::from_secs(10)), Ok(false));
}

/// A loader that blocks until the test releases it.
struct BlockingLoader {
    entered: std_mpsc::SyncSender<()>,
    release: Arc<Mutex<std_mpsc::Receiver<()>>>,
}

impl Loader for BlockingLoader {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let _ = self.entered.send(());
        let release = self.release.lock().expect("no load panics");
        let _ = release.recv();
        Err(LoadError("this loader loads no model".to_owned()))
    }

    fn name(&self) -> &'static str {
        "blocking"
    }
}

#[test]
fn joining_a_hung_device_thread_stops_at_the_deadline() {
    let (entered, has_entered) = std_mpsc::sync_channel(1);
    let (releaser, release) = std_mpsc::channel();
    let loader = BlockingLoader {
        entered,
        release: Arc::new(Mutex::new(release)),
    };
    let (sender, _events) = mpsc::channel(16);
    let SpawnedWorker {
        handle: _handle,
        mut thread,
    } = spawn(settings(loader, sender)).expect("a thread");
    has_entered.recv().expect("the load starts");
    thread.stop();
    assert!(!thread.join_until(Instant::now()), "the load still blocks");
    drop(releaser);
    assert!(thread.join_until(Instant::now() + Duration::from_secs(10)));
}

/// A device that holds a clone of the `Arc`, so that the reference count shows whether the device still exists.
struct CountedLoader(Arc<()>);

impl Loader for CountedLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let (recorder, _) = mpsc::channel(1);
        let loaded = RecordingDevice(recorder).load(slots, progress)?;
        let runner = Box::new(Self(Arc::clone(&self.0)));
        Ok(LoadedModel { runner, ..loaded })
    }

    fn name(&self) -> &'static str {
        "counted"
    }
}

impl Runner for CountedLoader {
    fn admit(&mut self, _slot: Slot, _sequence: Sequence) -> Result<SequenceStart, ModelError> {
        Ok(SequenceStart::default())
    }

    fn release(&mut self, _slot: Slot) {}

    fn next_step(&mut self, _room: &dyn SlotCredit) -> NextStep {
        NextStep::Idle
    }

    fn step(&mut self, _step: &mut Step<'_>) -> Result<(), StepError> {
        Ok(())
    }
}

/// A runner that chooses a slot that is not free, or panics if it has none to choose.
#[derive(Clone)]
struct BadChoice(Option<Slot>);

impl Loader for BadChoice {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let (recorder, _) = mpsc::channel(1);
        let loaded = RecordingDevice(recorder).load(slots, progress)?;
        let runner = Box::new(self.clone());
        Ok(LoadedModel { runner, ..loaded })
    }

    fn name(&self) -> &'static str {
        "bad choice"
    }
}

impl Runner for BadChoice {
    fn choose_slot(&self, _sequence: &Sequence, _free: &[Slot]) -> Slot {
        self.0.expect("a bug")
    }

    fn admit(&mut self, slot: Slot, _sequence: Sequence) -> Result<SequenceStart, ModelError> {
        panic!("slot {} is not free", slot.0)
    }

    fn release(&mut self, _slot: Slot) {}

    fn next_step(&mut self, _credit: &dyn SlotCredit) -> NextStep {
        NextStep::Idle
    }

    fn step(&mut self, _step: &mut Step<'_>) -> Result<(), StepError> {
        Ok(())
    }
}

#[tokio::test]
async fn a_sequence_for_which_a_runner_fails_to_choose_a_slot_is_a_crash_suspect() {
    for (choice, reason) in [
        (None, "the runner panicked: a bug"),
        (
            Some(Slot(7)),
            "the runner panicked: the runner chose slot 7, which is not free",
        ),
    ] {
        let (sender, mut events) = mpsc::channel(16);
        let SpawnedWorker { handle, thread } =
            spawn(settings(BadChoice(choice), sender)).expect("a thread");
        let Some(WorkerEvent::Ready { generation, .. }) = events.recv().await else {
            panic!("expected Ready");
        };
        let in_an_hour = Instant::now() + Duration::from_secs(3_600);
        let (assignment, mut receiver) = Assignment::for_test(MAX_TOKENS, in_an_hour);
        assert!(handle.submit(generation, assignment).is_ok());
        let Some(WorkerEvent::Lost { reason: lost, .. }) = events.recv().await else {
            panic!("expected Lost");
        };
        assert_eq!(lost, reason);
        let mut outputs = Vec::new();
        let received = poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, 16)).await;
        assert_eq!(received, 0, "{outputs:?}");
        assert!(receiver.has_crashed());
        handle.stop();
        drop(thread);
    }
}

#[tokio::test]
async fn dropping_the_thread_handle_ends_the_thread_and_its_device() {
    let alive = Arc::new(());
    let (sender, mut events) = mpsc::channel(16);
    let settings = settings(CountedLoader(Arc::clone(&alive)), sender);
    let SpawnedWorker {
        handle: _handle,
        thread,
    } = spawn(settings).expect("a thread");
    assert!(matches!(
        events.recv().await,
        Some(WorkerEvent::Ready { .. })
    ));
    drop(thread);
    assert_eq!(Arc::strong_count(&alive), 1);
}

#[tokio::test]
async fn a_panic_while_loading_is_reported_as_load_failed() {
    struct Panicking;
    impl Loader for Panicking {
        fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
            panic!("a bug")
        }

        fn name(&self) -> &'static str {
            "panicking"
        }
    }
    let (sender, mut events) = mpsc::channel(16);
    let _worker = spawn(settings(Panicking, sender)).expect("a thread");
    let Some(WorkerEvent::LoadFailed { reason, .. }) = events.recv().await else {
        panic!("expected LoadFailed");
    };
    assert_eq!(reason, "the runner panicked: a bug");
}
