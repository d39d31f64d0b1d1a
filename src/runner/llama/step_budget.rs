//! The number of prompt rows in one step, chosen so that the step takes at most about `--max-step-ms`. This module must
//! not know the device.

use std::time::Duration;

/// Weight of the newest measurement in the estimated cost of a row, from 0 to 1.
const NEW_SHARE: f64 = 0.5;

/// Estimates the cost of a row from the steps so far, and limits the rows of the next step accordingly.
pub(super) struct StepBudget {
    max_step: Duration,
    /// Estimated seconds per row. `None` before the first step.
    seconds_per_row: Option<f64>,
    /// Number of rows in the first step, and the maximum of all steps.
    first: usize,
    max: usize,
}

impl StepBudget {
    /// Creates a budget for steps that take about `max_step`. The first step has `first` rows. No step has more than
    /// `max`.
    pub(super) fn new(max_step: Duration, first: usize, max: usize) -> Self {
        Self {
            max_step,
            seconds_per_row: None,
            first,
            max,
        }
    }

    /// Returns the number of prompt rows for the next step, at least 1.
    pub(super) fn rows(&self) -> usize {
        let Some(seconds) = self.seconds_per_row else {
            return self.first;
        };
        let per_row = Duration::from_secs_f64(seconds).max(Duration::from_nanos(1));
        let rows = self.max_step.as_nanos() / per_row.as_nanos();
        usize::try_from(rows).map_or(self.max, |rows| rows.clamp(1, self.max))
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
        let mut budget = StepBudget::new(Duration::from_millis(500), 64, 512);
        assert_eq!(budget.rows(), 64);
        budget.record(100, Duration::from_millis(400));
        assert_eq!(budget.rows(), 125);
        // Rows become slower as the context grows.
        budget.record(100, Duration::from_millis(600));
        assert_eq!(budget.rows(), 100);
    }

    #[test]
    fn the_number_of_rows_has_limits() {
        let mut budget = StepBudget::new(Duration::from_millis(100), 64, 512);
        budget.record(10, Duration::from_nanos(10));
        assert_eq!(budget.rows(), 512);
        budget.record(1, Duration::from_secs(100));
        assert_eq!(budget.rows(), 1);
        budget.record(0, Duration::from_secs(1));
        assert_eq!(budget.rows(), 1);
    }
}
