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

fn new_lane(credit: usize) -> (LaneSender, LaneReceiver) {
    lane(credit, Arc::new(Notify::new()), Counter::noop())
}

async fn receive(lane: &mut LaneReceiver) -> Vec<Output> {
    let mut outputs = Vec::new();
    poll_fn(|cx| lane.poll_recv_many(cx, &mut outputs, 16)).await;
    outputs
}

#[tokio::test]
async fn a_full_lane_still_has_a_place_for_its_end() {
    let (sender, mut receiver) = new_lane(2);
    assert_eq!(sender.token(token(0)), Sent::Delivered);
    assert_eq!(sender.token(token(1)), Sent::Delivered);
    assert_eq!(sender.room(), 0);
    assert_eq!(sender.token(token(2)), Sent::NoRoom);
    sender.fail(Failure::SlowReader);
    let outputs = receive(&mut receiver).await;
    assert_eq!(outputs.len(), 3);
    assert!(matches!(outputs[2], Output::Failed(Failure::SlowReader)));
}

#[tokio::test]
async fn room_that_a_reader_made_just_before_the_worker_asked_for_it_is_seen() {
    let (sender, mut receiver) = new_lane(2);
    assert_eq!(sender.token(token(0)), Sent::Delivered);
    assert_eq!(sender.token(token(1)), Sent::Delivered);
    // The worker has found no room and has not said so yet: nobody will wake it for this.
    assert_eq!(receive(&mut receiver).await.len(), 2);
    let Way::Here(lane) = &sender.0 else {
        panic!("the lane leads to this process");
    };
    assert_eq!(lane.stall(), 2);
}

#[test]
fn the_tokens_that_nobody_read_are_counted_as_wasted() {
    let telemetry = Telemetry::new();
    let wasted = telemetry.tokens_wasted.clone();
    let (sender, receiver) = lane(3, Arc::new(Notify::new()), wasted);
    assert_eq!(sender.accept(), Sent::Delivered);
    assert_eq!(sender.token(token(0)), Sent::Delivered);
    assert_eq!(sender.token(token(1)), Sent::Delivered);
    sender.finish(Some(token(2)), FinishReason::Length);
    drop(receiver);
    let counts = telemetry.render();
    assert!(
        counts.contains("tokenway_tokens_wasted_total 3"),
        "{counts}"
    );
}

#[tokio::test]
async fn a_lane_that_is_dropped_without_an_end_closes() {
    let (sender, mut receiver) = new_lane(2);
    drop(sender);
    assert!(receive(&mut receiver).await.is_empty());
}

#[tokio::test]
async fn a_reader_that_goes_away_unplaced_notifies_the_queue() {
    let queue = Arc::new(Notify::new());
    let (sender, receiver) = lane(2, Arc::clone(&queue), Counter::noop());
    drop(receiver);
    queue.notified().await;
    assert!(sender.is_closed());
}
