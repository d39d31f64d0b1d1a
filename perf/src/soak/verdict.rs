//! Checks that a server has released all resources.

use super::sample::Sample;

/// Medians of resident memory in the first and the last quarter of the load, in bytes.
pub(super) struct RssMedians {
    pub(super) first_quarter: u64,
    pub(super) last_quarter: u64,
}

/// Describes the resources that the server did not release. `before` and `after` are samples without clients, `steady`
/// are samples under load, and `rss_allowance` is the allowed growth of memory under load, in bytes.
pub(super) fn find_leaks(
    before: &Sample,
    steady: &[Sample],
    after: &Sample,
    rss_allowance: u64,
) -> Vec<String> {
    let mut leaks: Vec<_> = find_memory_leak(steady, rss_allowance)
        .into_iter()
        .collect();
    for (name, before, after) in [
        ("descriptors", before.descriptors, after.descriptors),
        ("threads", before.threads, after.threads),
    ] {
        if after > before {
            let more = after - before;
            leaks.push(format!(
                "{name}: {more} more than before the load ({before})"
            ));
        }
    }
    for (name, held) in [
        ("slots of the device", after.sequences),
        ("requests in the queue", after.queued),
        ("connections", after.connections),
        ("requests in flight", after.in_flight),
    ] {
        if held > 0 {
            leaks.push(format!(
                "{name}: {held} still in use after all clients had left"
            ));
        }
    }
    leaks
}

/// Returns true if the server holds no more resources than before. Memory is not compared.
pub(super) fn has_released(before: &Sample, now: &Sample) -> bool {
    now.is_idle() && now.descriptors <= before.descriptors && now.threads <= before.threads
}

/// Returns the medians under load. `None` if there are too few samples.
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

fn find_memory_leak(steady: &[Sample], allowance: u64) -> Option<String> {
    let medians = rss_medians(steady)?;
    let more = medians.last_quarter.checked_sub(medians.first_quarter)?;
    let (from, to) = (
        format_mib(medians.first_quarter),
        format_mib(medians.last_quarter),
    );
    let leak = format!(
        "memory: {} MiB more at the end of the load than at its beginning ({from} MiB, then {to} MiB), and {} \
         MiB are allowed",
        format_mib(more),
        format_mib(allowance)
    );
    (more > allowance).then_some(leak)
}

pub(super) fn format_mib(bytes: u64) -> String {
    let kib = f64::from(u32::try_from(bytes / 1024).unwrap_or(u32::MAX));
    format!("{:.1}", kib / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn idle_sample() -> Sample {
        Sample {
            rss_bytes: 20 * MIB,
            descriptors: 12,
            threads: 5,
            ..Sample::default()
        }
    }

    fn leaks_of(rss_mib: &[u64], after: Sample) -> Vec<String> {
        let under_load = |mib: &u64| Sample {
            rss_bytes: mib * MIB,
            descriptors: 100,
            sequences: 10,
            ..idle_sample()
        };
        let steady: Vec<_> = rss_mib.iter().map(under_load).collect();
        find_leaks(&idle_sample(), &steady, &after, 8 * MIB)
    }

    #[test]
    fn memory_that_grows_beyond_the_allowance_is_a_leak() {
        let growing: Vec<u64> = (20..60).collect();
        let leak = "memory: 30.0 MiB more at the end of the load than at its beginning (25.0 MiB, then \
                    55.0 MiB), and 8.0 MiB are allowed";
        assert_eq!(leaks_of(&growing, idle_sample()), [leak]);
    }

    #[test]
    fn memory_on_a_plateau_with_rare_peaks_is_not_a_leak() {
        let mut plateau = [30, 31, 29, 30].repeat(10);
        plateau.extend([90, 30, 31, 30]);
        assert_eq!(leaks_of(&plateau, idle_sample()), Vec::<String>::new());
        // An allocator keeps the memory of a peak once.
        let step: Vec<u64> = [[30; 20], [38; 20]].concat();
        assert_eq!(leaks_of(&step, idle_sample()), Vec::<String>::new());
    }

    #[test]
    fn one_more_descriptor_or_thread_is_a_leak() {
        let after = Sample {
            descriptors: 13,
            threads: 6,
            ..idle_sample()
        };
        let leaks = [
            "descriptors: 1 more than before the load (12)",
            "threads: 1 more than before the load (5)",
        ];
        assert_eq!(leaks_of(&[30; 8], after), leaks);
        let fewer = Sample {
            descriptors: 11,
            ..idle_sample()
        };
        assert_eq!(leaks_of(&[30; 8], fewer), Vec::<String>::new());
        assert!(has_released(&idle_sample(), &fewer) && !has_released(&idle_sample(), &after));
    }

    #[test]
    fn a_slot_request_or_connection_that_is_still_held_is_a_leak() {
        let after = Sample {
            sequences: 1,
            queued: 2,
            connections: 3,
            in_flight: 4,
            ..idle_sample()
        };
        let leaks = [
            "slots of the device: 1 still in use after all clients had left",
            "requests in the queue: 2 still in use after all clients had left",
            "connections: 3 still in use after all clients had left",
            "requests in flight: 4 still in use after all clients had left",
        ];
        assert_eq!(leaks_of(&[30; 8], after), leaks);
        assert!(!has_released(&idle_sample(), &after));
    }
}
