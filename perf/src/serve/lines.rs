//! Writes the NDJSON lines of the floors, with the same bytes as Tokenway's lines.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use futures_core::Stream;
use serde::Deserialize;
use tokenway::runner::Token;
use tokenway::worker::token_channel::{Output, TokenReceiver};

use crate::device::{Device, READ_BATCH};

/// Estimated length of a line, in bytes.
const LINE_BYTES: usize = 320;
/// Start of a line, up to the token's text. The id is as long as Tokenway's ids.
const LINE_PREFIX: &[u8] = b"{\"id\":\"cmpl-0123456789abcdef0123456789abcdef\",\
    \"object\":\"text_completion\",\"created\":1795551613,\"model\":\"llm_test\",\
    \"choices\":[{\"index\":0,\"text\":\"";

/// Fields of a request that a floor reads.
#[derive(Deserialize)]
pub(super) struct RequestBody {
    max_tokens: u32,
    #[serde(default)]
    stream_options: StreamOptions,
}

#[derive(Default, Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_stamps: bool,
}

/// Stream of the lines of one sequence. Lines that are ready together are sent as one piece.
pub(super) struct LineStream {
    tokens: Option<TokenReceiver>,
    outputs: Vec<Output>,
    stamps: bool,
}

impl LineStream {
    pub(super) fn open(device: &Device, request: &RequestBody) -> Self {
        let stamps = request.stream_options.include_stamps;
        Self {
            tokens: Some(device.open_sequence(request.max_tokens, stamps)),
            outputs: Vec::new(),
            stamps,
        }
    }

    fn write_lines(&mut self) -> BytesMut {
        let mut out = BytesMut::with_capacity(self.outputs.len() * LINE_BYTES);
        for output in self.outputs.drain(..) {
            let is_end = !matches!(
                output,
                Output::Accepted { .. } | Output::Token(_) | Output::Tokens(_)
            );
            let finish_reason = if is_end { "\"length\"" } else { "null" };
            for token in output.completion_tokens() {
                write_line(&mut out, token, finish_reason, self.stamps);
            }
            if is_end {
                self.tokens = None;
            }
        }
        out
    }
}

impl Stream for LineStream {
    type Item = Result<Bytes, Infallible>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            let Some(tokens) = &mut this.tokens else {
                return Poll::Ready(None);
            };
            match tokens.poll_recv_many(cx, &mut this.outputs, READ_BATCH) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(0) => this.tokens = None,
                Poll::Ready(_) => {
                    let lines = this.write_lines();
                    if !lines.is_empty() {
                        return Poll::Ready(Some(Ok(lines.freeze())));
                    }
                }
            }
        }
    }
}

fn write_line(out: &mut BytesMut, token: &Token, finish_reason: &str, stamps: bool) {
    out.put_slice(LINE_PREFIX);
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

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http_body_util::BodyExt;
    use tokenway::server::Server;
    use tokio::net::TcpListener;

    use super::super::{Options, Role, bare, server_parts};
    use crate::arguments::ServerUrl;
    use crate::device::Device;
    use crate::stream::{CompletionRequest, Connection, Protocol, StreamOptions, http_request};

    async fn read_body(address: &str, stamps: bool) -> String {
        let url = ServerUrl::from_authority(address);
        let completion = CompletionRequest {
            stream_options: stamps.then_some(StreamOptions::IncludeStamps(true)),
            ..CompletionRequest::of_tokens(12)
        };
        let request = http_request(&url, "application/x-ndjson", &completion);
        let mut connection = Connection::open(&url, Protocol::Http1).await.unwrap();
        let body = connection.send(request).await.unwrap().collect().await;
        String::from_utf8(body.unwrap().to_bytes().to_vec()).unwrap()
    }

    /// Replaces the digits that differ between responses: the digits of ids and times.
    fn mask_digits(body: &str) -> String {
        let own = ["\"id\":\"cmpl-", "\"created\":", "_ns\":"];
        let mut rest = body;
        let mut masked = String::new();
        while let Some((at, label)) = own
            .iter()
            .filter_map(|label| Some((rest.find(label)?, label)))
            .min()
        {
            let (before, after) = rest.split_at(at + label.len());
            let digits = after.chars().take_while(char::is_ascii_hexdigit).count();
            masked.push_str(before);
            masked.push_str(&"x".repeat(digits));
            rest = &after[digits..];
        }
        masked + rest
    }

    #[tokio::test]
    async fn the_floor_writes_the_products_lines_byte_for_byte() {
        let options = Options::new(Role::Product, Duration::ZERO, 1, 1);
        let product = Server::start(server_parts(&options).unwrap())
            .await
            .unwrap();
        product.ready(|_| ()).await.unwrap();
        let product_address = product.http_address().unwrap().to_string();
        let device = Device::start(Duration::ZERO, 1).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let floor_address = listener.local_addr().unwrap().to_string();
        tokio::spawn(bare::serve_axum(listener, device));
        for stamps in [false, true] {
            let lines = mask_digits(&read_body(&product_address, stamps).await);
            assert_eq!(lines.lines().count(), 12, "{lines}");
            assert_eq!(mask_digits(&read_body(&floor_address, stamps).await), lines);
        }
        product.drain().await;
    }
}
