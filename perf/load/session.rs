//! Connections to one target, on which loads are put one after the other: the second finds them warm.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::task::{JoinSet, LocalSet};

use super::arrivals::Arrivals;
use super::figures::{Figures, Progress};
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
    pub(super) tokens: u32,
    pub(super) timed: bool,
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

    /// Puts a load on the target, and says what came of it.
    pub(crate) async fn run(&self, load: &Load) -> Figures {
        self.notes.replace(Figures::new());
        let ran = self.tasks.run_until(self.streams(load)).await;
        let mut figures = self.take();
        if let Err(fault) = ran {
            figures.fault(fault.to_string());
        }
        figures
    }

    /// What a running load has seen so far, of which it says nothing any more at its end.
    pub(crate) fn take(&self) -> Figures {
        let mut figures = self.notes.replace(Figures::new());
        figures.end();
        figures.fault_foreign_stamps();
        figures
    }

    /// Runs the streams as tasks of this thread.
    async fn streams(&self, load: &Load) -> Result<(), Fault> {
        let asked = Rc::new(Asked {
            message: self.pool.target.message(load),
            tokens: load.tokens,
            timed: load.timed,
            notes: Rc::clone(&self.notes),
            buffer: RefCell::new(vec![0; READ]),
        });
        let mut streams = JoinSet::new();
        let mut arrivals = Arrivals::begin(load.streams, load.spread)?;
        while let Some(due_ns) = arrivals.next().await? {
            let (pool, asked, requests) = (Rc::clone(&self.pool), Rc::clone(&asked), load.requests);
            streams.spawn_local(async move {
                if let Err(fault) = pool.stream(due_ns, requests, &asked).await {
                    asked.notes.borrow_mut().fault(fault.to_string());
                }
            });
            while streams.try_join_next().is_some() {}
        }
        // A stream that panics is a bug of this program's, and its panic is told.
        while streams.join_next().await.is_some() {}
        Ok(())
    }
}

impl Pool {
    /// Makes a stream's requests, one after the other, of which the first has been due since then.
    async fn stream(&self, due_ns: u64, requests: u32, asked: &Asked) -> Result<(), Fault> {
        asked.notes.borrow_mut().sent(due_ns);
        let idle = self.idle.borrow_mut().pop_front();
        let mut connection = match idle {
            Some(connection) => connection,
            None => open(&self.target).await?,
        };
        let mut progress = Progress::begin(due_ns);
        for _ in 0..requests {
            connection.request(asked, &mut progress).await?;
            asked.notes.borrow_mut().finished(&progress);
            progress = Progress::begin(monotonic_ns());
        }
        self.idle.borrow_mut().push_back(connection);
        Ok(())
    }
}

impl Target {
    /// A request, as it is written to a connection.
    fn message(&self, load: &Load) -> Bytes {
        match self {
            Self::Device(_) => Bytes::new(),
            Self::Http(url, form) => http::message(url, *form, load),
            Self::Grpc(_) => grpc::message(load),
        }
    }
}

impl Connection {
    async fn request(&mut self, asked: &Asked, progress: &mut Progress) -> Result<(), Fault> {
        match self {
            Self::Device(device) => channel::request(device, asked, progress).await,
            Self::Http(connection) => connection.request(asked, progress).await,
            Self::Grpc(connection) => connection.request(asked, progress).await,
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
