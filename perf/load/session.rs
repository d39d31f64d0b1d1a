//! Connections to one target, on which loads are put one after the other: the second finds them warm.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::arrivals::Arrivals;
use super::counted::Counted;
use super::figures::Figures;
use super::taker::Taker;
use super::{Fault, Load, Target, channel, grpc, http};
use crate::device::Device;

/// How many connections are opened, before anything is asked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sockets {
    /// For how many streams at once.
    pub(crate) streams: u32,
    /// How many gRPC streams share a connection.
    pub(crate) sharing: u32,
}

impl Sockets {
    /// What so many streams need.
    pub(crate) fn of(streams: u32) -> Self {
        Self {
            streams,
            sharing: 64,
        }
    }
}

/// What is asked besides a load.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms<'a> {
    /// Without a model the server chooses.
    pub(crate) model: Option<&'a str>,
    /// How long a request may take; for ever where nobody says.
    pub(crate) timeout: Option<Duration>,
}

/// Open connections, and the tasks of this thread that use them.
pub(crate) struct Session {
    tasks: LocalSet,
    pool: Rc<Pool>,
    notes: Notes,
}

/// Where streams note what they see.
pub(super) type Notes = Rc<RefCell<Figures>>;

/// What the streams of a run have in common.
pub(super) struct Asked {
    /// The request, as it is written to a connection.
    pub(super) message: Bytes,
    requests: u32,
    pub(super) tokens: u32,
    pub(super) timed: bool,
    timeout: Option<Duration>,
    pub(super) notes: Notes,
    /// What a read brought, until the reader has looked at it, which it does at once.
    pub(super) buffer: RefCell<Vec<u8>>,
}

/// Connections that wait for a request: whoever has waited longest is next, so that none waits until its
/// server closes it.
struct Pool {
    target: Target,
    idle: RefCell<VecDeque<Connection>>,
}

enum Connection {
    Device(Device),
    Http(http::Connection),
    Grpc(grpc::Connection),
}

/// The most that is read at once.
const READ: usize = 64 * 1024;

impl Session {
    /// Opens connections one by one: a server that takes them never sees a storm.
    pub(crate) async fn open(target: &Target, sockets: Sockets) -> Result<Self, Fault> {
        let tasks = LocalSet::new();
        let idle = tasks.run_until(connect(target, sockets)).await?;
        Ok(Self {
            tasks,
            pool: Rc::new(Pool {
                target: target.clone(),
                idle: RefCell::new(idle),
            }),
            notes: Rc::new(RefCell::new(Figures::new())),
        })
    }

    /// Puts a load on the target, whose tokens must be the test runner's, and says what came of it.
    pub(crate) async fn run(&self, load: &Load) -> Figures {
        let tokens = load.tokens;
        let begin = move |due_ns| Counted::begin(due_ns, tokens);
        let mut figures = self.run_with(load, Terms::default(), begin).await;
        figures.fault_foreign_stamps();
        figures
    }

    /// Puts a load on the target whose answers are taken by what `begin` makes of the time at which a
    /// request is due.
    pub(crate) async fn run_with<T: Taker>(
        &self,
        load: &Load,
        terms: Terms<'_>,
        begin: impl Fn(u64) -> T + Clone + 'static,
    ) -> Figures {
        self.notes.replace(Figures::new());
        let ran = self.tasks.run_until(self.streams(load, terms, begin)).await;
        let mut figures = self.noted();
        if let Err(fault) = ran {
            figures.fault(fault.to_string());
        }
        figures
    }

    /// What a running load of [`Self::run`] has seen so far, of which it says nothing any more at its end.
    pub(crate) fn take(&self) -> Figures {
        let mut figures = self.noted();
        figures.fault_foreign_stamps();
        figures
    }

    fn noted(&self) -> Figures {
        let mut figures = self.notes.replace(Figures::new());
        figures.end();
        figures
    }

    /// Runs the streams as tasks of this thread.
    async fn streams<T: Taker>(
        &self,
        load: &Load,
        terms: Terms<'_>,
        begin: impl Fn(u64) -> T + Clone + 'static,
    ) -> Result<(), Fault> {
        let asked = Rc::new(Asked {
            message: self.pool.target.message(load, terms.model),
            requests: load.requests,
            tokens: load.tokens,
            timed: load.timed,
            timeout: terms.timeout,
            notes: Rc::clone(&self.notes),
            buffer: RefCell::new(vec![0; READ]),
        });
        let mut streams = JoinSet::new();
        let mut arrivals = Arrivals::begin(load.streams, load.spread)?;
        while let Some(due_ns) = arrivals.next().await? {
            let (pool, asked, begin) = (Rc::clone(&self.pool), Rc::clone(&asked), begin.clone());
            streams.spawn_local(async move { pool.stream(due_ns, &asked, begin).await });
            while streams.try_join_next().is_some() {}
        }
        // A stream that panics is a bug of this program's, and its panic is told.
        while streams.join_next().await.is_some() {}
        Ok(())
    }
}

impl Pool {
    /// Makes a stream's requests, one after the other, of which the first has been due since then. Each of
    /// the others is due once the one before has its answer and there is a connection for it.
    async fn stream<T: Taker>(&self, due_ns: u64, asked: &Asked, begin: impl Fn(u64) -> T) {
        asked.notes.borrow_mut().sent(due_ns);
        let mut first_due_ns = Some(due_ns);
        let mut kept = self.idle.borrow_mut().pop_front();
        for _ in 0..asked.requests {
            let connection = match kept.take() {
                Some(connection) => Ok(Ok(connection)),
                None => asked.in_time(open(&self.target)).await,
            };
            let mut taker = begin(first_due_ns.take().unwrap_or_else(monotonic_ns));
            let ended = match connection {
                Ok(Ok(connection)) => {
                    let connection = kept.insert(connection);
                    asked.in_time(connection.request(asked, &mut taker)).await
                }
                Ok(Err(fault)) => Ok(Err(fault)),
                Err(late) => Err(late),
            };
            kept = kept.filter(Connection::takes_another);
            let ended = ended.unwrap_or_else(|_| Err(asked.hangs(&taker)));
            if taker.ended(ended, &mut asked.notes.borrow_mut()).is_break() {
                return;
            }
        }
        self.idle.borrow_mut().extend(kept);
    }
}

impl Asked {
    /// Does a request's work for as long as that may take.
    async fn in_time<O>(&self, work: impl Future<Output = O>) -> Result<O, Elapsed> {
        match self.timeout {
            Some(longest) => timeout(longest, work).await,
            None => Ok(work.await),
        }
    }

    fn hangs(&self, taker: &impl Taker) -> Fault {
        Fault::Hangs {
            after: taker.count(),
            seconds: self.timeout.unwrap_or_default().as_secs(),
        }
    }
}

impl Target {
    /// A request, as it is written to a connection.
    fn message(&self, load: &Load, model: Option<&str>) -> Bytes {
        match self {
            Self::Device(_) => Bytes::new(),
            Self::Http(url, form) => http::message(url, *form, load, model),
            Self::Grpc(_) => grpc::message(load, model),
        }
    }
}

impl Connection {
    /// Whether another request can be made.
    fn takes_another(&self) -> bool {
        match self {
            Self::Device(_) | Self::Grpc(_) => true,
            Self::Http(connection) => connection.is_idle(),
        }
    }

    async fn request(&mut self, asked: &Asked, taker: &mut impl Taker) -> Result<(), Fault> {
        match self {
            Self::Device(device) => channel::request(device, asked, taker).await,
            Self::Http(connection) => connection.request(asked, taker).await,
            Self::Grpc(connection) => connection.request(asked, taker).await,
        }
    }
}

async fn connect(target: &Target, sockets: Sockets) -> Result<VecDeque<Connection>, Fault> {
    let mut connections = VecDeque::new();
    for stream in 0..sockets.streams {
        let connection = match connections.back() {
            Some(Connection::Grpc(shared)) if stream % sockets.sharing != 0 => {
                Connection::Grpc(shared.clone())
            }
            _ => open(target).await?,
        };
        connections.push_back(connection);
    }
    Ok(connections)
}

async fn open(target: &Target) -> Result<Connection, Fault> {
    Ok(match target {
        Target::Device(device) => Connection::Device(device.clone()),
        Target::Http(url, form) => Connection::Http(http::Connection::open(url, *form).await?),
        Target::Grpc(url) => Connection::Grpc(grpc::Connection::open(url).await?),
    })
}
