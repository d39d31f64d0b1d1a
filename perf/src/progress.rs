//! The progress bar of a run. It is drawn on standard error, and only if standard error is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Creates a progress bar of `length` steps with the layout of an indicatif template.
pub(crate) fn create_bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    // The default target is standard error. Nothing is drawn if standard error is not a terminal.
    ProgressBar::new(length).with_style(style)
}
