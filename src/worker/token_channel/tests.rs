use std::future::poll_fn;

use smallvec::SmallVec;

use super::*;
use crate::telemetry::Telemetry;

fn token(id: u32) -> Token {
    Token {
        id,
        bytes: SmallVec::new(),
        due_ns: 0,
        emitted_ns: 0,
        logprobs: None,
    }
}

fn new_channel(credit: usize) -> (TokenSender, TokenReceiver) {
    token_channel(credit, Arc::new(Notify::new()), Counter::noop())
}

async fn receive(receiver: &mut TokenReceiver) -> Vec<Output> {
    let mut outputs = Vec::new();
    poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, 16)).await;
    outputs
}

#[tokio::test]
async fn a_full_channel_still_has_room_for_its_end() {
    let (sender, mut receiver) = new_channel(2);
    assert_eq!(sender.send_token(token(0)), SendOutcome::Delivered);
    assert_eq!(sender.send_token(token(1)), SendOutcome::Delivered);
    assert_eq!(sender.credit(), 0);
    assert_eq!(sender.send_token(token(2)), SendOutcome::NoCredit);
    sender.fail(Failure::SlowReader);
    let outputs = receive(&mut receiver).await;
    assert_eq!(outputs.len(), 3);
    assert!(matches!(outputs[2], Output::Failed(Failure::SlowReader)));
}

#[tokio::test]
async fn room_made_just_before_the_worker_stalls_is_seen() {
    let (sender, mut receiver) = new_channel(2);
    assert_eq!(sender.send_token(token(0)), SendOutcome::Delivered);
    assert_eq!(sender.send_token(token(1)), SendOutcome::Delivered);
    // The worker has found the channel full but has not requested a wake-up yet, so this read does not wake it.
    assert_eq!(receive(&mut receiver).await.len(), 2);
    let TokenDestination::Local(channel) = &sender.0 else {
        panic!("the channel is local");
    };
    let credit = &channel.shared.credit;
    assert_eq!(credit.request_wake(channel.sent.get()), 2);
}

#[test]
fn unread_tokens_are_counted_as_wasted() {
    let telemetry = Telemetry::new();
    let wasted = telemetry.tokens_wasted.clone();
    let (sender, receiver) = token_channel(3, Arc::new(Notify::new()), wasted);
    assert_eq!(sender.accept(0), SendOutcome::Delivered);
    assert_eq!(sender.send_token(token(0)), SendOutcome::Delivered);
    assert_eq!(sender.send_token(token(1)), SendOutcome::Delivered);
    sender.finish(Some(token(2)), FinishReason::Length);
    drop(receiver);
    let metrics = telemetry.render();
    assert!(
        metrics.contains("tokenway_tokens_wasted_total 3"),
        "{metrics}"
    );
}

#[tokio::test]
async fn a_dropped_sender_closes_the_channel() {
    let (sender, mut receiver) = new_channel(2);
    drop(sender);
    assert!(receive(&mut receiver).await.is_empty());
}

#[tokio::test]
async fn dropping_a_reader_that_is_still_queued_notifies_the_queue() {
    let queue = Arc::new(Notify::new());
    let (sender, receiver) = token_channel(2, Arc::clone(&queue), Counter::noop());
    drop(receiver);
    queue.notified().await;
    assert!(sender.is_closed());
}
