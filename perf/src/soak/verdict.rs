//! Checks that a server has released everything.

use std::fmt;

use super::sample::Sample;

/// Samples that are judged.
pub(super) struct Evidence<'a> {
    /// Without clients, after the warm-up.
    pub(super) before: &'a Sample,
    /// Under load.
    pub(super) steady: &'a [Sample],
    /// Without clients, at the end.
    pub(super) after: &'a Sample,
    /// Limit of the memory that is added under load, in bytes.
    pub(super) rss_allowance: u64,
}

/// A resource that the server has kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Leak {
    resource: Resource,
    from: u64,
    to: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Resource {
    Memory { allowance: u64 },
    Descriptors,
    Threads,
    Sequences,
    Queued,
    Connections,
    InFlight,
}

/// Medians of resident memory, in bytes.
pub(super) struct RssMedians {
    pub(super) first_quarter: u64,
    pub(super) last_quarter: u64,
}

/// Lists the leaks.
pub(super) fn leaks(evidence: &Evidence<'_>) -> Vec<Leak> {
    let Evidence { before, after, .. } = evidence;
    let held = [
        (Resource::Descriptors, before.descriptors, after.descriptors),
        (Resource::Threads, before.threads, after.threads),
        (Resource::Sequences, 0, after.sequences),
        (Resource::Queued, 0, after.queued),
        (Resource::Connections, 0, after.connections),
        (Resource::InFlight, 0, after.in_flight),
    ];
    let held = held.into_iter().filter(|(_, from, to)| to > from);
    let held = held.map(|(resource, from, to)| Leak { resource, from, to });
    memory_leak(evidence).into_iter().chain(held).collect()
}

/// Reports if the server holds no more than before, apart from memory.
pub(super) fn has_released(before: &Sample, now: &Sample) -> bool {
    now.is_idle() && now.descriptors <= before.descriptors && now.threads <= before.threads
}

/// Medians of the first and of the last quarter under load; `None` with too few samples.
pub(super) fn rss_medians(steady: &[Sample]) -> Option<RssMedians> {
    let quarter = steady.len() / 4;
    let median = |samples: &[Sample]| {
        let mut rss: Vec<_> = samples.iter().map(|sample| sample.rss_bytes).collect();
        rss.sort_unstable();
        rss.get(rss.len() / 2).copied()
    };
    Some(RssMedians {
        first_quarter: median(&steady[..quarter])?,
        last_quarter: median(&steady[steady.len() - quarter..])?,
    })
}

fn memory_leak(evidence: &Evidence<'_>) -> Option<Leak> {
    let allowance = evidence.rss_allowance;
    let medians = rss_medians(evidence.steady)?;
    let (from, to) = (medians.first_quarter, medians.last_quarter);
    (to > from + allowance).then_some(Leak {
        resource: Resource::Memory { allowance },
        from,
        to,
    })
}

/// Formats bytes as MiB.
pub(super) fn mib(bytes: u64) -> String {
    let kib = f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX));
    format!("{:.1}", kib / 1024.0)
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { resource, from, to } = *self;
        let more = to - from;
        let held = match resource {
            Resource::Memory { allowance } => {
                return write!(
                    f,
                    "memory: {} MiB more at the end of the load than at its beginning ({} MiB, then {} \
                     MiB), and {} MiB are allowed",
                    mib(more),
                    mib(from),
                    mib(to),
                    mib(allowance)
                );
            }
            Resource::Descriptors => {
                return write!(
                    f,
                    "descriptors: {more} more than the {from} before the load"
                );
            }
            Resource::Threads => {
                return write!(f, "threads: {more} more than the {from} before the load");
            }
            Resource::Sequences => "slots of the device",
            Resource::Queued => "requests in the queue",
            Resource::Connections => "connections",
            Resource::InFlight => "requests in flight",
        };
        write!(f, "{held}: {to} held after all clients had left")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn idle() -> Sample {
        Sample {
            rss_bytes: 20 * MIB,
            descriptors: 12,
            threads: 5,
            ..Sample::default()
        }
    }

    fn judged(rss_mib: &[u64], after: Sample) -> Vec<String> {
        let under_load = |mib: &u64| Sample {
            rss_bytes: mib * MIB,
            descriptors: 100,
            sequences: 10,
            ..idle()
        };
        let steady: Vec<_> = rss_mib.iter().map(under_load).collect();
        let leaks = leaks(&Evidence {
            before: &idle(),
            steady: &steady,
            after: &after,
            rss_allowance: 8 * MIB,
        });
        leaks.iter().map(Leak::to_string).collect()
    }

    #[test]
    fn memory_that_grows_beyond_the_allowance_is_a_leak() {
        let growing: Vec<u64> = (20..60).collect();
        let leak = "memory: 30.0 MiB more at the end of the load than at its beginning (25.0 MiB, then \
                    55.0 MiB), and 8.0 MiB are allowed";
        assert_eq!(judged(&growing, idle()), [leak]);
    }

    #[test]
    fn memory_on_a_plateau_with_rare_peaks_is_not_a_leak() {
        let mut plateau = [30, 31, 29, 30].repeat(10);
        plateau.extend([90, 30, 31, 30]);
        assert_eq!(judged(&plateau, idle()), Vec::<String>::new());
        // An allocator keeps the memory of a peak once.
        let step: Vec<u64> = [[30; 20], [38; 20]].concat();
        assert_eq!(judged(&step, idle()), Vec::<String>::new());
    }

    #[test]
    fn one_more_descriptor_or_thread_is_a_leak() {
        let after = Sample {
            descriptors: 13,
            threads: 6,
            ..idle()
        };
        let leaks = [
            "descriptors: 1 more than the 12 before the load",
            "threads: 1 more than the 5 before the load",
        ];
        assert_eq!(judged(&[30; 8], after), leaks);
        let fewer = Sample {
            descriptors: 11,
            ..idle()
        };
        assert_eq!(judged(&[30; 8], fewer), Vec::<String>::new());
        assert!(has_released(&idle(), &fewer) && !has_released(&idle(), &after));
    }

    #[test]
    fn a_slot_request_or_connection_that_is_still_held_is_a_leak() {
        let after = Sample {
            sequences: 1,
            queued: 2,
            connections: 3,
            in_flight: 4,
            ..idle()
        };
        let leaks = [
            "slots of the device: 1 held after all clients had left",
            "requests in the queue: 2 held after all clients had left",
            "connections: 3 held after all clients had left",
            "requests in flight: 4 held after all clients had left",
        ];
        assert_eq!(judged(&[30; 8], after), leaks);
        assert!(!has_released(&idle(), &after));
    }
}
