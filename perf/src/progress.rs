//! The progress bar of a run. It draws on standard error, and only if that is a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Creates a bar of `length` steps, laid out by an indicatif template.
pub(crate) fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template).expect("the template is valid");
    // Its default target is standard error, and is hidden if that is no terminal.
    ProgressBar::new(length).with_style(style)
}
