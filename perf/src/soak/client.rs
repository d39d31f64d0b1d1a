//! Runs the clients. Each client performs one behavior after the other until it is stopped.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::behavior::{Behavior, BehaviorDeck, Load};
use super::tally::{End, Tally};
use super::{bad, chats, readers};
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{Format, Protocol};

/// Maximum duration of a behavior, in addition to the server's own timeouts.
const MAX_BEHAVIOR_TIME: Duration = Duration::from_secs(60);
/// Maximum pause between two behaviors.
const MAX_PAUSE: Duration = Duration::from_millis(20);

/// The server under test.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    /// Time after which the server gives up an unresponsive peer.
    pub(super) peer_timeout: Duration,
}

/// State that all clients share.
#[derive(Clone)]
pub(super) struct SharedState {
    pub(super) server: Rc<Server>,
    pub(super) tally: Rc<RefCell<Tally>>,
}

/// Running clients. Each client is a task on this thread.
pub(super) struct Crowd {
    tasks: JoinSet<()>,
}

struct Client {
    shared: SharedState,
    random: StdRng,
}

impl Server {
    pub(super) fn api_url(&self, format: Format) -> &ServerUrl {
        match format {
            Format::Raw | Format::Ndjson | Format::Sse => &self.http,
            Format::Grpc => &self.grpc,
        }
    }

    /// Returns the URL of one of the two APIs at random.
    pub(super) fn random_api(&self, random: &mut StdRng) -> &ServerUrl {
        let Self { http, grpc, .. } = self;
        if random.random() { http } else { grpc }
    }
}

impl Crowd {
    /// Starts the clients of a load, whose random numbers are drawn from `random`.
    pub(super) fn start_clients(
        shared: &SharedState,
        load: Load,
        clients: usize,
        random: &mut StdRng,
    ) -> Self {
        let mut tasks = JoinSet::new();
        // The first clients start with different behaviors, so that even a short run has every behavior.
        for first in Behavior::of_load(load).iter().cycle().take(clients) {
            let client = Client {
                shared: shared.clone(),
                random: StdRng::from_rng(random),
            };
            tasks.spawn_local(client.run(*first));
        }
        Self { tasks }
    }

    pub(super) async fn stop_clients(mut self) {
        self.tasks.abort_all();
        while let Some(left) = self.tasks.join_next().await {
            if let Err(error) = left
                && error.is_panic()
            {
                std::panic::resume_unwind(error.into_panic());
            }
        }
    }
}

impl Client {
    async fn run(mut self, first: Behavior) {
        let mut deck = BehaviorDeck::starting_with(first);
        loop {
            let behavior = deck.draw(&mut self.random);
            self.shared.tally.borrow_mut().record_start(behavior);
            // Some behaviors wait until the server gives the client up, which takes up to three peer timeouts.
            let longest = MAX_BEHAVIOR_TIME + self.shared.server.peer_timeout * 10;
            let ended = timeout(longest, self.perform(behavior)).await;
            let ended = ended.unwrap_or(Err(Fault::TimedOut(longest.as_secs())));
            self.shared.tally.borrow_mut().record_end(behavior, ended);
            sleep(self.random.random_range(Duration::ZERO..MAX_PAUSE)).await;
        }
    }

    async fn perform(&mut self, behavior: Behavior) -> Result<End, Fault> {
        use Format::{Grpc, Ndjson, Sse};
        use Protocol::{Http1, Http2};
        let Self { shared, random } = self;
        let server = &*shared.server;
        match behavior {
            Behavior::WholeNdjson => readers::read_in_sequence(shared, Ndjson, random).await,
            Behavior::WholeSse => readers::read_in_sequence(shared, Sse, random).await,
            Behavior::WholeHttp2 => readers::read_concurrently(shared, Ndjson, random).await,
            Behavior::WholeGrpc => readers::read_concurrently(shared, Grpc, random).await,
            Behavior::Unary => readers::request_unary(server, random).await,
            Behavior::CloseHttp => readers::leave_with_fin(server, random).await,
            Behavior::ResetHttp => readers::leave_with_rst(server, random).await,
            Behavior::ResetHttp2 => readers::leave_one_stream(server, Ndjson, random).await,
            Behavior::ResetGrpc => readers::leave_one_stream(server, Grpc, random).await,
            Behavior::SlowHttp => {
                let format = readers::random_http_format(random);
                readers::stop_reading(server, format, Http1, random).await
            }
            Behavior::StallHttp2 => readers::stop_reading(server, Ndjson, Http2, random).await,
            Behavior::StallGrpc => readers::stop_reading(server, Grpc, Http2, random).await,
            Behavior::BadRequest => bad::send_bad_request(server, random).await,
            Behavior::BadMessage => bad::send_bad_message(server, random).await,
            Behavior::LongHeaders => bad::send_large_head(server, random).await,
            Behavior::Garbage => bad::send_garbage(server, random).await,
            Behavior::HalfRequest => bad::send_half_request(server, random).await,
            Behavior::OpenClose => bad::send_nothing(server, random).await,
            Behavior::WholeChat => chats::hold_chat(shared, random).await,
            Behavior::LeftChat => chats::leave_chat(shared, random).await,
            Behavior::RepeatedChat => chats::repeat_chat(shared, random).await,
        }
    }
}
