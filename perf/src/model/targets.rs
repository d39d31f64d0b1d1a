//! The targets of a run: limits on figures of Tokenway relative to llama.cpp's server or to other figures of Tokenway,
//! and a verdict on each.

use super::measurement::Figure;
use super::results::Results;
use super::scenario::Scenario;
use super::servers::ServerKind;
use crate::target::{Bound, TargetResult};

/// Maximum ratio of Tokenway's time to that of llama.cpp's server where Tokenway must be as fast. It leaves a tenth for
/// noise.
const MAX_RATIO_IF_EQUAL: f64 = 1.1;

/// Definition of a target: the ratio of a figure of Tokenway to another figure of the same scenario, and its limit.
struct TargetSpec {
    name: &'static str,
    scenario: Scenario,
    figure: Figure,
    reference: Reference,
    limit: f64,
}

/// The figure in the denominator of a target's ratio.
#[derive(Clone, Copy)]
enum Reference {
    /// The same figure of llama.cpp's server.
    LlamaCpp,
    /// Another figure of Tokenway.
    Own(Figure),
}

fn target_specs() -> Vec<TargetSpec> {
    use Figure::{DecodeRate, FirstTurnTtft, HotTurnTtft, LaterTurnsTtft};
    use Figure::{PromptRate, PromptTtft, RunningGapP99, SecondTurnTtft};
    use Reference::{LlamaCpp, Own};
    use Scenario::{Conversations, DecodeEight, DecodeOne, GrowingChat};
    use Scenario::{LongPrompt, PromptAmongStreams};
    let spec = |name, (scenario, figure), reference, limit| TargetSpec {
        name,
        scenario,
        figure,
        reference,
        limit,
    };
    let among = |figure| (PromptAmongStreams, figure);
    vec![
        spec(
            "decoding, 1 stream: tokens/s",
            (DecodeOne, DecodeRate),
            LlamaCpp,
            1.0,
        ),
        spec(
            "decoding, 8 streams: tokens/s",
            (DecodeEight, DecodeRate),
            LlamaCpp,
            1.0,
        ),
        spec(
            "long prompt: tokens/s until the first token",
            (LongPrompt, PromptRate),
            LlamaCpp,
            0.95,
        ),
        spec(
            "growing chat: TTFT of turns 2 to 6",
            (GrowingChat, LaterTurnsTtft),
            LlamaCpp,
            MAX_RATIO_IF_EQUAL,
        ),
        spec(
            "32 conversations: TTFT of turn 2",
            (Conversations, SecondTurnTtft),
            Own(HotTurnTtft),
            2.0,
        ),
        // Without this target, a server that reuses nothing would reach the one above.
        spec(
            "32 conversations: TTFT of a hot turn",
            (Conversations, HotTurnTtft),
            Own(FirstTurnTtft),
            0.5,
        ),
        spec(
            "prompt among 7 streams: inter-token latency p99",
            among(RunningGapP99),
            LlamaCpp,
            0.15,
        ),
        spec(
            "prompt among 7 streams: TTFT of the prompt",
            among(PromptTtft),
            LlamaCpp,
            MAX_RATIO_IF_EQUAL,
        ),
    ]
}

/// Returns the figures that have a target.
pub(super) fn figures() -> impl Iterator<Item = (Scenario, Figure)> {
    let specs = target_specs().into_iter();
    specs.map(|spec| (spec.scenario, spec.figure))
}

/// Judges the targets whose figures were measured.
pub(super) fn judge_targets(results: &Results) -> Vec<TargetResult> {
    let judged = target_specs().into_iter().filter_map(|spec| {
        let (other, beside) = match spec.reference {
            Reference::LlamaCpp => ((ServerKind::LlamaCpp, spec.figure), "llama.cpp's"),
            Reference::Own(figure) => ((ServerKind::Tokenway, figure), figure.name()),
        };
        let own = (ServerKind::Tokenway, spec.figure);
        let ratio = results.ratio(spec.scenario, own, other)?;
        let bound = if spec.figure.is_rate() {
            Bound::AtLeast
        } else {
            Bound::AtMost
        };
        let name = format!("{}, relative to {beside}", spec.name);
        Some(TargetResult::new(name, ratio, bound, spec.limit, "×"))
    });
    judged.collect()
}

#[cfg(test)]
mod tests {
    use super::super::measurement::{Counts, Measurement};
    use super::*;

    fn add<const N: usize>(
        results: &mut Results,
        server: ServerKind,
        scenario: Scenario,
        figures: [(Figure, f64); N],
    ) {
        let measurement = Measurement::new(figures, Counts::default());
        results.add(scenario, server, Some(measurement));
    }

    /// Returns the value of each judged target, and true if the target is reached.
    fn judge(results: &Results) -> Vec<(f64, bool)> {
        let targets = judge_targets(results).into_iter();
        targets.map(|target| (target.value, target.pass)).collect()
    }

    #[test]
    fn a_rate_has_a_minimum_and_a_time_has_a_maximum() {
        let mut results = Results::default();
        let of = |rate, p99| {
            [
                (Figure::DecodeRate, rate),
                (Figure::RunningGapP99, p99),
                (Figure::PromptTtft, 5.0),
            ]
        };
        for scenario in [Scenario::DecodeOne, Scenario::PromptAmongStreams] {
            add(
                &mut results,
                ServerKind::LlamaCpp,
                scenario,
                of(100.0, 1_000.0),
            );
            add(
                &mut results,
                ServerKind::Tokenway,
                scenario,
                of(99.0, 150.0),
            );
        }
        assert_eq!(judge(&results), [(0.99, false), (0.15, true), (1.0, true)]);
    }

    #[test]
    fn turns_that_reuse_nothing_miss_a_target_although_all_are_alike() {
        let mut results = Results::default();
        let figures = |second, hot| {
            [
                (Figure::FirstTurnTtft, 1_000.0),
                (Figure::SecondTurnTtft, second),
                (Figure::HotTurnTtft, hot),
            ]
        };
        add(
            &mut results,
            ServerKind::Tokenway,
            Scenario::Conversations,
            figures(1_200.0, 1_500.0),
        );
        assert_eq!(judge(&results), [(0.8, true), (1.5, false)]);
        let mut results = Results::default();
        add(
            &mut results,
            ServerKind::Tokenway,
            Scenario::Conversations,
            figures(300.0, 200.0),
        );
        assert_eq!(judge(&results), [(1.5, true), (0.2, true)]);
    }

    #[test]
    fn a_figure_without_its_reference_is_not_judged() {
        let mut results = Results::default();
        add(
            &mut results,
            ServerKind::Tokenway,
            Scenario::DecodeOne,
            [(Figure::DecodeRate, 9.0)],
        );
        assert_eq!(judge(&results), []);
    }
}
