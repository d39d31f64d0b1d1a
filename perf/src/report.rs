//! Reports of `overhead`, `soak` and `compare`: the page, its charts, the tables and the JSON file. It
//! does not know which of them it reports.

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

pub(crate) use charts::{Axis, Bar, COLORS, Curve, QUANTILES, quantiles};
pub(crate) use machine::Machine;
pub(crate) use table::{cell, head, number, row};

/// Files of a report.
#[derive(Args)]
pub(crate) struct Files {
    /// Write all measurements to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a page with charts to this file, as HTML in one piece
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

impl Files {
    /// Writes the files that were asked for. The page is a template, and the values in it.
    pub(crate) fn write(
        &self,
        measurements: &impl Serialize,
        template: &str,
        values: impl FnOnce() -> Value,
    ) -> anyhow::Result<()> {
        if let Some(path) = &self.json {
            let json = serde_json::to_string(measurements)? + "\n";
            write("--json", path, &json)?;
        }
        if let Some(path) = &self.html {
            write("--html", path, &page::render(template, &values())?)?;
        }
        Ok(())
    }
}

/// Writes the file of a flag.
pub(crate) fn write(flag: &str, path: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(path, text).with_context(|| format!("{flag} {}", path.display()))
}
