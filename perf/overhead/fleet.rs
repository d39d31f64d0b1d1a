//! The servers of all lanes, each in a process of its own, started before anything is measured and
//! idle while it is not their turn.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::time::Duration;

use super::lane::{Lane, Speaks};
use crate::arguments::ServerUrl;
use crate::device::Device;
use crate::load::Target;
use crate::process::Usage;
use crate::serve::Role;
use crate::server::{OwnServer, ServerError, Start};

/// Of which kind the servers are.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// The time between two tokens of a stream.
    pub(super) interval: Duration,
    /// How many streams each runs at a time.
    pub(super) slots: usize,
    /// How many requests may wait for a slot.
    pub(super) queue: usize,
}

impl Setup {
    /// Servers on which no stream waits for a slot.
    pub(super) fn of_interval(interval: Duration) -> Self {
        Self {
            interval,
            slots: 1024,
            queue: 1024,
        }
    }
}

/// Servers of one kind.
pub(super) struct Fleet {
    targets: HashMap<Lane, (Target, Vec<usize>)>,
    processes: Vec<OwnServer>,
    setup: Setup,
    /// Where the engines' Unix sockets are.
    folder: tempfile::TempDir,
}

impl Fleet {
    /// Starts what these lanes need.
    pub(super) async fn start(lanes: &BTreeSet<Lane>, setup: Setup) -> Result<Self, ServerError> {
        let mut fleet = Self {
            targets: HashMap::new(),
            processes: Vec::new(),
            setup,
            folder: tempfile::tempdir()?,
        };
        for lane in lanes {
            fleet.add(*lane).await?;
        }
        Ok(fleet)
    }

    /// Where a lane's load goes.
    pub(super) fn target(&self, lane: Lane) -> &Target {
        &self.targets[&lane].0
    }

    /// The processor time that a lane's servers have used so far, and their memory; `None` where there
    /// is no server.
    pub(super) fn usage(&self, lane: Lane) -> io::Result<Option<Usage>> {
        let processes = &self.targets[&lane].1;
        let usages: io::Result<Vec<_>> = processes
            .iter()
            .map(|process| self.processes[*process].usage())
            .collect();
        Ok(usages?.into_iter().reduce(|sum, usage| Usage {
            cpu: sum.cpu + usage.cpu,
            device_cpu: sum.device_cpu + usage.device_cpu,
            rss_bytes: sum.rss_bytes + usage.rss_bytes,
        }))
    }

    /// Ends all processes.
    pub(super) async fn stop(self) -> io::Result<()> {
        for process in self.processes {
            process.stop().await?;
        }
        Ok(())
    }

    async fn add(&mut self, lane: Lane) -> Result<(), ServerError> {
        let Some(role) = lane.role() else {
            let device = Device::start(self.setup.interval, self.setup.slots).await?;
            self.targets
                .insert(lane, (Target::Device(device), Vec::new()));
            return Ok(());
        };
        let processes = match role {
            Role::Product => match self.shared_product() {
                Some(product) => vec![product],
                None => vec![self.process(role, None, None).await?],
            },
            Role::Gateway => self.gateway(lane).await?,
            Role::Isolated | Role::Engine | Role::Tcp | Role::Axum | Role::Tonic => {
                vec![self.process(role, None, None).await?]
            }
        };
        let door = &self.processes[processes[0]];
        let target = match lane.speaks() {
            Speaks::Http(form) => Target::Http(door.http()?, form),
            Speaks::Grpc | Speaks::Channel => Target::Grpc(door.grpc()?),
        };
        self.targets.insert(lane, (target, processes));
        Ok(())
    }

    /// The product's process, which serves three lanes.
    fn shared_product(&self) -> Option<usize> {
        let mut lanes = self.targets.iter();
        let (_, (_, processes)) = lanes.find(|(lane, _)| lane.role() == Some(Role::Product))?;
        processes.first().copied()
    }

    /// A gateway, and behind it its engine.
    async fn gateway(&mut self, lane: Lane) -> Result<Vec<usize>, ServerError> {
        let (listen, engine_url) = if lane == Lane::TwoUnix {
            let path = self.folder.path().join("engine.sock");
            let address = format!("unix:{}", path.display());
            (Some(address.clone()), Some(address))
        } else {
            (None, None)
        };
        let engine = self.process(Role::Engine, listen, None).await?;
        let engine_url = match engine_url {
            Some(url) => url,
            None => ServerUrl::to_string(&self.processes[engine].grpc()?),
        };
        let gateway = self.process(Role::Gateway, None, Some(engine_url)).await?;
        Ok(vec![gateway, engine])
    }

    async fn process(
        &mut self,
        role: Role,
        grpc_listen: Option<String>,
        engine: Option<String>,
    ) -> Result<usize, ServerError> {
        let start = Start {
            role,
            interval: self.setup.interval,
            slots: self.setup.slots,
            queue: self.setup.queue,
            grpc_listen,
            engine,
        };
        self.processes.push(OwnServer::start(&start).await?);
        Ok(self.processes.len() - 1)
    }
}
