//! What is done to workers, and when.

use std::ops::Range;
use std::time::Duration;

use rand::RngExt;
use rand::rngs::StdRng;
use rustix::process::Signal;
use tokio::time::sleep;

use super::server::Server;
use super::tally::Tally;

/// One in so many faults is a stop: its worker hangs until the engine finds that out.
const STOPS: u32 = 4;

/// Kills and stops workers at random moments.
pub(super) struct Killer {
    pub(super) random: StdRng,
    /// How long it waits between two faults.
    pub(super) pause: Range<Duration>,
}

impl Killer {
    /// Goes on until it is dropped.
    pub(super) async fn kill_on(mut self, server: &Server, tally: &Tally) {
        loop {
            let pause = if self.pause.is_empty() {
                self.pause.start
            } else {
                self.random.random_range(self.pause.clone())
            };
            sleep(pause).await;
            let workers = server.workers();
            let is_stop = self.random.random_range(0..STOPS) == 0;
            if workers.is_empty() {
                continue;
            }
            let victim = workers[self.random.random_range(..workers.len())];
            if is_stop {
                Server::signal(victim, Signal::STOP);
            } else {
                Server::signal(victim, Signal::KILL);
            }
            tally.fault(is_stop);
        }
    }
}
