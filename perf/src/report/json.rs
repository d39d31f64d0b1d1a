//! A run as a JSON file, so that others can judge it again.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::figures::Times;

/// Number of occurrences of each time, in nanoseconds.
#[derive(Serialize)]
pub(crate) struct Histograms {
    one_way: Vec<(u64, u64)>,
    schedule_lateness: Vec<(u64, u64)>,
    runner_lateness: Vec<(u64, u64)>,
    sender_lateness: Vec<(u64, u64)>,
    ttft: Vec<(u64, u64)>,
    inter_token: Vec<(u64, u64)>,
    time_per_output_token: Vec<(u64, u64)>,
}

impl Histograms {
    pub(crate) fn of(times: &Times) -> Self {
        let pairs = |histogram: &Histogram<u64>| {
            let recorded = histogram.iter_recorded();
            recorded
                .map(|value| (value.value_iterated_to(), value.count_at_value()))
                .collect()
        };
        Self {
            one_way: pairs(&times.one_way),
            schedule_lateness: pairs(&times.lateness),
            runner_lateness: pairs(&times.runner),
            sender_lateness: pairs(&times.sender),
            ttft: pairs(&times.ttft),
            inter_token: pairs(&times.gaps),
            time_per_output_token: pairs(&times.tpot),
        }
    }
}

/// Writes an object to the file of `--json`.
pub(crate) fn write_json(path: &Path, object: &impl Serialize) -> io::Result<()> {
    let write = || {
        let mut file = BufWriter::new(File::create(path)?);
        serde_json::to_writer(&mut file, object)?;
        file.write_all(b"\n")?;
        file.flush()
    };
    write().map_err(|error: io::Error| super::page::with_flag("--json", path, &error))
}
