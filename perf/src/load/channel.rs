//! Reads a stream from a device in this process, which shows the cost of a token without any server.

use std::future::poll_fn;

use tokenway::runner::monotonic_ns;
use tokenway::worker::token_channel::Output;

use super::Load;
use super::consumer::Consumer;
use super::generator::SharedLoad;
use crate::device::{Device, READ_BATCH};
use crate::fault::Fault;
use crate::timestamps::TokenTimestamps;

/// Runs a sequence on the device, and passes its tokens to `consumer`.
pub(super) async fn run_request(
    device: &Device,
    shared: &SharedLoad,
    consumer: &mut Consumer,
) -> Result<(), Fault> {
    let Load {
        tokens,
        request_timestamps,
        ..
    } = shared.load;
    let mut receiver = device.open_sequence(tokens, request_timestamps);
    let mut outputs = Vec::new();
    while consumer.token_count() < tokens {
        if poll_fn(|cx| receiver.poll_recv_many(cx, &mut outputs, READ_BATCH)).await == 0 {
            return Err(Fault::cut_off(consumer.token_count(), "its last token"));
        }
        let received_ns = monotonic_ns();
        let mut stats = shared.stats.borrow_mut();
        stats.record_read(0);
        for output in outputs.drain(..) {
            if let Output::Token(token) | Output::Finished(Some(token), _) = output {
                let stamp = request_timestamps.then_some(TokenTimestamps {
                    due_ns: Some(token.due_ns),
                    emitted_ns: token.emitted_ns,
                });
                consumer.consume_token(Some(token.id), stamp, received_ns, &mut stats)?;
            }
        }
    }
    Ok(())
}
