//! Faults of worker processes at random moments.

use std::ops::Range;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::Signal;
use tokio::time::sleep;

use super::server::Server;
use super::tally::Tally;

/// One in this many faults stops its worker, which then hangs until the engine detects it.
const STOPS: u32 = 4;

/// Kills and stops workers.
pub(super) struct FaultInjector {
    pub(super) random: StdRng,
    /// Time between two faults.
    pub(super) pause: Range<Duration>,
}

impl FaultInjector {
    /// Injects faults until it is dropped.
    pub(super) async fn run(mut self, server: &Server, tally: &Tally) {
        loop {
            let pause = if self.pause.is_empty() {
                self.pause.start
            } else {
                self.random.random_range(self.pause.clone())
            };
            sleep(pause).await;
            let workers = server.workers();
            let signal = match self.random.random_range(0..STOPS) {
                0 => Signal::STOP,
                _ => Signal::KILL,
            };
            if workers.is_empty() {
                continue;
            }
            let victim = workers[self.random.random_range(..workers.len())];
            Server::signal(victim, signal);
            tally.signalled(signal);
        }
    }
}
