//! CPU time, memory and other resources of a process, as Linux reports them.

use std::iter::{Sum, once};
use std::time::Duration;

use procfs::ProcResult;
use procfs::process::Process;

/// Prefix of the names of device threads.
const DEVICE_THREAD_PREFIX: &str = "worker-";

/// Processor time and memory of processes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct ResourceUsage {
    /// Processor time of all threads, with a resolution of a nanosecond.
    pub(crate) cpu: Duration,
    /// Processor time of the device threads alone.
    pub(crate) device_cpu: Duration,
    pub(crate) rss_bytes: u64,
}

impl ResourceUsage {
    /// Returns the usage of a process and its children so far.
    pub(crate) fn of_process(id: u32) -> ProcResult<Self> {
        let mut own = Self {
            rss_bytes: rss_bytes(id)?,
            ..Self::default()
        };
        // A thread or a child may end while it is inspected.
        for thread in open_process(id)?.tasks()?.flatten() {
            if let (Ok(status), Ok(counts)) = (thread.status(), thread.schedstat()) {
                let run_time = Duration::from_nanos(counts.sum_exec_runtime);
                own.cpu += run_time;
                if status.name.starts_with(DEVICE_THREAD_PREFIX) {
                    own.device_cpu += run_time;
                }
            }
        }
        let of_children = child_ids(id)?
            .into_iter()
            .filter_map(|id| Self::of_process(id).ok());
        Ok(once(own).chain(of_children).sum())
    }
}

impl Sum for ResourceUsage {
    fn sum<I: Iterator<Item = Self>>(usages: I) -> Self {
        usages.fold(Self::default(), |sum, usage| Self {
            cpu: sum.cpu + usage.cpu,
            device_cpu: sum.device_cpu + usage.device_cpu,
            rss_bytes: sum.rss_bytes + usage.rss_bytes,
        })
    }
}

/// Resources that a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct HeldResources {
    pub(crate) rss_bytes: u64,
    /// Number of file descriptors: open files, sockets and others.
    pub(crate) descriptors: u64,
    pub(crate) threads: u64,
}

impl HeldResources {
    /// Returns the resources that a process holds now.
    /// Returns an error if there is no such process, or if it belongs to another user.
    pub(crate) fn of_process(id: u32) -> ProcResult<Self> {
        let process = open_process(id)?;
        Ok(Self {
            rss_bytes: rss_bytes(id)?,
            descriptors: u64::try_from(process.fd_count()?).unwrap_or(u64::MAX),
            threads: process.status()?.threads,
        })
    }
}

/// Returns the ids of the running child processes of a process.
pub(crate) fn child_ids(id: u32) -> ProcResult<Vec<u32>> {
    let threads = open_process(id)?.tasks()?.flatten();
    Ok(threads
        .flat_map(|thread| thread.children().unwrap_or_default())
        .collect())
}

/// Returns the resident memory of a process.
pub(crate) fn rss_bytes(id: u32) -> ProcResult<u64> {
    // A process that has exited, but was not waited for, has no memory.
    Ok(open_process(id)?.status()?.vmrss.unwrap_or(0) * 1024)
}

fn open_process(id: u32) -> ProcResult<Process> {
    Process::new(id.try_into().unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load_stats::thread_cpu_time;

    #[test]
    fn the_time_of_a_devices_thread_is_counted_apart() {
        let busy = || {
            // Spend CPU time, not wall-clock time: on a busy machine, a thread gets little CPU time in a second.
            let end = thread_cpu_time() + Duration::from_millis(20);
            while thread_cpu_time() < end {}
            ResourceUsage::of_process(std::process::id()).unwrap()
        };
        let before = busy();
        let named = std::thread::Builder::new().name(format!("{DEVICE_THREAD_PREFIX}0"));
        let after = named.spawn(busy).unwrap().join().unwrap();
        let device_cpu = after.device_cpu.saturating_sub(before.device_cpu);
        assert!(device_cpu > Duration::from_millis(1), "{after:?}");
        let other_cpu = before.cpu - before.device_cpu;
        assert!(other_cpu > Duration::from_millis(1), "{before:?}");
        assert!(after.rss_bytes > 0);
    }
}
