//! Tests of the scheduler with a real queue and a real worker.

use std::future::poll_fn;
use std::time::Duration;

use super::*;
use crate::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use crate::telemetry::Telemetry;
use crate::worker::WorkerId;
use crate::worker::device_thread::DeviceThread;
use crate::worker::thread::{SpawnOptions, SpawnedWorker, spawn};
use crate::worker::token_channel::{Failure, Output};

/// Starts a scheduler with a queue limit of two, and a worker with one slot whose sequence never ends.
async fn start_scheduler() -> (Arc<Scheduler>, DeviceThread) {
    let telemetry = Telemetry::new();
    let (sender, events) = mpsc::channel(16);
    let options = TestRunnerOptions {
        silent_at: Some(0),
        ..TestRunnerOptions::default()
    };
    let SpawnedWorker {
        handle: worker,
        thread,
    } = spawn(SpawnOptions {
        id: WorkerId(0),
        loader: Arc::new(TestRunnerLoader::new(options)),
        slots: 1,
        slow_reader_timeout: Duration::from_secs(10),
        events: sender,
        telemetry: telemetry.clone(),
        after_step: None,
    })
    .expect("the thread starts");
    let models = Models::for_test(&["m"]);
    let model = models.entries()[0].id;
    let (scheduler, task) = Scheduler::new(SchedulerParts {
        queue_depths: models.map_values([2]),
        workers: vec![LocalWorker {
            worker: WorkerId(0),
            model,
            handle: Some(worker),
        }],
        events,
        models,
        resumption: ResumptionLimits::default(),
        telemetry,
    });
    tokio::spawn(task);
    let mut readiness = scheduler.readiness();
    let ready = |readiness: &Readiness| *readiness == Readiness::Ready;
    readiness.wait_for(ready).await.expect("the task runs");
    (scheduler, thread)
}

async fn submit(scheduler: &Arc<Scheduler>) -> Result<Admitted, ErrorKind> {
    let deadline = Instant::now() + Duration::from_secs(3_600);
    let request = NewRequest {
        model: scheduler.models.entries()[0].id,
        caller: CallerShare::default(),
        priority: 0,
        deadline,
        choices: vec![Sequence::new([0], 1)],
    };
    scheduler.submit(request).await.map_err(|error| error.kind)
}

#[tokio::test]
async fn a_request_that_leaves_the_queue_makes_room_for_the_next() {
    let (scheduler, _thread) = start_scheduler().await;
    let _running = submit(&scheduler).await.expect("a slot is free");
    let _first = submit(&scheduler)
        .await
        .expect("the queue has two free places");
    let second = submit(&scheduler)
        .await
        .expect("the queue has one free place");
    assert_eq!(submit(&scheduler).await.err(), Some(ErrorKind::QueueFull));
    drop(second);
    assert!(submit(&scheduler).await.is_ok());
    scheduler.stop();
}

#[tokio::test]
async fn a_stopped_scheduler_fails_queued_requests_with_draining() {
    let (scheduler, _thread) = start_scheduler().await;
    let _running = submit(&scheduler).await.expect("a slot is free");
    let mut queued = submit(&scheduler)
        .await
        .expect("the queue has two free places");
    scheduler.stop();
    let mut outputs = Vec::new();
    poll_fn(|cx| queued.token_channels[0].poll_recv_many(cx, &mut outputs, 16)).await;
    assert!(
        matches!(&outputs[..], [Output::Failed(Failure::Draining)]),
        "{outputs:?}"
    );
}
