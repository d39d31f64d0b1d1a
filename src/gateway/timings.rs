//! Merges the latencies of the prompts of one request.

use crate::proto::v1;

/// Merges the timings of another prompt of the same request. The queue time and the first-token time are the minimum,
/// the total is the maximum, and resumptions are added up. The frontend and socket stages stay empty, because the gateway measures them itself.
pub(super) fn merge(timings: Option<v1::Timings>, other: v1::Timings) -> v1::Timings {
    let Some(timings) = timings else { return other };
    v1::Timings {
        queue_ns: timings.queue_ns.min(other.queue_ns),
        first_token_ns: timings.first_token_ns.min(other.first_token_ns),
        total_ns: timings.total_ns.max(other.total_ns),
        engine: merge_stages(timings.engine, other.engine),
        frontend: None,
        socket: None,
        resumptions: timings.resumptions.saturating_add(other.resumptions),
        resumption_method: match other.resumptions {
            0 => timings.resumption_method,
            _ => other.resumption_method,
        },
    }
}

/// Merges a stage: the mean is weighted by the number of tokens, and the longest time is the maximum.
fn merge_stages(
    one: Option<v1::StageTiming>,
    other: Option<v1::StageTiming>,
) -> Option<v1::StageTiming> {
    let (Some(one), Some(other)) = (one, other) else {
        return one.or(other);
    };
    let tokens = one.tokens.saturating_add(other.tokens);
    let sum = |stage: v1::StageTiming| u128::from(stage.mean_ns) * u128::from(stage.tokens);
    let mean = sum(one).saturating_add(sum(other)) / u128::from(tokens.max(1));
    Some(v1::StageTiming {
        tokens,
        mean_ns: u64::try_from(mean).unwrap_or(u64::MAX),
        longest_ns: one.longest_ns.max(other.longest_ns),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_largest_timings_of_an_engine_can_be_merged() {
        let largest = v1::Timings {
            engine: Some(v1::StageTiming {
                tokens: u64::MAX,
                mean_ns: u64::MAX,
                longest_ns: u64::MAX,
            }),
            ..v1::Timings::default()
        };
        assert_eq!(merge(Some(largest), largest), largest);
    }

    #[test]
    fn merged_timings_start_with_the_first_prompt_and_end_with_the_last() {
        let timings = |queue_ns, first_token_ns, total_ns, (tokens, mean_ns, longest_ns)| {
            let engine = v1::StageTiming {
                tokens,
                mean_ns,
                longest_ns,
            };
            v1::Timings {
                queue_ns,
                first_token_ns,
                total_ns,
                engine: Some(engine),
                ..v1::Timings::default()
            }
        };
        let one = timings(5, 10, 20, (3, 10, 12));
        let both = merge(Some(merge(None, one)), timings(2, 12, 15, (1, 50, 50)));
        assert_eq!(both, timings(2, 10, 20, (4, 20, 50)));
    }
}
