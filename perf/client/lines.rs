//! The lines of an NDJSON body: one JSON object on each, as OpenAI's completions have them. It knows
//! nothing of how they are sent.

use std::borrow::Cow;

use serde::Deserialize;

use super::{Received, StreamError};
use crate::stamp::StampObject;

/// The lines of a body, which are cut anywhere by its frames.
#[derive(Default)]
pub(super) struct Lines {
    /// The beginning of a line whose end has not come.
    unfinished: Vec<u8>,
    has_finished: bool,
}

impl Lines {
    pub(super) fn read(
        &mut self,
        data: &[u8],
        received_ns: u64,
        received: &mut Received,
    ) -> Result<(), StreamError> {
        let mut rest = data;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            if self.unfinished.is_empty() {
                self.line(&rest[..end], received_ns, received)?;
            } else {
                let mut line = std::mem::take(&mut self.unfinished);
                line.extend_from_slice(&rest[..end]);
                self.line(&line, received_ns, received)?;
            }
            rest = &rest[end + 1..];
        }
        self.unfinished.extend_from_slice(rest);
        Ok(())
    }

    fn line(
        &mut self,
        line: &[u8],
        received_ns: u64,
        received: &mut Received,
    ) -> Result<(), StreamError> {
        let parsed: Line<'_> = serde_json::from_slice(line).map_err(|error| {
            received.malformed(format!("{:?} ({error})", String::from_utf8_lossy(line)))
        })?;
        if let Some(error) = parsed.error {
            return Err(received.error_record(error.into_text()));
        }
        let Some(choice) = parsed.choices.into_iter().next() else {
            return Ok(());
        };
        // An end that was known only after the last token has a line without a text.
        let is_token = !(choice.text.is_empty() && choice.finish_reason.is_some());
        if is_token {
            let stamp = parsed.stamp.and_then(StampObject::into_stamp);
            received.token(&choice.text, received_ns, stamp)?;
        }
        self.has_finished |= choice.finish_reason.is_some();
        Ok(())
    }

    pub(super) fn end(&self, received: &Received) -> Result<(), StreamError> {
        if !self.unfinished.is_empty() {
            return Err(received.cut_off("the last line has no end"));
        }
        if !self.has_finished {
            return Err(received.cut_off("no line has a finish_reason"));
        }
        Ok(())
    }
}

/// The text of an error object.
pub(super) fn error_text(body: &[u8]) -> Option<String> {
    let parsed: Line<'_> = serde_json::from_slice(body).ok()?;
    parsed.error.map(ErrorObject::into_text)
}

/// A line, or the body of a refusal.
#[derive(Deserialize)]
struct Line<'a> {
    #[serde(borrow, default)]
    choices: Vec<Choice<'a>>,
    stamp: Option<StampObject>,
    error: Option<ErrorObject>,
}

#[derive(Deserialize)]
struct Choice<'a> {
    #[serde(borrow)]
    text: Cow<'a, str>,
    #[serde(borrow)]
    finish_reason: Option<Cow<'a, str>>,
}

#[derive(Deserialize)]
struct ErrorObject {
    message: String,
    code: Option<String>,
}

impl ErrorObject {
    fn into_text(self) -> String {
        match self.code {
            None => self.message,
            Some(code) => format!("{} ({code})", self.message),
        }
    }
}

#[cfg(test)]
mod tests {
    use indicatif::ProgressBar;

    use super::*;

    fn line(text: &str, finish_reason: &str) -> String {
        format!(
            "{{\"choices\":[{{\"text\":\"{text}\",\"finish_reason\":{finish_reason}}}],\
             \"stamp\":{{\"due_ns\":3,\"emitted_ns\":4}}}}\n"
        )
    }

    fn read(frames: &[&str]) -> (Result<(), StreamError>, Received) {
        let (mut lines, mut received) = (Lines::default(), Received::of(2, ProgressBar::hidden()));
        for (received_ns, frame) in (10..).zip(frames) {
            if let Err(error) = lines.read(frame.as_bytes(), received_ns, &mut received) {
                return (Err(error), received);
            }
        }
        (lines.end(&received), received)
    }

    #[test]
    fn a_line_is_timed_by_the_frame_that_ends_it() {
        let both = line("token_0", "null") + &line("token_1", "\"length\"");
        let (ended, received) = read(&[&both[..30], &both[30..120], &both[120..]]);
        ended.unwrap();
        let times: Vec<_> = received
            .samples()
            .iter()
            .map(|sample| (sample.index, sample.received_ns))
            .collect();
        assert_eq!(times, [(0, 11), (1, 12)]);
        let stamp = received.samples()[0].stamp.unwrap();
        assert_eq!((stamp.due_ns, stamp.emitted_ns), (Some(3), 4));
    }

    #[test]
    fn an_end_on_a_line_of_its_own_is_no_token() {
        let (ended, received) = read(&[&line("token_0", "null"), &line("", "\"stop\"")]);
        ended.unwrap();
        assert_eq!(received.samples().len(), 1);
    }

    #[test]
    fn a_body_without_its_last_line_was_cut_off() {
        for frames in [
            vec![line("token_0", "null")],
            vec![line("token_0", "\"length\""), "{".to_owned()],
        ] {
            let frames: Vec<_> = frames.iter().map(String::as_str).collect();
            let (ended, _) = read(&frames);
            assert!(
                matches!(ended, Err(StreamError::CutOff { after: 1, .. })),
                "{ended:?}"
            );
        }
    }

    #[test]
    fn an_error_record_is_told_with_its_code() {
        let error = "{\"error\":{\"message\":\"Gone.\",\"code\":\"worker_lost\"}}\n";
        let (ended, _) = read(&[&line("token_0", "null"), error]);
        assert_eq!(
            ended.unwrap_err().to_string(),
            "the stream ended with an error after 1 tokens: Gone. (worker_lost)"
        );
    }
}
