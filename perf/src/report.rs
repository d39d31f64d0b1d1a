//! Parts that the reports of `overhead`, `model`, `soak` and `compare` share: the HTML page, its charts, the tables and
//! the JSON file.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use serde::Serialize;
use serde_json::Value;

mod charts;
mod machine;
mod page;
mod table;

pub(crate) use charts::{Axis, Bar, COLORS, Curve, Panel, QUANTILES, quantiles};
pub(crate) use machine::Machine;
pub(crate) use table::{format_cell, format_head, format_number, format_row, format_spread};

/// Files to which a report is written.
#[derive(Args)]
pub(crate) struct ReportFiles {
    /// Write all measurements to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a self-contained HTML page with charts to this file
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl ReportFiles {
    /// Writes the files that the flags name. `page` returns the values for the HTML template.
    pub(crate) fn write(
        &self,
        measurements: &impl Serialize,
        template: &str,
        values: impl FnOnce() -> Value,
    ) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            let json = serde_json::to_string(measurements)? + "\n";
            write_file("--json", path, &json)?;
        }
        if let Some(path) = &self.html {
            write_file("--html", path, &page::render(template, &values())?)?;
        }
        Ok(())
    }
}

/// Writes the file that a flag names. The error names the flag.
pub(crate) fn write_file(flag: &str, path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("{flag} {}", path.display()))
}
