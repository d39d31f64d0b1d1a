//! Connections to one target. Several loads reuse them one after the other, so that later loads need not connect.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::rc::Rc;

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::task::{JoinSet, LocalSet};
use tokio::time::error::Elapsed;
use tokio::time::timeout;

use super::arrivals::Arrivals;
use super::consumer::Consumer;
use super::{Load, Target, channel, http};
use crate::device::Device;
use crate::fault::Fault;
use crate::load_stats::LoadStats;
use crate::stream::{self, Format, Protocol, Stream};

/// Size of the read buffer that all streams share, in bytes.
const READ_BUFFER_BYTES: usize = 64 * 1024;

/// Connections to open before the first request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ConnectionPlan {
    /// Number of concurrent streams.
    pub(crate) streams: u32,
    /// Number of gRPC streams that share a connection.
    pub(crate) streams_per_connection: u32,
}

impl ConnectionPlan {
    pub(crate) fn for_streams(streams: u32) -> Self {
        Self {
            streams,
            streams_per_connection: 64,
        }
    }
}

/// Open connections, and the tasks of this thread that use them.
pub(crate) struct LoadGenerator {
    tasks: LocalSet,
    pool: Rc<Pool>,
    stats: Rc<RefCell<LoadStats>>,
}

/// State that all streams of a load share.
pub(super) struct SharedLoad {
    pub(super) load: Load,
    /// Bytes of the request that is written to an HTTP connection or a raw socket.
    pub(super) request: Bytes,
    pub(super) stats: Rc<RefCell<LoadStats>>,
    /// Bytes of the last read. Its reader consumes them before any other task runs.
    pub(super) buffer: RefCell<Vec<u8>>,
}

/// Idle connections. The one that has been idle longest is used first, so that no server closes an idle connection.
struct Pool {
    target: Target,
    idle: RefCell<VecDeque<Connection>>,
}

enum Connection {
    Device(Device),
    Http(http::Connection),
    Grpc(stream::Connection),
}

impl LoadGenerator {
    /// Opens the connections one by one, so that the server sees no connection storm.
    pub(crate) async fn open(
        target: &Target,
        connection_plan: ConnectionPlan,
    ) -> Result<Self, Fault> {
        let tasks = LocalSet::new();
        let idle = tasks
            .run_until(open_connections(target, connection_plan))
            .await?;
        Ok(Self {
            tasks,
            pool: Rc::new(Pool {
                target: target.clone(),
                idle: RefCell::new(idle),
            }),
            stats: Rc::new(RefCell::new(LoadStats::new())),
        })
    }

    pub(crate) async fn run(&self, load: &Load) -> LoadStats {
        self.stats.replace(LoadStats::new());
        let ran = self.tasks.run_until(self.run_streams(load)).await;
        let mut stats = self.take_stats();
        if let Err(fault) = ran {
            stats.record_fault(fault.to_string());
        }
        stats
    }

    /// Takes the figures of the running [`Self::run`] so far. They are not part of the result of `run`.
    pub(crate) fn take_stats(&self) -> LoadStats {
        let mut stats = self.stats.replace(LoadStats::new());
        stats.record_end();
        stats
    }

    async fn run_streams(&self, load: &Load) -> Result<(), Fault> {
        let shared = Rc::new(SharedLoad {
            load: load.clone(),
            request: match &self.pool.target {
                Target::Server(url, format) => http::encode_request(url, *format, load),
                Target::Device(_) => Bytes::new(),
            },
            stats: Rc::clone(&self.stats),
            buffer: RefCell::new(vec![0; READ_BUFFER_BYTES]),
        });
        let mut streams = JoinSet::new();
        let mut arrivals = Arrivals::start(load.streams, load.spread)?;
        while let Some(due_ns) = arrivals.wait_for_next().await? {
            let (pool, shared) = (Rc::clone(&self.pool), Rc::clone(&shared));
            streams.spawn_local(async move { pool.run_stream(due_ns, &shared).await });
            while streams.try_join_next().is_some() {}
        }
        // A stream panics only by a bug of this program, and the panic is printed.
        while streams.join_next().await.is_some() {}
        Ok(())
    }
}

impl Pool {
    /// Makes a stream's requests one after the other. The first request is due at `due_ns`. Each further request is
    /// due once the previous response has ended and a connection is open.
    async fn run_stream(&self, due_ns: u64, shared: &SharedLoad) {
        shared.stats.borrow_mut().record_start(due_ns);
        let mut first_due_ns = Some(due_ns);
        let mut kept = self.idle.borrow_mut().pop_front();
        for _ in 0..shared.load.requests {
            let connection = match kept.take() {
                Some(connection) => Ok(Ok(connection)),
                None => shared.with_timeout(open_connection(&self.target)).await,
            };
            let due_ns = first_due_ns.take().unwrap_or_else(monotonic_ns);
            let mut consumer = Consumer::start(due_ns, &shared.load);
            let ended = match connection {
                Ok(Ok(connection)) => {
                    let connection = kept.insert(connection);
                    shared
                        .with_timeout(connection.run_request(shared, &mut consumer))
                        .await
                }
                Ok(Err(fault)) => Ok(Err(fault)),
                Err(late) => Err(late),
            };
            kept = kept.filter(Connection::accepts_another_request);
            let hangs = |_| Fault::Hangs {
                after: consumer.token_count(),
                seconds: shared.load.timeout.unwrap_or_default().as_secs(),
            };
            let ended = ended.map_err(hangs).flatten();
            consumer.record_end(ended, &mut shared.stats.borrow_mut());
        }
        self.idle.borrow_mut().extend(kept);
    }
}

impl SharedLoad {
    async fn with_timeout<O>(&self, work: impl Future<Output = O>) -> Result<O, Elapsed> {
        match self.load.timeout {
            Some(longest) => timeout(longest, work).await,
            None => Ok(work.await),
        }
    }
}

impl Connection {
    fn accepts_another_request(&self) -> bool {
        match self {
            Self::Device(_) | Self::Grpc(_) => true,
            Self::Http(connection) => connection.is_idle(),
        }
    }

    async fn run_request(
        &mut self,
        shared: &SharedLoad,
        consumer: &mut Consumer,
    ) -> Result<(), Fault> {
        let connection = match self {
            Self::Device(device) => return channel::run_request(device, shared, consumer).await,
            Self::Http(connection) => return connection.run_request(shared, consumer).await,
            Self::Grpc(connection) => connection,
        };
        let completion = shared.load.completion_request();
        let mut stream = Stream::open(connection, Format::Grpc, &completion).await?;
        let stats = &shared.stats;
        stats.borrow_mut().answered += 1;
        let reading = stream.read_to_end(|event, received_ns| {
            consumer.consume_event(event, received_ns, &mut stats.borrow_mut())
        });
        reading.await?.complete(consumer.token_count())
    }
}

async fn open_connections(
    target: &Target,
    connection_plan: ConnectionPlan,
) -> Result<VecDeque<Connection>, Fault> {
    let mut connections = VecDeque::new();
    for stream in 0..connection_plan.streams {
        let shared = match connections.back() {
            Some(Connection::Grpc(last))
                if stream % connection_plan.streams_per_connection != 0 =>
            {
                last.share()
            }
            _ => None,
        };
        connections.push_back(match shared {
            Some(connection) => Connection::Grpc(connection),
            None => open_connection(target).await?,
        });
    }
    Ok(connections)
}

async fn open_connection(target: &Target) -> Result<Connection, Fault> {
    Ok(match target {
        Target::Device(device) => Connection::Device(device.clone()),
        Target::Server(url, Format::Grpc) => {
            Connection::Grpc(stream::Connection::open(url, Protocol::Http2).await?)
        }
        Target::Server(url, format) => {
            Connection::Http(http::Connection::open(url, *format).await?)
        }
    })
}
