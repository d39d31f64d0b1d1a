//! A stream over HTTP/1.1, or over a bare socket: the least of a client that can check what it reads.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::{Poll, ready};

use bytes::Bytes;
use tokenway::runner::monotonic_ns;
use tokio::io::{AsyncRead, AsyncWriteExt, ReadBuf};
use tokio::net::TcpStream;

use super::answer::Answer;
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
        progress: &mut Progress,
    ) -> Result<(), Fault> {
        let (mut framed, mut has_ended) = (Framed::new(self.form), false);
        self.socket.write_all(&asked.message).await?;
        while !has_ended {
            let read = self.read(asked).await?;
            let received_ns = monotonic_ns();
            if read == 0 {
                framed.closed()?;
                return Err(Fault::CutOff(progress.next_index));
            }
            let mut figures = asked.notes.borrow_mut();
            figures.read(read);
            let piece = &asked.buffer.borrow()[..read];
            has_ended = framed.read(piece, received_ns, progress, &mut figures)?;
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

/// The lines of an answer: framed by HTTP, or bare.
struct Framed {
    answer: Option<Answer>,
    lines: Lines,
}

impl Framed {
    fn new(form: Form) -> Self {
        let answer = match form {
            Form::Raw => None,
            Form::Ndjson | Form::Sse => Some(Answer::new()),
        };
        Self {
            answer,
            lines: Lines::default(),
        }
    }

    /// Takes the end of the connection, which is never an end that was asked for.
    fn closed(&mut self) -> Result<(), Fault> {
        self.answer.as_mut().map_or(Ok(()), Answer::closed)
    }

    /// Takes the next piece; true when it was the last.
    fn read(
        &mut self,
        piece: &[u8],
        received_ns: u64,
        progress: &mut Progress,
        figures: &mut Figures,
    ) -> Result<bool, Fault> {
        let lines = &mut self.lines;
        let Some(answer) = &mut self.answer else {
            lines.read(piece, received_ns, progress, figures)?;
            return Ok(lines.has_finished());
        };
        answer.read(piece, |data| {
            lines.read(data, received_ns, progress, figures)
        })?;
        Ok(answer.has_ended())
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
            let (mut framed, mut progress, mut figures) = (
                Framed::new(Form::Ndjson),
                Progress::begin(0),
                Figures::new(),
            );
            let mut has_ended = false;
            for piece in [&ANSWER[..cut], &ANSWER[cut..]] {
                has_ended = framed
                    .read(piece.as_bytes(), 1, &mut progress, &mut figures)
                    .unwrap_or_else(|fault| panic!("cut at {cut}: {fault}"));
            }
            assert!(has_ended, "cut at {cut}");
            assert_eq!(figures.tokens, 2);
        }
    }
}
