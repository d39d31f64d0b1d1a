//! A stream over HTTP/1.1, or over a bare socket: the least of a client that can check what it reads.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::figures::{Figures, Progress};
use super::lines::Lines;
use super::session::Asked;
use super::{Fault, Load};
use crate::arguments::ServerUrl;

/// What is asked for over HTTP, or over a bare socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Form {
    /// Lines over a bare socket.
    Raw,
    /// NDJSON.
    Ndjson,
    /// Server-sent events.
    Sse,
}

/// A connection that is kept alive.
pub(super) struct Connection {
    socket: TcpStream,
    form: Form,
}

impl Connection {
    pub(super) async fn open(url: &ServerUrl, form: Form) -> io::Result<Self> {
        let socket = TcpStream::connect(&url.authority).await?;
        socket.set_nodelay(true)?;
        Ok(Self { socket, form })
    }

    /// Makes a request.
    pub(super) async fn request(
        &mut self,
        asked: &Asked,
        mut progress: Progress,
    ) -> Result<(), Fault> {
        let mut answer = Answer::new(self.form);
        self.socket.write_all(&asked.message).await?;
        while !answer.has_ended() {
            let read = self.read(asked).await?;
            let received_ns = monotonic_ns();
            if read == 0 {
                return Err(Fault::CutOff(progress.next_index));
            }
            let mut figures = asked.notes.borrow_mut();
            figures.read(read);
            let piece = &asked.buffer.borrow()[..read];
            answer.read(piece, received_ns, &mut progress, &mut figures)?;
        }
        if progress.next_index != asked.tokens {
            return Err(Fault::CutOff(progress.next_index));
        }
        Ok(())
    }

    /// Reads into the buffer that all streams share.
    async fn read(&mut self, asked: &Asked) -> io::Result<usize> {
        let socket = &mut self.socket;
        poll_fn(|cx| {
            let mut buffer = asked.buffer.borrow_mut();
            let mut buffer = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut *socket).poll_read(cx, &mut buffer))?;
            Poll::Ready(Ok(buffer.filled().len()))
        })
        .await
    }
}

/// The request, as it is written to a connection.
pub(super) fn message(url: &ServerUrl, form: Form, load: &Load) -> Bytes {
    let body = body(load);
    let accept = match form {
        Form::Sse => "text/event-stream",
        Form::Ndjson => "application/x-ndjson",
        Form::Raw => return format!("{body}\n").into(),
    };
    let (path, host, length) = (url.path("/v1/completions"), &url.authority, body.len());
    format!(
        "POST {path} HTTP/1.1\r\nhost: {host}\r\ncontent-type: application/json\r\n\
         accept: {accept}\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .into()
}

fn body(load: &Load) -> String {
    let options = if load.timed {
        r#","stream_options":{"include_stamps":true}"#
    } else {
        ""
    };
    let tokens = load.tokens;
    format!(r#"{{"prompt":"Count the tokens.","max_tokens":{tokens},"stream":true{options}}}"#)
}

/// An answer as it comes.
struct Answer {
    framing: Framing,
    lines: Lines,
    /// What was read of a head or of a chunk's size that is not whole yet.
    unread: Vec<u8>,
}

/// What comes next of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Framing {
    /// There is none: lines to the last token.
    None,
    Head,
    ChunkSize,
    /// So many bytes of a chunk, and then its line's end.
    Chunk(usize),
    ChunkEnd,
    /// The empty line after the last chunk.
    LastEnd,
    Ended,
}

impl Answer {
    fn new(form: Form) -> Self {
        let framing = match form {
            Form::Raw => Framing::None,
            Form::Ndjson | Form::Sse => Framing::Head,
        };
        Self {
            framing,
            lines: Lines::default(),
            unread: Vec::new(),
        }
    }

    fn has_ended(&self) -> bool {
        match self.framing {
            Framing::None => self.lines.has_finished(),
            Framing::Ended => true,
            Framing::Head
            | Framing::ChunkSize
            | Framing::Chunk(_)
            | Framing::ChunkEnd
            | Framing::LastEnd => false,
        }
    }

    fn read(
        &mut self,
        mut piece: &[u8],
        received_ns: u64,
        progress: &mut Progress,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        while !piece.is_empty() {
            match self.framing {
                Framing::None => {
                    return self.lines.read(piece, received_ns, progress, figures);
                }
                Framing::Chunk(left) => {
                    let (data, rest) = piece.split_at(left.min(piece.len()));
                    self.lines.read(data, received_ns, progress, figures)?;
                    piece = rest;
                    self.framing = match left - data.len() {
                        0 => Framing::ChunkEnd,
                        left => Framing::Chunk(left),
                    };
                }
                Framing::Head => piece = self.until(piece, b"\r\n\r\n", Self::head)?,
                Framing::ChunkSize => piece = self.until(piece, b"\r\n", Self::chunk_size)?,
                Framing::ChunkEnd => piece = self.until(piece, b"\r\n", Self::chunk_end)?,
                Framing::LastEnd => piece = self.until(piece, b"\r\n", Self::last_end)?,
                Framing::Ended => {
                    let what = String::from_utf8_lossy(piece).into_owned();
                    return Err(Fault::Malformed(what));
                }
            }
        }
        Ok(())
    }

    /// Collects up to an end, and hands over what came before it; returns what came after.
    fn until<'a>(
        &mut self,
        piece: &'a [u8],
        end: &[u8],
        take: fn(&[u8]) -> Result<Framing, Fault>,
    ) -> Result<&'a [u8], Fault> {
        let before = self.unread.len();
        self.unread.extend_from_slice(piece);
        let Some(at) = memchr::memmem::find(&self.unread, end) else {
            return Ok(&[]);
        };
        self.framing = take(&self.unread[..at])?;
        self.unread.clear();
        Ok(&piece[at + end.len() - before..])
    }

    fn head(head: &[u8]) -> Result<Framing, Fault> {
        let head = String::from_utf8_lossy(head).to_ascii_lowercase();
        let status = head.split("\r\n").next().unwrap_or_default().to_owned();
        if !status.starts_with("http/1.1 200") {
            return Err(Fault::Refused(status));
        }
        if !head.contains("transfer-encoding: chunked") {
            return Err(Fault::Malformed("a body that is not chunked".to_owned()));
        }
        Ok(Framing::ChunkSize)
    }

    fn chunk_size(line: &[u8]) -> Result<Framing, Fault> {
        let text = std::str::from_utf8(line).unwrap_or_default();
        let digits = text.split(';').next().unwrap_or_default().trim();
        match usize::from_str_radix(digits, 16) {
            Ok(0) => Ok(Framing::LastEnd),
            Ok(size) => Ok(Framing::Chunk(size)),
            Err(_) => Err(Fault::Malformed(format!("the chunk size {text:?}"))),
        }
    }

    fn chunk_end(line: &[u8]) -> Result<Framing, Fault> {
        if line.is_empty() {
            Ok(Framing::ChunkSize)
        } else {
            Err(Fault::Malformed("a chunk without its end".to_owned()))
        }
    }

    fn last_end(_trailer: &[u8]) -> Result<Framing, Fault> {
        Ok(Framing::Ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ANSWER: &str = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n\
        1f\r\n{\"text\":\"token_0\",\"finish_reaso\r\n\
        1a\r\nn\":null}\n{\"text\":\"token_1\"\r\n\
        3;x=y\r\n,\"f\r\n\
        18\r\ninish_reason\":\"length\"}\n\r\n\
        0\r\n\r\n";

    #[test]
    fn an_answer_is_read_wherever_its_pieces_and_its_chunks_are_cut() {
        for cut in 1..ANSWER.len() {
            let (mut answer, mut progress, mut figures) = (
                Answer::new(Form::Ndjson),
                Progress::begin(0),
                Figures::new(),
            );
            for piece in [&ANSWER[..cut], &ANSWER[cut..]] {
                answer
                    .read(piece.as_bytes(), 1, &mut progress, &mut figures)
                    .unwrap_or_else(|fault| panic!("cut at {cut}: {fault}"));
            }
            assert!(answer.has_ended(), "cut at {cut}");
            assert_eq!(figures.tokens, 2);
        }
    }

    #[test]
    fn a_refusal_is_told_by_its_status() {
        let refusal = b"HTTP/1.1 429 Too Many Requests\r\n\r\n";
        let (mut answer, mut progress, mut figures) = (
            Answer::new(Form::Ndjson),
            Progress::begin(0),
            Figures::new(),
        );
        let fault = answer.read(refusal, 1, &mut progress, &mut figures);
        assert!(fault.unwrap_err().to_string().contains("429"));
    }
}
