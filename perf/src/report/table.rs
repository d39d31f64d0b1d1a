//! Formats the rows of a text table: a name, and numbers in columns.

use std::fmt::Display;

use crate::statistics::Spread;

/// Width of the column of names, and of each other column, in characters.
const NAME_WIDTH: usize = 30;
const COLUMN_WIDTH: usize = 15;

pub(crate) fn format_row(name: &str, cells: &[String]) -> String {
    format!("  {name:<NAME_WIDTH$}{}", cells.concat())
}

pub(crate) fn format_head(name: &str, columns: &[&str]) -> String {
    let columns: Vec<_> = columns.iter().map(format_cell).collect();
    format_row(name, &columns)
}

/// Formats a text, or a number without decimals, as a cell.
pub(crate) fn format_cell(value: impl Display) -> String {
    format!("{value:>COLUMN_WIDTH$}")
}

/// Formats a number with decimals as a cell. An unknown number is a dash.
pub(crate) fn format_number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(
        || format_cell("–"),
        |value| format!("{value:>COLUMN_WIDTH$.decimals$}"),
    )
}

/// Formats the median, and the range if the rounds differ. An unknown value is a dash.
pub(crate) fn format_spread(spread: Option<Spread>, decimals: usize) -> String {
    let Some(Spread {
        median,
        lowest,
        highest,
    }) = spread
    else {
        return "–".to_owned();
    };
    if lowest < highest {
        format!("{median:.decimals$} ({lowest:.decimals$} to {highest:.decimals$})")
    } else {
        format!("{median:.decimals$}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_has_a_range_only_if_the_rounds_differ() {
        let text = |values: &[f64]| format_spread(Spread::from_values(values.to_vec()), 1);
        assert_eq!(text(&[1.0, 2.0, 4.0]), "2.0 (1.0 to 4.0)");
        assert_eq!(text(&[2.0]), "2.0");
        assert_eq!(text(&[]), "–");
    }
}
