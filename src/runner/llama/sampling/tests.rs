//! Tests with distributions whose result is known.

use super::*;

/// Computes logits that give these probabilities.
fn logits(probabilities: &[f32]) -> Vec<f32> {
    probabilities.iter().map(|p| p.ln()).collect()
}

fn temperature_one() -> Sampling {
    Sampling::default()
}

fn greedy() -> Sampling {
    Sampling {
        temperature: 0.0,
        ..temperature_one()
    }
}

fn choose(logits: &[f32], sampling: &Sampling, history: &PenaltyHistory) -> TokenId {
    let draw = DrawKey {
        seed: 0,
        choice: 0,
        position: 0,
    };
    let chosen =
        Sampler::default().sample(logits, sampling, history, LogitAdjustments::default(), draw);
    chosen.expect("the logits are valid")
}

/// Samples at 20,000 positions. Returns how often each token was sampled, as a fraction.
fn frequencies(logits: &[f32], sampling: &Sampling) -> Vec<f64> {
    let history = PenaltyHistory::new(sampling, &[], &[]);
    let mut sampler = Sampler::default();
    let mut counts = vec![0_u32; logits.len()];
    for position in 0..20_000 {
        let draw = DrawKey {
            seed: 42,
            choice: 0,
            position,
        };
        let id = sampler
            .sample(
                logits,
                sampling,
                &history,
                LogitAdjustments::default(),
                draw,
            )
            .unwrap();
        counts[usize::try_from(id).unwrap()] += 1;
    }
    let fraction = |count: u32| f64::from(count) / 20_000.0;
    counts.into_iter().map(fraction).collect()
}

/// Allows an error of 0.018, which is five standard deviations of a fraction estimated from 20,000 draws.
fn assert_near(frequencies: &[f64], expected: &[f64]) {
    assert_eq!(frequencies.len(), expected.len());
    for (frequency, expected) in frequencies.iter().zip(expected) {
        if *expected == 0.0 {
            assert_eq!(*frequency, 0.0, "{frequencies:?}");
        }
        assert!((frequency - expected).abs() < 0.018, "{frequencies:?}");
    }
}

const FOUR: [f32; 4] = [0.1, 0.5, 0.25, 0.15];

#[test]
fn greedy_takes_the_largest_logit_and_breaks_ties_by_id() {
    let none = PenaltyHistory::new(&greedy(), &[], &[]);
    assert_eq!(choose(&[0.0, 3.0, -1.0, 3.0], &greedy(), &none), 1);
    assert_eq!(choose(&[f32::NEG_INFINITY, -7.0], &greedy(), &none), 1);
}

#[test]
fn greedy_finds_the_largest_logit_at_any_position_of_a_large_vocabulary() {
    let greedy = greedy();
    let history = PenaltyHistory::new(&greedy, &[], &[]);
    for position in 0..100_u8 {
        let mut logits = vec![-2.0; 100];
        // A later equal logit loses the tie.
        for at in position..100 {
            logits[usize::from(at)] = -1.0;
        }
        assert_eq!(choose(&logits, &greedy, &history), u32::from(position));
    }
}

#[test]
fn draws_follow_the_distribution() {
    assert_near(
        &frequencies(&logits(&FOUR), &temperature_one()),
        &[0.1, 0.5, 0.25, 0.15],
    );
}

#[test]
fn temperature_flattens_the_distribution() {
    let warm = Sampling {
        temperature: 2.0,
        ..temperature_one()
    };
    let roots: Vec<f64> = FOUR.iter().map(|p| f64::from(*p).sqrt()).collect();
    let sum: f64 = roots.iter().sum();
    let expected: Vec<f64> = roots.iter().map(|root| root / sum).collect();
    assert_near(&frequencies(&logits(&FOUR), &warm), &expected);
}

#[test]
fn top_k_keeps_the_most_likely_tokens() {
    let two = Sampling {
        top_k: 2,
        ..temperature_one()
    };
    let expected = [0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0];
    assert_near(&frequencies(&logits(&FOUR), &two), &expected);
    let equals = Sampling {
        top_k: 1,
        ..temperature_one()
    };
    assert_near(&frequencies(&[1.0, 1.0, 0.0], &equals), &[1.0, 0.0, 0.0]);
    let more_than_there_are = Sampling {
        top_k: 9,
        ..temperature_one()
    };
    let expected = [0.1, 0.5, 0.25, 0.15];
    assert_near(
        &frequencies(&logits(&FOUR), &more_than_there_are),
        &expected,
    );
}

#[test]
fn top_p_keeps_the_smallest_set_that_reaches_it() {
    let nucleus = |top_p| Sampling {
        top_p,
        ..temperature_one()
    };
    let two_thirds = [0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0];
    assert_near(&frequencies(&logits(&FOUR), &nucleus(0.7)), &two_thirds);
    let one = [0.0, 1.0, 0.0, 0.0];
    assert_near(&frequencies(&logits(&FOUR), &nucleus(0.49)), &one);
    assert_near(&frequencies(&logits(&FOUR), &nucleus(0.000_01)), &one);
    let three = [0.0, 0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9];
    assert_near(&frequencies(&logits(&FOUR), &nucleus(0.89)), &three);
}

#[test]
fn top_p_applies_after_top_k() {
    let both = Sampling {
        top_k: 2,
        top_p: 0.6,
        ..temperature_one()
    };
    assert_near(&frequencies(&logits(&FOUR), &both), &[0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn min_p_is_relative_to_the_most_likely_token() {
    let half = Sampling {
        min_p: 0.4,
        ..temperature_one()
    };
    let expected = [0.0, 2.0 / 3.0, 1.0 / 3.0, 0.0];
    assert_near(&frequencies(&logits(&FOUR), &half), &expected);
    let all = Sampling {
        min_p: 1.0,
        ..temperature_one()
    };
    assert_near(&frequencies(&logits(&FOUR), &all), &[0.0, 1.0, 0.0, 0.0]);
}

#[test]
fn the_repetition_penalty_applies_once_per_token_of_prompt_and_completion() {
    let sampling = Sampling {
        repetition_penalty: 2.0,
        ..greedy()
    };
    let row = [3.0, 2.0, -1.0];
    let of = |prompt: &[TokenId], completion: &[TokenId]| {
        choose(
            &row,
            &sampling,
            &PenaltyHistory::new(&sampling, prompt, completion),
        )
    };
    assert_eq!(of(&[], &[]), 0);
    assert_eq!(of(&[0, 0], &[]), 1, "1.5 is below 2");
    assert_eq!(of(&[], &[0, 0]), 1);
    assert_eq!(of(&[0], &[1]), 0, "1.5 is above 1");
    let negative = [-1.5, -1.0];
    let history = PenaltyHistory::new(&sampling, &[1], &[]);
    assert_eq!(
        choose(&negative, &sampling, &history),
        0,
        "-2 is below -1.5"
    );
}

#[test]
fn presence_and_frequency_penalties_ignore_the_prompt() {
    let presence = Sampling {
        presence_penalty: 1.5,
        ..greedy()
    };
    let frequency = Sampling {
        frequency_penalty: 0.6,
        ..greedy()
    };
    let row = [3.0, 2.0];
    let of = |sampling: &Sampling, completion: &[TokenId]| {
        let history = PenaltyHistory::new(sampling, &[0, 0, 0], completion);
        choose(&row, sampling, &history)
    };
    assert_eq!(of(&presence, &[]), 0);
    assert_eq!(of(&presence, &[0]), 1);
    assert_eq!(of(&presence, &[1, 1, 1]), 0);
    assert_eq!(of(&frequency, &[0]), 0, "2.4 is above 2");
    assert_eq!(of(&frequency, &[0, 0]), 1, "1.8 is below 2");
}

#[test]
fn a_history_grows_with_the_completion() {
    let sampling = Sampling {
        presence_penalty: 2.0,
        ..greedy()
    };
    let mut history = PenaltyHistory::new(&sampling, &[], &[]);
    assert_eq!(choose(&[3.0, 2.0], &sampling, &history), 0);
    history.push(0);
    assert_eq!(choose(&[3.0, 2.0], &sampling, &history), 1);
}

#[test]
fn a_penalty_near_zero_does_not_make_the_logits_invalid() {
    let sampling = Sampling {
        repetition_penalty: f32::MIN_POSITIVE,
        ..temperature_one()
    };
    let history = PenaltyHistory::new(&sampling, &[1], &[]);
    assert_eq!(choose(&[9.0, 8.0], &sampling, &history), 1);
}

#[test]
fn invalid_logits_are_an_error() {
    let rows: [&[f32]; 5] = [
        &[1.0, f32::NAN],
        &[f32::NAN, 1.0],
        &[1.0, f32::INFINITY],
        &[f32::NEG_INFINITY; 2],
        &[],
    ];
    for row in rows {
        for sampling in [greedy(), temperature_one()] {
            let history = PenaltyHistory::new(&sampling, &[], &[]);
            let draw = DrawKey {
                seed: 1,
                choice: 0,
                position: 0,
            };
            let chosen = Sampler::default().sample(
                row,
                &sampling,
                &history,
                LogitAdjustments::default(),
                draw,
            );
            assert_eq!(chosen, Err(InvalidLogits), "{row:?}");
        }
    }
}

#[test]
fn bias_is_added_before_penalties_and_banned_tokens_are_never_sampled() {
    let penalized = Sampling {
        repetition_penalty: 2.0,
        ..greedy()
    };
    let chosen = |logits: &[f32], adjustments| {
        let draw = DrawKey {
            seed: 0,
            choice: 0,
            position: 0,
        };
        // Token 1 is in the prompt, so its logit is halved.
        let history = PenaltyHistory::new(&penalized, &[1], &[]);
        let chosen = Sampler::default().sample(logits, &penalized, &history, adjustments, draw);
        chosen.expect("the logits are valid")
    };
    let biased = |bias| LogitAdjustments {
        bias,
        ..LogitAdjustments::default()
    };
    assert_eq!(chosen(&[3.0, 4.0], LogitAdjustments::default()), 0);
    assert_eq!(chosen(&[3.0, 4.0], biased(&[(1, 1.5)])), 0);
    assert_eq!(chosen(&[3.0, 4.0], biased(&[(1, 2.5)])), 1);
    let banned = LogitAdjustments {
        bias: &[(1, 100.0)],
        banned: &[1],
    };
    assert_eq!(chosen(&[-9.0, 4.0, -8.0], banned), 2);
}

#[test]
fn a_draw_depends_on_each_part_of_its_key() {
    let draw = |seed, choice, position| {
        let draw = DrawKey {
            seed,
            choice,
            position,
        };
        draw.uniform()
    };
    let base = draw(7, 1, 3);
    assert_eq!(base, draw(7, 1, 3));
    for other in [draw(8, 1, 3), draw(7, 2, 3), draw(7, 1, 4), draw(7, 3, 1)] {
        assert_ne!(base, other);
    }
    // A seed must produce the same tokens in every release.
    assert_eq!(base, 0.621_529_640_770_632_6);
}
