use metrics::Counter;
use tokio::sync::Notify;
use tokio_stream::StreamExt;

use super::*;
use crate::runner::{Token, TokenBytes};
use crate::telemetry::{ResponseFormat, Stage, Telemetry};
use crate::worker::token_channel::{SendOutcome, TokenSender, token_channel};

fn send(token_channel: &TokenSender, text: &str) {
    let token = Token {
        id: 0,
        bytes: TokenBytes::from_slice(text.as_bytes()),
        due_ns: 0,
        emitted_ns: 0,
        logprobs: None,
    };
    assert_eq!(token_channel.token(token), SendOutcome::Delivered);
}

/// A completion of so many choices, and the workers' ends of their lanes.
fn completion(choices: usize) -> (Completion, Vec<TokenSender>) {
    let lanes = (0..choices).map(|_| token_channel(16, Arc::new(Notify::new()), Counter::noop()));
    let (senders, lanes) = lanes.unzip();
    let now = Instant::now();
    let admitted = Admitted {
        model: "m".into(),
        prompt_tokens: 1,
        echo: None,
        scores_prompt: false,
        resumed: Vec::new(),
        lanes,
        resumer: None,
        gaps: Histogram::noop(),
        arrived: now,
        deadline: now + Duration::from_secs(3_600),
    };
    let times = Telemetry::new().stage_times(ResponseFormat::Grpc, Stage::Engine);
    let completion = Completion::new(admitted, &Stopping::default(), times);
    (completion.expect("nothing is resumed"), senders)
}

async fn next_choice(completion: &mut Completion) -> u32 {
    match completion.next().await {
        Some(Ok(CompletionEvent::Tokens { choice, .. })) => choice,
        other => panic!("no tokens: {other:?}"),
    }
}

#[tokio::test]
async fn a_choice_that_always_has_tokens_does_not_starve_the_others() {
    let (mut completion, lanes) = completion(3);
    for token_channel in &lanes {
        send(token_channel, "a");
    }
    let mut order = Vec::new();
    for _ in 0..4 {
        order.push(next_choice(&mut completion).await);
        send(&lanes[0], "more");
    }
    assert_eq!(order, [0, 1, 2, 0]);
}
#[tokio::test]
async fn the_engine_stage_ends_when_the_completion_takes_the_token() {
    let (mut completion, lanes) = completion(1);
    for seconds_ago in [3, 3, 1] {
        let token = Token {
            id: 0,
            bytes: TokenBytes::from_slice(b"a"),
            due_ns: 0,
            emitted_ns: monotonic_ns() - seconds_ago * 1_000_000_000,
            logprobs: None,
        };
        assert_eq!(lanes[0].token(token), SendOutcome::Delivered);
    }
    next_choice(&mut completion).await;
    let StageSummary {
        tokens,
        mean_ns,
        longest_ns,
    } = completion.times.summary();
    let seconds = |ns: u64| Duration::from_nanos(ns).as_secs();
    assert_eq!((tokens, seconds(mean_ns), seconds(longest_ns)), (3, 2, 3));
}
