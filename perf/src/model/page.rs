//! The chart of a run, and the values that its HTML template shows.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use super::measurement::Figure;
use super::report::Report;
use super::results::Results;
use super::scenario::Scenario;
use super::servers::ServerKind;
use super::{table, targets};
use crate::report::{Bar, COLORS, Panel};

pub(super) fn page_values(report: &Report) -> Value {
    let scenarios = report.results.scenarios();
    let figures: BTreeSet<_> = scenarios.flat_map(Scenario::figures).collect();
    let definitions = figures
        .into_iter()
        .map(|figure| json!({ "name": figure.name(), "text": figure.definition() }));
    json!({
        "machine": report.machine,
        "settings": report.settings.describe(),
        "targets": report.targets,
        "picture": draw_picture(&report.results),
        "text": table::render_tables(&report.results),
        "notes": report.notes,
        "faults": report.faults,
        "definitions": definitions.collect::<Vec<_>>(),
    })
}

/// Draws a panel for each figure that has a target, with a bar for each server.
pub(super) fn draw_picture(results: &Results) -> String {
    let figures: Vec<_> = targets::figures()
        .map(|(scenario, figure)| {
            (
                scenario,
                figure,
                format!("{}: {}", scenario.title(), figure.name()),
            )
        })
        .collect();
    let panels = figures.iter().map(|(scenario, figure, title)| Panel {
        title,
        unit: if figure.is_rate() {
            "tokens/s (more is better)"
        } else {
            "ms (less is better)"
        },
        bars: bars(results, *scenario, *figure),
    });
    let measured = panels.filter(|panel| !panel.bars.is_empty());
    Panel::draw_svg(&measured.collect::<Vec<_>>())
}

fn bars(results: &Results, scenario: Scenario, figure: Figure) -> Vec<Bar<'static>> {
    let bars = results.of_scenario(scenario).filter_map(|cell| {
        Some(Bar {
            title: cell.server.title(),
            color: COLORS[match cell.server {
                ServerKind::Tokenway => 0,
                ServerKind::LlamaCpp => 1,
                ServerKind::Vllm => 2,
            }],
            spread: cell.spread(figure)?,
        })
    });
    // The chart draws the first bar at the bottom. The first server should be at the top.
    let mut bars: Vec<_> = bars.collect();
    bars.reverse();
    bars
}
