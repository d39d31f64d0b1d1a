//! The device behind the floors: the product's own worker over the test runner, with nothing between
//! it and whoever reads a sequence.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokenway::runner::Sequence;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::telemetry::Telemetry;
use tokenway::worker::device_thread::DeviceThread;
use tokenway::worker::thread::{SpawnOptions, spawn};
use tokenway::worker::token_channel::{TokenReceiver, token_channel};
use tokenway::worker::{Assignment, Generation, WorkerEvent, WorkerHandle, WorkerId};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// How far a sequence may run ahead of its reader, as in the product.
const CREDIT: usize = 256;

const EVENTS: usize = 1024;

/// Longer than any run.
const DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// A worker of the test runner's. Clones share it.
#[derive(Clone)]
pub(crate) struct Device {
    worker: WorkerHandle,
    generation: Generation,
    /// Ends with the last clone.
    _thread: Arc<DeviceThread>,
}

impl Device {
    /// Starts the worker, and waits until it is ready.
    pub(crate) async fn start(interval: Duration, slots: usize) -> io::Result<Self> {
        let (sender, mut events) = mpsc::channel(EVENTS);
        let options = TestRunnerOptions {
            interval,
            ..TestRunnerOptions::default()
        };
        let (worker, thread) = spawn(SpawnOptions {
            id: WorkerId(0),
            loader: Arc::new(TestRunnerLoader::new(options)),
            slots,
            slow_reader_timeout: DEADLINE,
            events: sender,
            telemetry: Telemetry::new(),
            after_step: None,
        })?;
        while let Some(event) = events.recv().await {
            if let WorkerEvent::Ready(_, generation, _) = event {
                // A worker waits for whoever takes its events; here nobody wants them.
                tokio::spawn(async move { while events.recv().await.is_some() {} });
                return Ok(Self {
                    worker,
                    generation,
                    _thread: Arc::new(thread),
                });
            }
        }
        Err(io::Error::other("the worker ended before it was ready"))
    }

    /// Gives the worker a sequence. Where it has no slot for it the token_channel just closes.
    pub(crate) fn open(&self, max_tokens: u32, timestamps: bool) -> TokenReceiver {
        let (sender, receiver) = token_channel(CREDIT, Arc::new(Notify::new()), Counter::noop());
        let mut sequence = Sequence::new([0], max_tokens);
        sequence.options.timestamps = timestamps;
        let assignment = Assignment {
            sequence,
            token_channel: sender,
            is_suspect: false,
            deadline: Instant::now() + DEADLINE,
        };
        // What the worker does not take is dropped, and its token_channel closes.
        drop(self.worker.submit(self.generation, assignment));
        receiver
    }
}
