//! The engine's side of the worker protocol. The tests play the worker and send each message by hand.

#[path = "../support/mod.rs"]
mod support;

mod connection;
mod sequences;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use support::http::{HttpError, expected_error, get, http_error, post};
use support::metrics::MetricsSnapshot;
use support::{Setup, TestServer, full_speed, grpc};
use tempfile::TempDir;
use tokenway::error::{Error, ErrorKind};
use tokenway::listen::Address;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokenway::proto::worker as proto;
use tokenway::proto::worker::answer::Answer;
use tokenway::proto::worker::attach_request::Message as Sent;
use tokenway::proto::worker::attach_response::Message;
use tokenway::proto::worker::device_worker_client::DeviceWorkerClient;
use tokenway::proto::worker::question::Operation;
use tokenway::server::Isolation;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// An engine with one model, which remote workers serve.
struct Engine {
    server: TestServer,
    channel: Channel,
    _folder: TempDir,
}

async fn start_engine(change: impl FnOnce(&mut Setup)) -> Engine {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("workers.sock");
    let endpoint = Endpoint::from_shared(format!("unix:{}", path.display()));
    let mut setup = Setup::test_runner(full_speed());
    let engine = setup.engine();
    engine.models[0].workers = 0;
    engine.models[0].isolation = Isolation::Thread;
    engine.workers.listen = Some(Address::Unix(path));
    change(&mut setup);
    let server = setup.start_loading().await;
    Engine {
        server,
        channel: endpoint.expect("an address").connect_lazy(),
        _folder: folder,
    }
}

/// The worker's end of an `Attach` stream.
struct Worker {
    sender: mpsc::Sender<proto::AttachRequest>,
    receiver: Streaming<proto::AttachResponse>,
}

fn hello_message() -> proto::Hello {
    proto::Hello {
        protocol_version: 2,
        ..proto::Hello::default()
    }
}

fn ready_message() -> proto::Ready {
    proto::Ready {
        model: Some(proto::Model {
            runner: "by hand".to_owned(),
            context_length: 100,
            max_prompt_bytes: 1_000,
            vocabulary_size: 1_000,
            resumption: proto::Resumption::Exact.into(),
            eos_token: "</s>".to_owned(),
            ..proto::Model::default()
        }),
        slots: 2,
        generation: 1,
    }
}

impl Engine {
    /// Connects a worker that sends `first` as its first message.
    async fn connect(&self, first: Sent) -> Result<Worker, Status> {
        let (sender, requests) = mpsc::channel(16);
        let mut worker = DeviceWorkerClient::new(self.channel.clone());
        let message = Some(first);
        let first = proto::AttachRequest { message };
        sender.send(first).await.expect("the channel has room");
        let attached = worker.attach(ReceiverStream::new(requests)).await?;
        let mut worker = Worker {
            sender,
            receiver: attached.into_inner(),
        };
        assert!(matches!(worker.receive().await?, Message::Welcome(_)));
        Ok(worker)
    }

    /// Connects a worker that is ready, and waits until the engine knows that it is ready.
    async fn connect_ready_worker(&self) -> Worker {
        let worker = self
            .connect(Sent::Hello(hello_message()))
            .await
            .expect("the worker is accepted");
        worker.send(Sent::Ready(ready_message())).await;
        self.server.wait_until_loaded().await;
        worker
    }

    /// Connects a worker that declares this heartbeat timeout, in milliseconds.
    async fn connect_with_heartbeat_timeout(
        &self,
        heartbeat_timeout_ms: u32,
    ) -> Result<Worker, Status> {
        self.connect(Sent::Hello(proto::Hello {
            heartbeat_timeout_ms,
            ..hello_message()
        }))
        .await
    }

    /// Connects another worker, which sends `ready`. Does not wait until the engine has read the message.
    async fn connect_another(&self, name: &str) -> Worker {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello_message()
        };
        let worker = self
            .connect(Sent::Hello(hello))
            .await
            .expect("the worker is accepted");
        worker.send(Sent::Ready(ready_message())).await;
        worker
    }

    /// Connects two workers that are ready, and waits until the engine knows both.
    async fn two_workers(&self) -> [Worker; 2] {
        let mut one = self
            .connect(Sent::Hello(hello_message()))
            .await
            .expect("the worker is accepted");
        let ready = proto::Ready {
            slots: 1,
            ..ready_message()
        };
        one.send(Sent::Ready(ready)).await;
        self.server.wait_until_loaded().await;
        let body = json!({"prompt": [5], "max_tokens": 1});
        let mut posts = Vec::new();
        // The first request occupies the only slot of worker `one`, so the second request runs on worker `two`.
        for _ in 0..2 {
            posts.push(self.post("/v1/completions", &body));
            let (question, _) = one.next_call().await;
            one.answer_tokenizer_call(question, Answer::Pieces(one_token_piece()))
                .await;
            if posts.len() == 1 {
                let sequence = one.next_submit().await.sequence;
                one.send(Sent::Accepted(proto::Accepted {
                    sequence,
                    cached_tokens: 0,
                }))
                .await;
            }
        }
        let mut two = self.connect_another("two").await;
        let second = two.next_submit().await.sequence;
        let accepted = proto::Accepted {
            sequence: second,
            cached_tokens: 0,
        };
        two.send(Sent::Accepted(accepted)).await;
        for (worker, sequence) in [(&one, 1), (&two, second)] {
            worker
                .send(step_message(scored_step_entry(
                    sequence,
                    7,
                    proto::End::Length,
                )))
                .await;
        }
        for post in posts {
            assert_eq!(post.await.expect("the task does not panic"), 200);
        }
        [one, two]
    }

    /// Makes two tokenizer calls, which go to one worker each. Worker `two` answers its call. Returns the requests,
    /// and the call that worker `one` has not answered.
    async fn call_both_workers(
        &self,
        one: &mut Worker,
        two: &mut Worker,
    ) -> (Vec<JoinHandle<u16>>, u64) {
        let body = json!({"prompt": "hi"});
        let posts = (0..2).map(|_| self.post("/tokenize", &body)).collect();
        let (question, _) = two.next_call().await;
        two.answer_tokenizer_call(question, token_ids_answer())
            .await;
        (posts, one.next_call().await.0)
    }

    /// Sends a POST request in the background. Its result is the status.
    fn post(&self, path: &str, body: &serde_json::Value) -> JoinHandle<u16> {
        let request = post(path, body.to_string());
        let address = self.server.http_address();
        tokio::spawn(async move { request.send_to(&address).await.status })
    }

    /// Connects a worker with this name, which sends these messages. Returns the status that ends the worker's
    /// stream.
    async fn status_after(&self, name: &str, messages: impl IntoIterator<Item = Sent>) -> Status {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello_message()
        };
        let mut worker = self
            .connect(Sent::Hello(hello))
            .await
            .expect("the worker is accepted");
        for message in messages {
            worker.send(message).await;
        }
        worker.wait_for_end().await
    }
}

impl Worker {
    async fn send(&self, message: Sent) {
        let message = Some(message);
        // Sending fails if the engine has ended the stream.
        let _ = self.sender.send(proto::AttachRequest { message }).await;
    }

    async fn receive(&mut self) -> Result<Message, Status> {
        let received = self.receiver.message().await?;
        let received = received.ok_or_else(|| Status::cancelled("the engine ended the stream"))?;
        Ok(received.message.expect("the message has a known type"))
    }

    /// Waits until the engine ends the stream and returns the status.
    async fn wait_for_end(&mut self) -> Status {
        loop {
            if let Err(status) = self.receive().await {
                return status;
            }
        }
    }

    /// Ends the worker's stream. Returns after the engine has read every message.
    async fn end_stream(self) {
        let Self {
            sender,
            mut receiver,
        } = self;
        drop(sender);
        while let Ok(Some(_)) = receiver.message().await {}
    }

    async fn next_submit(&mut self) -> proto::Submit {
        let Message::Submit(submit) = self.receive().await.expect("the stream continues") else {
            panic!("expected a submit");
        };
        submit
    }

    async fn next_call(&mut self) -> (u64, Operation) {
        let Message::Question(call) = self.receive().await.expect("the stream continues") else {
            panic!("expected a tokenizer call");
        };
        (
            call.question,
            call.operation.expect("the call has a known type"),
        )
    }

    /// Accepts a sequence, and emits the token with this index. The token's id equals its index.
    async fn emit_token(&self, sequence: u64, index: u32) {
        self.send(Sent::Accepted(proto::Accepted {
            sequence,
            cached_tokens: 0,
        }))
        .await;
        let entry = proto::SequenceStep {
            sequence,
            first_index: index,
            ids: proto::PackedVarints::from_iter([index]),
            bytes: b"x".to_vec(),
            lengths: proto::PackedVarints::from_iter([1]),
            ..proto::SequenceStep::default()
        };
        let sequences = vec![entry];
        self.send(Sent::Step(proto::Step { sequences })).await;
    }

    async fn answer_tokenizer_call(&self, question: u64, answer: Answer) {
        let answer = Some(answer);
        self.send(Sent::Answer(proto::Answer { question, answer }))
            .await;
    }
}

fn token_ids_answer() -> Answer {
    Answer::Ids(v1::TokenIds { ids: vec![7] })
}

/// Returns an answer that contains the bytes of one token.
fn one_token_piece() -> proto::Pieces {
    proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    }
}

/// Creates a step entry with one token and its logprob.
fn scored_step_entry(sequence: u64, id: u32, end: proto::End) -> proto::SequenceStep {
    proto::SequenceStep {
        sequence,
        ids: proto::PackedVarints::from_iter([id]),
        bytes: b"x".to_vec(),
        lengths: proto::PackedVarints::from_iter([1]),
        logprobs: vec![v1::Logprobs {
            logprob: Some(-1.0),
            ..v1::Logprobs::default()
        }],
        end: end.into(),
        ..proto::SequenceStep::default()
    }
}

fn step_message(entry: proto::SequenceStep) -> Sent {
    let sequences = vec![entry];
    Sent::Step(proto::Step { sequences })
}
