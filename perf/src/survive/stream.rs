//! Runs one stream and compares it, token by token, with the undisturbed completion of its prompt.

use tokio::time::Instant;

use super::server::Server;
use super::tally::Tally;
use crate::fault::Fault;
use crate::stream::{CompletionRequest, Connection, Event, Format, RequestInput, Stream};

const PROMPT_OPENINGS: [&str; 8] = [
    "The capital of France is",
    "Once upon a time",
    "Water boils when",
    "The first programmer was",
    "A good engineer",
    "In the middle of the night",
    "The river flows",
    "Three things matter:",
];

/// Number of different prompts.
pub(super) const PROMPT_COUNT: u16 = 8;

/// Text of each token of a stream.
pub(super) type Texts = Vec<String>;

/// Request of a stream: its format, its prompt and its number of tokens.
#[derive(Clone, Copy, Debug)]
pub(super) struct StreamPlan {
    pub(super) format: Format,
    pub(super) prompt: u16,
    pub(super) tokens: u32,
}

/// Compares the tokens of a stream, as they arrive, with the expected tokens.
struct StreamChecker<'a> {
    texts: Texts,
    expected: Option<&'a Texts>,
    last: Option<Instant>,
    tally: &'a Tally,
}

impl StreamPlan {
    /// Returns the request of the stream with this number. Streams alternate between gRPC and HTTP, and use all
    /// prompts in turn.
    pub(super) fn for_number(number: u16, tokens: u32) -> Self {
        let formats = [Format::Grpc, Format::Ndjson];
        Self {
            format: formats[usize::from(number % 2)],
            prompt: number / 2 % PROMPT_COUNT,
            tokens,
        }
    }

    pub(super) fn prompt_index(&self) -> usize {
        usize::from(self.prompt)
    }

    /// Runs the stream to its end, and returns its texts, which must be the expected ones.
    pub(super) async fn run(
        &self,
        server: &Server,
        expected: Option<&Texts>,
        tally: &Tally,
    ) -> Result<Texts, Fault> {
        let url = match self.format {
            Format::Grpc => &server.grpc,
            Format::Raw | Format::Ndjson | Format::Sse => &server.http,
        };
        let mut connection = Connection::open(url, self.format.protocol()).await?;
        let completion = CompletionRequest {
            input: RequestInput::Text {
                prompt: PROMPT_OPENINGS[self.prompt_index()],
            },
            seed: Some(self.prompt.into()),
            ignore_eos: true,
            ..CompletionRequest::of_tokens(self.tokens)
        };
        let mut stream = Stream::open(&mut connection, self.format, &completion).await?;
        let mut received = StreamChecker::new(expected, tally);
        let ending = stream
            .read_to_end(|event, _| match event {
                Event::Token(token) => received.check_token(&token.text, token.index),
                Event::Usage(_) | Event::Other => {
                    Err(Fault::Malformed("a record without a token".to_owned()))
                }
                Event::BytesRead(_)
                | Event::Started
                | Event::FinishReason
                | Event::EndOfStream
                | Event::Error(_) => Ok(()),
            })
            .await?;
        ending.complete(stream.token_count())?;
        received.finish()
    }
}

impl<'a> StreamChecker<'a> {
    fn new(expected: Option<&'a Texts>, tally: &'a Tally) -> Self {
        Self {
            texts: Vec::new(),
            expected,
            last: None,
            tally,
        }
    }

    fn check_token(&mut self, text: &str, index: Option<u32>) -> Result<(), Fault> {
        let now = Instant::now();
        let gap = self.last.replace(now).map(|last| now - last);
        self.tally.record_token(gap.unwrap_or_default());
        let at = self.texts.len();
        if let Some(index) = index
            && usize::try_from(index) != Ok(at)
        {
            return Err(Fault::unexpected(format!("index {at}"), index.to_string()));
        }
        self.texts.push(text.to_owned());
        match self.expected.map(|expected| expected.get(at)) {
            None => Ok(()),
            Some(Some(expected)) if expected == text => Ok(()),
            Some(Some(expected)) => {
                let expected = format!("{expected:?} as token {at}");
                Err(Fault::unexpected(expected, format!("{text:?}")))
            }
            Some(None) => Err(Fault::unexpected(
                format!("{at} tokens"),
                format!("also {text:?}"),
            )),
        }
    }

    fn finish(self) -> Result<Texts, Fault> {
        let count = self.texts.len();
        match self.expected.map(Vec::len) {
            Some(expected) if count < expected => {
                let expected = format!("{expected} tokens");
                Err(Fault::unexpected(expected, count.to_string()))
            }
            Some(_) | None => Ok(self.texts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns the result of a stream with these tokens. The expected tokens are `a`, `b` and `c`.
    fn receive(texts: &[&str]) -> Result<Texts, Fault> {
        let expected = ["a", "b", "c"].map(str::to_owned).to_vec();
        let tally = Tally::new(1, 0);
        let mut received = StreamChecker::new(Some(&expected), &tally);
        for (index, text) in (0..).zip(texts) {
            received.check_token(text, Some(index))?;
        }
        received.finish()
    }

    #[test]
    fn a_stream_is_complete_only_with_each_token_once_and_in_order() {
        assert!(receive(&["a", "b", "c"]).is_ok());
        for (texts, fault) in [
            (&["a", "b"][..], "expected 3 tokens, got 2"),
            (&["a", "c"], "expected \"b\" as token 1, got \"c\""),
            (&["a", "a", "b"], "expected \"b\" as token 1, got \"a\""),
            (&["a", "b", "c", "c"], "expected 3 tokens, got also \"c\""),
        ] {
            assert_eq!(receive(texts).unwrap_err().to_string(), fault);
        }
    }

    #[test]
    fn an_index_that_leaves_a_gap_is_a_fault() {
        let tally = Tally::new(1, 0);
        let fault = StreamChecker::new(None, &tally)
            .check_token("a", Some(1))
            .unwrap_err();
        assert_eq!(fault.to_string(), "expected index 0, got 1");
    }
}
