use super::*;
use crate::error::ErrorKind;
use crate::keys::{KeyBudgets, TokenNeed};
use crate::tokens::{TextToken, Timestamps, TokenBatch};

/// Charges of a completion whose prompt is expected to have 10 tokens, under a budget of 100 tokens.
fn charges(resumed: u64) -> (KeyBudgets, TokenCharges) {
    let budgets = KeyBudgets::for_test(100);
    let need = TokenNeed {
        prompt: 10 + resumed,
        completion: 50,
        is_open_ended: false,
    };
    let reservation = budgets.reserve(need).unwrap().unwrap();
    (budgets, TokenCharges::new(reservation, resumed))
}

fn started(prompt_tokens: u32, text_only: bool) -> Event {
    Event::Started(v1::Started {
        prompt_tokens,
        text_only,
        ..v1::Started::default()
    })
}

fn tokens(count: usize) -> Event {
    let mut tokens = TokenBatch::default();
    for _ in 0..count {
        tokens.push(TextToken {
            id: 1,
            text: "a",
            timestamps: Timestamps::default(),
            logprobs: None,
        });
    }
    Event::Tokens(v1::Tokens {
        tokens,
        ..v1::Tokens::default()
    })
}

fn summary(prompt_tokens: u32, completion_tokens: u32) -> Event {
    Event::Summary(v1::Summary {
        usage: Some(v1::Usage {
            prompt_tokens,
            completion_tokens,
            ..v1::Usage::default()
        }),
        timings: None,
    })
}

fn used(prompt: u64, completion: u64) -> TokenCount {
    TokenCount { prompt, completion }
}

#[test]
fn the_usage_that_an_engine_reports_counts() {
    let (budgets, mut charges) = charges(0);
    for mut event in [started(12, false), tokens(3), summary(12, 5)] {
        charges.charge(&mut event).unwrap();
    }
    assert_eq!(budgets.used(), used(12, 5));
    assert_eq!(budgets.reserved(), used(0, 0));
}

#[test]
fn resumed_tokens_count_like_the_prompt_and_not_again_as_completion() {
    let (budgets, mut charges) = charges(20);
    for mut event in [started(10, false), tokens(3), summary(10, 23)] {
        charges.charge(&mut event).unwrap();
    }
    assert_eq!(budgets.used(), used(30, 3));
}

#[test]
fn a_completion_that_is_dropped_before_its_usage_is_known_has_its_expected_prompt() {
    let (budgets, mut of_text) = charges(0);
    let chat = || Event::Chat(v1::ChatDelta::default());
    for mut event in [started(0, true), chat(), chat()] {
        of_text.charge(&mut event).unwrap();
    }
    drop(of_text);
    assert_eq!(budgets.used(), used(10, 2));
    let (budgets, never_started) = charges(0);
    drop(never_started);
    assert_eq!(budgets.used(), used(0, 0));
    assert_eq!(budgets.reserved(), used(0, 0));
}

#[test]
fn the_tokens_beyond_the_budget_are_cut_and_the_error_follows() {
    let (budgets, mut charges) = charges(0);
    charges.charge(&mut started(60, false)).unwrap();
    let mut last = tokens(45);
    charges.charge(&mut last).unwrap();
    let Event::Tokens(last) = last else {
        panic!("the event has another type")
    };
    assert_eq!(last.tokens.len(), 40);
    let error = charges.take_error().expect("the budget is used up");
    assert_eq!(error.kind, ErrorKind::BudgetExhausted);
    assert_eq!(budgets.used(), used(60, 40));
    assert!(charges.take_error().is_none(), "an error is returned once");
}
