//! One stream, read to its end and compared with what it must be.

use std::time::Duration;

use http::{Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokenway::proto::v1::CompletionRequest;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::completion_request::Input;
use tokio::net::TcpStream;
use tokio::time::Instant;

use super::server::Server;
use super::tally::Tally;

/// How many different prompts there are.
pub(super) const PROMPTS: u16 = 8;

const OPENINGS: [&str; 8] = [
    "The capital of France is",
    "Once upon a time",
    "Water boils when",
    "The first programmer was",
    "A good engineer",
    "In the middle of the night",
    "The river flows",
    "Three things matter:",
];

/// The texts of a stream's tokens.
pub(super) type Expected = Vec<String>;

/// By which door a stream comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    Grpc,
    Http,
}

/// What a stream asks for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    door: Door,
    prompt: u16,
    tokens: u32,
}

/// Why a stream is none that it must be.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("it was refused or broke off: {0}")]
    Broke(String),
    #[error("after {after} tokens it failed: {message}")]
    Failed { after: usize, message: String },
    #[error("token {at} is {found:?}, and {expected:?} was due")]
    Other {
        at: usize,
        found: String,
        expected: String,
    },
    #[error("it ended after {0} tokens")]
    Short(usize),
}

impl Asked {
    /// What the stream of this number asks for.
    pub(super) fn of(number: u16, tokens: u32) -> Self {
        let door = if number.is_multiple_of(2) {
            Door::Grpc
        } else {
            Door::Http
        };
        Self {
            door,
            prompt: number / 2 % PROMPTS,
            tokens,
        }
    }

    /// A stream of this prompt.
    pub(super) fn of_prompt(prompt: u16, tokens: u32) -> Self {
        Self {
            door: Door::Grpc,
            prompt,
            tokens,
        }
    }

    pub(super) fn prompt(&self) -> usize {
        usize::from(self.prompt)
    }
}

/// The tokens of a stream as they come.
struct Coming<'a> {
    texts: Expected,
    expected: Option<&'a Expected>,
    last: Option<Instant>,
    tally: &'a Tally,
}

impl Coming<'_> {
    fn token(&mut self, text: &str) -> Result<(), Fault> {
        let now = Instant::now();
        let gap = self.last.replace(now).map(|last| now - last);
        self.tally.token(gap.unwrap_or(Duration::ZERO));
        let at = self.texts.len();
        self.texts.push(text.to_owned());
        match self.expected.map(|expected| expected.get(at)) {
            None => Ok(()),
            Some(Some(expected)) if expected == text => Ok(()),
            Some(expected) => Err(Fault::Other {
                at,
                found: text.to_owned(),
                expected: expected.cloned().unwrap_or_else(|| "the end".to_owned()),
            }),
        }
    }

    fn failed(&self, message: &impl ToString) -> Fault {
        Fault::Failed {
            after: self.texts.len(),
            message: message.to_string(),
        }
    }

    fn whole(self) -> Result<Expected, Fault> {
        match self.expected {
            Some(expected) if self.texts.len() < expected.len() => {
                Err(Fault::Short(self.texts.len()))
            }
            Some(_) | None => Ok(self.texts),
        }
    }
}

/// Runs a stream to its end.
pub(super) async fn run(
    server: &Server,
    asked: &Asked,
    expected: Option<&Expected>,
    tally: &Tally,
) -> Result<Expected, Fault> {
    let mut coming = Coming {
        texts: Vec::new(),
        expected,
        last: None,
        tally,
    };
    match asked.door {
        Door::Grpc => by_grpc(server, asked, &mut coming).await?,
        Door::Http => by_http(server, asked, &mut coming).await?,
    }
    coming.whole()
}

async fn by_grpc(server: &Server, asked: &Asked, coming: &mut Coming<'_>) -> Result<(), Fault> {
    let request = CompletionRequest {
        input: Some(Input::Prompt(OPENINGS[asked.prompt()].to_owned())),
        max_tokens: Some(asked.tokens),
        seed: Some(asked.prompt.into()),
        ignore_eos: true,
        ..CompletionRequest::default()
    };
    let broke = |status: tonic::Status| Fault::Broke(status.message().to_owned());
    let events = server.grpc.clone().complete(request).await.map_err(broke)?;
    let mut events = events.into_inner();
    let mut has_summary = false;
    while let Some(event) = events
        .message()
        .await
        .map_err(|status| coming.failed(&status.message()))?
    {
        match event.event {
            Some(Event::Tokens(tokens)) => {
                if usize::try_from(tokens.first_index) != Ok(coming.texts.len()) {
                    let message = format!("its index {} leaves a gap", tokens.first_index);
                    return Err(coming.failed(&message));
                }
                for token in tokens.tokens.iter() {
                    coming.token(token.text)?;
                }
            }
            Some(Event::Summary(_)) => has_summary = true,
            Some(Event::Started(_) | Event::Prompt(_)) | None => {}
        }
    }
    if has_summary {
        Ok(())
    } else {
        Err(coming.failed(&"it has no summary"))
    }
}

async fn by_http(server: &Server, asked: &Asked, coming: &mut Coming<'_>) -> Result<(), Fault> {
    let broke = |error: &dyn std::error::Error| Fault::Broke(error.to_string());
    let socket = TcpStream::connect(&server.http)
        .await
        .map_err(|error| broke(&error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(socket))
        .await
        .map_err(|error| broke(&error))?;
    tokio::task::spawn_local(connection);
    let body = json!({
        "prompt": OPENINGS[asked.prompt()], "max_tokens": asked.tokens, "seed": asked.prompt,
        "ignore_eos": true, "stream": true,
    });
    let request = Request::post("/v1/completions")
        .header("host", &server.http)
        .header("content-type", "application/json")
        .header("accept", "application/x-ndjson")
        .body(Full::new(Bytes::from(body.to_string())))
        .expect("a whole request");
    let response = sender.send_request(request).await;
    let response = response.map_err(|error| broke(&error))?;
    let status = response.status();
    let mut body = response.into_body();
    let mut rest = Vec::new();
    let mut has_finished = false;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| coming.failed(&error))?;
        rest.extend_from_slice(frame.data_ref().map_or(&[], |data| &data[..]));
        while let Some(end) = memchr::memchr(b'\n', &rest) {
            let line: Vec<u8> = rest.drain(..=end).collect();
            let line: Value =
                serde_json::from_slice(&line).map_err(|error| coming.failed(&error))?;
            if let Some(message) = line["error"]["message"].as_str() {
                return Err(coming.failed(&message));
            }
            let choice = &line["choices"][0];
            coming.token(choice["text"].as_str().unwrap_or("no text"))?;
            has_finished |= choice["finish_reason"].is_string();
        }
    }
    match (status, has_finished) {
        (StatusCode::OK, true) => Ok(()),
        (StatusCode::OK, false) => Err(coming.failed(&"it has no finish reason")),
        (status, _) => Err(Fault::Broke(status.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is found of a stream of these tokens where `a`, `b` and `c` are due.
    fn found(texts: &[&str]) -> Result<Expected, Fault> {
        let expected = ["a", "b", "c"].map(str::to_owned).to_vec();
        let tally = Tally::new(1, 0);
        let mut coming = Coming {
            texts: Vec::new(),
            expected: Some(&expected),
            last: None,
            tally: &tally,
        };
        texts.iter().try_for_each(|text| coming.token(text))?;
        coming.whole()
    }

    #[test]
    fn a_stream_is_whole_only_with_each_token_once_and_in_order() {
        assert!(found(&["a", "b", "c"]).is_ok());
        for (texts, fault) in [
            (&["a", "b"][..], "it ended after 2 tokens"),
            (&["a", "c"], "token 1 is \"c\", and \"b\" was due"),
            (&["a", "a", "b"], "token 1 is \"a\", and \"b\" was due"),
            (
                &["a", "b", "c", "c"],
                "token 3 is \"c\", and \"the end\" was due",
            ),
        ] {
            assert_eq!(found(texts).unwrap_err().to_string(), fault);
        }
    }
}
