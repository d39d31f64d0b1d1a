//! A stream from a device in this process: the cost of a token without any server.

use std::future::poll_fn;

use tokenway::runner::{Token, monotonic_ns};
use tokenway::worker::token_channel::Output;

use super::consumer::{Consumer, ReceivedToken};
use super::session::Shared;
use crate::device::{BATCH, Device};
use crate::fault::Fault;
use crate::stamp::Stamp;

/// Makes a request.
pub(super) async fn request(
    device: &Device,
    shared: &Shared,
    consumer: &mut impl Consumer,
) -> Result<(), Fault> {
    let mut tokens = device.open(shared.tokens, shared.timed);
    let mut outputs = Vec::new();
    while consumer.count() < shared.tokens {
        if poll_fn(|cx| tokens.poll_recv_many(cx, &mut outputs, BATCH)).await == 0 {
            let after = consumer.count();
            let missing = "its last token";
            return Err(Fault::cut_off(after, missing));
        }
        let received_ns = monotonic_ns();
        let mut figures = shared.figures.borrow_mut();
        figures.read(0);
        for output in outputs.drain(..) {
            let (Output::Token(token) | Output::Finished(Some(token), _)) = output else {
                continue;
            };
            let received = ReceivedToken {
                index: token.id.into(),
                text: None,
                received_ns,
                stamp: stamp(&token, shared),
            };
            consumer.token(&received, &mut figures)?;
        }
    }
    Ok(())
}

fn stamp(token: &Token, shared: &Shared) -> Option<Stamp> {
    shared.timed.then_some(Stamp {
        due_ns: Some(token.due_ns),
        emitted_ns: token.emitted_ns,
    })
}
