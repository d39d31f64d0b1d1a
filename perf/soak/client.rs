//! A client that does one thing after the other until it has to leave, and the crowd of them.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use super::Fault;
use super::kind::{Deck, Kind};
use super::tally::{End, Tally};
use super::tokens::Form;
use super::{bad, readers};
use crate::arguments::ServerUrl;

/// Beyond all of a server's own time-outs, whatever a client does takes no longer than this.
const LONGEST: Duration = Duration::from_secs(60);

/// How long a client rests at most before it does the next thing.
const REST: Duration = Duration::from_millis(20);

/// The server that is soaked.
#[derive(Debug)]
pub(super) struct Doors {
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    /// How long it waits for a peer that does nothing.
    pub(super) patience: Duration,
}

/// What all clients have in common.
#[derive(Clone)]
pub(super) struct Place {
    pub(super) doors: Rc<Doors>,
    pub(super) tally: Rc<RefCell<Tally>>,
}

/// Clients that are at it, each a task of this thread.
pub(super) struct Crowd {
    tasks: JoinSet<()>,
}

struct Client {
    place: Place,
    random: StdRng,
}

impl Crowd {
    /// So many clients come, whose chances are drawn from these.
    pub(super) fn enter(place: &Place, clients: usize, random: &mut StdRng) -> Self {
        let mut tasks = JoinSet::new();
        // Every kind is there from the beginning, however short the run is.
        for first in Kind::ALL.into_iter().cycle().take(clients) {
            let client = Client {
                place: place.clone(),
                random: StdRng::from_rng(random),
            };
            tasks.spawn_local(client.run(first));
        }
        Self { tasks }
    }

    /// All clients leave, whatever they are doing.
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
    async fn run(mut self, first: Kind) {
        let mut deck = Deck::beginning_with(first);
        loop {
            let kind = deck.draw(&mut self.random);
            self.place.tally.borrow_mut().begin(kind);
            // Some wait until a server has given them up, which takes three times its patience.
            let longest = LONGEST + self.place.doors.patience * 10;
            let ended = timeout(longest, self.act(kind)).await;
            let ended = ended.unwrap_or(Err(Fault::Hangs));
            self.place.tally.borrow_mut().end(kind, ended);
            sleep(self.random.random_range(Duration::ZERO..REST)).await;
        }
    }

    async fn act(&mut self, kind: Kind) -> Result<End, Fault> {
        let Self { place, random } = self;
        let doors = &*place.doors;
        match kind {
            Kind::WholeNdjson => readers::one_after_the_other(place, Form::Ndjson, random).await,
            Kind::WholeSse => readers::one_after_the_other(place, Form::Sse, random).await,
            Kind::WholeHttp2 => readers::at_once(place, Form::Ndjson, random).await,
            Kind::WholeGrpc => readers::at_once(place, Form::Grpc, random).await,
            Kind::Unary => readers::unary(doors, random).await,
            Kind::CloseHttp => readers::leave_by_fin(doors, random).await,
            Kind::ResetHttp => readers::leave_by_rst(doors, random).await,
            Kind::ResetHttp2 => readers::leave_one_stream(doors, Form::Ndjson, random).await,
            Kind::ResetGrpc => readers::leave_one_stream(doors, Form::Grpc, random).await,
            Kind::SlowHttp => readers::stand_still(doors, readers::Still::Socket, random).await,
            Kind::StallHttp2 => readers::stand_still(doors, readers::Still::Http2, random).await,
            Kind::StallGrpc => readers::stand_still(doors, readers::Still::Grpc, random).await,
            Kind::BadRequest => bad::request(doors, random).await,
            Kind::BadMessage => bad::message(doors, random).await,
            Kind::LongHeaders => bad::headers(doors, random).await,
            Kind::Garbage => bad::garbage(doors, random).await,
            Kind::HalfRequest => bad::half(doors, random).await,
            Kind::OpenClose => bad::nothing(doors, random).await,
        }
    }
}
