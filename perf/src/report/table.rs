//! Rows of a table on a terminal: a name, and numbers in columns.

use std::fmt::Display;

/// Width of the name's column, and of each other column.
const NAME: usize = 30;
const COLUMN: usize = 15;

/// A row with a name and cells.
pub(crate) fn row(name: &str, cells: &[String]) -> String {
    format!("  {name:<NAME$}{}", cells.concat())
}

/// A row with the names of columns.
pub(crate) fn head(name: &str, columns: &[&str]) -> String {
    let columns: Vec<_> = columns.iter().map(cell).collect();
    row(name, &columns)
}

/// A text, or a number without decimals, aligned in its column.
pub(crate) fn cell(value: impl Display) -> String {
    format!("{value:>COLUMN$}")
}

/// A number with decimals, or a dash if it is unknown.
pub(crate) fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| cell("–"), |value| format!("{value:>COLUMN$.decimals$}"))
}
