//! The servers of all measured paths, each in a process of its own. They start before the measurement, and
//! are idle while other paths are measured.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use super::path::MeasuredPath;
use crate::device::Device;
use crate::load::Target;
use crate::process::Usage;
use crate::serve::{self, Role};
use crate::server::OwnServer;
use crate::stream::Format;

/// Servers of one configuration. Their processes end when this is dropped.
pub(super) struct Fleet {
    destinations: HashMap<MeasuredPath, Destination>,
    /// Configuration of each, but for its role.
    options: serve::Options,
    /// Folder of the engines' Unix sockets.
    folder: tempfile::TempDir,
}

struct Destination {
    target: Target,
    processes: Vec<Rc<OwnServer>>,
}

impl Fleet {
    /// Starts the servers of these paths.
    pub(super) async fn start(
        paths: &BTreeSet<MeasuredPath>,
        options: serve::Options,
    ) -> anyhow::Result<Self> {
        let mut fleet = Self {
            destinations: HashMap::new(),
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
        let usages = processes.map(|process| process.usage());
        let usages: Vec<_> = usages.collect::<anyhow::Result<_>>()?;
        Ok((!usages.is_empty()).then(|| usages.into_iter().sum()))
    }

    async fn destination(&self, path: MeasuredPath) -> anyhow::Result<Destination> {
        let Some((role, format)) = path.server() else {
            let device = Device::start(self.options.interval, self.options.slots).await?;
            return Ok(Destination {
                target: Target::Device(device),
                processes: Vec::new(),
            });
        };
        let processes = match (role, self.shared_product()) {
            (Role::Gateway, _) => self.gateway(path).await?.to_vec(),
            (Role::Product, Some(product)) => vec![product],
            _ => vec![start(&self.options_of(role)).await?],
        };
        let url = match format {
            Format::Grpc => processes[0].grpc()?,
            Format::Raw | Format::Ndjson | Format::Sse => processes[0].http()?,
        };
        let target = Target::Server(url, format);
        Ok(Destination { target, processes })
    }

    /// The product's process, which serves three paths.
    fn shared_product(&self) -> Option<Rc<OwnServer>> {
        let mut destinations = self.destinations.iter();
        let is_product = |path: &MeasuredPath| matches!(path.server(), Some((Role::Product, _)));
        let (_, product) = destinations.find(|(path, _)| is_product(path))?;
        product.processes.first().cloned()
    }

    /// A gateway, and the engine behind it.
    async fn gateway(&self, path: MeasuredPath) -> anyhow::Result<[Rc<OwnServer>; 2]> {
        let socket = (path == MeasuredPath::TwoUnix)
            .then(|| format!("unix:{}", self.folder.path().join("engine.sock").display()));
        let mut engine = self.options_of(Role::Engine);
        if let Some(socket) = &socket {
            engine.grpc_listen.clone_from(socket);
        }
        let engine = start(&engine).await?;
        let address = match socket {
            Some(socket) => socket,
            None => engine.grpc()?.to_string(),
        };
        let mut gateway = self.options_of(Role::Gateway);
        gateway.engine = Some(address);
        Ok([start(&gateway).await?, engine])
    }

    fn options_of(&self, role: Role) -> serve::Options {
        let options = self.options.clone();
        serve::Options { role, ..options }
    }
}

async fn start(options: &serve::Options) -> anyhow::Result<Rc<OwnServer>> {
    Ok(Rc::new(OwnServer::start(options).await?))
}
