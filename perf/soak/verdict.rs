//! Whether a server has kept what it should have given back.

use std::fmt;

use super::sample::Sample;

/// What is judged.
pub(super) struct Evidence<'a> {
    /// What was held when the first clients had left, after the warm-up.
    pub(super) before: &'a Sample,
    /// What was held under the load, from moment to moment.
    pub(super) steady: &'a [Sample],
    /// What was held when all clients had been gone for long enough.
    pub(super) after: &'a Sample,
    /// How much memory may have been added.
    pub(super) rss_allowance: u64,
}

/// What the server has kept.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Leak {
    what: What,
    from: u64,
    to: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Memory { allowance: u64 },
    Descriptors,
    Threads,
    Sequences,
    Queued,
    Connections,
    InFlight,
}

/// What leaked; nothing where all is well.
pub(super) fn leaks(evidence: &Evidence<'_>) -> Vec<Leak> {
    let Evidence { before, after, .. } = evidence;
    let held = [
        (What::Descriptors, before.descriptors, after.descriptors),
        (What::Threads, before.threads, after.threads),
        (What::Sequences, 0, after.sequences),
        (What::Queued, 0, after.queued),
        (What::Connections, 0, after.connections),
        (What::InFlight, 0, after.in_flight),
    ];
    let held = held.into_iter().filter(|(_, from, to)| to > from);
    let held = held.map(|(what, from, to)| Leak { what, from, to });
    memory(evidence).into_iter().chain(held).collect()
}

/// Whether the server holds no more than before, but for memory.
pub(super) fn is_back(before: &Sample, now: &Sample) -> bool {
    now.is_idle() && now.descriptors <= before.descriptors && now.threads <= before.threads
}

/// The medians of the first and of the last quarter under load; `None` where there were too few looks.
pub(super) fn rss_medians(steady: &[Sample]) -> Option<(u64, u64)> {
    let quarter = steady.len() / 4;
    let median = |samples: &[Sample]| {
        let mut rss: Vec<_> = samples.iter().map(|sample| sample.rss_bytes).collect();
        rss.sort_unstable();
        rss.get(rss.len() / 2).copied()
    };
    median(&steady[..quarter]).zip(median(&steady[steady.len() - quarter..]))
}

fn memory(evidence: &Evidence<'_>) -> Option<Leak> {
    let allowance = evidence.rss_allowance;
    let (from, to) = rss_medians(evidence.steady)?;
    (to > from + allowance).then_some(Leak {
        what: What::Memory { allowance },
        from,
        to,
    })
}

/// Bytes as MiB, for people.
pub(super) fn mib(bytes: u64) -> String {
    let kib = f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX));
    format!("{:.1}", kib / 1024.0)
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, from, to } = *self;
        let more = to - from;
        let held = match what {
            What::Memory { allowance } => {
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
            What::Descriptors => {
                return write!(
                    f,
                    "descriptors: {more} more than the {from} before the load"
                );
            }
            What::Threads => {
                return write!(f, "threads: {more} more than the {from} before the load");
            }
            What::Sequences => "slots of the device",
            What::Queued => "requests in the queue",
            What::Connections => "connections",
            What::InFlight => "requests in flight",
        };
        write!(f, "{held}: {to} held when all clients had gone")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    const IDLE: Sample = Sample {
        seconds: 0.0,
        rss_bytes: 20 * MIB,
        descriptors: 12,
        threads: 5,
        sequences: 0,
        queued: 0,
        connections: 0,
        in_flight: 0,
        streams_done: 0,
        faults: 0,
    };

    fn judged(rss_mib: &[u64], after: Sample) -> Vec<String> {
        let under_load = |mib: &u64| Sample {
            rss_bytes: mib * MIB,
            descriptors: 100,
            sequences: 10,
            ..IDLE
        };
        let steady: Vec<_> = rss_mib.iter().map(under_load).collect();
        let leaks = leaks(&Evidence {
            before: &IDLE,
            steady: &steady,
            after: &after,
            rss_allowance: 8 * MIB,
        });
        leaks.iter().map(Leak::to_string).collect()
    }

    #[test]
    fn memory_that_grows_beyond_the_allowance_is_a_leak() {
        let growing: Vec<u64> = (20..60).collect();
        assert_eq!(
            judged(&growing, IDLE),
            [
                "memory: 30.0 MiB more at the end of the load than at its beginning (25.0 MiB, then \
              55.0 MiB), and 8.0 MiB are allowed"
            ]
        );
    }

    #[test]
    fn memory_on_a_plateau_with_a_peak_now_and_then_is_none() {
        let mut plateau = [30, 31, 29, 30].repeat(10);
        plateau.extend([90, 30, 31, 30]);
        assert_eq!(judged(&plateau, IDLE), Vec::<String>::new());
        // What an allocator keeps for the next peak is kept once.
        let step: Vec<u64> = [[30; 20], [38; 20]].concat();
        assert_eq!(judged(&step, IDLE), Vec::<String>::new());
    }

    #[test]
    fn one_descriptor_or_thread_more_is_a_leak() {
        let after = Sample {
            descriptors: 13,
            threads: 6,
            ..IDLE
        };
        assert_eq!(
            judged(&[30; 8], after),
            [
                "descriptors: 1 more than the 12 before the load",
                "threads: 1 more than the 5 before the load"
            ]
        );
        let fewer = Sample {
            descriptors: 11,
            ..IDLE
        };
        assert_eq!(judged(&[30; 8], fewer), Vec::<String>::new());
    }

    #[test]
    fn what_is_still_held_is_a_leak() {
        let after = Sample {
            sequences: 1,
            queued: 2,
            connections: 3,
            in_flight: 4,
            ..IDLE
        };
        assert_eq!(
            judged(&[30; 8], after),
            [
                "slots of the device: 1 held when all clients had gone",
                "requests in the queue: 2 held when all clients had gone",
                "connections: 3 held when all clients had gone",
                "requests in flight: 4 held when all clients had gone",
            ]
        );
        assert!(!is_back(&IDLE, &after));
    }

    #[test]
    fn who_holds_what_it_held_before_is_back() {
        assert!(is_back(&IDLE, &IDLE));
        let more = Sample {
            descriptors: 13,
            ..IDLE
        };
        assert!(!is_back(&IDLE, &more));
    }
}
