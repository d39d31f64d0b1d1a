//! Sends requests to one server over OpenAI's HTTP API and reads their streams. All servers get the same requests, with
//! temperature 0 and `ignore_eos`, so that all replies have the same length.

use std::iter::once;
use std::time::Duration;

use tokenway::runner::monotonic_ns;
use tokio::time::timeout;

use crate::arguments::ServerUrl;
use crate::fault::Fault;
use crate::statistics::count_to_f64;
use crate::stream::{
    ChatMessage, CompletionRequest, Connection, Event, Format, RequestInput, Stream, StreamOptions,
    Usage,
};

/// Maximum time from the request to the end of its reply.
const REPLY_TIMEOUT: Duration = Duration::from_secs(300);

/// Client of one server.
pub(crate) struct Client {
    pub(crate) url: ServerUrl,
}

/// A complete reply, and the times at which its tokens arrived.
#[derive(Debug, Default)]
pub(crate) struct Reply {
    pub(crate) text: String,
    pub(super) usage: Usage,
    /// Time just before the request was sent, in nanoseconds of CLOCK_MONOTONIC.
    pub(super) sent_ns: u64,
    /// Time of the read that returned each text. A token without text has no entry.
    pub(super) token_ns: Vec<u64>,
}

impl Client {
    /// Requests a completion of a prompt.
    pub(super) async fn complete(&self, prompt: &str, tokens: u32) -> Result<Reply, Fault> {
        self.stream(RequestInput::Text { prompt }, tokens, |_| ())
            .await
    }

    /// Requests the next message of a chat. `messages` are the contents of the system message, and then alternately of
    /// a user message and an assistant message.
    pub(crate) async fn chat(&self, messages: &[String], tokens: u32) -> Result<Reply, Fault> {
        let turns = ["user", "assistant"].into_iter().cycle();
        let roles = once("system").chain(turns);
        let messages = roles
            .zip(messages)
            .map(|(role, content)| ChatMessage { role, content });
        let messages: Vec<_> = messages.collect();
        let input = RequestInput::Chat {
            messages: &messages,
        };
        self.stream(input, tokens, |_| ()).await
    }

    /// Requests a completion or the next message of a chat. Calls `on_token` after each text, with the number of texts
    /// so far.
    pub(super) async fn stream(
        &self,
        input: RequestInput<'_>,
        tokens: u32,
        on_token: impl FnMut(usize),
    ) -> Result<Reply, Fault> {
        let completion = CompletionRequest {
            input,
            temperature: Some(0.0),
            ignore_eos: true,
            stream_options: Some(StreamOptions::IncludeUsage(true)),
            ..CompletionRequest::of_tokens(tokens)
        };
        let reply = timeout(REPLY_TIMEOUT, self.read_reply(&completion, on_token)).await;
        reply.unwrap_or_else(|_| Err(Fault::TimedOut(REPLY_TIMEOUT.as_secs())))
    }

    async fn read_reply(
        &self,
        completion: &CompletionRequest<'_>,
        mut on_token: impl FnMut(usize),
    ) -> Result<Reply, Fault> {
        let mut connection = Connection::open(&self.url, Format::Sse.protocol()).await?;
        let (mut reply, mut usage) = (
            Reply {
                sent_ns: monotonic_ns(),
                ..Reply::default()
            },
            None,
        );
        let mut stream = Stream::open(&mut connection, Format::Sse, completion).await?;
        let outcome = stream.read_to_end(|event, received_ns| {
            match event {
                // Some servers start a chat with an empty text before the first token is computed.
                Event::Token(token) if !token.text.is_empty() => {
                    reply.text.push_str(&token.text);
                    reply.token_ns.push(received_ns);
                    on_token(reply.token_ns.len());
                }
                Event::Usage(counts) => usage = Some(counts),
                Event::BytesRead(_)
                | Event::Started
                | Event::Token(_)
                | Event::FinishReason
                | Event::EndOfStream
                | Event::Error(_)
                | Event::Other => {}
            }
            Ok(())
        });
        outcome.await?.complete(stream.token_count())?;
        reply.usage = usage.ok_or_else(|| Fault::Malformed("no usage in the stream".to_owned()))?;
        reply.check(completion.max_tokens)?;
        Ok(reply)
    }
}

impl Reply {
    /// Checks that the reply has the requested number of tokens.
    fn check(&self, requested: u32) -> Result<(), Fault> {
        let expected = format!("{requested} tokens");
        let counted = self.usage.completion_tokens;
        if counted != requested {
            return Err(Fault::unexpected(
                expected,
                format!("{counted} by the server's count"),
            ));
        }
        // A token that ends within a character has no text of its own, so there may be fewer texts than tokens.
        match self.token_ns.len() {
            0 => Err(Fault::unexpected(expected, "no text")),
            texts if texts > usize::try_from(requested).unwrap_or(usize::MAX) => {
                Err(Fault::unexpected(expected, format!("{texts} texts")))
            }
            _ => Ok(()),
        }
    }

    /// Returns the time from the request to the first text.
    pub(super) fn ttft(&self) -> Duration {
        Duration::from_nanos(self.first_ns().saturating_sub(self.sent_ns))
    }

    /// Returns the number of tokens per second, from the first text to the last.
    pub(super) fn decode_rate(&self) -> f64 {
        self.decode_rate_between(self.first_ns(), self.last_ns())
    }

    /// Returns the number of tokens per second from the first token to the last token that arrived between these times.
    pub(super) fn decode_rate_between(&self, start_ns: u64, end_ns: u64) -> f64 {
        let within = |ns: &&u64| (start_ns..=end_ns).contains(*ns);
        let mut times = self.token_ns.iter().filter(within);
        let first = times.next().copied().unwrap_or(start_ns);
        let (texts, last) = times.fold((0_u32, first), |(texts, _), ns| (texts + 1, *ns));
        let tokens = f64::from(texts) * self.tokens_per_text();
        tokens / Duration::from_nanos(last - first).as_secs_f64()
    }

    /// Returns the number of tokens for each text after the first one: slightly more than 1 if some tokens have no text
    /// of their own.
    fn tokens_per_text(&self) -> f64 {
        let texts = count_to_f64(u64::try_from(self.token_ns.len()).unwrap_or(u64::MAX));
        f64::from(self.usage.completion_tokens.saturating_sub(1)) / (texts - 1.0)
    }

    /// Returns the number of prompt tokens per second until the first text.
    pub(super) fn prompt_rate(&self) -> f64 {
        f64::from(self.usage.prompt_tokens) / self.ttft().as_secs_f64()
    }

    /// Returns the time at which the first text arrived.
    pub(super) fn first_ns(&self) -> u64 {
        self.token_ns.first().copied().unwrap_or(self.sent_ns)
    }

    pub(super) fn last_ns(&self) -> u64 {
        self.token_ns.last().copied().unwrap_or(self.sent_ns)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a reply whose texts arrived at these times, in milliseconds after the request.
    fn reply(text_ms: &[u64], completion_tokens: u32) -> Reply {
        let sent_ns = 1_000_000_000;
        Reply {
            usage: Usage {
                prompt_tokens: 100,
                completion_tokens,
                ..Usage::default()
            },
            sent_ns,
            token_ns: text_ms.iter().map(|ms| sent_ns + ms * 1_000_000).collect(),
            ..Reply::default()
        }
    }

    #[test]
    fn the_prompt_is_timed_until_the_first_text_and_decoding_after_it() {
        let reply = reply(&[500, 600, 1_000], 3);
        assert_eq!(reply.ttft(), Duration::from_millis(500));
        assert_eq!(reply.prompt_rate(), 200.0);
        assert_eq!(reply.decode_rate(), 4.0);
    }

    #[test]
    fn a_rate_between_two_times_counts_only_the_tokens_between_them() {
        let reply = reply(&[100, 500, 600, 800, 2_000], 5);
        let start_ns = reply.sent_ns + 450_000_000;
        assert_eq!(
            reply.decode_rate_between(start_ns, reply.last_ns() - 1),
            2.0 / 0.3
        );
        // Two of nine tokens have no text of their own.
        let reply = self::reply(&[0, 1_000, 2_000, 3_000, 4_000, 5_000, 6_000], 9);
        assert_eq!(reply.decode_rate(), 8.0 / 6.0);
    }

    #[test]
    fn a_token_without_a_text_of_its_own_is_not_lost() {
        assert!(reply(&[1, 2, 3], 3).check(3).is_ok());
        assert!(reply(&[1, 2], 3).check(3).is_ok());
        for (texts, counted, found) in [
            (&[1, 2, 3][..], 2, "2 by the server's count"),
            (&[1, 2, 3], 4, "4 by the server's count"),
            (&[1, 2, 3, 4], 3, "4 texts"),
            (&[], 3, "no text"),
        ] {
            let fault = reply(texts, counted).check(3).unwrap_err();
            assert_eq!(fault.to_string(), format!("expected 3 tokens, got {found}"));
        }
    }
}
