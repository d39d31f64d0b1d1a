//! The servers of all measured paths, each in its own process. They start before the measurement, and are idle while
//! other paths are measured.

use std::collections::{BTreeSet, HashMap};
use std::rc::Rc;

use super::credentials::Credentials;
use super::path::{MeasuredPath, Protection};
use crate::access::Access;
use crate::device::Device;
use crate::load::Target;
use crate::process::ResourceUsage;
use crate::serve::{self, Role};
use crate::server::ServerProcess;
use crate::stream::Format;

/// Servers with one configuration. Their processes end when the fleet is dropped.
pub(super) struct Fleet {
    destinations: HashMap<MeasuredPath, PathServers>,
    /// Configuration of each server, except for its role.
    options: serve::Options,
    /// Folder for the Unix sockets of the engines, and for keys and certificates.
    folder: tempfile::TempDir,
    /// Keys and certificates of the protected servers. `None` if there are no such servers.
    credentials: Option<Credentials>,
}

struct PathServers {
    target: Target,
    processes: Vec<Rc<ServerProcess>>,
}

impl Fleet {
    pub(super) async fn start(
        paths: &BTreeSet<MeasuredPath>,
        options: serve::Options,
    ) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir()?;
        let is_protected = |path: &MeasuredPath| path.protection() != Protection::None;
        let needs_credentials = paths.iter().any(is_protected);
        let mut fleet = Self {
            destinations: HashMap::new(),
            options,
            credentials: needs_credentials
                .then(|| Credentials::create(folder.path()))
                .transpose()?,
            folder,
        };
        for path in paths {
            let destination = fleet.start_destination(*path).await?;
            fleet.destinations.insert(*path, destination);
        }
        Ok(fleet)
    }

    pub(super) fn target(&self, path: MeasuredPath) -> &Target {
        &self.destinations[&path].target
    }

    /// Returns the CPU time and memory of a path's servers so far, or `None` for a path without a server.
    pub(super) fn usage(&self, path: MeasuredPath) -> anyhow::Result<Option<ResourceUsage>> {
        let processes = self.destinations[&path].processes.iter();
        let usages = processes.map(|process| process.usage());
        let usages: Vec<_> = usages.collect::<anyhow::Result<_>>()?;
        Ok((!usages.is_empty()).then(|| usages.into_iter().sum()))
    }

    async fn start_destination(&self, path: MeasuredPath) -> anyhow::Result<PathServers> {
        let Some((role, format)) = path.server() else {
            let device = Device::start(self.options.interval, self.options.slots).await?;
            return Ok(PathServers {
                target: Target::Device(device),
                processes: Vec::new(),
            });
        };
        let (mut options, mut access) = (self.server_options(role), Access::default());
        if let Some(credentials) = &self.credentials {
            (options.credentials, access) = credentials.of(path.protection());
        }
        let processes = match (role, self.shared_product(path.protection())) {
            (Role::Gateway, _) => self.start_gateway(path).await?.to_vec(),
            (Role::Product, Some(product)) => vec![product],
            _ => vec![start_server(&options).await?],
        };
        let url = match format {
            Format::Grpc => processes[0].grpc_url()?,
            Format::Raw | Format::Ndjson | Format::Sse => processes[0].http_url()?,
        };
        let target = Target::Server(url.with_access(access), format);
        Ok(PathServers { target, processes })
    }

    /// Returns the process in the role `Product` with this protection, which serves several paths, if it runs.
    fn shared_product(&self, protection: Protection) -> Option<Rc<ServerProcess>> {
        let mut destinations = self.destinations.iter();
        let is_product = |path: &MeasuredPath| {
            let is_product = matches!(path.server(), Some((Role::Product, _)));
            is_product && path.protection() == protection
        };
        let (_, product) = destinations.find(|(path, _)| is_product(path))?;
        product.processes.first().cloned()
    }

    async fn start_gateway(&self, path: MeasuredPath) -> anyhow::Result<[Rc<ServerProcess>; 2]> {
        let socket = (path == MeasuredPath::TwoUnix)
            .then(|| format!("unix:{}", self.folder.path().join("engine.sock").display()));
        let mut engine = self.server_options(Role::Engine);
        if let Some(socket) = &socket {
            engine.grpc_listen.clone_from(socket);
        }
        let engine = start_server(&engine).await?;
        let address = match socket {
            Some(socket) => socket,
            None => engine.grpc_url()?.to_string(),
        };
        let mut gateway = self.server_options(Role::Gateway);
        gateway.engines = vec![address];
        Ok([start_server(&gateway).await?, engine])
    }

    fn server_options(&self, role: Role) -> serve::Options {
        let options = self.options.clone();
        serve::Options { role, ..options }
    }
}

async fn start_server(options: &serve::Options) -> anyhow::Result<Rc<ServerProcess>> {
    Ok(Rc::new(ServerProcess::start(options).await?))
}
