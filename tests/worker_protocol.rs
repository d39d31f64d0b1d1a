//! The engine's side of the worker protocol, tested with a worker that sends each message by hand.

mod support;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use support::http::{HttpError, expected_error, get, http_error, post};
use support::{Counts, Setup, TestServer, full_speed, grpc};
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
use tokenway::proto::worker::question::About;
use tokenway::server::Isolation;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// An engine whose only model is served by remote workers.
struct Engine {
    server: TestServer,
    channel: Channel,
    _folder: TempDir,
}

async fn engine(change: impl FnOnce(&mut Setup)) -> Engine {
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

fn hello() -> proto::Hello {
    proto::Hello {
        protocol_version: 2,
        ..proto::Hello::default()
    }
}

fn ready() -> proto::Ready {
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
    /// Connects and sends `first` as the first message.
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

    /// Connects a worker that is ready and waits until the engine knows it.
    async fn worker(&self) -> Worker {
        let worker = self
            .connect(Sent::Hello(hello()))
            .await
            .expect("the worker is accepted");
        worker.send(Sent::Ready(ready())).await;
        self.server.loaded().await;
        worker
    }

    /// Connects with this heartbeat timeout, in milliseconds.
    async fn connect_with_heartbeat_timeout(
        &self,
        heartbeat_timeout_ms: u32,
    ) -> Result<Worker, Status> {
        self.connect(Sent::Hello(proto::Hello {
            heartbeat_timeout_ms,
            ..hello()
        }))
        .await
    }

    /// Connects another worker and sends `ready`. Does not wait until the engine has read it.
    async fn connect_another(&self, name: &str) -> Worker {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello()
        };
        let worker = self
            .connect(Sent::Hello(hello))
            .await
            .expect("the worker is accepted");
        worker.send(Sent::Ready(ready())).await;
        worker
    }

    /// Connects two workers that are ready and idle, and waits until the engine knows both.
    async fn two_workers(&self) -> [Worker; 2] {
        let mut one = self
            .connect(Sent::Hello(hello()))
            .await
            .expect("the worker is accepted");
        let ready = proto::Ready {
            slots: 1,
            ..ready()
        };
        one.send(Sent::Ready(ready)).await;
        self.server.loaded().await;
        let body = json!({"prompt": [5], "max_tokens": 1});
        let mut posts = Vec::new();
        // The first request takes the only slot of `one`, so the second runs on `two`.
        for _ in 0..2 {
            posts.push(self.post("/v1/completions", &body));
            let (question, _) = one.next_call().await;
            one.answer(question, Answer::Pieces(piece())).await;
            if posts.len() == 1 {
                let sequence = one.next_submit().await.sequence;
                one.send(Sent::Accepted(proto::Accepted { sequence })).await;
            }
        }
        let mut two = self.connect_another("two").await;
        let second = two.next_submit().await.sequence;
        let accepted = proto::Accepted { sequence: second };
        two.send(Sent::Accepted(accepted)).await;
        for (worker, sequence) in [(&one, 1), (&two, second)] {
            worker
                .send(step(scored(sequence, 7, proto::End::Length)))
                .await;
        }
        for post in posts {
            assert_eq!(post.await.expect("the task does not panic"), 200);
        }
        [one, two]
    }

    /// Sends two tokenizer calls, one to each worker. `two` answers; the call to `one` is returned unanswered.
    async fn call_both(&self, one: &mut Worker, two: &mut Worker) -> (Vec<JoinHandle<u16>>, u64) {
        let body = json!({"prompt": "hi"});
        let posts = (0..2).map(|_| self.post("/tokenize", &body)).collect();
        let (question, _) = two.next_call().await;
        two.answer(question, ids()).await;
        (posts, one.next_call().await.0)
    }

    /// Sends a POST request in the background. Returns its status.
    fn post(&self, path: &str, body: &serde_json::Value) -> JoinHandle<u16> {
        let request = post(path, body.to_string());
        let address = self.server.http_address();
        tokio::spawn(async move { request.send_to(&address).await.status })
    }

    /// Connects a worker of this name, sends these messages and returns the status that ends its stream.
    async fn status_after(&self, name: &str, messages: impl IntoIterator<Item = Sent>) -> Status {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello()
        };
        let mut worker = self
            .connect(Sent::Hello(hello))
            .await
            .expect("the worker is accepted");
        for message in messages {
            worker.send(message).await;
        }
        worker.ended().await
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
    async fn ended(&mut self) -> Status {
        loop {
            if let Err(status) = self.receive().await {
                return status;
            }
        }
    }

    /// Ends the stream. The engine has read every message when this returns.
    async fn leave(self) {
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

    async fn next_call(&mut self) -> (u64, About) {
        let Message::Question(call) = self.receive().await.expect("the stream continues") else {
            panic!("expected a tokenizer call");
        };
        (
            call.question,
            call.about.expect("the call has a known type"),
        )
    }

    /// Accepts a sequence and emits the token of this index. The index is also the token's id.
    async fn emit(&self, sequence: u64, index: u32) {
        self.send(Sent::Accepted(proto::Accepted { sequence }))
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

    async fn answer(&self, question: u64, answer: Answer) {
        let answer = Some(answer);
        self.send(Sent::Answer(proto::Answer { question, answer }))
            .await;
    }
}

#[tokio::test]
async fn an_invalid_hello_is_rejected_with_its_reason() {
    let engine = engine(|_| ()).await;
    let changed = |change: fn(&mut proto::Hello)| {
        let mut hello = hello();
        change(&mut hello);
        Sent::Hello(hello)
    };
    for (first, code, expected) in [
        (
            changed(|hello| hello.protocol_version = 1),
            Code::FailedPrecondition,
            "this engine speaks protocol_version 2",
        ),
        (
            changed(|hello| hello.model = "nobody".to_owned()),
            Code::NotFound,
            "hello.model must be one of: llm_test (got 'nobody')",
        ),
        (
            changed(|hello| hello.child_token = "stolen".to_owned()),
            Code::PermissionDenied,
            "hello.child_token is unknown",
        ),
        (
            changed(|hello| hello.name = "two\nlines".to_owned()),
            Code::InvalidArgument,
            "hello.name must have",
        ),
        (
            Sent::Heartbeat(proto::Heartbeat { step_ms: 0 }),
            Code::FailedPrecondition,
            "hello must be the first message",
        ),
    ] {
        let status = engine
            .connect(first)
            .await
            .err()
            .expect("the request is rejected");
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(expected), "{status:?}");
    }
}

#[tokio::test]
async fn a_protocol_violation_is_reported_with_its_rule() {
    let engine = engine(|_| ()).await;
    let changed = |change: fn(&mut proto::Ready)| {
        let mut ready = ready();
        change(&mut ready);
        Sent::Ready(ready)
    };
    fn of_model(ready: &mut proto::Ready) -> &mut proto::Model {
        ready.model.as_mut().expect("the model is set")
    }
    let too_large = proto::Crashed {
        reason: "x".repeat(17 * 1024 * 1024),
    };
    for (message, rule) in [
        (Sent::Crashed(too_large), "too large"),
        (changed(|ready| ready.slots = 0), "ready.slots"),
        (changed(|ready| ready.generation = 0), "ready.generation"),
        (
            changed(|ready| ready.model = None),
            "ready.model is missing",
        ),
        (
            changed(|ready| of_model(ready).context_length = 1),
            "context_length",
        ),
        (
            changed(|ready| of_model(ready).vocabulary_size = 0),
            "vocabulary_size",
        ),
        (
            changed(|ready| of_model(ready).unsupported = vec!["colour".to_owned()]),
            "'colour'",
        ),
        (Sent::Hello(hello()), "hello must be sent only once"),
        (
            Sent::Step(proto::Step::default()),
            "crashed must be sent after ready",
        ),
    ] {
        let status = engine.status_after(rule, [message]).await;
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        assert!(status.message().contains(rule), "{status:?}");
    }
    let sequences = vec![proto::SequenceStep::default(); proto::MAX_STEP_ENTRIES + 1];
    let many = [Sent::Ready(ready()), Sent::Step(proto::Step { sequences })];
    let status = engine.status_after("many entries", many).await;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("at most 131072"), "{status:?}");
    let crashed = Sent::Crashed(proto::Crashed::default());
    let twice = [Sent::Ready(ready()), crashed, Sent::Ready(ready())];
    let status = engine.status_after("same generation", twice).await;
    assert!(
        status.message().contains("ready.generation must be higher"),
        "{status:?}"
    );
    let _first = engine.worker().await;
    let other = changed(|ready| of_model(ready).context_length = 99);
    let status = engine.status_after("other", [other]).await;
    assert!(
        status.message().contains("differs from what another"),
        "{status:?}"
    );
}

#[tokio::test]
async fn only_the_violating_worker_gets_a_reconnect_penalty() {
    let engine = engine(|_| ()).await;
    let broken = Sent::Step(proto::Step::default());
    let _ = engine.status_after("one", [broken]).await;
    let hello_from = |name: &str| {
        Sent::Hello(proto::Hello {
            name: name.to_owned(),
            ..hello()
        })
    };
    let status = engine.connect(hello_from("one")).await.err();
    let status = status.expect("the request is rejected");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(status.message().contains("may reconnect in"), "{status:?}");
    assert!(engine.connect(hello_from("another")).await.is_ok());
}

#[tokio::test]
async fn a_worker_that_ignores_a_sequence_is_lost() {
    let engine = engine(|setup| {
        let timeouts = &mut setup.engine().workers.timeouts;
        timeouts.heartbeat_timeout = Duration::from_millis(200);
        timeouts.step_limit = Some(Duration::from_millis(100));
    })
    .await;
    let mut worker = engine.worker().await;
    let body = json!({"prompt": [5], "max_tokens": 2});
    let request = post("/v1/completions", body.to_string());
    let address = engine.server.http_address();
    let _response = tokio::spawn(async move { request.send_to(&address).await });
    let mut heartbeat = tokio::time::interval(Duration::from_millis(20));
    let status = loop {
        tokio::select! {
            received = worker.receive() => match received {
                Ok(Message::Question(proto::Question { question, .. })) => {
                    let pieces = proto::Pieces { bytes: b"x".to_vec(), lengths: vec![1] };
                    worker.answer(question, Answer::Pieces(pieces)).await;
                }
                Ok(_) => {}
                Err(status) => break status,
            },
            _ = heartbeat.tick() => worker.send(Sent::Heartbeat(proto::Heartbeat::default())).await,
        }
    };
    let reason = "neither accepted nor rejected a sequence";
    assert!(status.message().contains(reason), "{status:?}");
}

#[tokio::test]
async fn every_sequence_reaches_a_worker_with_thousands_of_slots() {
    const SLOTS: u32 = 4_096;
    const CHOICES: u32 = 128;
    let engine = engine(|_| ()).await;
    let mut worker = engine
        .connect(Sent::Hello(hello()))
        .await
        .expect("the worker is accepted");
    let offer = proto::Ready {
        slots: SLOTS,
        ..ready()
    };
    worker.send(Sent::Ready(offer)).await;
    engine.server.loaded().await;
    let client = engine.server.grpc().await;
    let requests = (0..SLOTS / CHOICES).map(|_| {
        let mut client = client.clone();
        let request = v1::CompletionRequest {
            n: Some(CHOICES),
            ..grpc::request("a", 1)
        };
        async move { client.complete(request).await }
    });
    let requests = tokio::spawn(join_all(requests));
    let mut submitted = 0;
    while submitted < SLOTS {
        match worker.receive().await.expect("the stream continues") {
            Message::Submit(_) => submitted += 1,
            Message::Question(proto::Question { question, .. }) => {
                let ids = v1::TokenIds { ids: vec![1] };
                worker.answer(question, Answer::Ids(ids)).await;
            }
            Message::Welcome(_) | Message::Credit(_) | Message::Cancel(_) | Message::Drain(_) => {}
        }
    }
    assert_eq!(
        Counts::now(&engine.server).get("tokenway_resumptions_total"),
        0.0
    );
    drop(worker);
    requests.abort();
}

#[tokio::test]
async fn a_worker_without_heartbeats_is_lost_with_deadline_exceeded() {
    let engine = engine(|setup| {
        setup.engine().workers.timeouts.heartbeat_timeout = Duration::from_millis(100);
    })
    .await;
    let mut worker = engine.worker().await;
    let status = worker
        .receive()
        .await
        .expect_err("the worker sends no heartbeat");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    engine.server.wait_until_not_ready().await;
    let no_worker = expected_error(503, "no_worker", None);
    assert_eq!(http_error(&engine.server, get("/readyz")).await, no_worker);
    let (_, body) = get("/readyz").fetch(&engine.server).await;
    assert!(
        body.text
            .contains("No worker of the model 'llm_test' has connected"),
        "{}",
        body.text
    );
}

#[tokio::test]
async fn an_out_of_range_heartbeat_timeout_is_rejected_with_its_field() {
    let engine = engine(|_| ()).await;
    for out_of_range in [1, 99, 3_600_001] {
        let result = engine
            .connect_with_heartbeat_timeout(out_of_range)
            .await
            .err();
        let status = result.expect("the worker is rejected");
        assert_eq!(status.code(), Code::InvalidArgument);
        let rule = "hello.heartbeat_timeout_ms must be 0 or from 100 to 3600000";
        assert!(status.message().contains(rule), "{status:?}");
    }
    for in_range in [100, 3_600_000] {
        assert!(
            engine
                .connect_with_heartbeat_timeout(in_range)
                .await
                .is_ok()
        );
    }
}

#[tokio::test]
async fn the_declared_heartbeat_timeout_replaces_the_engines() {
    let engine = engine(|setup| {
        setup.engine().workers.timeouts.heartbeat_timeout = Duration::from_millis(100);
        // A worker's stream is one long request. The limits on client requests must not apply to it.
        setup.parts.limits.body_timeout = Duration::from_millis(500);
        setup.parts.limits.write_timeout = Duration::from_millis(500);
    })
    .await;
    let started = Instant::now();
    let declared = Duration::from_millis(1_500);
    let mut worker = engine
        .connect_with_heartbeat_timeout(1_500)
        .await
        .expect("the worker is accepted");
    let status = worker.ended().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("no heartbeat"), "{status:?}");
    assert!(started.elapsed() >= declared, "{:?}", started.elapsed());
}

#[tokio::test]
async fn the_declared_heartbeat_timeout_raises_the_step_limit() {
    let engine = engine(|setup| {
        setup.engine().workers.timeouts.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine
        .connect_with_heartbeat_timeout(60_000)
        .await
        .expect("the worker is accepted");
    let heartbeat = |step_ms| Sent::Heartbeat(proto::Heartbeat { step_ms });
    worker.send(heartbeat(60_000)).await;
    // `ready` comes after the heartbeat, so the engine has read both when the worker is ready.
    worker.send(Sent::Ready(ready())).await;
    tokio::select! {
        () = engine.server.loaded() => {}
        status = worker.ended() => panic!("{status:?}"),
    }
    worker.send(heartbeat(60_001)).await;
    let status = worker.ended().await;
    assert!(status.message().contains("step limit"), "{status:?}");
}

/// Runs one request on a series of workers. Each worker runs `before_leaving` and then ends its stream. Returns the
/// number of resumptions and the request's error.
async fn resumptions(before_leaving: impl AsyncFn(&Worker, u64, u32)) -> (f64, HttpError) {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let request = post("/v1/completions", r#"{"prompt": [5], "max_tokens": 90}"#);
    let address = engine.server.http_address();
    let response = tokio::spawn(async move {
        let mut response = request.send_to(&address).await;
        let (code, param) = response.rest().await.error();
        (response.status, code, param)
    });
    let (question, _) = worker.next_call().await;
    worker.answer(question, Answer::Pieces(piece())).await;
    for index in 0.. {
        let sequence = worker.next_submit().await.sequence;
        before_leaving(&worker, sequence, index).await;
        worker.leave().await;
        if index == 8 {
            break;
        }
        worker = engine.connect_another(&index.to_string()).await;
    }
    let error = response.await.expect("the task does not panic");
    let resumptions = Counts::now(&engine.server).get("tokenway_resumptions_total");
    (resumptions, error)
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_after_each_token_ends_with_worker_lost() {
    let make = async |worker: &Worker, sequence, index| worker.emit(sequence, index).await;
    let worker_lost = expected_error(502, "worker_lost", None);
    assert_eq!(resumptions(make).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_before_they_accept_it_ends_with_worker_lost() {
    let nothing = async |_: &Worker, _, _| ();
    let worker_lost = expected_error(502, "worker_lost", None);
    assert_eq!(resumptions(nothing).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_worker_over_the_step_limit_is_lost() {
    let engine = engine(|setup| {
        setup.engine().workers.timeouts.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine.worker().await;
    worker
        .send(Sent::Heartbeat(proto::Heartbeat { step_ms: 1_001 }))
        .await;
    let status = worker
        .receive()
        .await
        .expect_err("the step limit is exceeded");
    assert!(status.message().contains("step limit"), "{status:?}");
    engine.server.wait_until_not_ready().await;
}

#[tokio::test]
async fn worker_messages_become_the_clients_tokens() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let client = engine.server.grpc().await;
    let response = tokio::spawn(async move {
        let mut client = client;
        let stream = client.complete(grpc::request("hi", 3)).await;
        grpc::collect(stream.expect("the request is admitted").into_inner()).await
    });
    let (question, about) = worker.next_call().await;
    let tokenize = proto::Tokenize {
        text: "hi".to_owned(),
        begins: true,
    };
    assert_eq!(about, About::Tokenize(tokenize));
    let ids = vec![7, 8];
    worker
        .answer(question, Answer::Ids(v1::TokenIds { ids }))
        .await;
    let submit = worker.next_submit().await;
    assert_eq!((submit.generation, submit.credit), (1, 3));
    let request = submit.request.expect("a submit carries its request");
    let ids = v1::TokenIds { ids: vec![7, 8] };
    assert_eq!(request.input, Some(Input::PromptTokenIds(ids)));
    assert_eq!(request.max_tokens, Some(3));
    let sequence = submit.sequence;
    worker
        .send(Sent::Accepted(proto::Accepted { sequence }))
        .await;
    // One character in two tokens, then the end-of-sequence token.
    let entry = proto::SequenceStep {
        sequence,
        ids: proto::PackedVarints::from_iter([1, 2, 3]),
        bytes: "é".as_bytes().to_vec(),
        lengths: proto::PackedVarints::from_iter([1, 1, 0]),
        end: proto::End::Stop.into(),
        ..proto::SequenceStep::default()
    };
    let sequences = vec![entry];
    worker.send(Sent::Step(proto::Step { sequences })).await;
    let completion = response.await.expect("the task does not panic");
    assert_eq!(completion.texts(0), ["", "é", ""]);
    assert_eq!(completion.usage().completion_tokens, 3);
}

#[tokio::test]
async fn crashed_choices_resume_one_at_a_time_and_fail_on_the_second_crash() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let mut client = engine.server.grpc().await;
    let request = v1::CompletionRequest {
        n: Some(2),
        ..grpc::request("hi", 9)
    };
    let response = tokio::spawn(async move {
        let stream = client.complete(request).await;
        grpc::collect(stream.expect("the request is admitted").into_inner()).await
    });
    let (question, _) = worker.next_call().await;
    let ids = v1::TokenIds { ids: vec![7] };
    worker.answer(question, Answer::Ids(ids)).await;
    let (first, second) = (worker.next_submit().await, worker.next_submit().await);
    for submit in [&first, &second] {
        worker.emit(submit.sequence, 0).await;
    }
    let crashes = |generation| {
        let again = Sent::Ready(proto::Ready {
            generation,
            ..ready()
        });
        [Sent::Crashed(proto::Crashed::default()), again]
    };
    for message in crashes(2) {
        worker.send(message).await;
    }
    // Either choice may have caused the crash, so the second is resumed only after the first has a token.
    let one = worker.next_submit().await;
    worker.emit(one.sequence, 1).await;
    let other = worker.next_submit().await;
    for again in [&one, &other] {
        assert_eq!((&*again.delivered, again.generation), (&[0][..], 2));
    }
    let mut resumed = [one.choice, other.choice];
    resumed.sort_unstable();
    assert_eq!(resumed, [first.choice, second.choice]);
    for message in crashes(3) {
        worker.send(message).await;
    }
    let error = response.await.expect("the task does not panic").error;
    assert_eq!(
        error.map(|error| Error::from(&error).kind),
        Some(ErrorKind::WorkerLost)
    );
}

#[tokio::test]
async fn a_workers_rejection_reaches_the_client() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let address = engine.server.http_address();
    let post_json = |path: &str, body: serde_json::Value| {
        let request = post(path, body.to_string());
        let address = address.clone();
        tokio::spawn(async move {
            let mut response = request.send_to(&address).await;
            (response.status, response.rest().await.error())
        })
    };
    let failure = |is_invalid| proto::Failure {
        is_invalid,
        message: "not this text".to_owned(),
    };
    for (is_invalid, status, code) in [(true, 400, "invalid_value"), (false, 500, "internal_error")]
    {
        let response = post_json("/tokenize", json!({"prompt": "hi"}));
        let (question, _) = worker.next_call().await;
        worker
            .answer(question, Answer::Failure(failure(is_invalid)))
            .await;
        let (actual_status, (actual_code, _)) = response.await.expect("the task does not panic");
        assert_eq!((actual_status, &*actual_code), (status, code));
    }
    let response = post_json("/v1/completions", json!({"prompt": [5], "max_tokens": 2}));
    let (question, about) = worker.next_call().await;
    assert_eq!(about, About::Detokenize(proto::Detokenize { ids: vec![5] }));
    let pieces = proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    };
    worker.answer(question, Answer::Pieces(pieces)).await;
    let sequence = worker.next_submit().await.sequence;
    let failure = Some(failure(true));
    worker
        .send(Sent::Refused(proto::Refused { sequence, failure }))
        .await;
    let (status, (code, _)) = response.await.expect("the task does not panic");
    assert_eq!((status, &*code), (400, "invalid_value"));
}

#[tokio::test]
async fn an_invalid_prompt_score_moves_the_request_to_another_worker() {
    let engine = engine(|_| ()).await;
    let mut wrong = engine.worker().await;
    let body = json!({"prompt": [5], "max_tokens": 1, "echo": true, "logprobs": 0});
    let response = engine.post("/v1/completions", &body);
    let (question, _) = wrong.next_call().await;
    wrong.answer(question, Answer::Pieces(piece())).await;
    let sequence = wrong.next_submit().await.sequence;
    let mut right = engine.connect_another("right").await;
    wrong
        .send(Sent::Accepted(proto::Accepted { sequence }))
        .await;
    let completion = scored(sequence, 7, proto::End::Length);
    wrong.send(step(completion)).await;
    let status = wrong.ended().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status
            .message()
            .contains("before the last of its prompt tokens"),
        "{status:?}"
    );
    let submit = right.next_submit().await;
    assert!(submit.request.is_some_and(|request| request.echo));
    let sequence = submit.sequence;
    right
        .send(Sent::Accepted(proto::Accepted { sequence }))
        .await;
    let prompt = proto::SequenceStep {
        is_prompt: true,
        ..scored(sequence, 5, proto::End::Unspecified)
    };
    right.send(step(prompt)).await;
    let completion = scored(sequence, 7, proto::End::Length);
    right.send(step(completion)).await;
    assert_eq!(response.await.expect("the task does not panic"), 200);
}

#[tokio::test]
async fn a_mismatched_tokenizer_answer_loses_the_worker_and_another_is_asked() {
    let engine = engine(|_| ()).await;
    let [mut wrong, mut right] = engine.two_workers().await;
    let (posts, question) = engine.call_both(&mut wrong, &mut right).await;
    let text = Answer::Text("no ids".to_owned());
    wrong.answer(question, text).await;
    let status = wrong.ended().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("does not match"), "{status:?}");
    let (question, _) = right.next_call().await;
    right.answer(question, ids()).await;
    for post in posts {
        assert_eq!(post.await.expect("the task does not panic"), 200);
    }
}

#[tokio::test]
async fn a_tokenizer_call_timeout_loses_the_worker_and_another_is_asked() {
    let engine = engine(|setup| {
        setup.engine().workers.timeouts.tokenizer_call_timeout = Duration::from_millis(500);
    })
    .await;
    let [mut slow, mut right] = engine.two_workers().await;
    let (posts, _) = engine.call_both(&mut slow, &mut right).await;
    let (question, _) = right.next_call().await;
    right.answer(question, ids()).await;
    for post in posts {
        assert_eq!(post.await.expect("the task does not panic"), 200);
    }
    let status = slow.ended().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let reason = "did not answer its tokenizer calls";
    assert!(status.message().contains(reason), "{status:?}");
}

fn ids() -> Answer {
    Answer::Ids(v1::TokenIds { ids: vec![7] })
}

/// An answer with the bytes of one token.
fn piece() -> proto::Pieces {
    proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    }
}

/// A step entry of one token with its logprob.
fn scored(sequence: u64, id: u32, end: proto::End) -> proto::SequenceStep {
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

fn step(entry: proto::SequenceStep) -> Sent {
    let sequences = vec![entry];
    Sent::Step(proto::Step { sequences })
}
