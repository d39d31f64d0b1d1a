//! The servers of all measured paths, each in a process of its own. They start before the measurement, and
//! are idle while other paths are measured.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::Duration;

use super::path::{MeasuredPath, Transport};
use crate::device::Device;
use crate::load::Target;
use crate::process::Usage;
use crate::serve::{self, Role};
use crate::server::{OwnServer, ServerError};

/// Configuration of the servers.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// Time between two tokens of a stream.
    pub(super) interval: Duration,
    /// Streams that each server runs at once.
    pub(super) slots: usize,
    /// Requests that may wait for a slot.
    pub(super) queue: usize,
}

impl Setup {
    /// Servers with so many slots that no stream waits.
    pub(super) fn of_interval(interval: Duration) -> Self {
        Self {
            interval,
            slots: 1024,
            queue: 1024,
        }
    }
}

/// Servers of one configuration.
pub(super) struct Fleet {
    destinations: HashMap<MeasuredPath, Destination>,
    processes: Vec<OwnServer>,
    setup: Setup,
    /// Folder of the engines' Unix sockets.
    folder: tempfile::TempDir,
}

struct Destination {
    target: Target,
    /// Indices of its processes.
    processes: Vec<usize>,
}

impl Fleet {
    /// Starts the servers of these paths.
    pub(super) async fn start(
        paths: &BTreeSet<MeasuredPath>,
        setup: Setup,
    ) -> Result<Self, ServerError> {
        let mut fleet = Self {
            destinations: HashMap::new(),
            processes: Vec::new(),
            setup,
            folder: tempfile::tempdir()?,
        };
        for path in paths {
            let destination = fleet.destination(*path).await?;
            fleet.destinations.insert(*path, destination);
        }
        Ok(fleet)
    }

    pub(super) fn target(&self, path: MeasuredPath) -> &Target {
        &self.destinations[&path].target
    }

    /// Usage of a path's servers so far; `None` for a path without a server.
    pub(super) fn usage(&self, path: MeasuredPath) -> io::Result<Option<Usage>> {
        let processes = &self.destinations[&path].processes;
        if processes.is_empty() {
            return Ok(None);
        }
        let usages = processes
            .iter()
            .map(|process| self.processes[*process].usage());
        let usages: Vec<_> = usages.collect::<io::Result<_>>()?;
        Ok(Some(usages.into_iter().sum()))
    }

    /// Ends all processes.
    pub(super) async fn stop(self) -> io::Result<()> {
        for process in self.processes {
            process.stop().await?;
        }
        Ok(())
    }

    async fn destination(&mut self, path: MeasuredPath) -> Result<Destination, ServerError> {
        let processes = match path.role() {
            None => {
                let device = Device::start(self.setup.interval, self.setup.slots).await?;
                return Ok(Destination {
                    target: Target::Device(device),
                    processes: Vec::new(),
                });
            }
            Some(Role::Gateway) => self.gateway(path).await?,
            Some(Role::Product) => match self.shared_product() {
                Some(product) => vec![product],
                None => vec![self.process(self.start_of(Role::Product)).await?],
            },
            Some(role) => vec![self.process(self.start_of(role)).await?],
        };
        let first = &self.processes[processes[0]];
        let target = match path.transport() {
            Transport::Http(format) => Target::Http(first.http()?, format),
            Transport::Grpc | Transport::Channel => Target::Grpc(first.grpc()?),
        };
        Ok(Destination { target, processes })
    }

    /// The product's process, which serves three paths.
    fn shared_product(&self) -> Option<usize> {
        let mut destinations = self.destinations.iter();
        let (_, product) = destinations.find(|(path, _)| path.role() == Some(Role::Product))?;
        product.processes.first().copied()
    }

    /// A gateway, and the engine behind it.
    async fn gateway(&mut self, path: MeasuredPath) -> Result<Vec<usize>, ServerError> {
        let socket = (path == MeasuredPath::TwoUnix)
            .then(|| format!("unix:{}", self.folder.path().join("engine.sock").display()));
        let mut engine = self.start_of(Role::Engine);
        if let Some(socket) = &socket {
            engine.grpc_listen.clone_from(socket);
        }
        let engine = self.process(engine).await?;
        let mut gateway = self.start_of(Role::Gateway);
        let address = match socket {
            Some(socket) => socket,
            None => self.processes[engine].grpc()?.to_string(),
        };
        gateway.engine = Some(address.parse().expect("a server's own address is valid"));
        Ok(vec![self.process(gateway).await?, engine])
    }

    fn start_of(&self, role: Role) -> serve::Options {
        let Setup {
            interval,
            slots,
            queue,
        } = self.setup;
        serve::Options::new(role, interval, slots, queue)
    }

    /// Starts a process, and returns its index.
    async fn process(&mut self, start: serve::Options) -> Result<usize, ServerError> {
        self.processes.push(OwnServer::start(&start).await?);
        Ok(self.processes.len() - 1)
    }
}
