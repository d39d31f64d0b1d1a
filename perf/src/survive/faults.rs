//! Kills and stops worker processes at random times.

use std::ops::Range;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::Signal;
use tokio::time::sleep;

use super::server::Server;
use super::tally::Tally;

/// One fault in this many stops its worker instead of killing it. The worker then hangs until the engine notices.
const STOP_ONE_IN: u32 = 4;

pub(super) struct FaultInjector {
    pub(super) random: StdRng,
    /// Range of the random time between two faults.
    pub(super) pause: Range<Duration>,
}

impl FaultInjector {
    /// Injects faults until the future is dropped.
    pub(super) async fn run(mut self, server: &Server, tally: &Tally) {
        loop {
            let pause = if self.pause.is_empty() {
                self.pause.start
            } else {
                self.random.random_range(self.pause.clone())
            };
            sleep(pause).await;
            let workers = server.worker_processes();
            let signal = match self.random.random_range(0..STOP_ONE_IN) {
                0 => Signal::STOP,
                _ => Signal::KILL,
            };
            if workers.is_empty() {
                continue;
            }
            let victim = workers[self.random.random_range(..workers.len())];
            Server::send_signal(victim, signal);
            tally.record_signal(signal);
        }
    }
}
