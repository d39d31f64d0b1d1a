//! A stream of the test runner that checks every token while it is read.

use tokenway::error::ErrorKind;

use crate::fault::Fault;
use crate::order;
use crate::stream::{CompletionRequest, Connection, Event, Format, Stream, StreamOutcome};

/// A stream whose response has started.
pub(super) struct CheckedStream {
    stream: Stream,
    next_index: u32,
}

/// End of a stream.
#[derive(Debug)]
pub(super) enum StreamEnd {
    /// The stream was complete.
    Whole,
    /// The server sent an error, and ended the stream uncleanly.
    Failed(ErrorKind),
    /// The stream broke, or its end is missing.
    Incomplete(Fault),
}

impl CheckedStream {
    /// Requests a stream and waits for the head of its response.
    pub(super) async fn open(
        connection: &mut Connection,
        format: Format,
        tokens: u32,
    ) -> Result<Self, Fault> {
        let completion = CompletionRequest::of_tokens(tokens);
        Ok(Self {
            stream: Stream::open(connection, format, &completion).await?,
            next_index: 0,
        })
    }

    /// Reads until this many tokens have arrived, or until the stream ends.
    pub(super) async fn read_until(&mut self, count: u32) -> Result<(), Fault> {
        let Self { stream, next_index } = self;
        while *next_index < count {
            if !stream
                .read(|event, _| check_event(event, next_index))
                .await?
            {
                break;
            }
        }
        Ok(())
    }

    pub(super) fn token_count(&self) -> u32 {
        self.next_index
    }

    /// Reads to the end.
    /// Returns a fault if a token is out of order, or if the body is not a completion.
    pub(super) async fn read_to_end(&mut self) -> Result<StreamEnd, Fault> {
        let Self { stream, next_index } = self;
        match stream
            .read_to_end(|event, _| check_event(event, next_index))
            .await?
        {
            StreamOutcome::Complete => Ok(StreamEnd::Whole),
            StreamOutcome::Incomplete(fault) => Ok(StreamEnd::Incomplete(fault)),
            StreamOutcome::Failed { failure, is_clean } => {
                let kind = failure.code.as_deref().and_then(ErrorKind::from_code);
                let kind = kind.ok_or_else(|| Fault::Malformed(failure.to_string()))?;
                // A client that ignores the error record must still notice that the stream failed.
                if is_clean {
                    let code = kind.mapping().code;
                    return Err(Fault::unexpected(
                        "an unclean end",
                        format!("a clean one after {code}"),
                    ));
                }
                Ok(StreamEnd::Failed(kind))
            }
        }
    }

    /// Reads to the end. The stream must be complete and have this many tokens.
    pub(super) async fn read_complete(mut self, tokens: u32) -> Result<(), Fault> {
        match self.read_to_end().await? {
            StreamEnd::Whole => self.check_count(tokens),
            StreamEnd::Failed(kind) => {
                Err(Fault::unexpected("a complete stream", kind.mapping().code))
            }
            StreamEnd::Incomplete(fault) => Err(fault),
        }
    }

    pub(super) fn check_count(&self, tokens: u32) -> Result<(), Fault> {
        if self.token_count() == tokens {
            return Ok(());
        }
        Err(Fault::unexpected(
            format!("{tokens} tokens"),
            self.token_count().to_string(),
        ))
    }
}

/// Checks one event: each token must be the next one.
fn check_event(event: Event<'_>, next_index: &mut u32) -> Result<(), Fault> {
    let expected = *next_index;
    match event {
        Event::Token(token) => {
            let index = order::check_index(&token.text, token.index)?;
            if index != expected {
                let found = token.text.into_owned();
                return Err(Fault::Order { expected, found });
            }
            *next_index += 1;
            Ok(())
        }
        Event::Started if expected > 0 => Err(Fault::Malformed("a second start".to_owned())),
        Event::Usage(_) | Event::Other => {
            Err(Fault::Malformed("a record without a token".to_owned()))
        }
        Event::BytesRead(_)
        | Event::Started
        | Event::FinishReason
        | Event::EndOfStream
        | Event::Error(_) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::stream::Token;

    fn token_event(text: &'static str, index: Option<u32>) -> Event<'static> {
        Event::Token(Token {
            text: Cow::Borrowed(text),
            index,
            stamp: None,
            bytes: 0,
        })
    }

    #[test]
    fn each_token_must_be_the_next_one() {
        let mut next = 0;
        for event in [
            Event::Started,
            token_event("token_0", Some(0)),
            token_event("token_1", None),
        ] {
            check_event(event, &mut next).unwrap();
        }
        for wrong in [
            token_event("token_1", None),
            token_event("token_3", None),
            token_event("Paris", None),
            token_event("token_2", Some(3)),
            Event::Started,
            Event::Other,
        ] {
            assert!(check_event(wrong, &mut next).is_err());
        }
        assert_eq!(next, 2);
    }
}
