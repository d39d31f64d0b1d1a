//! Connections to one target, which carry one load after the other, so that the second finds them warm.

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
use super::consumer::Consumer;
use super::counting::Counting;
use super::{Load, Target, channel, grpc, http};
use crate::device::Device;
use crate::fault::Fault;
use crate::figures::Figures;
use crate::stream::CompletionRequest;

/// Largest read.
const READ: usize = 64 * 1024;

/// Connections that are opened before the first request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sockets {
    /// Streams at once.
    pub(crate) streams: u32,
    /// gRPC streams that share a connection.
    pub(crate) sharing: u32,
}

impl Sockets {
    pub(crate) fn of(streams: u32) -> Self {
        Self {
            streams,
            sharing: 64,
        }
    }
}

/// Options of a load's requests.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct RequestOptions<'a> {
    /// `None` lets the server choose.
    pub(crate) model: Option<&'a str>,
    /// `None` waits forever.
    pub(crate) timeout: Option<Duration>,
}

/// Open connections, and the tasks of this thread that use them.
pub(crate) struct Session {
    tasks: LocalSet,
    pool: Rc<Pool>,
    figures: Rc<RefCell<Figures>>,
}

/// State that the streams of a load share.
pub(super) struct Shared {
    /// The request as it is written to a connection.
    pub(super) request: Bytes,
    requests: u32,
    pub(super) tokens: u32,
    pub(super) timed: bool,
    timeout: Option<Duration>,
    pub(super) figures: Rc<RefCell<Figures>>,
    /// Bytes of the last read. Its reader consumes them before any other task runs.
    pub(super) buffer: RefCell<Vec<u8>>,
}

/// Idle connections. The one that has been idle for longest is used first, so that no server closes one
/// for being idle.
struct Pool {
    target: Target,
    idle: RefCell<VecDeque<Connection>>,
}

enum Connection {
    Device(Device),
    Http(http::Connection),
    Grpc(grpc::Connection),
}

impl Session {
    /// Opens the connections one by one, so that the server sees no connection storm.
    pub(crate) async fn open(target: &Target, sockets: Sockets) -> Result<Self, Fault> {
        let tasks = LocalSet::new();
        let idle = tasks.run_until(connect(target, sockets)).await?;
        Ok(Self {
            tasks,
            pool: Rc::new(Pool {
                target: target.clone(),
                idle: RefCell::new(idle),
            }),
            figures: Rc::new(RefCell::new(Figures::new())),
        })
    }

    /// Runs a load whose tokens must be the test runner's.
    pub(crate) async fn run(&self, load: &Load) -> Figures {
        let tokens = load.tokens;
        let start = move |due_ns| Counting::start(due_ns, tokens);
        let mut figures = self.run_with(load, RequestOptions::default(), start).await;
        figures.fault_foreign_stamps();
        figures
    }

    /// Runs a load. `start` makes the consumer of a request that is due at a given time.
    pub(crate) async fn run_with<C: Consumer>(
        &self,
        load: &Load,
        options: RequestOptions<'_>,
        start: impl Fn(u64) -> C + Clone + 'static,
    ) -> Figures {
        self.figures.replace(Figures::new());
        let ran = self
            .tasks
            .run_until(self.streams(load, options, start))
            .await;
        let mut figures = self.take_figures();
        if let Err(fault) = ran {
            figures.fault(fault.to_string());
        }
        figures
    }

    /// Takes the figures of a running [`Self::run`] so far. Its own result will not contain them.
    pub(crate) fn take(&self) -> Figures {
        let mut figures = self.take_figures();
        figures.fault_foreign_stamps();
        figures
    }

    fn take_figures(&self) -> Figures {
        let mut figures = self.figures.replace(Figures::new());
        figures.end();
        figures
    }

    /// Runs the streams as tasks of this thread.
    async fn streams<C: Consumer>(
        &self,
        load: &Load,
        options: RequestOptions<'_>,
        start: impl Fn(u64) -> C + Clone + 'static,
    ) -> Result<(), Fault> {
        let completion = CompletionRequest {
            model: options.model,
            stamps: load.timed,
            ..CompletionRequest::of_tokens(load.tokens)
        };
        let shared = Rc::new(Shared {
            request: self.pool.target.request(&completion),
            requests: load.requests,
            tokens: load.tokens,
            timed: load.timed,
            timeout: options.timeout,
            figures: Rc::clone(&self.figures),
            buffer: RefCell::new(vec![0; READ]),
        });
        let mut streams = JoinSet::new();
        let mut arrivals = Arrivals::start(load.streams, load.spread)?;
        while let Some(due_ns) = arrivals.next().await? {
            let (pool, shared, start) = (Rc::clone(&self.pool), Rc::clone(&shared), start.clone());
            streams.spawn_local(async move { pool.stream(due_ns, &shared, start).await });
            while streams.try_join_next().is_some() {}
        }
        // A stream panics only by a bug of this program, and the panic is printed.
        while streams.join_next().await.is_some() {}
        Ok(())
    }
}

impl Pool {
    /// Makes a stream's requests one after the other. The first is due at `due_ns`; each of the others is
    /// due once the response before it has ended and a connection is open.
    async fn stream<C: Consumer>(&self, due_ns: u64, shared: &Shared, start: impl Fn(u64) -> C) {
        shared.figures.borrow_mut().sent(due_ns);
        let mut first_due_ns = Some(due_ns);
        let mut kept = self.idle.borrow_mut().pop_front();
        for _ in 0..shared.requests {
            let connection = match kept.take() {
                Some(connection) => Ok(Ok(connection)),
                None => shared.in_time(open(&self.target)).await,
            };
            let mut consumer = start(first_due_ns.take().unwrap_or_else(monotonic_ns));
            let ended = match connection {
                Ok(Ok(connection)) => {
                    let connection = kept.insert(connection);
                    shared
                        .in_time(connection.request(shared, &mut consumer))
                        .await
                }
                Ok(Err(fault)) => Ok(Err(fault)),
                Err(late) => Err(late),
            };
            kept = kept.filter(Connection::takes_another);
            let ended = ended.unwrap_or_else(|_| Err(shared.hangs(&consumer)));
            if consumer
                .ended(ended, &mut shared.figures.borrow_mut())
                .is_break()
            {
                return;
            }
        }
        self.idle.borrow_mut().extend(kept);
    }
}

impl Shared {
    /// Limits a part of a request to the timeout.
    async fn in_time<O>(&self, work: impl Future<Output = O>) -> Result<O, Elapsed> {
        match self.timeout {
            Some(longest) => timeout(longest, work).await,
            None => Ok(work.await),
        }
    }

    fn hangs(&self, consumer: &impl Consumer) -> Fault {
        Fault::Hangs {
            after: consumer.count(),
            seconds: self.timeout.unwrap_or_default().as_secs(),
        }
    }
}

impl Target {
    /// The request as it is written to a connection.
    fn request(&self, completion: &CompletionRequest<'_>) -> Bytes {
        match self {
            Self::Device(_) => Bytes::new(),
            Self::Http(url, format) => http::request(url, *format, completion),
            Self::Grpc(_) => grpc::request(completion),
        }
    }
}

impl Connection {
    fn takes_another(&self) -> bool {
        match self {
            Self::Device(_) | Self::Grpc(_) => true,
            Self::Http(connection) => connection.is_idle(),
        }
    }

    async fn request(
        &mut self,
        shared: &Shared,
        consumer: &mut impl Consumer,
    ) -> Result<(), Fault> {
        match self {
            Self::Device(device) => channel::request(device, shared, consumer).await,
            Self::Http(connection) => connection.request(shared, consumer).await,
            Self::Grpc(connection) => connection.request(shared, consumer).await,
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
        Target::Http(url, format) => Connection::Http(http::Connection::open(url, *format).await?),
        Target::Grpc(url) => Connection::Grpc(grpc::Connection::open(url).await?),
    })
}
