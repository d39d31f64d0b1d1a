//! The number of prompt rows in one step, chosen so that the step takes at most about `--max-step-ms`. This module must
//! not know the device.

use std::ops::RangeInclusive;
use std::time::Duration;

/// Weight of the newest measurement in the estimated cost of a row, from 0 to 1.
const NEW_SHARE: f64 = 0.5;

/// Estimates the cost of a row from the steps so far, and limits the rows of the next step accordingly.
pub(super) struct StepBudget {
    max_step: Duration,
    /// Estimated seconds per row. `None` before the first step.
    seconds_per_row: Option<f64>,
    /// Number of rows in the first step.
    first: usize,
    /// Limits of the number of rows in every step after the first.
    limits: RangeInclusive<usize>,
}

impl StepBudget {
    /// Creates a budget for steps that take about `max_step`. The first step has `first` rows.
    ///
    /// The lowest limit should be above 1. The time of a step is divided by its rows, so a step with one row makes a
    /// row look as expensive as a whole step, and the number of rows would never grow again.
    pub(super) fn new(max_step: Duration, first: usize, limits: RangeInclusive<usize>) -> Self {
        Self {
            max_step,
            seconds_per_row: None,
            first,
            limits,
        }
    }

    /// Returns the number of prompt rows for the next step.
    pub(super) fn rows(&self) -> usize {
        let Some(seconds) = self.seconds_per_row else {
            return self.first;
        };
        let per_row = Duration::from_secs_f64(seconds).max(Duration::from_nanos(1));
        let rows = self.max_step.as_nanos() / per_row.as_nanos();
        let rows = usize::try_from(rows).unwrap_or(usize::MAX);
        rows.clamp(*self.limits.start(), *self.limits.end())
    }

    /// Records that a step with this number of rows took this long. All its rows count, so that a step that also
    /// generates tokens does not make prompt rows look more expensive.
    pub(super) fn record(&mut self, rows: usize, elapsed: Duration) {
        let Some(rows) = u32::try_from(rows).ok().filter(|rows| *rows > 0) else {
            return;
        };
        let now = elapsed.as_secs_f64() / f64::from(rows);
        let before = self.seconds_per_row.unwrap_or(now);
        self.seconds_per_row = Some(before + (now - before) * NEW_SHARE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_gets_as_many_rows_as_its_time_allows() {
        let mut budget = StepBudget::new(Duration::from_millis(500), 64, 8..=512);
        assert_eq!(budget.rows(), 64);
        budget.record(100, Duration::from_millis(400));
        assert_eq!(budget.rows(), 125);
        // Rows become slower as the context grows.
        budget.record(100, Duration::from_millis(600));
        assert_eq!(budget.rows(), 100);
    }

    #[test]
    fn the_number_of_rows_has_limits() {
        let mut budget = StepBudget::new(Duration::from_millis(100), 64, 8..=512);
        budget.record(10, Duration::from_nanos(10));
        assert_eq!(budget.rows(), 512);
        budget.record(1, Duration::from_secs(100));
        assert_eq!(budget.rows(), 8);
        budget.record(0, Duration::from_secs(1));
        assert_eq!(budget.rows(), 8);
    }

    #[test]
    fn the_number_of_rows_recovers_from_one_slow_step() {
        let mut budget = StepBudget::new(Duration::from_millis(700), 64, 8..=512);
        budget.record(10, Duration::from_secs(30));
        assert_eq!(budget.rows(), 8);
        // Each step takes 400 ms, and 1 ms more for each row.
        for _ in 0..100 {
            let rows = budget.rows();
            let milliseconds = 400 + u64::try_from(rows).unwrap();
            budget.record(rows, Duration::from_millis(milliseconds));
        }
        assert!((280..=300).contains(&budget.rows()), "{}", budget.rows());
    }
}
