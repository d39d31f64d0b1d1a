//! A client that shows one behavior after the other until it has to leave, and the crowd of clients.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::behavior::{Behavior, Deck};
use super::tally::{End, Tally};
use super::{bad, readers};
use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::stream::{Format, Protocol};

/// Upper bound of a behavior's time, in addition to the server's own timeouts.
const LONGEST: Duration = Duration::from_secs(60);

/// Upper bound of the pause between two behaviors.
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

/// The server under test.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    /// Time until it gives up an unresponsive peer.
    pub(super) peer_timeout: Duration,
}

/// State that all clients share.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) server: Rc<Server>,
    pub(super) tally: Rc<RefCell<Tally>>,
}

/// Clients at work, each a task of this thread.
pub(super) struct Crowd {
    tasks: JoinSet<()>,
}

struct Client {
    shared: Shared,
    random: StdRng,
}

impl Server {
    /// Address of the API that streams in this format.
    pub(super) fn api(&self, format: Format) -> &ServerUrl {
        match format {
            Format::Raw | Format::Ndjson | Format::Sse => &self.http,
            Format::Grpc => &self.grpc,
        }
    }

    /// Address of one of the APIs.
    pub(super) fn any_api(&self, random: &mut StdRng) -> &ServerUrl {
        let Self { http, grpc, .. } = self;
        if random.random() { http } else { grpc }
    }
}

impl Crowd {
    /// Starts the clients, whose random numbers are drawn from `random`.
    pub(super) fn enter(shared: &Shared, clients: usize, random: &mut StdRng) -> Self {
        let mut tasks = JoinSet::new();
        // Every behavior occurs from the start, however short the run is.
        for first in Behavior::all().iter().cycle().take(clients) {
            let client = Client {
                shared: shared.clone(),
                random: StdRng::from_rng(random),
            };
            tasks.spawn_local(client.run(*first));
        }
        Self { tasks }
    }

    /// Makes all clients leave at once.
    pub(super) async fn leave(mut self) {
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
        let mut deck = Deck::starting_with(first);
        loop {
            let behavior = deck.draw(&mut self.random);
            self.shared.tally.borrow_mut().start(behavior);
            // Some wait until the server gives them up, which takes three times its peer timeout.
            let longest = LONGEST + self.shared.server.peer_timeout * 10;
            let ended = timeout(longest, self.act(behavior)).await;
            let ended = ended.unwrap_or(Err(Fault::TimedOut(longest.as_secs())));
            self.shared.tally.borrow_mut().end(behavior, ended);
            sleep(self.random.random_range(Duration::ZERO..LONGEST_PAUSE)).await;
        }
    }

    async fn act(&mut self, behavior: Behavior) -> Result<End, Fault> {
        use Format::{Grpc, Ndjson, Sse};
        use Protocol::{Http1, Http2};
        let Self { shared, random } = self;
        let server = &*shared.server;
        match behavior {
            Behavior::WholeNdjson => readers::one_after_the_other(shared, Ndjson, random).await,
            Behavior::WholeSse => readers::one_after_the_other(shared, Sse, random).await,
            Behavior::WholeHttp2 => readers::at_once(shared, Ndjson, random).await,
            Behavior::WholeGrpc => readers::at_once(shared, Grpc, random).await,
            Behavior::Unary => readers::unary(server, random).await,
            Behavior::CloseHttp => readers::leave_with_fin(server, random).await,
            Behavior::ResetHttp => readers::leave_with_rst(server, random).await,
            Behavior::ResetHttp2 => readers::leave_one_stream(server, Ndjson, random).await,
            Behavior::ResetGrpc => readers::leave_one_stream(server, Grpc, random).await,
            Behavior::SlowHttp => {
                let format = readers::any_http(random);
                readers::stop_reading(server, format, Http1, random).await
            }
            Behavior::StallHttp2 => readers::stop_reading(server, Ndjson, Http2, random).await,
            Behavior::StallGrpc => readers::stop_reading(server, Grpc, Http2, random).await,
            Behavior::BadRequest => bad::request(server, random).await,
            Behavior::BadMessage => bad::message(server, random).await,
            Behavior::LongHeaders => bad::headers(server, random).await,
            Behavior::Garbage => bad::garbage(server, random).await,
            Behavior::HalfRequest => bad::half(server, random).await,
            Behavior::OpenClose => bad::nothing(server, random).await,
        }
    }
}
