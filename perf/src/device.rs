//! The device behind the floors: the product's own worker over the test runner, read directly.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use tokenway::runner::Sequence;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::telemetry::Telemetry;
use tokenway::worker::device_thread::DeviceThread;
use tokenway::worker::thread::{SpawnOptions, SpawnedWorker, spawn};
use tokenway::worker::token_channel::{TokenReceiver, token_channel};
use tokenway::worker::{Assignment, Generation, WorkerEvent, WorkerHandle, WorkerId};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// Outputs that a reader takes at once, as in the product.
pub(crate) const BATCH: usize = 256;

/// Tokens by which a sequence may be ahead of its reader, as in the product.
const CREDIT: usize = 256;

/// Capacity of the channel with the worker's events.
const EVENTS: usize = 1024;

/// Longer than any run.
const DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// A worker over the test runner. Its clones share it.
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
        let SpawnedWorker {
            handle: worker,
            thread,
        } = spawn(SpawnOptions {
            id: WorkerId(0),
            loader: Arc::new(TestRunnerLoader::new(options)),
            slots,
            slow_reader_timeout: DEADLINE,
            events: sender,
            telemetry: Telemetry::new(),
            after_step: None,
        })?;
        while let Some(event) = events.recv().await {
            if let WorkerEvent::Ready { generation, .. } = event {
                // The worker blocks on a full channel, so its events are received and dropped.
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

    /// Assigns a sequence to the worker. The channel closes at once if there is no free slot.
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
        // Dropping a rejected assignment closes its channel.
        drop(self.worker.submit(self.generation, assignment));
        receiver
    }
}
