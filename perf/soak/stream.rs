//! One stream through a door: it is asked for, and read as far as its client wants, every token checked.

use bytes::Bytes;
use http::header::{ACCEPT, CONTENT_TYPE, HOST};
use http::{HeaderMap, Request, StatusCode};
use prost::Message;
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tonic::{Code, Status};

use super::Fault;
use super::connection::{Answer, Body, Connection};
use super::tokens::{Form, Stage, Tokens};
use crate::arguments::ServerUrl;

const PROMPT: &str = "Count the tokens.";

/// A stream whose answer has begun.
pub(super) struct Stream {
    body: Body,
    tokens: Tokens,
    form: Form,
}

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// All of its tokens came, and its end.
    Whole,
    /// It told of an error, and ended uncleanly.
    Failed(ErrorKind),
    /// It broke, or ended without its end.
    CutOff(Fault),
}

impl Stream {
    /// Asks for a stream.
    pub(super) async fn open(
        connection: &mut Connection,
        url: &ServerUrl,
        form: Form,
        tokens: u32,
    ) -> Result<Self, Fault> {
        let request = match form {
            Form::Ndjson => http(url, "application/x-ndjson", tokens, true),
            Form::Sse => http(url, "text/event-stream", tokens, true),
            Form::Grpc => grpc(url, "Complete", &completion(tokens)),
        };
        let answer = connection.send(request).await?;
        if answer.status != StatusCode::OK {
            return Err(refusal(answer).await);
        }
        if let Some(status) = failed_status(&answer.headers) {
            return Err(Fault::answer("a stream", format!("{status:?}")));
        }
        Ok(Self {
            body: answer.body,
            tokens: Tokens::new(form),
            form,
        })
    }

    /// Reads on until so many tokens have come, or the end.
    pub(super) async fn read_until(&mut self, count: u32) -> Result<(), Fault> {
        while self.tokens.count() < count {
            match self.body.piece().await? {
                Some(piece) => self.tokens.read(&piece)?,
                None => break,
            }
        }
        Ok(())
    }

    /// How many tokens have come.
    pub(super) fn count(&self) -> u32 {
        self.tokens.count()
    }

    /// Reads to the end.
    ///
    /// # Errors
    /// When a token is not in its place, or something came that belongs to no stream.
    pub(super) async fn read_to_end(&mut self) -> Result<Ended, Fault> {
        let broken = loop {
            match self.body.piece().await {
                Ok(Some(piece)) => self.tokens.read(&piece)?,
                Ok(None) => break None,
                Err(fault) => break Some(fault),
            }
        };
        let cut_off = || Fault::CutOff(self.tokens.count());
        match (self.tokens.stage(), broken) {
            (Stage::Whole, None) if self.form == Form::Grpc => {
                let trailers = self.body.trailers().await?;
                Ok(failed_status(&trailers).map_or(Ended::Whole, |status| failure(&status)))
            }
            (Stage::Whole, None) => Ok(Ended::Whole),
            (Stage::Failed(kind), Some(_)) => Ok(Ended::Failed(kind)),
            // The record is there so that it is read; the end must not look like one.
            (Stage::Failed(kind), None) => Err(Fault::answer(
                "an unclean end",
                format!("a clean one after {}", kind.row().code),
            )),
            (Stage::Open | Stage::Finished, None) if self.form == Form::Grpc => {
                let trailers = self.body.trailers().await?;
                let status = failed_status(&trailers);
                Ok(status.map_or_else(|| Ended::CutOff(cut_off()), |status| failure(&status)))
            }
            (Stage::Open | Stage::Finished, None) => Ok(Ended::CutOff(cut_off())),
            (Stage::Open | Stage::Finished | Stage::Whole, Some(fault)) => Ok(Ended::CutOff(fault)),
        }
    }

    /// Reads to the end, which must be that of a whole stream of so many tokens.
    pub(super) async fn read_whole(mut self, tokens: u32) -> Result<(), Fault> {
        match self.read_to_end().await? {
            Ended::Whole if self.count() == tokens => Ok(()),
            Ended::Whole => Err(Fault::CutOff(self.count())),
            Ended::Failed(kind) => Err(Fault::answer("a whole stream", kind.row().code)),
            Ended::CutOff(fault) => Err(fault),
        }
    }
}

/// A request for a completion over HTTP.
pub(super) fn http(url: &ServerUrl, accept: &str, tokens: u32, stream: bool) -> Request<Bytes> {
    let body = format!(r#"{{"prompt":"{PROMPT}","max_tokens":{tokens},"stream":{stream}}}"#);
    let request = Request::post(format!("{url}/v1/completions"))
        .header(HOST, &url.authority)
        .header(CONTENT_TYPE, "application/json")
        .header(ACCEPT, accept)
        .body(body.into());
    request.expect("it is a whole request")
}

/// A call of a method of the inference service.
pub(super) fn grpc(url: &ServerUrl, method: &str, message: &[u8]) -> Request<Bytes> {
    let length = u32::try_from(message.len()).expect("a message is short");
    let framed = [&[0][..], &length.to_be_bytes(), message].concat();
    let request = Request::post(format!("{url}/tokenway.v1.Inference/{method}"))
        .header(CONTENT_TYPE, "application/grpc")
        .header("te", "trailers")
        .body(framed.into());
    request.expect("it is a whole request")
}

fn completion(tokens: u32) -> Vec<u8> {
    let request = v1::CompletionRequest {
        input: Some(Input::Prompt(PROMPT.to_owned())),
        max_tokens: Some(tokens),
        ..v1::CompletionRequest::default()
    };
    request.encode_to_vec()
}

/// The status of a call that failed; `None` of one that did not, or not yet.
pub(super) fn failed_status(headers: &HeaderMap) -> Option<Status> {
    Status::from_header_map(headers).filter(|status| status.code() != Code::Ok)
}

fn failure(status: &Status) -> Ended {
    Ended::Failed(Error::from(status).kind)
}

async fn refusal(answer: Answer) -> Fault {
    let status = answer.status;
    let body = answer.body.whole().await.unwrap_or_default();
    let text = String::from_utf8_lossy(&body);
    Fault::answer("a stream", format!("{status}: {text}"))
}
