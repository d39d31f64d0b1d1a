//! What a process has used, as Linux counts it.

use std::fs;
use std::io;
use std::time::Duration;

/// How the name of a device's thread begins.
const DEVICE: &str = "worker-";

/// What a process has used.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Usage {
    /// The processor time of all its threads, as the scheduler counts it to the nanosecond.
    pub(crate) cpu: Duration,
    /// That of its devices' threads alone.
    pub(crate) device_cpu: Duration,
    /// Its resident memory.
    pub(crate) rss_bytes: u64,
}

impl Usage {
    /// What the process has used up to now, with its children.
    ///
    /// # Errors
    /// When there is no such process.
    pub(crate) fn of(id: u32) -> io::Result<Self> {
        let own = Self::of_one(id)?;
        // A child may end while it is looked at.
        let of_children = children(id)?.into_iter().filter_map(|id| Self::of(id).ok());
        Ok(of_children.fold(own, |sum, child| Self {
            cpu: sum.cpu + child.cpu,
            device_cpu: sum.device_cpu + child.device_cpu,
            rss_bytes: sum.rss_bytes + child.rss_bytes,
        }))
    }

    fn of_one(id: u32) -> io::Result<Self> {
        let (mut cpu, mut device_cpu) = (Duration::ZERO, Duration::ZERO);
        for thread in fs::read_dir(format!("/proc/{id}/task"))? {
            let read = |file| fs::read_to_string(thread.as_ref().ok()?.path().join(file)).ok();
            // A thread may end while it is looked at.
            if let Some((name, counts)) = read("comm").zip(read("schedstat")) {
                let run_time = run_time(&counts).unwrap_or_default();
                cpu += run_time;
                if name.starts_with(DEVICE) {
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

/// What a process holds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Holdings {
    /// Its resident memory.
    pub(crate) rss_bytes: u64,
    /// Its open files, sockets and what else has a descriptor.
    pub(crate) descriptors: u64,
    /// Its threads.
    pub(crate) threads: u64,
}

impl Holdings {
    /// What the process holds now.
    ///
    /// # Errors
    /// When there is no such process, or it is not this user's.
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

/// The processes that a process has started and that still run.
///
/// # Errors
/// When there is no such process.
pub(crate) fn children(id: u32) -> io::Result<Vec<u32>> {
    let mut children = Vec::new();
    for thread in fs::read_dir(format!("/proc/{id}/task"))? {
        let listed = fs::read_to_string(thread?.path().join("children"));
        let listed = listed.unwrap_or_default();
        children.extend(
            listed
                .split_whitespace()
                .filter_map(|id| id.parse::<u32>().ok()),
        );
    }
    Ok(children)
}

pub(crate) fn rss_bytes(id: u32) -> io::Result<u64> {
    let status = fs::read_to_string(format!("/proc/{id}/status"))?;
    resident(&status).ok_or_else(|| io::Error::other("the process's status has no VmRSS"))
}

/// The first number of `schedstat`: the time on a processor, in nanoseconds.
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
    fn the_counts_are_read_as_linux_writes_them() {
        assert_eq!(run_time("1500 20 3\n"), Some(Duration::from_nanos(1_500)));
        assert_eq!(resident("Name:\tx\nVmRSS:\t  12 kB\n"), Some(12 * 1024));
        assert_eq!((run_time(""), resident("")), (None, None));
    }

    #[test]
    fn a_process_that_runs_has_used_time_and_memory() {
        let usage = Usage::of(std::process::id()).unwrap();
        assert!(
            usage.cpu > Duration::ZERO && usage.rss_bytes > 0,
            "{usage:?}"
        );
    }

    #[test]
    fn what_a_device_has_used_is_known_apart() {
        let busy = || {
            let end = Instant::now() + Duration::from_millis(20);
            while Instant::now() < end {}
            Usage::of(std::process::id()).unwrap()
        };
        let others = busy();
        let named = std::thread::Builder::new().name("worker-0".to_owned());
        let usage = named.spawn(busy).unwrap().join().unwrap();
        let used = usage.device_cpu.saturating_sub(others.device_cpu);
        assert!(used > Duration::from_millis(1), "{usage:?}");
        assert!(
            others.cpu - others.device_cpu > Duration::from_millis(1),
            "{others:?}"
        );
    }

    #[test]
    fn files_that_are_open_are_held() {
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
