//! Token budgets of API keys, on both APIs alike.

mod support;

use futures_util::future::join_all;
use rustix::process::Signal;
use serde_json::{Value, json};
use support::grpc;
use support::http::{Response, completion};
use support::keys::KeysFile;
use support::program::{start_gateway, start_server, start_serving, tokenway};
use support::running_program::RunningProgram;
use support::{Setup, with_interval};
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::Request as GrpcRequest;
use tonic::transport::Channel;

/// A server, or a gateway, with one key that has a budget.
struct Server {
    running: RunningProgram,
    http: String,
    client: InferenceClient<Channel>,
    secret: String,
}

/// The part of a completion that a client received.
#[derive(Debug, Default, PartialEq)]
struct Received {
    prompt_tokens: u64,
    completion_tokens: u64,
    error: Option<ErrorKind>,
}

impl Server {
    /// Starts a server whose only key has the budgets of these flags of `tokenway keys new`.
    async fn start(keys: &KeysFile, budgets: &str, arguments: &[&str]) -> Self {
        let secret = keys.secret(&format!("new a {budgets}")).await;
        Self::restart(keys, secret, arguments).await
    }

    /// Starts a server with the keys and the usage of an earlier one.
    async fn restart(keys: &KeysFile, secret: String, arguments: &[&str]) -> Self {
        let files = key_flags(keys);
        let files = files.each_ref().map(String::as_str);
        let fast = ["--test-runner-frequency-ms", "0", "--drain-grace", "0"];
        let arguments = [&files[..], &fast, arguments].concat();
        let program = tokenway().env("TOKENWAY_LOG", "info,tokenway::server=debug");
        let (running, urls) = start_serving(program, &arguments).await;
        Self::connect(running, urls, secret).await
    }

    async fn connect(running: RunningProgram, [http, grpc]: [String; 2], secret: String) -> Self {
        let channel = Channel::from_shared(grpc).expect("a URL").connect().await;
        Self {
            running,
            http: http.trim_start_matches("http://").to_owned(),
            client: InferenceClient::new(channel.expect("a connection")),
            secret,
        }
    }

    async fn send(&self, body: &Value) -> Response {
        let key = format!("Bearer {}", self.secret);
        let request = completion(body).header("authorization", &key);
        request.send_to(&self.http).await
    }

    /// Streams a completion of a prompt with three tokens over HTTP.
    async fn stream_over_http(&self, max_tokens: u32) -> Received {
        let body = json!({
            "prompt": "a b c", "max_tokens": max_tokens, "stream": true,
            "stream_options": {"include_usage": true},
        });
        let mut response = self.send(&body).await;
        let body = response.read_rest().await;
        if response.status != 200 {
            return Received {
                error: Some(error_kind(&body.json())),
                ..Received::default()
            };
        }
        let mut received = Received {
            prompt_tokens: 3,
            ..Received::default()
        };
        for record in body.lines() {
            assert_eq!(received.error, None, "an error is the last record");
            if record.get("error").is_some() {
                let delivered = record["error"]["tokens_delivered"].as_u64();
                assert_eq!(delivered, Some(received.completion_tokens));
                received.error = Some(error_kind(&record));
            } else if let Some(choice) = record["choices"].get(0) {
                let text = choice["text"].as_str().expect("text");
                let tokens = text.matches("token_").count();
                received.completion_tokens += u64::try_from(tokens).expect("few tokens");
            }
        }
        received
    }

    /// Streams a completion of a prompt with three tokens over gRPC.
    async fn stream_over_grpc(&self, max_tokens: u32) -> Received {
        let mut request = GrpcRequest::new(grpc::request("a b c", max_tokens));
        let key = format!("Bearer {}", self.secret).parse();
        let key = key.expect("a metadata value");
        request.metadata_mut().insert("authorization", key);
        let mut received = Received::default();
        let mut events = match self.client.clone().complete(request).await {
            Ok(events) => events.into_inner(),
            Err(status) => {
                received.error = Some(Error::from(&status).kind);
                return received;
            }
        };
        loop {
            match events.message().await {
                Ok(None) => return received,
                Ok(Some(message)) => match message.event.expect("an event") {
                    Event::Started(started) => {
                        received.prompt_tokens = started.prompt_tokens.into();
                    }
                    Event::Tokens(tokens) => {
                        let count = u64::try_from(tokens.tokens.len());
                        received.completion_tokens += count.expect("few tokens");
                    }
                    Event::Prompt(_) | Event::Chat(_) | Event::Summary(_) => {}
                },
                Err(status) => {
                    received.error = Some(Error::from(&status).kind);
                    return received;
                }
            }
        }
    }

    /// Streams this many completions at the same time, half of them over each API.
    async fn stream_many(&self, streams: usize, max_tokens: u32) -> Vec<Received> {
        let all = (0..streams).map(async |stream| match stream % 2 {
            0 => self.stream_over_http(max_tokens).await,
            _ => self.stream_over_grpc(max_tokens).await,
        });
        join_all(all).await
    }
}

fn key_flags(keys: &KeysFile) -> [String; 4] {
    let path = |name: &str| keys.folder.path().join(name).display().to_string();
    [
        "--keys-file".to_owned(),
        keys.path.display().to_string(),
        "--usage-file".to_owned(),
        path("usage.json"),
    ]
}

fn error_kind(record: &Value) -> ErrorKind {
    let code = record["error"]["code"].as_str().expect("a code");
    ErrorKind::from_code(code).expect("a known code")
}

fn sum(received: &[Received], count: impl Fn(&Received) -> u64) -> u64 {
    received.iter().map(count).sum()
}

#[tokio::test]
async fn fifty_streams_on_both_apis_get_exactly_the_budget() {
    for (budget, counts_prompts) in [("--budget 1000", true), ("--completion-budget 1000", false)] {
        let keys = KeysFile::new();
        let server = Server::start(&keys, budget, &[]).await;
        let mut received = server.stream_many(50, 70).await;
        // A stream is rejected while the rest of the budget is reserved. Its error asks for a retry.
        let retries = received
            .iter()
            .filter(|it| it.error == Some(ErrorKind::RateLimited));
        let retries = retries.count();
        for _ in 0..retries {
            received.push(server.stream_over_http(70).await);
        }
        let tokens = sum(&received, |it| {
            it.completion_tokens + if counts_prompts { it.prompt_tokens } else { 0 }
        });
        assert_eq!(tokens, 1_000, "{budget}: {received:?}");
        let cut_off = received
            .iter()
            .filter(|it| it.completion_tokens > 0 && it.error == Some(ErrorKind::BudgetExhausted));
        assert_eq!(cut_off.count(), 1, "{budget}: {received:?}");
        let rejected = received.last().expect("a stream");
        assert_eq!(rejected.error, Some(ErrorKind::BudgetExhausted));
    }
}

#[tokio::test]
async fn a_stream_ends_at_the_token_that_uses_up_the_budget() {
    let keys = KeysFile::new();
    let server = Server::start(&keys, "--budget 26", &[]).await;
    let first = server.stream_over_grpc(10).await;
    assert_eq!((first.completion_tokens, first.error), (10, None));
    // Three tokens of the prompt and ten of the completion are left.
    let second = server.stream_over_http(20).await;
    let expected = Received {
        prompt_tokens: 3,
        completion_tokens: 10,
        error: Some(ErrorKind::BudgetExhausted),
    };
    assert_eq!(second, expected);
    let mut rejected = server.send(&json!({"prompt": "a", "max_tokens": 1})).await;
    let error = rejected.read_rest().await.json();
    assert_eq!(rejected.status, 429);
    assert_eq!(rejected.header("x-should-retry"), Some("false"));
    assert_eq!(error["error"]["type"], "insufficient_quota");
    assert_eq!(error["error"]["code"], "budget_exhausted");
    let message = error["error"]["message"].as_str().expect("a message");
    assert_eq!(
        message,
        "The API key's budget of 26 tokens in total is used up."
    );
}

#[tokio::test]
async fn a_completion_in_one_piece_beyond_the_budget_is_an_error() {
    let keys = KeysFile::new();
    let server = Server::start(&keys, "--completion-budget 5", &[]).await;
    let body = json!({"prompt": "a", "max_tokens": 6});
    assert_eq!(server.send(&body).await.status, 429);
    let body = json!({"prompt": "a", "max_tokens": 1});
    assert_eq!(server.send(&body).await.status, 429, "the tokens were used");
}

#[tokio::test]
async fn several_choices_share_the_budget() {
    let keys = KeysFile::new();
    let server = Server::start(&keys, "--completion-budget 100", &[]).await;
    let body = json!({"prompt": ["a", "b"], "n": 3, "max_tokens": 15, "stream": true});
    let whole = server.send(&body).await.read_rest().await.text;
    assert_eq!(whole.matches("token_").count(), 90);
    let body = json!({"prompt": "a", "n": 3, "max_tokens": 15, "stream": true});
    let cut = server.send(&body).await.read_rest().await.text;
    assert_eq!(cut.matches("token_").count(), 10, "{cut}");
    assert!(cut.contains("budget_exhausted"), "{cut}");
}

#[tokio::test]
async fn budgets_survive_restarts_and_keys_that_are_missing_for_a_while() {
    let keys = KeysFile::new();
    let server = Server::start(&keys, "--budget 100/month", &[]).await;
    assert_eq!(server.stream_over_http(57).await.error, None);
    let (secret, text) = (server.secret.clone(), keys.text());
    assert_eq!(server.running.interrupt().await, Some(0));

    let mut server = Server::restart(&keys, secret.clone(), &[]).await;
    let replace = async |server: &mut Server, text: &str| {
        let new = keys.folder.path().join("new.toml");
        std::fs::write(&new, text).expect("the keys file");
        std::fs::rename(&new, &keys.path).expect("the keys file is replaced");
        server.running.wait_for_log("the keys were reloaded").await;
    };
    replace(&mut server, "").await;
    assert_eq!(server.send(&json!({"prompt": "a"})).await.status, 401);
    replace(&mut server, &text).await;
    let rest = server.stream_over_grpc(100).await;
    assert_eq!(rest.completion_tokens, 37);
    assert_eq!(rest.error, Some(ErrorKind::BudgetExhausted));

    // The file is written every second, so a killed server forgets no more than that.
    server.running.wait_for_log("tokens=100").await;
    server.running.signal(Signal::KILL);
    server.running.wait_for_exit_code().await;
    let server = Server::restart(&keys, secret, &[]).await;
    let rejected = server.stream_over_http(1).await;
    assert_eq!(rejected.error, Some(ErrorKind::BudgetExhausted));
}

#[tokio::test]
async fn a_server_with_budgets_needs_a_usage_file_of_its_own() {
    let keys = KeysFile::new();
    keys.secret("new a --budget 5/day").await;
    let [keys_flag, path, usage_flag, usage] = key_flags(&keys);
    let without = tokenway().args(["serve", &keys_flag, &path]).run().await;
    assert_eq!(without.code, Some(1), "{without:?}");
    assert!(
        without
            .stderr
            .contains("the key a has a budget; set --usage-file"),
        "{without:?}"
    );

    let flags = [keys_flag, path, usage_flag, usage].map(String::from);
    let flags = flags.each_ref().map(String::as_str);
    let (_running, _) = start_server(&flags).await;
    let second = tokenway().arg("serve").args(flags).run().await;
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(
        second.stderr.contains("another server uses it"),
        "{second:?}"
    );
}

#[tokio::test]
async fn a_gateway_charges_prompts_when_an_engine_starts_them() {
    let engine = Setup::test_runner(with_interval(std::time::Duration::ZERO))
        .start()
        .await;
    let keys = KeysFile::new();
    let secret = keys.secret("new a --budget 40").await;
    let files = key_flags(&keys);
    let files = files.each_ref().map(String::as_str);
    let url = engine.grpc_url();
    let arguments = [&files[..], &["--engine", &url]].concat();
    let (running, urls) = start_gateway(&arguments).await;
    let gateway = Server::connect(running, urls, secret).await;
    let first = gateway.stream_over_grpc(10).await;
    assert_eq!((first.completion_tokens, first.error), (10, None));
    let second = gateway.stream_over_http(100).await;
    assert_eq!(second.completion_tokens, 24);
    assert_eq!(second.error, Some(ErrorKind::BudgetExhausted));
    let rejected = gateway.stream_over_grpc(1).await;
    assert_eq!(rejected.error, Some(ErrorKind::BudgetExhausted));
}
