//! The ways by which a request reaches an engine, and what each of them says of it, in the same words.

use std::time::Duration;

use serde_json::{Value, json};
use tokenway::error::Error;
use tokenway::proto::v1;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::{Request, Status, Streaming};

use crate::outcome::{Choice, Likelihood, Outcome};
use crate::support::http::{self, End};
use crate::support::{Setup, TestServer, grpc};
use crate::table::Row;

/// A way to an engine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Grpc,
    Http(Format, Deployment),
}

/// The form of an answer over HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Ndjson,
    Sse,
    Unary,
}

/// Where the HTTP door is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deployment {
    InProcess,
    Remote,
}

/// A request whose answer nobody reads.
#[expect(dead_code, reason = "it is only held, and dropped")]
pub(crate) enum Open {
    Grpc(Streaming<v1::CompletionEvent>),
    Http(TcpStream),
}

/// An engine with an HTTP door of its own, and a gateway before it.
pub(crate) struct Servers {
    pub(crate) engine: TestServer,
    gateway: TestServer,
}

impl Transport {
    pub(crate) const ALL: [Self; 7] = [
        Self::Grpc,
        Self::Http(Format::Ndjson, Deployment::InProcess),
        Self::Http(Format::Sse, Deployment::InProcess),
        Self::Http(Format::Unary, Deployment::InProcess),
        Self::Http(Format::Ndjson, Deployment::Remote),
        Self::Http(Format::Sse, Deployment::Remote),
        Self::Http(Format::Unary, Deployment::Remote),
    ];

    /// Whether the transport can carry what the row asks for.
    pub(crate) fn takes(self, row: &Row) -> bool {
        match self {
            Self::Grpc | Self::Http(Format::Ndjson | Format::Sse, _) => !row.is_unary(),
            Self::Http(Format::Unary, _) => true,
        }
    }
}

impl Servers {
    pub(crate) async fn start(setup: Setup) -> Self {
        let engine = setup.start().await;
        let gateway = Setup::gateway(&[&engine]).start().await;
        Self { engine, gateway }
    }

    /// What becomes of a row by this transport.
    pub(crate) async fn run(&self, transport: Transport, row: &Row) -> Outcome {
        match transport {
            Transport::Grpc => self.over_grpc(row).await,
            Transport::Http(form, place) => self.over_http(row, form, self.door(place)).await,
        }
    }

    /// Sends a row, and leaves what comes of it to be read, or to be dropped.
    pub(crate) async fn begin(&self, transport: Transport, row: &Row) -> Open {
        match transport {
            Transport::Grpc => Open::Grpc(self.engine.stream(row.message()).await),
            Transport::Http(form, place) => {
                let address = self.door(place).http_address();
                let mut stream = TcpStream::connect(address).await.expect("a connection");
                let bytes = request(row, form).bytes();
                stream.write_all(&bytes).await.expect("the request is sent");
                Open::Http(stream)
            }
        }
    }

    fn door(&self, place: Deployment) -> &TestServer {
        match place {
            Deployment::InProcess => &self.engine,
            Deployment::Remote => &self.gateway,
        }
    }

    async fn over_grpc(&self, row: &Row) -> Outcome {
        let mut request = Request::new(row.message());
        if let Some(timeout) = row.timeout {
            request.set_timeout(timeout);
        }
        let completion = match self.engine.grpc().await.complete(request).await {
            Ok(answer) => grpc::collect(answer.into_inner()).await,
            Err(status) => return Outcome::failed(error_of(row, &status)),
        };
        let mut outcome = Outcome {
            echo: Some(completion.prompt.text.clone()).filter(|_| row.echoes()),
            scored: completion
                .prompt
                .tokens
                .iter()
                .filter_map(likelihood(row))
                .collect(),
            choices: completion
                .choices
                .iter()
                .map(|choice| choice_of(row, choice))
                .collect(),
            ..Outcome::default()
        };
        match &completion.error {
            Some(status) => outcome.error = Some(error_of(row, status)),
            None => {
                let usage = completion.usage();
                outcome.usage = Some((usage.prompt_tokens, usage.completion_tokens));
            }
        }
        outcome
    }

    async fn over_http(&self, row: &Row, form: Format, door: &TestServer) -> Outcome {
        let (response, body) = request(row, form).fetch(door).await;
        let lines = match form {
            Format::Ndjson if response.status == 200 => body.lines(),
            Format::Sse if response.status == 200 => events(&body),
            Format::Ndjson | Format::Sse | Format::Unary => {
                assert_eq!(body.end, End::Clean, "{body:?}");
                return Outcome::of_body(row, &body.json());
            }
        };
        let outcome = Outcome::of_lines(row, &lines);
        let is_whole = if outcome.error.is_some() {
            End::Unclean
        } else {
            End::Clean
        };
        assert_eq!(body.end, is_whole, "{}", body.text);
        outcome
    }
}

fn request(row: &Row, form: Format) -> http::Request {
    let mut body = row.body.clone();
    if form != Format::Unary {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true, "return_token_ids": true});
    }
    let request = http::post(row.path(), body.to_string()).accept(match form {
        Format::Ndjson => "application/x-ndjson",
        Format::Sse => "text/event-stream",
        Format::Unary => "application/json",
    });
    match row.timeout {
        None => request,
        Some(timeout) => request.header("x-request-timeout", &seconds(timeout)),
    }
}

/// The objects of a stream of server-sent events, which says `[DONE]` where it is whole.
fn events(body: &http::Body) -> Vec<Value> {
    let mut events = body.events();
    if body.end == End::Clean {
        assert_eq!(events.pop(), Some("[DONE]"));
    }
    let parse = |event| serde_json::from_str(event).expect("an event is JSON");
    events.into_iter().map(parse).collect()
}

fn choice_of(row: &Row, choice: &grpc::Choice) -> Choice {
    Choice {
        text: choice
            .tokens
            .iter()
            .map(|token| token.text.as_str())
            .collect(),
        ids: Some(choice.tokens.iter().map(|token| token.id).collect()),
        finish: match choice.finish {
            v1::FinishReason::Unspecified => None,
            v1::FinishReason::Stop => Some("stop".to_owned()),
            v1::FinishReason::Length => Some("length".to_owned()),
        },
        logprobs: choice.tokens.iter().filter_map(likelihood(row)).collect(),
    }
}

fn likelihood(row: &Row) -> impl Fn(&v1::Token) -> Option<Likelihood> {
    let shows_own = !row.is_chat();
    move |token| {
        let logprobs = token.logprobs.as_ref()?;
        let own = logprobs
            .logprob
            .map(|own| (logprobs.token_bytes.clone(), own));
        let top = logprobs
            .top
            .iter()
            .map(|top| (top.token_bytes.clone(), top.logprob));
        let mut top: Vec<_> = top.collect();
        // OpenAI's older form has the token itself among the likeliest.
        if let Some(own) = own.filter(|own| shows_own && !top.contains(own)) {
            top.push(own);
        }
        Some(Likelihood::new(
            &logprobs.token_bytes,
            logprobs.logprob,
            top,
        ))
    }
}

/// An error's code, and its field as the row's route names it.
fn error_of(row: &Row, status: &Status) -> (String, Option<String>) {
    let error = Error::from(status);
    let param = error.param.map(|param| match param.as_str() {
        "chat" => "messages".to_owned(),
        "prompt_token_ids" => "prompt".to_owned(),
        "max_tokens" if row.body.get("max_completion_tokens").is_some() => {
            "max_completion_tokens".to_owned()
        }
        _ => param,
    });
    (error.kind.row().code.to_owned(), param)
}

fn seconds(timeout: Duration) -> String {
    timeout.as_secs_f64().to_string()
}
