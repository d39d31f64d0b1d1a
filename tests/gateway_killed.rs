//! A client whose gateway is killed goes on at a second gateway, with the tokens that it has.

mod support;

use std::time::Duration;

use rustix::process::Signal;
use support::program::tokenway;
use support::running_program::RunningProgram;
use support::{Setup, grpc, with_interval};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::Streaming;
use tonic::transport::Channel;

const TOKENS: u32 = 40;
/// Number of tokens that the client has when its gateway is killed.
const DELIVERED: usize = 10;

/// Starts a gateway in front of an engine. Returns it and a client of its gRPC API.
async fn start_gateway(engine: &str) -> (RunningProgram, InferenceClient<Channel>) {
    let free = "127.0.0.1:0";
    let listen = ["--http-listen", free, "--grpc-listen", free];
    let program = tokenway().arg("gateway").args(listen);
    let mut running = program.args(["--engine", engine]).start();
    let mut url = None;
    loop {
        let line = running.read_line().await;
        match line.split_once(' ') {
            Some(("gRPC", address)) => url = address.split_whitespace().next().map(str::to_owned),
            Some(("ready", _)) => break,
            _ => {}
        }
    }
    let url = url.expect("the gateway prints its address");
    let client = InferenceClient::connect(url).await;
    (running, client.expect("the gateway accepts connections"))
}

fn request(resume: Vec<v1::ResumedChoice>) -> v1::CompletionRequest {
    v1::CompletionRequest {
        seed: Some(7),
        resume,
        ..grpc::request("hi", TOKENS)
    }
}

/// What a client has of a completion, from one gateway or two.
#[derive(Default)]
struct Received {
    /// Ids and texts of the tokens.
    tokens: Vec<(u32, String)>,
    usage: Option<v1::Usage>,
}

impl Received {
    /// Sends the request and reads its stream, until it ends or `is_enough` returns true.
    async fn read(
        &mut self,
        client: &mut InferenceClient<Channel>,
        request: v1::CompletionRequest,
        is_enough: impl Fn(&Self) -> bool,
    ) -> Streaming<v1::CompletionEvent> {
        let response = client.complete(request).await;
        let mut stream = response.expect("the request is accepted").into_inner();
        while !is_enough(self)
            && let Ok(Some(event)) = stream.message().await
        {
            self.add(event);
        }
        stream
    }

    fn add(&mut self, event: v1::CompletionEvent) {
        match event.event.expect("the event has a known type") {
            Event::Tokens(tokens) => {
                let next = usize::try_from(tokens.first_index);
                assert_eq!(next, Ok(self.tokens.len()), "the tokens have a gap");
                let new = tokens.tokens.iter();
                self.tokens
                    .extend(new.map(|token| (token.id, token.text.to_owned())));
            }
            Event::Summary(summary) => self.usage = summary.usage,
            Event::Started(_) | Event::Prompt(_) | Event::Chat(_) => {}
        }
    }
}

#[tokio::test]
async fn a_stream_goes_on_at_a_second_gateway_with_the_tokens_that_the_client_has() {
    let engine = Setup::test_runner(with_interval(Duration::from_millis(5)))
        .start()
        .await;
    let (first, mut first_client) = start_gateway(&engine.grpc_url()).await;
    let (_second, mut second_client) = start_gateway(&engine.grpc_url()).await;
    let to_end = |_: &Received| false;
    let mut whole = Received::default();
    whole
        .read(&mut second_client, request(Vec::new()), to_end)
        .await;

    let mut received = Received::default();
    let has_some = |received: &Received| received.tokens.len() >= DELIVERED;
    let mut stream = received
        .read(&mut first_client, request(Vec::new()), has_some)
        .await;
    first.signal(Signal::KILL);
    // More tokens may be on their way.
    while let Ok(Some(event)) = stream.message().await {
        received.add(event);
    }
    assert_eq!(received.usage, None, "the stream was cut");

    let resumed = v1::ResumedChoice {
        choice: 0,
        token_ids: received.tokens.iter().map(|(id, _)| *id).collect(),
    };
    received
        .read(&mut second_client, request(vec![resumed]), to_end)
        .await;
    assert_eq!(received.tokens, whole.tokens);
    assert_eq!(received.usage, whole.usage);
}
