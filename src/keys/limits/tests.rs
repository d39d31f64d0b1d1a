use tokio::time::advance;

use super::*;
use crate::keys::bucket::RETRY_AFTER_HELD;

fn of_key(limits: KeyLimits) -> Quotas {
    let of_key = Quota {
        limits,
        ..Quota::default()
    };
    Quotas {
        of_key,
        ..Quotas::default()
    }
}

fn at_most(limit: u32) -> Option<NonZeroU32> {
    NonZeroU32::new(limit)
}

fn start(quotas: &Quotas) -> Result<LimitedRequest, Error> {
    LimitedRequest::start(quotas, Instant::now())
}

fn wait<T>(result: Result<T, Error>) -> Option<Duration> {
    let Err(error) = result else {
        panic!("the request is within the limit")
    };
    assert_eq!(error.kind, ErrorKind::RateLimited);
    error.retry_after
}

#[tokio::test(start_paused = true)]
async fn requests_beyond_the_rate_are_rejected_with_the_time_to_wait() {
    let quotas = of_key(KeyLimits {
        requests_per_minute: at_most(30),
        ..KeyLimits::default()
    });
    for _ in 0..30 {
        start(&quotas).unwrap();
    }
    let seconds = |seconds| Some(Duration::from_secs(seconds));
    assert_eq!(wait(start(&quotas)), seconds(2));
    advance(Duration::from_secs(1)).await;
    assert_eq!(
        wait(start(&quotas)),
        seconds(1),
        "a rejected request counts nothing"
    );
    advance(Duration::from_secs(1)).await;
    start(&quotas).unwrap();
    assert_eq!(wait(start(&quotas)), seconds(2));
    let [requests, tokens] = quotas.status(Instant::now());
    assert_eq!(tokens, None);
    let expected = RateStatus {
        limit: 30,
        remaining: 0,
        reset: Duration::from_secs(60),
    };
    assert_eq!(requests, Some(expected));
}

#[tokio::test(start_paused = true)]
async fn a_request_is_concurrent_until_it_ends_or_is_dropped() {
    let quotas = of_key(KeyLimits {
        concurrent_requests: at_most(2),
        ..KeyLimits::default()
    });
    let (first, second) = (start(&quotas).unwrap(), start(&quotas).unwrap());
    wait(start(&quotas)).unwrap();
    first.end(0, Instant::now());
    drop(first);
    let third = start(&quotas).unwrap();
    wait(start(&quotas)).unwrap();
    drop(second);
    start(&quotas).unwrap();
    drop(third);
}

#[tokio::test(start_paused = true)]
async fn held_tokens_that_were_not_used_are_given_back() {
    let quotas = of_key(KeyLimits {
        tokens_per_minute: at_most(600),
        ..KeyLimits::default()
    });
    let request = start(&quotas).unwrap();
    request.hold_tokens(500, Instant::now()).unwrap();
    let other = start(&quotas).unwrap();
    let rejected = other.hold_tokens(150, Instant::now());
    assert_eq!(wait(rejected), Some(RETRY_AFTER_HELD));
    request.end(100, Instant::now());
    other.hold_tokens(500, Instant::now()).unwrap();
    let [_, tokens] = quotas.status(Instant::now());
    assert_eq!(tokens.unwrap().remaining, 0);

    let too_large = other.hold_tokens(601, Instant::now()).unwrap_err();
    assert_eq!(too_large.kind, ErrorKind::InvalidValue);
    assert_eq!(too_large.param.as_deref(), Some("max_tokens"));
}

#[tokio::test(start_paused = true)]
async fn tokens_that_were_not_held_count_when_the_request_ends() {
    let quotas = of_key(KeyLimits {
        tokens_per_minute: at_most(60),
        ..KeyLimits::default()
    });
    start(&quotas).unwrap().end(90, Instant::now());
    let rejected = start(&quotas).unwrap().hold_tokens(1, Instant::now());
    assert_eq!(wait(rejected), Some(Duration::from_secs(31)));
}

#[tokio::test(start_paused = true)]
async fn held_tokens_do_not_drain_and_used_ones_do() {
    let quotas = of_key(KeyLimits {
        tokens_per_minute: at_most(6_000),
        ..KeyLimits::default()
    });
    let requests = [(); 20].map(|()| start(&quotas).unwrap());
    for request in &requests {
        request.hold_tokens(300, Instant::now()).unwrap();
    }
    advance(Duration::from_secs(60)).await;
    let next = start(&quotas).unwrap();
    wait(next.hold_tokens(1, Instant::now())).unwrap();
    for request in &requests {
        request.end(20, Instant::now());
    }
    let remaining = || quotas.status(Instant::now())[1].unwrap().remaining;
    assert_eq!(remaining(), 5_600);
    advance(Duration::from_secs(3)).await;
    assert_eq!(remaining(), 5_900);
}

#[tokio::test(start_paused = true)]
async fn the_prompts_of_a_request_must_fit_together() {
    let quotas = of_key(KeyLimits {
        tokens_per_minute: at_most(1_000),
        ..KeyLimits::default()
    });
    let request = start(&quotas).unwrap();
    request.hold_tokens(600, Instant::now()).unwrap();
    let never = request.hold_tokens(600, Instant::now()).unwrap_err();
    assert_eq!(never.kind, ErrorKind::InvalidValue);
    assert!(never.message.contains("up to 1200 tokens"), "{never}");
}

#[tokio::test(start_paused = true)]
async fn frequent_attempts_do_not_delay_the_next_request() {
    let quotas = of_key(KeyLimits {
        requests_per_minute: at_most(1),
        ..KeyLimits::default()
    });
    start(&quotas).unwrap();
    for _ in 0..60_000 {
        advance(Duration::from_micros(999)).await;
        wait(start(&quotas)).unwrap();
    }
    advance(Duration::from_millis(60)).await;
    start(&quotas).unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_limits_of_all_keys_apply_together_and_a_rejection_counts_nowhere() {
    let of_all = Quota {
        limits: KeyLimits {
            requests_per_minute: at_most(2),
            tokens_per_minute: at_most(100),
            ..KeyLimits::default()
        },
        ..Quota::default()
    };
    let [one, other] = [(); 2].map(|()| Quotas {
        of_all: of_all.clone(),
        ..of_key(KeyLimits {
            requests_per_minute: at_most(10),
            tokens_per_minute: at_most(1_000),
            ..KeyLimits::default()
        })
    });
    let (first, second) = (start(&one).unwrap(), start(&other).unwrap());
    first.hold_tokens(60, Instant::now()).unwrap();
    wait(second.hold_tokens(60, Instant::now())).unwrap();
    second.hold_tokens(40, Instant::now()).unwrap();
    let rejected = start(&other).unwrap_err();
    assert!(
        rejected.message.starts_with("The server's limit"),
        "{rejected}"
    );
    let now = Instant::now();
    let remaining = |quota: &Quota| quota.status(now).map(|it| it.unwrap().remaining);
    assert_eq!(remaining(&other.of_key), [9, 960]);
    assert_eq!(remaining(&one.of_key), [9, 940]);
    assert_eq!(other.status(now).map(|it| it.unwrap().remaining), [0, 0]);
}
