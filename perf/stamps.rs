//! What each token of a stream really cost, from the stamps of its device. It knows nothing of doors.

use crate::metrics::TokenSample;
use crate::percentiles::Percentiles;
use crate::stamp::Stamp;

/// What the stamps of a stream tell.
#[derive(Debug)]
pub(crate) enum StampReport {
    /// There are none.
    Absent,
    /// They are of a clock that is not the client's, so that nothing can be told from them.
    ForeignClock,
    /// What each token cost.
    Known {
        /// From the emission to the client.
        one_way: Percentiles,
        /// From the time at which a token was due to the client, and to its emission. A stall is
        /// counted against every token that it delayed. `None` where the device keeps no schedule.
        lateness: Option<Lateness>,
    },
}

/// How late tokens were.
#[derive(Debug)]
pub(crate) struct Lateness {
    /// At the client.
    pub(crate) schedule: Percentiles,
    /// At the device, which is no fault of the server's.
    pub(crate) runner: Percentiles,
}

impl StampReport {
    /// What the stamps of these tokens tell, whose request was sent then.
    pub(crate) fn of(samples: &[TokenSample], requested_ns: u64) -> Self {
        let stamped = || {
            samples
                .iter()
                .filter_map(|sample| Some((sample.received_ns, sample.stamp?)))
        };
        // On one clock a token is emitted between the request and the token's arrival.
        let is_foreign = |(received_ns, stamp): (u64, Stamp)| {
            !(requested_ns..=received_ns).contains(&stamp.emitted_ns)
        };
        if stamped().any(is_foreign) {
            return Self::ForeignClock;
        }
        let one_way = stamped().map(|(received, stamp)| (received, stamp.emitted_ns));
        let schedule = stamped().filter_map(|(received, stamp)| Some((received, stamp.due_ns?)));
        let runner = stamped().filter_map(|(_, stamp)| Some((stamp.emitted_ns, stamp.due_ns?)));
        let Some(one_way) = Percentiles::of_differences(one_way) else {
            return Self::Absent;
        };
        let lateness = Percentiles::of_differences(schedule)
            .zip(Percentiles::of_differences(runner))
            .map(|(schedule, runner)| Lateness { schedule, runner });
        Self::Known { one_way, lateness }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(index: u32, received_ns: u64, stamp: Option<(Option<u64>, u64)>) -> TokenSample {
        TokenSample {
            index,
            received_ns,
            stamp: stamp.map(|(due_ns, emitted_ns)| Stamp { due_ns, emitted_ns }),
        }
    }

    #[test]
    fn the_runners_own_lateness_is_told_apart_from_the_servers() {
        let samples = [
            sample(0, 10_500, Some((Some(10_000), 10_200))),
            sample(1, 20_900, Some((Some(20_000), 20_300))),
        ];
        let StampReport::Known { one_way, lateness } = StampReport::of(&samples, 0) else {
            panic!("the stamps are of one clock")
        };
        let lateness = lateness.unwrap();
        assert_eq!((one_way.p50_ns, one_way.max_ns), (300, 600));
        let of = |percentiles: Percentiles| (percentiles.p50_ns, percentiles.max_ns);
        assert_eq!(of(lateness.schedule), (500, 900));
        assert_eq!(of(lateness.runner), (200, 300));
        assert_eq!(
            one_way.to_string(),
            "p50 0.3 µs, p90 0.6 µs, p99 0.6 µs, max 0.6 µs"
        );
    }

    #[test]
    fn a_device_without_a_schedule_has_no_lateness() {
        let samples = [sample(0, 10, Some((None, 5)))];
        assert!(matches!(
            StampReport::of(&samples, 0),
            StampReport::Known { lateness: None, .. }
        ));
    }

    #[test]
    fn no_stamps_and_another_machines_stamps_are_no_zeros() {
        let report = |emitted_ns| StampReport::of(&[sample(0, 10, emitted_ns)], 5);
        assert!(matches!(report(None), StampReport::Absent));
        for emitted_ns in [4, 11] {
            let report = report(Some((None, emitted_ns)));
            assert!(matches!(report, StampReport::ForeignClock), "{report:?}");
        }
    }
}
