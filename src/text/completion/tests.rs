use std::time::Duration;

use metrics::Counter;
use tokio::sync::Notify;
use tokio_stream::StreamExt;

use super::*;
use crate::runner::{Token, TokenBytes};
use crate::telemetry::StageSummary;
use crate::telemetry::{ResponseFormat, Stage, Telemetry};
use crate::worker::token_channel::{SendOutcome, TokenSender, token_channel};

fn send(sender: &TokenSender, text: &str) {
    let token = Token {
        id: 0,
        bytes: TokenBytes::from_slice(text.as_bytes()),
        due_ns: 0,
        emitted_ns: 0,
        logprobs: None,
    };
    assert_eq!(sender.send_token(token), SendOutcome::Delivered);
}

/// Creates a completion, and returns it with the senders of its choices.
fn completion(choices: usize) -> (Completion, Vec<TokenSender>) {
    let token_channels =
        (0..choices).map(|_| token_channel(16, Arc::new(Notify::new()), Counter::noop()));
    let (senders, token_channels) = token_channels.unzip();
    let prompt = Prompt {
        ids: [0].into(),
        echo: None,
        is_scored: false,
        max_tokens: 16,
        resumed: Vec::new(),
    };
    let admitted = Admitted {
        token_channels,
        reuses_prefixes: false,
        resumer: None,
        resumption_gap_seconds: Histogram::noop(),
    };
    let times = Telemetry::new().stage_times(ResponseFormat::Grpc, Stage::Engine);
    let completion = Completion::new(&CompletionRequest::for_test("a"), prompt, admitted, times);
    (completion.expect("the request resumes no tokens"), senders)
}

async fn next_choice(completion: &mut Completion) -> u32 {
    match completion.next().await {
        Some(Ok(CompletionEvent::Tokens { choice, .. })) => choice,
        other => panic!("expected tokens, got {other:?}"),
    }
}

#[tokio::test]
async fn a_choice_that_always_has_tokens_does_not_starve_the_others() {
    let (mut completion, senders) = completion(3);
    for sender in &senders {
        send(sender, "a");
    }
    let mut order = Vec::new();
    for _ in 0..4 {
        order.push(next_choice(&mut completion).await);
        send(&senders[0], "more");
    }
    assert_eq!(order, [0, 1, 2, 0]);
}

#[tokio::test]
async fn the_engine_stage_ends_when_the_completion_takes_the_token() {
    let (mut completion, senders) = completion(1);
    for seconds_ago in [3, 3, 1] {
        let token = Token {
            id: 0,
            bytes: TokenBytes::from_slice(b"a"),
            due_ns: 0,
            emitted_ns: monotonic_ns() - seconds_ago * 1_000_000_000,
            logprobs: None,
        };
        assert_eq!(senders[0].send_token(token), SendOutcome::Delivered);
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
