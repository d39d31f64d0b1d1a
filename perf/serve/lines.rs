//! A sequence as NDJSON lines, with the bytes of the product's: what a floor writes.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures_core::Stream;
use serde::Deserialize;
use tokenway::runner::Token;
use tokenway::worker::lane::{LaneReceiver, Output};

/// How many outputs are taken at once, as in the product.
const BATCH: usize = 256;

/// What a line takes, about.
const LINE: usize = 320;

/// Everything of a line before its text. The id has the length of the product's.
const PREFIX: &[u8] = b"{\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\
    \"object\":\"text_completion\",\"created\":1795551613,\"model\":\"llm_test\",\
    \"choices\":[{\"index\":0,\"text\":\"";

/// What a request asks for, of what a floor knows.
#[derive(Deserialize)]
pub(super) struct Asked {
    pub(super) max_tokens: u32,
    #[serde(default)]
    pub(super) stream_options: AskedOptions,
}

#[derive(Default, Deserialize)]
pub(super) struct AskedOptions {
    #[serde(default)]
    pub(super) include_stamps: bool,
}

/// The lines of one sequence; what is ready together comes together.
pub(super) struct LineStream {
    lane: Option<LaneReceiver>,
    outputs: Vec<Output>,
    stamps: bool,
}

impl LineStream {
    pub(super) fn new(lane: LaneReceiver, stamps: bool) -> Self {
        Self {
            lane: Some(lane),
            outputs: Vec::new(),
            stamps,
        }
    }

    fn write(&mut self) -> BytesMut {
        let mut out = BytesMut::with_capacity(self.outputs.len() * LINE);
        for output in self.outputs.drain(..) {
            match output {
                Output::Accepted => {}
                Output::Token(token) => line(&mut out, &token, "null", self.stamps),
                Output::Finished(token, _) => {
                    if let Some(token) = token {
                        line(&mut out, &token, "\"length\"", self.stamps);
                    }
                    self.lane = None;
                }
                Output::Failed(_) => self.lane = None,
            }
        }
        out
    }
}

impl Stream for LineStream {
    type Item = Result<Bytes, std::convert::Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let Some(lane) = &mut this.lane else {
                return Poll::Ready(None);
            };
            match lane.poll_recv_many(cx, &mut this.outputs, BATCH) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(0) => this.lane = None,
                Poll::Ready(_) => {
                    let lines = this.write();
                    if !lines.is_empty() {
                        return Poll::Ready(Some(Ok(lines.freeze())));
                    }
                }
            }
        }
    }
}

fn line(out: &mut BytesMut, token: &Token, finish_reason: &str, stamps: bool) {
    out.put_slice(PREFIX);
    out.put_slice(&token.bytes);
    out.put_slice(b"\",\"logprobs\":null,\"finish_reason\":");
    out.put_slice(finish_reason.as_bytes());
    out.put_slice(b"}]");
    if stamps {
        let mut number = itoa::Buffer::new();
        out.put_slice(b",\"stamp\":{\"due_ns\":");
        out.put_slice(number.format(token.due_ns).as_bytes());
        out.put_slice(b",\"emitted_ns\":");
        out.put_slice(number.format(token.emitted_ns).as_bytes());
        out.put_slice(b"}");
    }
    out.put_slice(b"}\n");
}
