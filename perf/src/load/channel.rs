//! Reads a stream from a device in this process, which shows the cost of a token without any server.

use std::future::poll_fn;

use tokenway::runner::monotonic_ns;
use tokenway::worker::token_channel::Output;

use super::Load;
use super::consumer::Consumer;
use super::session::SharedLoad;
use crate::device::{Device, READ_BATCH};
use crate::fault::Fault;
use crate::stamp::Stamp;

/// Runs a sequence on the device, and passes its tokens to `consumer`.
pub(super) async fn run_request(
    device: &Device,
    shared: &SharedLoad,
    consumer: &mut Consumer,
) -> Result<(), Fault> {
    let Load { tokens, timed, .. } = shared.load;
    let mut receiver = device.open_sequence(tokens, timed);
    let mut outputs = Vec::new();
    while consumer.token_count() < tokens {
        if poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, READ_BATCH)).await == 0 {
            return Err(Fault::cut_off(consumer.token_count(), "its last token"));
        }
        let received_ns = monotonic_ns();
        let mut figures = shared.figures.borrow_mut();
        figures.record_read(0);
        for output in outputs.drain(..) {
            if let Output::Token(token) | Output::Finished(Some(token), _) = output {
                let stamp = timed.then_some(Stamp {
                    due_ns: Some(token.due_ns),
                    emitted_ns: token.emitted_ns,
                });
                consumer.consume_token(Some(token.id), stamp, received_ns, &mut figures)?;
            }
        }
    }
    Ok(())
}
