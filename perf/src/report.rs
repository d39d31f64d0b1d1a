//! Reports of `overhead`, `soak` and `compare`: the page, its charts, the tables and the JSON file. It
//! does not know which of them it reports.

mod charts;
mod machine;
mod page;
mod table;

pub(crate) use charts::{Axis, Bar, Chart, ChartError, Curve, QUANTILES, quantiles};
pub(crate) use machine::Machine;
pub(crate) use page::{Page, write_json};
pub(crate) use table::{cell, head, number, row};
