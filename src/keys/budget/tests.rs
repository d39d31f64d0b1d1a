//! Tests of token budgets.

use jiff::civil::date;

use super::*;

fn budget(limit: u64, unit: BudgetUnit, period: BudgetPeriod) -> Budget {
    let limit = NonZeroU64::new(limit).unwrap();
    Budget {
        limit,
        unit,
        period,
    }
}

fn budgets(budgets: &[Budget]) -> KeyBudgets {
    KeyBudgets {
        budgets: budgets.into(),
        usage: Arc::default(),
    }
}

fn in_total(limit: u64) -> KeyBudgets {
    budgets(&[budget(limit, BudgetUnit::Tokens, BudgetPeriod::Total)])
}

fn need(prompt: u64, completion: u64) -> TokenNeed {
    TokenNeed {
        prompt,
        completion,
        is_open_ended: false,
    }
}

fn reserve(budgets: &KeyBudgets, need: TokenNeed) -> Result<Reservation, Error> {
    Reservation::new(budgets.clone(), need, today())
}

fn total(budgets: &KeyBudgets) -> TokenCount {
    let record = budgets.usage.record(today());
    record.map(|it| it.total).unwrap_or_default()
}

#[test]
fn a_completion_gets_what_is_left_and_not_one_token_more() {
    let budgets = in_total(100);
    let mut first = reserve(&budgets, need(10, 50)).unwrap();
    let mut second = reserve(&budgets, need(10, 50)).unwrap();
    first.charge_prompt(10);
    second.charge_prompt(10);
    for _ in 0..50 {
        assert_eq!(first.charge_completion(1), 1);
        first.check_left().unwrap();
    }
    assert_eq!(second.charge_completion(29), 29);
    second.check_left().unwrap();
    assert_eq!(second.charge_completion(4), 1);
    let error = second.check_left().unwrap_err();
    assert_eq!(error.kind, ErrorKind::BudgetExhausted);
    let expected = "The API key's budget of 100 tokens in total is used up.";
    assert_eq!(error.message, expected);
    assert_eq!(total(&budgets).sum(), 100);
    let error = reserve(&budgets, need(1, 1)).unwrap_err();
    assert_eq!(error.message, expected);
}

#[test]
fn tokens_that_a_completion_did_not_use_are_given_back() {
    let budgets = in_total(100);
    let mut running = reserve(&budgets, need(10, 85)).unwrap();
    let rejected = reserve(&budgets, need(10, 85)).unwrap_err();
    assert_eq!(rejected.kind, ErrorKind::RateLimited, "{rejected}");
    running.charge_prompt(10);
    running.charge_completion(5);
    drop(running);
    let mut next = reserve(&budgets, need(10, 75)).unwrap();
    next.charge_prompt(10);
    assert_eq!(next.charge_completion(75), 75);
    assert_eq!(total(&budgets).sum(), 100);
}

#[test]
fn a_shortened_completion_goes_on_with_tokens_that_another_gives_back() {
    let budgets = in_total(100);
    let other = reserve(&budgets, need(0, 60)).unwrap();
    let mut shortened = reserve(&budgets, need(0, 60)).unwrap();
    assert_eq!(shortened.charge_completion(40), 40);
    drop(other);
    shortened.check_left().unwrap();
    assert_eq!(shortened.charge_completion(20), 20);
    assert_eq!(total(&budgets).sum(), 60);
}

#[test]
fn an_open_ended_completion_grows_until_the_budget_is_used_up() {
    let budgets = in_total(1_000);
    let open = TokenNeed {
        is_open_ended: true,
        ..need(1, 16)
    };
    let mut open = reserve(&budgets, open).unwrap();
    open.charge_prompt(1);
    let granted: u64 = (0..2_000).map(|_| open.charge_completion(1)).sum();
    assert_eq!(granted, 999);
    open.check_left().unwrap_err();
}

#[test]
fn a_prompt_must_fit_into_what_is_left() {
    let budgets = in_total(100);
    let error = reserve(&budgets, need(100, 5)).unwrap_err();
    assert_eq!(error.kind, ErrorKind::BudgetExhausted);
    let expected = "The request needs at least 101 tokens to start, but only 100 are left of the API key's budget of \
                    100 tokens in total.";
    assert_eq!(error.message, expected);
    // A request for the log probabilities of a prompt generates nothing.
    reserve(&budgets, need(100, 0)).unwrap();
}

#[test]
fn a_prompt_that_was_not_reserved_takes_tokens_from_the_completion() {
    let budgets = in_total(100);
    let mut request = reserve(&budgets, need(0, 90)).unwrap();
    request.charge_prompt(30);
    request.check_left().unwrap();
    assert_eq!(request.charge_completion(90), 70);
    request.check_left().unwrap_err();

    let small = in_total(10);
    let mut request = reserve(&small, need(0, 5)).unwrap();
    request.charge_prompt(30);
    request.check_left().unwrap_err();
    assert_eq!(
        total(&small).sum(),
        30,
        "the engine has computed the prompt"
    );
}

#[test]
fn a_budget_of_completion_tokens_does_not_count_prompts() {
    let unit = BudgetUnit::CompletionTokens;
    let budgets = budgets(&[budget(5, unit, BudgetPeriod::Total)]);
    let mut request = reserve(&budgets, need(1_000, 10)).unwrap();
    request.charge_prompt(1_000);
    assert_eq!(request.charge_completion(10), 5);
    request.check_left().unwrap_err();
}

#[test]
fn budgets_start_again_with_the_day_and_the_month() {
    let (unit, usage) = (BudgetUnit::Tokens, BudgetUsage::default());
    let [day, month, all] = [
        budget(10, unit, BudgetPeriod::Day),
        budget(25, unit, BudgetPeriod::Month),
        budget(40, unit, BudgetPeriod::Total),
    ];
    let use_up = |today: Date| {
        let tokens = |completion| TokenCount {
            prompt: 0,
            completion,
        };
        let granted = usage.reserve(&[day, month, all], tokens(100), 1, today);
        if let Ok(granted) = granted {
            usage.charge(tokens(granted), tokens(granted));
        }
        granted.map_err(|shortage| shortage.budget)
    };
    assert_eq!(use_up(date(2026, 11, 28)), Ok(10));
    assert_eq!(use_up(date(2026, 11, 28)), Err(day));
    assert_eq!(use_up(date(2026, 11, 29)), Ok(10));
    assert_eq!(
        use_up(date(2026, 11, 28)),
        Err(day),
        "the clock was set back"
    );
    assert_eq!(use_up(date(2026, 11, 30)), Ok(5));
    assert_eq!(use_up(date(2026, 11, 30)), Err(month));
    assert_eq!(use_up(date(2026, 12, 1)), Ok(10));
    assert_eq!(
        use_up(date(2027, 12, 1)),
        Ok(5),
        "the same month a year later"
    );
    assert_eq!(use_up(date(2028, 1, 1)), Err(all));
}

#[test]
fn stored_usage_goes_on_where_it_was() {
    let unit = BudgetUnit::Tokens;
    let per_day = [budget(10, unit, BudgetPeriod::Day)];
    let (today, tomorrow) = (date(2026, 11, 30), date(2026, 12, 1));
    let tokens = |completion| TokenCount {
        prompt: 0,
        completion,
    };
    let usage = BudgetUsage::default();
    assert_eq!(usage.record(today), None);
    usage.reserve(&per_day, tokens(7), 1, today).unwrap();
    assert_eq!(usage.record(today), None, "nothing has been used yet");
    usage.charge(tokens(6), tokens(7));
    let record = usage.record(today).unwrap();
    let restored = BudgetUsage::restore(&record);
    assert_eq!(restored.record(today), Some(record));
    assert_eq!(restored.reserve(&per_day, tokens(7), 1, today), Ok(4));
    let later = BudgetUsage::restore(&record);
    assert_eq!(later.reserve(&per_day, tokens(7), 1, tomorrow), Ok(7));
    let expected = UsageRecord {
        date: tomorrow,
        day: tokens(0),
        month: tokens(0),
        total: tokens(6),
    };
    assert_eq!(later.record(tomorrow), Some(expected));
}

#[test]
fn a_used_up_budget_says_when_it_starts_again() {
    let today = date(2026, 12, 31);
    for (period, expected) in [
        (
            BudgetPeriod::Day,
            " It starts again at 2027-01-01T00:00:00Z.",
        ),
        (
            BudgetPeriod::Month,
            " It starts again at 2027-01-01T00:00:00Z.",
        ),
        (BudgetPeriod::Total, ""),
    ] {
        let shortage = Shortage {
            budget: budget(5, BudgetUnit::Tokens, period),
            unused: 0,
            available: 0,
        };
        let message = shortage.rejection(2, today).message;
        assert!(
            message.ends_with(&format!("is used up.{expected}")),
            "{message}"
        );
    }
}

#[test]
fn an_amount_has_a_limit_and_a_period() {
    let parse = |text: &str| text.parse::<BudgetAmount>();
    for (text, period) in [
        ("7", BudgetPeriod::Total),
        ("7/day", BudgetPeriod::Day),
        ("7/month", BudgetPeriod::Month),
    ] {
        let unit = BudgetUnit::CompletionTokens;
        assert_eq!(parse(text).unwrap().of(unit), budget(7, unit, period));
    }
    for text in [
        "",
        "0",
        "-1",
        "7/",
        "7/year",
        "/day",
        "9223372036854775808",
        "7.5",
    ] {
        assert_eq!(parse(text), Err(InvalidBudget), "{text}");
    }
}
