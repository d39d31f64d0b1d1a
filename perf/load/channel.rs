//! A stream from a device in this process: what a token costs where there is no server at all.

use std::future::poll_fn;

use tokenway::runner::{Token, monotonic_ns};
use tokenway::worker::token_channel::Output;

use super::Fault;
use super::session::Asked;
use super::taker::{Came, Taker};
use crate::device::Device;
use crate::stamp::Stamp;

/// How many outputs are taken at once, as in the product.
const BATCH: usize = 256;

/// Makes a request.
pub(super) async fn request(
    device: &Device,
    asked: &Asked,
    taker: &mut impl Taker,
) -> Result<(), Fault> {
    let mut token_channel = device.open(asked.tokens, asked.timed);
    let mut outputs = Vec::new();
    while taker.count() < asked.tokens {
        if poll_fn(|cx| token_channel.poll_recv_many(cx, &mut outputs, BATCH)).await == 0 {
            return Err(Fault::CutOff(taker.count()));
        }
        let received_ns = monotonic_ns();
        let mut figures = asked.notes.borrow_mut();
        figures.read(0);
        for output in outputs.drain(..) {
            let (Output::Token(token) | Output::Finished(Some(token), _)) = output else {
                continue;
            };
            let came = Came {
                index: token.id.into(),
                text: None,
                received_ns,
                stamp: stamp(&token, asked),
            };
            taker.take(&came, &mut figures)?;
        }
    }
    Ok(())
}

fn stamp(token: &Token, asked: &Asked) -> Option<Stamp> {
    asked.timed.then_some(Stamp {
        due_ns: Some(token.due_ns),
        emitted_ns: token.emitted_ns,
    })
}
