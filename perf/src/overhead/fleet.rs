//! The servers of all measured paths, each in a process of its own. They start before the measurement, and
//! are idle while other paths are measured.

use std::collections::{BTreeSet, HashMap};
use std::io;

use super::path::MeasuredPath;
use crate::device::Device;
use crate::load::Target;
use crate::process::Usage;
use crate::serve::{self, Role};
use crate::server::OwnServer;
use crate::stream::Format;

/// Servers of one configuration.
pub(super) struct Fleet {
    destinations: HashMap<MeasuredPath, Destination>,
    processes: Vec<OwnServer>,
    /// Configuration of each, but for its role.
    options: serve::Options,
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
        options: serve::Options,
    ) -> anyhow::Result<Self> {
        let mut fleet = Self {
            destinations: HashMap::new(),
            processes: Vec::new(),
            options,
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
    pub(super) fn usage(&self, path: MeasuredPath) -> anyhow::Result<Option<Usage>> {
        let processes = self.destinations[&path].processes.iter();
        let usages = processes.map(|process| self.processes[*process].usage());
        let usages: Vec<_> = usages.collect::<anyhow::Result<_>>()?;
        Ok((!usages.is_empty()).then(|| usages.into_iter().sum()))
    }

    /// Ends all processes.
    pub(super) async fn stop(self) -> io::Result<()> {
        for process in self.processes {
            process.stop().await?;
        }
        Ok(())
    }

    async fn destination(&mut self, path: MeasuredPath) -> anyhow::Result<Destination> {
        let Some((role, format)) = path.role().zip(path.format()) else {
            let device = Device::start(self.options.interval_ms, self.options.slots).await?;
            return Ok(Destination {
                target: Target::Device(device),
                processes: Vec::new(),
            });
        };
        let processes = match (role, self.shared_product()) {
            (Role::Gateway, _) => self.gateway(path).await?,
            (Role::Product, Some(product)) => vec![product],
            _ => vec![self.process(self.options_of(role)).await?],
        };
        let first = &self.processes[processes[0]];
        let url = match format {
            Format::Grpc => first.grpc()?,
            Format::Raw | Format::Ndjson | Format::Sse => first.http()?,
        };
        let target = Target::Server(url, format);
        Ok(Destination { target, processes })
    }

    /// The product's process, which serves three paths.
    fn shared_product(&self) -> Option<usize> {
        let mut destinations = self.destinations.iter();
        let (_, product) = destinations.find(|(path, _)| path.role() == Some(Role::Product))?;
        product.processes.first().copied()
    }

    /// A gateway, and the engine behind it.
    async fn gateway(&mut self, path: MeasuredPath) -> anyhow::Result<Vec<usize>> {
        let socket = (path == MeasuredPath::TwoUnix)
            .then(|| format!("unix:{}", self.folder.path().join("engine.sock").display()));
        let mut engine = self.options_of(Role::Engine);
        if let Some(socket) = &socket {
            engine.grpc_listen.clone_from(socket);
        }
        let engine = self.process(engine).await?;
        let mut gateway = self.options_of(Role::Gateway);
        let address = match socket {
            Some(socket) => socket,
            None => self.processes[engine].grpc()?.to_string(),
        };
        gateway.engine = Some(address.parse().expect("a server's own address is valid"));
        Ok(vec![self.process(gateway).await?, engine])
    }

    fn options_of(&self, role: Role) -> serve::Options {
        let options = self.options.clone();
        serve::Options { role, ..options }
    }

    /// Starts a process, and returns its index.
    async fn process(&mut self, options: serve::Options) -> anyhow::Result<usize> {
        self.processes.push(OwnServer::start(&options).await?);
        Ok(self.processes.len() - 1)
    }
}
