//! How what a device makes is gathered into messages.

use prost::Message as _;

use super::*;
use crate::tokens::{Logprobs, TopLogprob};

/// A sequence's lane with so much credit, and where it leads.
fn lane(credit: usize) -> (RemoteLane, Arc<Outbox>) {
    let outbox = Arc::<Outbox>::default();
    let reader = RemoteReader::new(credit);
    let lane = RemoteLane::new((1, reader), Arc::clone(&outbox), 0, false);
    (lane, outbox)
}

fn token(id: u32) -> Token {
    Token {
        id,
        bytes: b"x".as_slice().into(),
        due_ns: 0,
        emitted_ns: 0,
        logprobs: None,
    }
}

/// A token with as much beside it as there may be.
fn scored(id: u32) -> Token {
    let top = (0..20).map(|id| TopLogprob {
        id,
        spelling: vec![b'x'; 1_024],
        logprob: -1.0,
    });
    let logprobs = Logprobs {
        logprob: Some(-1.0),
        spelling: vec![b'x'; 1_024],
        top: top.collect(),
    };
    Token {
        logprobs: Some(Box::new(logprobs)),
        ..token(id)
    }
}

/// The steps that are sent now, each with its entries.
fn steps(outbox: &Outbox) -> Vec<proto::Step> {
    let mut messages = VecDeque::new();
    outbox.take(&mut messages);
    let mut steps = Vec::new();
    for message in messages {
        if let Message::Step(step) = message {
            steps.push(step);
        }
    }
    steps
}

#[test]
fn a_last_token_and_its_end_are_one_entry_whatever_else_is_said_meanwhile() {
    let (lane, outbox) = lane(8);
    assert_eq!(lane.token(token(0)), Sent::Delivered);
    outbox.say(Message::Loading(proto::Loading { fraction: 0.0 }));
    lane.finish(Some(token(1)), FinishReason::Stop);
    let steps = steps(&outbox);
    assert_eq!(steps.len(), 2);
    let last = &steps[1].sequences[0];
    assert_eq!((last.first_index, last.ids.len()), (1, 1));
    assert_eq!(last.end(), proto::End::Stop);
}

#[test]
fn what_an_engine_does_not_read_for_a_while_is_as_many_messages_as_are_small_enough() {
    const COUNT: u32 = 2_000;
    let (lane, outbox) = lane(2_000);
    for id in 0..COUNT {
        assert_eq!(lane.token(scored(id)), Sent::Delivered);
    }
    let steps = steps(&outbox);
    let largest = steps.iter().map(proto::Step::encoded_len).max();
    assert!(largest < Some(wire::MESSAGE_LIMIT / 8), "{largest:?}");
    let entries = || steps.iter().flat_map(|step| &step.sequences);
    let ids: Vec<_> = entries().flat_map(|entry| entry.ids.iter()).collect();
    assert_eq!(ids, (0..COUNT).collect::<Vec<_>>());
    let mut next = 0;
    for entry in entries() {
        assert_eq!(entry.first_index, next);
        next += u32::try_from(entry.ids.len()).unwrap();
    }
}

#[test]
fn tokens_of_the_prompt_and_of_the_completion_are_entries_of_their_own() {
    let (lane, outbox) = lane(8);
    assert_eq!(lane.prompt(token(7)), Sent::Delivered);
    assert_eq!(lane.token(token(8)), Sent::Delivered);
    assert_eq!(lane.token(token(9)), Sent::Delivered);
    let steps = steps(&outbox);
    let entries = steps.iter().flat_map(|step| &step.sequences);
    let told: Vec<_> = entries
        .map(|entry| (entry.is_prompt, entry.first_index, entry.ids.len()))
        .collect();
    assert_eq!(told, [(true, 0, 1), (false, 0, 2)]);
}

#[test]
fn what_is_said_of_a_worker_comes_behind_what_its_device_made_before() {
    let (lane, outbox) = lane(8);
    assert_eq!(lane.token(token(0)), Sent::Delivered);
    outbox.say(Message::Crashed(proto::Crashed::default()));
    let mut messages = VecDeque::new();
    outbox.take(&mut messages);
    let order: Vec<_> = messages
        .iter()
        .map(|message| matches!(message, Message::Step(_)))
        .collect();
    assert_eq!(order, [true, false]);
}

#[test]
fn a_cancelled_sequence_makes_nothing_more() {
    let (lane, outbox) = lane(8);
    lane.reader.cancel();
    assert_eq!(lane.accept(), Sent::Closed);
    assert_eq!(lane.token(token(0)), Sent::Closed);
    assert!(!outbox.has_something());
}
