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
use super::figures::Figures;
use super::session::Asked;
use super::taker::Taker;
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

/// A connection that is kept alive where its server keeps it.
pub(super) struct Connection {
    socket: TcpStream,
    form: Form,
    is_idle: bool,
}

impl Connection {
    pub(super) async fn open(url: &ServerUrl, form: Form) -> io::Result<Self> {
        let socket = TcpStream::connect(&url.authority).await?;
        socket.set_nodelay(true)?;
        Ok(Self {
            socket,
            form,
            is_idle: true,
        })
    }

    /// Whether another request can be made: the one before had its answer, and the server did not say that
    /// it would close.
    pub(super) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Makes a request.
    pub(super) async fn request(
        &mut self,
        asked: &Asked,
        taker: &mut impl Taker,
    ) -> Result<(), Fault> {
        self.is_idle = false;
        let mut frame = Frame::of(self.form);
        self.socket.write_all(&asked.message).await?;
        while !frame.has_ended(taker) {
            let read = self.read(asked).await?;
            let received_ns = monotonic_ns();
            if read == 0 {
                frame.closed(taker)?;
                break;
            }
            let mut figures = asked.notes.borrow_mut();
            figures.read(read);
            let piece = &asked.buffer.borrow()[..read];
            frame.read(piece, received_ns, taker, &mut figures)?;
        }
        self.is_idle = frame.keeps_connection();
        taker.body_ended()
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

/// The request, as it is written to a connection. Without a model the server chooses.
pub(super) fn message(url: &ServerUrl, form: Form, load: &Load, model: Option<&str>) -> Bytes {
    let body = body(load, model);
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

fn body(load: &Load, model: Option<&str>) -> String {
    let options = if load.timed {
        r#","stream_options":{"include_stamps":true}"#
    } else {
        ""
    };
    let model = model.map_or_else(String::new, |model| {
        format!(r#""model":{},"#, serde_json::Value::from(model))
    });
    let tokens = load.tokens;
    format!(
        r#"{{{model}"prompt":"Count the tokens.","max_tokens":{tokens},"stream":true{options}}}"#
    )
}

/// What is around an answer's body.
enum Frame {
    Http(Answer),
    /// Nothing: lines to the last token.
    Bare,
}

impl Frame {
    fn of(form: Form) -> Self {
        match form {
            Form::Raw => Self::Bare,
            Form::Ndjson | Form::Sse => Self::Http(Answer::new()),
        }
    }

    fn has_ended(&self, taker: &impl Taker) -> bool {
        match self {
            Self::Http(answer) => answer.has_ended(),
            Self::Bare => taker.has_last(),
        }
    }

    fn keeps_connection(&self) -> bool {
        match self {
            Self::Http(answer) => answer.keeps_connection(),
            Self::Bare => true,
        }
    }

    /// Takes the next piece.
    fn read(
        &mut self,
        piece: &[u8],
        received_ns: u64,
        taker: &mut impl Taker,
        figures: &mut Figures,
    ) -> Result<(), Fault> {
        match self {
            Self::Http(answer) => answer.read(piece, |data| taker.body(data, received_ns, figures)),
            Self::Bare => taker.body(piece, received_ns, figures),
        }
    }

    /// Takes the end of the connection, which is the end of some answers.
    fn closed(&mut self, taker: &impl Taker) -> Result<(), Fault> {
        if let Self::Http(answer) = self {
            answer.closed()?;
        }
        if self.has_ended(taker) {
            Ok(())
        } else {
            Err(Fault::CutOff(taker.count()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::counted::Counted;
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
            let (mut frame, mut counted, mut figures) = (
                Frame::of(Form::Ndjson),
                Counted::begin(0, 2),
                Figures::new(),
            );
            for piece in [&ANSWER[..cut], &ANSWER[cut..]] {
                frame
                    .read(piece.as_bytes(), 1, &mut counted, &mut figures)
                    .unwrap_or_else(|fault| panic!("cut at {cut}: {fault}"));
            }
            assert!(frame.has_ended(&counted), "cut at {cut}");
            assert_eq!(figures.tokens, 2);
        }
    }
}
