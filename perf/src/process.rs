//! Resources of a process, as Linux counts them.

use std::iter::{Sum, once};
use std::time::Duration;

use procfs::ProcResult;
use procfs::process::Process;

/// Prefix of the name of a device's thread.
const DEVICE_THREAD_PREFIX: &str = "worker-";

/// Processor time and memory of processes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Usage {
    /// Processor time of all threads, which the scheduler counts to the nanosecond.
    pub(crate) cpu: Duration,
    /// Processor time of the devices' threads alone.
    pub(crate) device_cpu: Duration,
    pub(crate) rss_bytes: u64,
}

impl Usage {
    /// Usage of a process and of its children up to now.
    ///
    /// # Errors
    /// If there is no such process.
    pub(crate) fn of(id: u32) -> ProcResult<Self> {
        let mut own = Self {
            rss_bytes: rss_bytes(id)?,
            ..Self::default()
        };
        // A thread or a child may end while it is inspected.
        for thread in process(id)?.tasks()?.flatten() {
            if let (Ok(status), Ok(counts)) = (thread.status(), thread.schedstat()) {
                let run_time = Duration::from_nanos(counts.sum_exec_runtime);
                own.cpu += run_time;
                if status.name.starts_with(DEVICE_THREAD_PREFIX) {
                    own.device_cpu += run_time;
                }
            }
        }
        let of_children = children(id)?.into_iter().filter_map(|id| Self::of(id).ok());
        Ok(once(own).chain(of_children).sum())
    }
}

impl Sum for Usage {
    fn sum<I: Iterator<Item = Self>>(usages: I) -> Self {
        usages.fold(Self::default(), |sum, usage| Self {
            cpu: sum.cpu + usage.cpu,
            device_cpu: sum.device_cpu + usage.device_cpu,
            rss_bytes: sum.rss_bytes + usage.rss_bytes,
        })
    }
}

/// Resources that a process holds at a moment.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holdings {
    pub(crate) rss_bytes: u64,
    /// Open files, sockets and everything else with a descriptor.
    pub(crate) descriptors: u64,
    pub(crate) threads: u64,
}

impl Holdings {
    /// Resources that a process holds now.
    ///
    /// # Errors
    /// If there is no such process, or it belongs to another user.
    pub(crate) fn of(id: u32) -> ProcResult<Self> {
        let process = process(id)?;
        Ok(Self {
            rss_bytes: rss_bytes(id)?,
            descriptors: u64::try_from(process.fd_count()?).unwrap_or(u64::MAX),
            threads: process.status()?.threads,
        })
    }
}

/// Running processes that a process has started.
///
/// # Errors
/// If there is no such process.
pub(crate) fn children(id: u32) -> ProcResult<Vec<u32>> {
    let threads = process(id)?.tasks()?.flatten();
    Ok(threads
        .flat_map(|thread| thread.children().unwrap_or_default())
        .collect())
}

/// Resident memory of a process.
///
/// # Errors
/// If there is no such process.
pub(crate) fn rss_bytes(id: u32) -> ProcResult<u64> {
    // A process that has ended and not been waited for has none.
    Ok(process(id)?.status()?.vmrss.unwrap_or(0) * 1024)
}

fn process(id: u32) -> ProcResult<Process> {
    Process::new(id.try_into().unwrap_or(i32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::figures::thread_cpu;

    #[test]
    fn the_time_of_a_devices_thread_is_counted_apart() {
        let busy = || {
            // Not a time on the wall, of which a busy machine gives this thread next to nothing.
            let end = thread_cpu() + Duration::from_millis(20);
            while thread_cpu() < end {}
            Usage::of(std::process::id()).unwrap()
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
