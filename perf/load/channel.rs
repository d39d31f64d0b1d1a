//! A stream from a device in this process: what a token costs where there is no server at all.

use std::future::poll_fn;

use tokenway::runner::{Token, monotonic_ns};
use tokenway::worker::lane::Output;

use super::Fault;
use super::figures::{Progress, Stamp};
use super::session::Asked;
use crate::device::Device;

/// How many outputs are taken at once, as in the product.
const BATCH: usize = 256;

/// Makes a request.
pub(super) async fn request(
    device: &Device,
    asked: &Asked,
    progress: &mut Progress,
) -> Result<(), Fault> {
    let mut lane = device.open(asked.tokens, asked.timed);
    let mut outputs = Vec::new();
    while progress.next_index < asked.tokens {
        if poll_fn(|cx| lane.poll_recv_many(cx, &mut outputs, BATCH)).await == 0 {
            return Err(Fault::CutOff(progress.next_index));
        }
        let received_ns = monotonic_ns();
        let mut figures = asked.notes.borrow_mut();
        figures.read(0);
        for output in outputs.drain(..) {
            let (Output::Token(token) | Output::Finished(Some(token), _)) = output else {
                continue;
            };
            if token.id != progress.next_index {
                let (expected, found) = (progress.next_index, format!("token_{}", token.id));
                return Err(Fault::Order { expected, found });
            }
            progress.token(&mut figures, received_ns, stamp(&token, asked));
        }
    }
    Ok(())
}

fn stamp(token: &Token, asked: &Asked) -> Option<Stamp> {
    asked.timed.then_some(Stamp {
        due_ns: token.due_ns,
        emitted_ns: token.emitted_ns,
    })
}
