//! Shows the progress of a download: a bar on a terminal, otherwise log lines.

use std::sync::{Mutex, PoisonError};

use indicatif::{DecimalBytes, ProgressBar, ProgressStyle};

use crate::hub::DownloadProgress;
use crate::output::Output;
use crate::server::run::progress::draw_target;

/// Progress between two log lines about a download, in per cent.
const LOG_STEP_PERCENT: u64 = 10;

const TEMPLATE: &str = "download {bar:30} {decimal_bytes}/{decimal_total_bytes} \
                        {decimal_bytes_per_sec} {eta} {wide_msg}";

/// Progress of the download of one model.
pub(super) struct Display {
    bar: ProgressBar,
    last_line: Mutex<LogLine>,
}

/// The last log line about a download.
#[derive(Default)]
struct LogLine {
    file: String,
    percent: u64,
}

impl Display {
    pub(super) fn new(err: &Output) -> Self {
        let bar = ProgressBar::new(0);
        bar.set_draw_target(draw_target(err));
        let style = ProgressStyle::with_template(TEMPLATE);
        bar.set_style(style.expect("the progress bar's template is valid"));
        Self {
            bar,
            last_line: Mutex::default(),
        }
    }

    pub(super) fn show(&self, progress: DownloadProgress<'_>) {
        let DownloadProgress {
            file,
            received,
            size,
        } = progress;
        let mut last = self
            .last_line
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let is_new_file = last.file != file;
        if is_new_file {
            file.clone_into(&mut last.file);
            self.bar.set_length(size);
            self.bar.set_message(file.to_owned());
            self.bar.set_position(received);
            // The bytes of an earlier download must not count for the speed and the remaining time.
            self.bar.reset_eta();
        }
        self.bar.set_position(received);
        if !self.bar.is_hidden() {
            return;
        }
        let percent = received.saturating_mul(100) / size.max(1);
        if is_new_file {
            let (size, received) = (DecimalBytes(size), DecimalBytes(received));
            tracing::info!(file, %size, %received, "downloading");
            last.percent = percent;
        } else if percent >= last.percent + LOG_STEP_PERCENT {
            tracing::info!(file, percent, "downloading");
            last.percent = percent - percent % LOG_STEP_PERCENT;
        }
    }

    pub(super) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
