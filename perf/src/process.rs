//! Resources of a process, as Linux counts them.

use std::fs;
use std::io;
use std::iter::Sum;
use std::time::Duration;

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
    pub(crate) fn of(id: u32) -> io::Result<Self> {
        let own = Self::of_one(id)?;
        // A child may end while it is inspected.
        let of_children = children(id)?.into_iter().filter_map(|id| Self::of(id).ok());
        Ok(std::iter::once(own).chain(of_children).sum())
    }

    fn of_one(id: u32) -> io::Result<Self> {
        let (mut cpu, mut device_cpu) = (Duration::ZERO, Duration::ZERO);
        for thread in fs::read_dir(format!("/proc/{id}/task"))? {
            let read = |file| fs::read_to_string(thread.as_ref().ok()?.path().join(file)).ok();
            // A thread may end while it is inspected.
            if let Some((name, counts)) = read("comm").zip(read("schedstat")) {
                let run_time = run_time(&counts).unwrap_or_default();
                cpu += run_time;
                if name.starts_with(DEVICE_THREAD_PREFIX) {
                    device_cpu += run_time;
                }
            }
        }
        Ok(Self {
            cpu,
            device_cpu,
            rss_bytes: rss_bytes(id)?,
        })
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
    pub(crate) fn of(id: u32) -> io::Result<Self> {
        let count = |folder| -> io::Result<u64> {
            let entries = fs::read_dir(format!("/proc/{id}/{folder}"))?.count();
            Ok(u64::try_from(entries).unwrap_or(u64::MAX))
        };
        Ok(Self {
            rss_bytes: rss_bytes(id)?,
            descriptors: count("fd")?,
            threads: count("task")?,
        })
    }
}

/// Running processes that a process has started.
///
/// # Errors
/// If there is no such process.
pub(crate) fn children(id: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{id}/task"))? {
        let listed = fs::read_to_string(thread?.path().join("children")).unwrap_or_default();
        children.extend(
            listed
                .split_whitespace()
                .filter_map(|id| id.parse::<u32>().ok()),
        );
    }
    Ok(children)
}

/// Resident memory of a process.
///
/// # Errors
/// If there is no such process.
pub(crate) fn rss_bytes(id: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    resident(&status).ok_or_else(|| io::Error::other("the process's status has no VmRSS"))
}

/// First number of `schedstat`: the time on a processor, in nanoseconds.
fn run_time(schedstat: &str) -> Option<Duration> {
    let nanoseconds = schedstat.split_whitespace().next()?;
    nanoseconds.parse().ok().map(Duration::from_nanos)
}

/// The line `VmRSS:  1234 kB`, in bytes.
fn resident(status: &str) -> Option<u64> {
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn counts_are_parsed_as_linux_writes_them() {
        assert_eq!(run_time("1500 20 3\n"), Some(Duration::from_nanos(1_500)));
        assert_eq!(resident("Name:\tx\nVmRSS:\t  12 kB\n"), Some(12 * 1024));
        assert_eq!((run_time(""), resident("")), (None, None));
    }

    #[test]
    fn the_time_of_a_devices_thread_is_counted_apart() {
        let busy = || {
            let end = Instant::now() + Duration::from_millis(20);
            while Instant::now() < end {}
            Usage::of(std::process::id()).unwrap()
        };
        let before = busy();
        let named = std::thread::Builder::new().name(format!("{DEVICE_THREAD_PREFIX}0"));
        let after = named.spawn(busy).unwrap().join().unwrap();
        let device_cpu = after.device_cpu.saturating_sub(before.device_cpu);
        assert!(device_cpu > Duration::from_millis(1), "{after:?}");
        assert!(
            before.cpu - before.device_cpu > Duration::from_millis(1),
            "{before:?}"
        );
        assert!(after.rss_bytes > 0);
    }

    #[test]
    fn open_files_are_counted_as_descriptors() {
        let before = Holdings::of(std::process::id()).unwrap();
        let open = || fs::File::open("/proc/self/status").unwrap();
        let files: Vec<_> = std::iter::repeat_with(open).take(50).collect();
        let after = Holdings::of(std::process::id()).unwrap();
        // Other tests of this process may have closed some of theirs.
        assert!(after.descriptors > before.descriptors + 25, "{after:?}");
        assert!(after.threads > 0 && after.rss_bytes > 0, "{after:?}");
        drop(files);
    }
}
