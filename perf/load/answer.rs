//! An answer over HTTP/1.1, cut anywhere by the reads that bring it: its head, and its body by any of
//! the framings of RFC 9112, section 6. It knows nothing of what a body means.

use super::Fault;

/// More than any head or any line of a chunk's size has.
const LONGEST_HEAD: usize = 64 * 1024;

/// How much of a refusal's body is told.
const TOLD: usize = 1024;

/// An answer as it comes.
pub(crate) struct Answer {
    framing: Framing,
    /// What was read of a head or of a line that is not whole yet.
    unread: Vec<u8>,
    /// The status line of a refusal, and the beginning of its body.
    refusal: Option<(String, Vec<u8>)>,
    closes: bool,
}

/// What comes next of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    Head,
    ChunkSize,
    /// So many bytes of a chunk, and then its line's end.
    Chunk(usize),
    ChunkEnd,
    /// The lines after the last chunk, of which an empty one is the last.
    Trailer,
    /// So many bytes of the body.
    Length(usize),
    /// The body has no end but the connection's.
    UntilClose,
    Ended,
}

impl Answer {
    /// Nothing yet.
    pub(crate) fn new() -> Self {
        Self {
            framing: Framing::Head,
            unread: Vec::new(),
            refusal: None,
            closes: false,
        }
    }

    /// Whether its last byte has come.
    pub(crate) fn has_ended(&self) -> bool {
        self.framing == Framing::Ended
    }

    /// Whether the server takes another request on the connection after this answer.
    pub(crate) fn keeps_connection(&self) -> bool {
        !self.closes
    }

    /// Takes the next piece, and hands over what it has of the body.
    ///
    /// # Errors
    /// What `take` returns, and where the answer is a refusal that has ended, or is none at all.
    pub(crate) fn read(
        &mut self,
        mut piece: &[u8],
        mut take: impl FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        while !piece.is_empty() {
            match self.framing {
                Framing::Chunk(left) => {
                    let (data, rest) = piece.split_at(left.min(piece.len()));
                    self.data(data, &mut take)?;
                    piece = rest;
                    self.framing = match left - data.len() {
                        0 => Framing::ChunkEnd,
                        left => Framing::Chunk(left),
                    };
                }
                Framing::Length(left) => {
                    let (data, rest) = piece.split_at(left.min(piece.len()));
                    self.data(data, &mut take)?;
                    piece = rest;
                    self.framing = of_length(left - data.len());
                }
                Framing::UntilClose => {
                    self.data(piece, &mut take)?;
                    piece = &[];
                }
                Framing::Head => piece = self.until(piece, b"\r\n\r\n", Self::head)?,
                Framing::ChunkSize => piece = self.until(piece, b"\r\n", Self::chunk_size)?,
                Framing::ChunkEnd => piece = self.until(piece, b"\r\n", Self::chunk_end)?,
                Framing::Trailer => piece = self.until(piece, b"\r\n", Self::trailer)?,
                Framing::Ended => return Err(malformed("something after its end", piece)),
            }
        }
        if self.has_ended() {
            self.refused()
        } else {
            Ok(())
        }
    }

    /// Takes the end of the connection, which is the end of some answers.
    ///
    /// # Errors
    /// Where the answer is a refusal. One that is not whole then has no end.
    pub(crate) fn closed(&mut self) -> Result<(), Fault> {
        if self.framing == Framing::UntilClose {
            self.framing = Framing::Ended;
        }
        self.refused()
    }

    fn data(
        &mut self,
        data: &[u8],
        take: &mut impl FnMut(&[u8]) -> Result<(), Fault>,
    ) -> Result<(), Fault> {
        match &mut self.refusal {
            None => take(data),
            Some((_, told)) => {
                let room = TOLD.saturating_sub(told.len());
                told.extend_from_slice(&data[..room.min(data.len())]);
                Ok(())
            }
        }
    }

    fn refused(&mut self) -> Result<(), Fault> {
        let Some((status, body)) = self.refusal.take() else {
            return Ok(());
        };
        let body = String::from_utf8_lossy(&body);
        Err(Fault::Refused(match body.trim() {
            "" => status,
            body => format!("{status}: {body}"),
        }))
    }

    /// Collects up to an end, and hands over what came before it; returns what came after.
    fn until<'a>(
        &mut self,
        piece: &'a [u8],
        end: &[u8],
        take: fn(&mut Self, &[u8]) -> Result<Framing, Fault>,
    ) -> Result<&'a [u8], Fault> {
        let mut unread = std::mem::take(&mut self.unread);
        let before = unread.len();
        unread.extend_from_slice(piece);
        let Some(at) = memchr::memmem::find(&unread, end) else {
            if unread.len() > LONGEST_HEAD {
                return Err(malformed("a head without an end", &unread[..TOLD]));
            }
            self.unread = unread;
            return Ok(&[]);
        };
        self.framing = take(self, &unread[..at])?;
        unread.clear();
        self.unread = unread;
        Ok(&piece[at + end.len() - before..])
    }

    fn head(&mut self, head: &[u8]) -> Result<Framing, Fault> {
        let text = String::from_utf8_lossy(head);
        let mut lines = text.split("\r\n");
        let status = lines.next().unwrap_or_default();
        let code = match status.split(' ').collect::<Vec<_>>()[..] {
            [version, code, ..] if version.starts_with("HTTP/1.") && code.len() == 3 => code,
            _ => return Err(malformed("no status line", head)),
        };
        if code.starts_with('1') {
            return Ok(Framing::Head);
        }
        self.closes = !status.starts_with("HTTP/1.1 ");
        if code != "200" {
            self.refusal = Some((status.to_owned(), Vec::new()));
        }
        let (mut is_chunked, mut length) = (false, None);
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let value = value.trim().to_ascii_lowercase();
            match name.to_ascii_lowercase().as_str() {
                "transfer-encoding" if value == "chunked" => is_chunked = true,
                "content-length" if length.as_ref().is_none_or(|known| *known == value) => {
                    length = Some(value);
                }
                "transfer-encoding" | "content-length" | "content-encoding"
                    if value != "identity" =>
                {
                    return Err(malformed("a body in an unknown coding", head));
                }
                "connection" => self.closes |= value.split(',').any(|of| of.trim() == "close"),
                _ => {}
            }
        }
        match length {
            _ if code == "204" || code == "304" => Ok(Framing::Ended),
            _ if is_chunked => Ok(Framing::ChunkSize),
            Some(length) => number(&length, 10).map(of_length),
            None => {
                self.closes = true;
                Ok(Framing::UntilClose)
            }
        }
    }

    fn chunk_size(&mut self, line: &[u8]) -> Result<Framing, Fault> {
        let text = std::str::from_utf8(line).unwrap_or_default();
        let digits = text.split(';').next().unwrap_or_default().trim();
        number(digits, 16).map(|size| match size {
            0 => Framing::Trailer,
            size => Framing::Chunk(size),
        })
    }

    fn chunk_end(&mut self, line: &[u8]) -> Result<Framing, Fault> {
        if line.is_empty() {
            Ok(Framing::ChunkSize)
        } else {
            Err(malformed("a chunk without its end", line))
        }
    }

    fn trailer(&mut self, line: &[u8]) -> Result<Framing, Fault> {
        Ok(if line.is_empty() {
            Framing::Ended
        } else {
            Framing::Trailer
        })
    }
}

fn of_length(left: usize) -> Framing {
    match left {
        0 => Framing::Ended,
        left => Framing::Length(left),
    }
}

/// A number of digits only: what `from_str_radix` takes besides is none here.
fn number(digits: &str, radix: u32) -> Result<usize, Fault> {
    let is_number = digits.chars().all(|digit| digit.is_digit(radix));
    let parsed = usize::from_str_radix(digits, radix).ok();
    let no_number = || malformed("no number of bytes", digits.as_bytes());
    parsed.filter(|_| is_number).ok_or_else(no_number)
}

fn malformed(what: &str, bytes: &[u8]) -> Fault {
    Fault::Malformed(format!("{what}: {:?}", String::from_utf8_lossy(bytes)))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is read of an answer in these pieces, after which the connection closes.
    fn read(pieces: &[&str]) -> Result<(String, Answer), Fault> {
        let (mut answer, mut body) = (Answer::new(), Vec::new());
        for piece in pieces {
            answer.read(piece.as_bytes(), |data| {
                body.extend_from_slice(data);
                Ok(())
            })?;
        }
        answer.closed()?;
        Ok((String::from_utf8(body).unwrap(), answer))
    }

    fn fault(answer: &str) -> String {
        let read = read(&[answer]).map(|(body, _)| body);
        read.expect_err("it is no good").to_string()
    }

    #[test]
    fn a_body_of_any_framing_is_read_wherever_its_pieces_are_cut() {
        for (head, body) in [
            ("content-length: 5", "hello"),
            (
                "Transfer-Encoding: Chunked",
                "3;name=\"x\"\r\nhel\r\n02 \r\nlo\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
            ),
            (
                "content-length: 7\r\ntransfer-encoding: chunked",
                "5\r\nhello\r\n0\r\n\r\n",
            ),
            ("content-type: text/plain", "hello"),
        ] {
            let answer =
                format!("HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\n{head}\r\n\r\n{body}");
            for cut in 1..answer.len() {
                let (read, answer) = read(&[&answer[..cut], &answer[cut..]])
                    .unwrap_or_else(|fault| panic!("{head} cut at {cut}: {fault}"));
                assert_eq!(
                    (read.as_str(), answer.has_ended()),
                    ("hello", true),
                    "{head}"
                );
            }
        }
    }

    #[test]
    fn a_body_that_is_cut_off_has_no_end() {
        for rest in [
            "content-length: 6\r\n\r\nhello",
            "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n",
            "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n",
            "content-le",
        ] {
            let (_, answer) = read(&[&format!("HTTP/1.1 200 OK\r\n{rest}")]).unwrap();
            assert!(!answer.has_ended(), "{rest}");
        }
    }

    #[test]
    fn a_connection_is_kept_unless_the_answer_says_otherwise() {
        for (head, is_kept) in [
            ("HTTP/1.1 200 OK\r\ncontent-length: 0", true),
            (
                "HTTP/1.1 200 OK\r\ncontent-length: 0\r\nConnection: TE, Close",
                false,
            ),
            ("HTTP/1.1 200 OK", false),
            ("HTTP/1.0 200 OK\r\ncontent-length: 0", false),
        ] {
            let (_, answer) = read(&[&format!("{head}\r\n\r\n")]).unwrap();
            assert_eq!(answer.keeps_connection(), is_kept, "{head}");
        }
    }

    #[test]
    fn a_refusal_is_told_with_its_body() {
        let refusal = "HTTP/1.1 429 Too Many Requests\r\ncontent-length: 4\r\n\r\nwait";
        let told = "the server answered HTTP/1.1 429 Too Many Requests";
        assert_eq!(fault(refusal), format!("{told}: wait"));
        assert_eq!(fault("HTTP/1.1 429 Too Many Requests\r\n\r\n"), told);
    }

    #[test]
    fn what_is_no_answer_is_told_as_such() {
        let ok = "HTTP/1.1 200 OK\r\n";
        for wrong in [
            "SSH-2.0-OpenSSH\r\n\r\n".to_owned(),
            format!("{ok}content-length: +5\r\n\r\nhello"),
            format!("{ok}content-length: 5\r\ncontent-length: 6\r\n\r\nhello"),
            format!("{ok}content-length: 5\r\n\r\nhello!"),
            format!("{ok}content-encoding: gzip\r\n\r\nhello"),
            format!("{ok}transfer-encoding: chunked\r\n\r\n-5\r\nhello\r\n"),
            format!("{ok}transfer-encoding: chunked\r\n\r\n5\r\nhello!\r\n"),
            format!("{ok}transfer-encoding: chunked\r\n\r\nfffffffffffffffff\r\n"),
        ] {
            let told = fault(&wrong);
            assert!(told.contains("what belongs to none"), "{wrong:?}: {told}");
        }
    }
}
