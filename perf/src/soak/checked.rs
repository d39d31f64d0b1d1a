//! A stream of the test runner, read as far as its client wants. Every token is checked.

use tokenway::error::ErrorKind;

use crate::fault::Fault;
use crate::order;
use crate::stream::{CompletionRequest, Connection, Ending, Event, Format, Stream};

/// A stream whose response has started.
pub(super) struct CheckedStream {
    stream: Stream,
    next_index: u32,
}

/// End of a stream.
#[derive(Debug)]
pub(super) enum Ended {
    /// All tokens and the end arrived.
    Whole,
    /// The server sent an error, and ended the stream uncleanly.
    Failed(ErrorKind),
    /// The stream broke, or its end is missing.
    CutOff(Fault),
}

impl CheckedStream {
    /// Requests a stream.
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

    /// Reads until this many tokens have arrived, or the end.
    pub(super) async fn read_until(&mut self, count: u32) -> Result<(), Fault> {
        let Self { stream, next_index } = self;
        while *next_index < count {
            if !stream.read(|event, _| check(event, next_index)).await? {
                break;
            }
        }
        Ok(())
    }

    /// Number of tokens that have arrived.
    pub(super) fn count(&self) -> u32 {
        self.next_index
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// If a token is not in its place, or the body is not a completion.
    pub(super) async fn read_to_end(&mut self) -> Result<Ended, Fault> {
        let Self { stream, next_index } = self;
        match stream
            .read_to_end(|event, _| check(event, next_index))
            .await?
        {
            Ending::Complete => Ok(Ended::Whole),
            Ending::Incomplete(fault) => Ok(Ended::CutOff(fault)),
            Ending::Failed { failure, is_clean } => {
                let kind = failure.code.as_deref().and_then(ErrorKind::from_code);
                let kind = kind.ok_or_else(|| Fault::Malformed(failure.to_string()))?;
                // A client that ignores the error record must still see that the stream failed.
                if is_clean {
                    let code = kind.row().code;
                    return Err(Fault::unexpected(
                        "an unclean end",
                        format!("a clean one after {code}"),
                    ));
                }
                Ok(Ended::Failed(kind))
            }
        }
    }

    /// Reads to the end, which must be that of a complete stream of this many tokens.
    pub(super) async fn read_whole(mut self, tokens: u32) -> Result<(), Fault> {
        match self.read_to_end().await? {
            Ended::Whole => self.check_count(tokens),
            Ended::Failed(kind) => Err(Fault::unexpected("a complete stream", kind.row().code)),
            Ended::CutOff(fault) => Err(fault),
        }
    }

    /// Checks the number of tokens of a complete stream.
    pub(super) fn check_count(&self, tokens: u32) -> Result<(), Fault> {
        if self.count() == tokens {
            return Ok(());
        }
        Err(Fault::unexpected(
            format!("{tokens} tokens"),
            self.count().to_string(),
        ))
    }
}

/// Checks one event: each token must be the next one.
fn check(event: Event<'_>, next_index: &mut u32) -> Result<(), Fault> {
    let expected = *next_index;
    match event {
        Event::Token(token) => {
            let index = order::agreed_index(&token.text, token.index)?;
            if index != expected {
                let found = token.text.into_owned();
                return Err(Fault::Order { expected, found });
            }
            *next_index += 1;
            Ok(())
        }
        Event::Started if expected > 0 => Err(Fault::Malformed("a second start".to_owned())),
        Event::Other => Err(Fault::Malformed("a record without a token".to_owned())),
        Event::Piece(_) | Event::Started | Event::Finished | Event::Done | Event::Error(_) => {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::stream::Token;

    fn token(text: &'static str, index: Option<u32>) -> Event<'static> {
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
            token("token_0", Some(0)),
            token("token_1", None),
        ] {
            check(event, &mut next).unwrap();
        }
        for wrong in [
            token("token_1", None),
            token("token_3", None),
            token("Paris", None),
            token("token_2", Some(3)),
            Event::Started,
            Event::Other,
        ] {
            assert!(check(wrong, &mut next).is_err());
        }
        assert_eq!(next, 2);
    }
}
