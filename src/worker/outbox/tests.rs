//! Tests that show how tokens are collected into step messages.

use prost::Message as _;

use super::*;
use crate::tokens::{Logprobs, TopLogprob};

/// Creates a token channel with this credit, and its outbox.
fn remote_channel(credit: usize) -> (RemoteChannel, Arc<Outbox>) {
    let outbox = Arc::<Outbox>::default();
    let reader = RemoteReader::new(credit);
    let channel = RemoteChannel::new(1, reader, Arc::clone(&outbox), 0, false);
    (channel, outbox)
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

/// Creates a token whose log probabilities have the maximum size.
fn token_with_logprobs(id: u32) -> Token {
    let top = (0..20).map(|id| TopLogprob {
        id,
        token_bytes: vec![b'x'; 1_024],
        logprob: -1.0,
    });
    let logprobs = Logprobs {
        logprob: Some(-1.0),
        token_bytes: vec![b'x'; 1_024],
        top: top.collect(),
    };
    Token {
        logprobs: Some(Box::new(logprobs)),
        ..token(id)
    }
}

/// Takes all unsent messages from the outbox. Returns the steps among them.
fn steps(outbox: &Outbox) -> Vec<proto::Step> {
    let mut messages = VecDeque::new();
    outbox.take_messages(&mut messages);
    let mut steps = Vec::new();
    for message in messages {
        if let Message::Step(step) = message {
            steps.push(step);
        }
    }
    steps
}

#[test]
fn a_last_token_and_its_end_share_one_entry() {
    let (channel, outbox) = remote_channel(8);
    assert_eq!(channel.send_token(token(0)), SendOutcome::Delivered);
    outbox.send(Message::Loading(proto::Loading { fraction: 0.0 }));
    channel.finish(Some(token(1)), FinishReason::Stop);
    let steps = steps(&outbox);
    assert_eq!(steps.len(), 2);
    let last = &steps[1].sequences[0];
    assert_eq!((last.first_index, last.ids.len()), (1, 1));
    assert_eq!(last.end(), proto::End::Stop);
}

#[test]
fn a_large_backlog_is_split_into_messages_below_the_size_limit() {
    const COUNT: u32 = 2_000;
    let (channel, outbox) = remote_channel(2_000);
    for id in 0..COUNT {
        assert_eq!(
            channel.send_token(token_with_logprobs(id)),
            SendOutcome::Delivered
        );
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
fn prompt_tokens_and_completion_tokens_have_separate_entries() {
    let (channel, outbox) = remote_channel(8);
    assert_eq!(channel.send_prompt_token(token(7)), SendOutcome::Delivered);
    assert_eq!(channel.send_token(token(8)), SendOutcome::Delivered);
    assert_eq!(channel.send_token(token(9)), SendOutcome::Delivered);
    let steps = steps(&outbox);
    let entries = steps.iter().flat_map(|step| &step.sequences);
    let shapes: Vec<_> = entries
        .map(|entry| (entry.is_prompt, entry.first_index, entry.ids.len()))
        .collect();
    assert_eq!(shapes, [(true, 0, 1), (false, 0, 2)]);
}

#[test]
fn a_message_is_sent_after_the_tokens_gathered_before_it() {
    let (channel, outbox) = remote_channel(8);
    assert_eq!(channel.send_token(token(0)), SendOutcome::Delivered);
    outbox.send(Message::Crashed(proto::Crashed::default()));
    let mut messages = VecDeque::new();
    outbox.take_messages(&mut messages);
    let order: Vec<_> = messages
        .iter()
        .map(|message| matches!(message, Message::Step(_)))
        .collect();
    assert_eq!(order, [true, false]);
}

#[test]
fn a_cancelled_sequence_sends_nothing() {
    let (channel, outbox) = remote_channel(8);
    channel.reader.cancel();
    assert_eq!(channel.accept(0), SendOutcome::Closed);
    assert_eq!(channel.send_token(token(0)), SendOutcome::Closed);
    assert!(!outbox.has_tokens_or_messages());
}
