//! The device behind the floors: Tokenway's own worker with the test runner. The floors read its token channels.

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
use tokenway::worker::{Assignment, AssignmentId, Generation, WorkerEvent, WorkerHandle, WorkerId};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

/// Number of outputs that a reader takes at once, as in Tokenway's own streams.
pub(crate) const READ_BATCH: usize = 256;
/// Number of tokens by which a sequence may be ahead of its reader, as in Tokenway's own streams.
const CREDIT: usize = 256;
/// Capacity of the channel for the worker's events.
const EVENT_CAPACITY: usize = 1024;
/// Deadline and timeout that no run reaches.
const DEADLINE: Duration = Duration::from_secs(24 * 60 * 60);

/// A worker that runs the test runner. Clones of this handle share one worker.
#[derive(Clone)]
pub(crate) struct Device {
    worker: WorkerHandle,
    generation: Generation,
    /// Thread of the worker, which ends when the last clone is dropped.
    _thread: Arc<DeviceThread>,
}

impl Device {
    pub(crate) async fn start(interval: Duration, slots: usize) -> io::Result<Self> {
        let (sender, mut events) = mpsc::channel(EVENT_CAPACITY);
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
    pub(crate) fn open_sequence(&self, max_tokens: u32, timestamps: bool) -> TokenReceiver {
        let (sender, receiver) = token_channel(CREDIT, Arc::new(Notify::new()), Counter::noop());
        let mut sequence = Sequence::new([0], max_tokens);
        sequence.options.timestamps = timestamps;
        let assignment = Assignment {
            // Only a scheduler uses the id.
            id: AssignmentId(0),
            sequence,
            token_channel: sender,
            prompt_blocks: Arc::default(),
            is_suspect: false,
            deadline: Instant::now() + DEADLINE,
        };
        // Dropping a rejected assignment closes its channel.
        drop(self.worker.submit(self.generation, assignment));
        receiver
    }
}
