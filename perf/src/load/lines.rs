//! Lines of NDJSON or of server-sent events, wherever pieces are cut. Only the fields that a measurement
//! needs are parsed.

use memchr::{memchr, memmem};

use crate::fault::Fault;
use crate::figures::{Figures, Progress};
use crate::stamp::Stamp;

const TEXT: &[u8] = b"\"text\":\"token_";

/// Lines of one response.
#[derive(Default)]
pub(super) struct Lines {
    /// Start of a line whose end has not arrived.
    unfinished: Vec<u8>,
    /// Position of the text in the last line, where it is expected again.
    text_at: usize,
    has_finished: bool,
}

impl Lines {
    /// Reports if the token with the finish reason has arrived.
    pub(super) fn has_finished(&self) -> bool {
        self.has_finished && self.unfinished.is_empty()
    }

    /// Reads the next piece.
    pub(super) fn read(
        &mut self,
        mut piece: &[u8],
        received_ns: u64,
        progress: &mut Progress,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        while let Some(end) = memchr(b'\n', piece) {
            if self.unfinished.is_empty() {
                self.line(&piece[..end], received_ns, progress, figures)?;
            } else {
                let mut line = std::mem::take(&mut self.unfinished);
                line.extend_from_slice(&piece[..end]);
                self.line(&line, received_ns, progress, figures)?;
            }
            piece = &piece[end + 1..];
        }
        self.unfinished.extend_from_slice(piece);
        Ok(())
    }

    fn line(
        &mut self,
        line: &[u8],
        received_ns: u64,
        progress: &mut Progress,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        let after_text = match self.after_text(line) {
            Some(at) => at,
            // A blank line ends an event, `[DONE]` a stream of events.
            None if line.is_empty() || line == b"data: [DONE]" || line.starts_with(b":") => {
                return Ok(());
            }
            None => return Err(Fault::malformed("a line without a token", line)),
        };
        let (index, rest) = number(&line[after_text..]);
        if index != Some(u64::from(progress.count)) || rest.first() != Some(&b'"') {
            let found = String::from_utf8_lossy(line).into_owned();
            let expected = progress.count;
            return Err(Fault::Order { expected, found });
        }
        self.has_finished = memmem::find(rest, b"\"finish_reason\":null").is_none();
        figures.token_bytes(line.len());
        progress.token(figures, received_ns, stamp(rest));
        Ok(())
    }

    fn after_text(&mut self, line: &[u8]) -> Option<usize> {
        let is_there = |at: usize| line.get(at..at + TEXT.len()) == Some(TEXT);
        if !is_there(self.text_at) {
            self.text_at = memmem::find(line, TEXT)?;
        }
        Some(self.text_at + TEXT.len())
    }
}

/// Stamp of a line, if it has one.
fn stamp(rest: &[u8]) -> Option<Stamp> {
    let after = |rest: &[u8], name: &[u8]| memmem::find(rest, name).map(|at| at + name.len());
    let rest = rest.get(after(rest, b"\"due_ns\":")?..)?;
    let (due_ns, rest) = number(rest);
    let (emitted_ns, _) = number(rest.get(after(rest, b"\"emitted_ns\":")?..)?);
    Some(Stamp {
        due_ns: Some(due_ns?),
        emitted_ns: emitted_ns?,
    })
}

/// Splits a leading number off.
fn number(text: &[u8]) -> (Option<u64>, &[u8]) {
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (digits, rest) = text.split_at(digits);
    let value = digits.iter().try_fold(0_u64, |value, digit| {
        value.checked_mul(10)?.checked_add(u64::from(digit - b'0'))
    });
    (value.filter(|_| !digits.is_empty()), rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pieces: &[&str]) -> Result<(Figures, Lines), Fault> {
        let (mut lines, mut progress, mut figures) =
            (Lines::default(), Progress::start(0), Figures::new());
        for (received_ns, piece) in (1_000..).zip(pieces) {
            lines.read(piece.as_bytes(), received_ns, &mut progress, &mut figures)?;
        }
        Ok((figures, lines))
    }

    fn line(index: u32, reason: &str) -> String {
        format!(
            "{{\"choices\":[{{\"text\":\"token_{index}\",\"finish_reason\":{reason}}}],\
             \"stamp\":{{\"due_ns\":100,\"emitted_ns\":400}}}}\n"
        )
    }

    #[test]
    fn tokens_are_counted_and_timed_wherever_the_pieces_are_cut() {
        let both = line(0, "null") + &line(1, "\"length\"");
        for cut in 1..both.len() {
            let (figures, lines) = read(&[&both[..cut], &both[cut..]]).unwrap();
            assert_eq!(figures.tokens, 2);
            // A line's bytes do not include its line feed.
            assert_eq!(figures.token_bytes, u64::try_from(both.len()).unwrap() - 2);
            assert!(lines.has_finished());
            assert_eq!(figures.times.runner.max(), 300);
        }
    }

    #[test]
    fn lines_of_events_without_a_token_are_skipped() {
        let token = line(0, "\"length\"");
        let events = format!("data: {token}\n: alive\n\ndata: [DONE]\n\n");
        let (figures, lines) = read(&[&events]).unwrap();
        assert_eq!((figures.tokens, lines.has_finished()), (1, true));
    }

    #[test]
    fn a_token_that_is_lost_repeated_or_foreign_is_a_fault() {
        for wrong in [
            line(0, "null") + &line(2, "null"),
            line(0, "null") + &line(0, "null"),
            "{\"error\":{\"message\":\"no\"}}\n".to_owned(),
        ] {
            assert!(read(&[&wrong]).is_err(), "{wrong}");
        }
    }
}
