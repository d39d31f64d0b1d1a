//! The transports over which a request can reach an engine, and the conversion of each transport's response to an
//! `Outcome`.

use std::time::Duration;

use serde_json::{Value, json};
use tokenway::error::Error;
use tokenway::proto::v1;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tonic::{Request, Status, Streaming};

use crate::outcome::{Choice, Outcome, TokenLogprob};
use crate::support::http::{self, BodyEnd};
use crate::support::{Setup, TestServer, grpc};
use crate::table::Row;

/// A way to send a request: the API, the process that serves the API, and for HTTP the response format.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transport {
    Grpc(Deployment),
    Http(Format, Deployment),
}

/// Response format of the HTTP API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    Ndjson,
    Sse,
    Unary,
}

/// The process that serves the API: the engine itself, or a gateway in front of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Deployment {
    InProcess,
    Remote,
}

/// A request that was sent and whose response is not read.
#[expect(dead_code, reason = "the value is only held and dropped")]
pub(crate) enum UnreadRequest {
    Grpc(Streaming<v1::CompletionEvent>),
    Http(TcpStream),
}

/// An engine that serves both APIs, and a gateway in front of it.
pub(crate) struct Servers {
    pub(crate) engine: TestServer,
    gateway: TestServer,
}

impl Transport {
    pub(crate) const ALL: [Self; 8] = [
        Self::Grpc(Deployment::InProcess),
        Self::Grpc(Deployment::Remote),
        Self::Http(Format::Ndjson, Deployment::InProcess),
        Self::Http(Format::Sse, Deployment::InProcess),
        Self::Http(Format::Unary, Deployment::InProcess),
        Self::Http(Format::Ndjson, Deployment::Remote),
        Self::Http(Format::Sse, Deployment::Remote),
        Self::Http(Format::Unary, Deployment::Remote),
    ];

    /// Returns true if the transport can carry this row. `best_of` requires a unary response.
    pub(crate) fn supports(self, row: &Row) -> bool {
        match self {
            Self::Grpc(_) | Self::Http(Format::Ndjson | Format::Sse, _) => !row.needs_unary(),
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

    /// Sends a row over this transport and reads its outcome.
    pub(crate) async fn run(&self, transport: Transport, row: &Row) -> Outcome {
        match transport {
            Transport::Grpc(deployment) => run_over_grpc(row, self.server(deployment)).await,
            Transport::Http(format, deployment) => {
                self.run_over_http(row, format, self.server(deployment))
                    .await
            }
        }
    }

    /// Sends a row. Does not read the response.
    pub(crate) async fn send_unread(&self, transport: Transport, row: &Row) -> UnreadRequest {
        match transport {
            Transport::Grpc(deployment) => {
                UnreadRequest::Grpc(self.server(deployment).stream(row.message()).await)
            }
            Transport::Http(format, deployment) => {
                let address = self.server(deployment).http_address();
                let mut stream = TcpStream::connect(address)
                    .await
                    .expect("the server accepts connections");
                let bytes = request(row, format).bytes();
                stream.write_all(&bytes).await.expect("the request is sent");
                UnreadRequest::Http(stream)
            }
        }
    }

    fn server(&self, deployment: Deployment) -> &TestServer {
        match deployment {
            Deployment::InProcess => &self.engine,
            Deployment::Remote => &self.gateway,
        }
    }

    async fn run_over_http(&self, row: &Row, format: Format, server: &TestServer) -> Outcome {
        let (response, body) = request(row, format).fetch(server).await;
        let lines = match format {
            Format::Ndjson if response.status == 200 => body.lines(),
            Format::Sse if response.status == 200 => sse_events(&body),
            Format::Ndjson | Format::Sse | Format::Unary => {
                assert_eq!(body.end, BodyEnd::Clean, "{body:?}");
                return Outcome::from_body(row, &body.json());
            }
        };
        let outcome = Outcome::from_lines(row, &lines);
        let expected_end = if outcome.error.is_some() {
            BodyEnd::Unclean
        } else {
            BodyEnd::Clean
        };
        assert_eq!(body.end, expected_end, "{}", body.text);
        outcome
    }
}

async fn run_over_grpc(row: &Row, server: &TestServer) -> Outcome {
    let mut request = Request::new(row.message());
    if let Some(timeout) = row.timeout {
        request.set_timeout(timeout);
    }
    let completion = match server.grpc().await.complete(request).await {
        Ok(answer) => grpc::collect(answer.into_inner()).await,
        Err(status) => return Outcome::failed(error_of(row, &status)),
    };
    let mut outcome = Outcome {
        echo: Some(completion.prompt.text.clone()).filter(|_| row.echoes()),
        scored: completion
            .prompt
            .tokens
            .iter()
            .filter_map(logprob_of(row))
            .collect(),
        choices: completion
            .choices
            .iter()
            .map(|choice| convert_choice(row, choice))
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

fn request(row: &Row, format: Format) -> http::Request {
    let mut body = row.body.clone();
    if format != Format::Unary {
        body["stream"] = json!(true);
        body["stream_options"] = json!({"include_usage": true, "return_token_ids": true});
    }
    let request = http::post(row.path(), body.to_string()).accept(match format {
        Format::Ndjson => "application/x-ndjson",
        Format::Sse => "text/event-stream",
        Format::Unary => "application/json",
    });
    match row.timeout {
        None => request,
        Some(timeout) => request.header("x-request-timeout", &format_seconds(timeout)),
    }
}

/// Parses the objects of an SSE stream. A stream that ends cleanly must end with `[DONE]`.
fn sse_events(body: &http::Body) -> Vec<Value> {
    let mut events = body.events();
    if body.end == BodyEnd::Clean {
        assert_eq!(events.pop(), Some("[DONE]"));
    }
    let parse = |event| serde_json::from_str(event).expect("an event is JSON");
    events.into_iter().map(parse).collect()
}

fn convert_choice(row: &Row, choice: &grpc::Choice) -> Choice {
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
            v1::FinishReason::ContentFilter => Some("content_filter".to_owned()),
            v1::FinishReason::ToolCalls => Some("tool_calls".to_owned()),
        },
        logprobs: choice.tokens.iter().filter_map(logprob_of(row)).collect(),
    }
}

fn logprob_of(row: &Row) -> impl Fn(&v1::Token) -> Option<TokenLogprob> {
    let adds_sampled = !row.is_chat();
    move |token| {
        let logprobs = token.logprobs.as_ref()?;
        let sampled = logprobs
            .logprob
            .map(|logprob| (logprobs.token_bytes.clone(), logprob));
        let top = logprobs
            .top
            .iter()
            .map(|top| (top.token_bytes.clone(), top.logprob));
        let mut top: Vec<_> = top.collect();
        // OpenAI's completions also list the sampled token in `top_logprobs`.
        if let Some(sampled) = sampled.filter(|it| adds_sampled && !top.contains(it)) {
            top.push(sampled);
        }
        Some(TokenLogprob::new(
            &logprobs.token_bytes,
            logprobs.logprob,
            top,
        ))
    }
}

/// Returns an error's code and the name of its field on the row's route.
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
    (error.kind.mapping().code.to_owned(), param)
}

fn format_seconds(timeout: Duration) -> String {
    timeout.as_secs_f64().to_string()
}
