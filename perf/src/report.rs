//! Reports of `overhead`, `soak` and `compare`: the page, its charts, the tables and the JSON file. It
//! does not know which of them it reports.

mod charts;
mod json;
mod machine;
mod page;
mod table;

pub(crate) use charts::{Axis, Bar, Chart, ChartError, Curve, QUANTILES, quantiles};
pub(crate) use json::{Histograms, write_json};
pub(crate) use machine::Machine;
pub(crate) use page::Page;
pub(crate) use table::{cell, head, number, row};
