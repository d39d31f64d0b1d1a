//! What an engine says to whoever dials its worker socket: a worker that is written here, message by message.

mod support;

use std::time::{Duration, Instant};

use futures_util::future::join_all;
use serde_json::json;
use support::http::{Refusal, get, post, refusal, refused};
use support::{Counts, Setup, TestServer, full_speed, grpc};
use tempfile::TempDir;
use tokenway::error::{Error, ErrorKind};
use tokenway::listen::Address;
use tokenway::proto::v1;
use tokenway::proto::worker as proto;
use tokenway::proto::worker::answer::Answer;
use tokenway::proto::worker::attach_request::Message as Said;
use tokenway::proto::worker::attach_response::Message;
use tokenway::proto::worker::device_worker_client::DeviceWorkerClient;
use tokenway::proto::worker::question::About;
use tokenway::server::Isolation;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status, Streaming};

/// An engine whose only model has no workers but those that dial in.
struct Engine {
    server: TestServer,
    channel: Channel,
    _folder: TempDir,
}

async fn engine(change: impl FnOnce(&mut Setup)) -> Engine {
    let folder = tempfile::tempdir().expect("a folder");
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

/// The worker's end of a stream.
struct Worker {
    says: mpsc::Sender<proto::AttachRequest>,
    hears: Streaming<proto::AttachResponse>,
}

fn hello() -> proto::Hello {
    proto::Hello {
        protocol_version: 1,
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
        life: 1,
    }
}

impl Engine {
    /// Dials, with this as the first word.
    async fn dial(&self, first: Said) -> Result<Worker, Status> {
        let (says, requests) = mpsc::channel(16);
        let mut worker = DeviceWorkerClient::new(self.channel.clone());
        let message = Some(first);
        let first = proto::AttachRequest { message };
        says.send(first).await.expect("there is room");
        let attached = worker.attach(ReceiverStream::new(requests)).await?;
        let mut worker = Worker {
            says,
            hears: attached.into_inner(),
        };
        assert!(matches!(worker.hear().await?, Message::Welcome(_)));
        Ok(worker)
    }

    /// A worker that is ready, and is known to be.
    async fn worker(&self) -> Worker {
        let worker = self.dial(Said::Hello(hello())).await.expect("it is taken");
        worker.say(Said::Ready(ready())).await;
        self.server.loaded().await;
        worker
    }

    /// Dials as a worker that may send nothing for so long.
    async fn connect_with_heartbeat_timeout(
        &self,
        heartbeat_timeout_ms: u32,
    ) -> Result<Worker, Status> {
        self.dial(Said::Hello(proto::Hello {
            heartbeat_timeout_ms,
            ..hello()
        }))
        .await
    }

    /// Another worker that is ready; the engine knows when it has read so far.
    async fn another(&self, name: &str) -> Worker {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello()
        };
        let worker = self.dial(Said::Hello(hello)).await.expect("it is taken");
        worker.say(Said::Ready(ready())).await;
        worker
    }

    /// Two workers that are ready and have nothing to do, and are known to be.
    async fn two_workers(&self) -> [Worker; 2] {
        let mut one = self.dial(Said::Hello(hello())).await.expect("it is taken");
        let ready = proto::Ready {
            slots: 1,
            ..ready()
        };
        one.say(Said::Ready(ready)).await;
        self.server.loaded().await;
        let body = json!({"prompt": [5], "max_tokens": 1});
        let mut posts = Vec::new();
        // The first takes the only slot, so that the second waits for another worker.
        for _ in 0..2 {
            posts.push(self.post("/v1/completions", &body));
            let (question, _) = one.asked().await;
            one.answer(question, Answer::Pieces(piece())).await;
            if posts.len() == 1 {
                let sequence = one.submitted().await.sequence;
                one.say(Said::Accepted(proto::Accepted { sequence })).await;
            }
        }
        let mut two = self.another("two").await;
        let second = two.submitted().await.sequence;
        let accepted = proto::Accepted { sequence: second };
        two.say(Said::Accepted(accepted)).await;
        for (worker, sequence) in [(&one, 1), (&two, second)] {
            worker
                .say(step(scored(sequence, 7, proto::End::Length)))
                .await;
        }
        for post in posts {
            assert_eq!(post.await.expect("it does not panic"), 200);
        }
        [one, two]
    }

    /// Has each of two workers asked once. The second answers; the question of the first is left to it.
    async fn ask_both(&self, one: &mut Worker, two: &mut Worker) -> (Vec<JoinHandle<u16>>, u64) {
        let body = json!({"prompt": "hi"});
        let posts = (0..2).map(|_| self.post("/tokenize", &body)).collect();
        let (question, _) = two.asked().await;
        two.answer(question, ids()).await;
        (posts, one.asked().await.0)
    }

    /// Posts this; the status of what comes.
    fn post(&self, path: &str, body: &serde_json::Value) -> JoinHandle<u16> {
        let request = post(path, body.to_string());
        let address = self.server.http_address();
        tokio::spawn(async move { request.send_to(&address).await.status })
    }

    /// The status with which the stream of the worker of this name ends that says this.
    async fn broke(&self, name: &str, said: impl IntoIterator<Item = Said>) -> Status {
        let hello = proto::Hello {
            name: name.to_owned(),
            ..hello()
        };
        let mut worker = self.dial(Said::Hello(hello)).await.expect("it is taken");
        for said in said {
            worker.say(said).await;
        }
        worker.ended().await
    }
}

impl Worker {
    async fn say(&self, message: Said) {
        let message = Some(message);
        // An engine that has ended the stream does not hear it.
        let _ = self.says.send(proto::AttachRequest { message }).await;
    }

    async fn hear(&mut self) -> Result<Message, Status> {
        let heard = self.hears.message().await?;
        let heard = heard.ok_or_else(|| Status::cancelled("the engine ended the stream"))?;
        Ok(heard.message.expect("a message is one of them"))
    }

    /// The status with which its stream ends.
    async fn ended(&mut self) -> Status {
        loop {
            if let Err(status) = self.hear().await {
                return status;
            }
        }
    }

    /// Ends its stream. The engine has read all that it said when this returns.
    async fn leave(self) {
        let Self { says, mut hears } = self;
        drop(says);
        while let Ok(Some(_)) = hears.message().await {}
    }

    async fn submitted(&mut self) -> proto::Submit {
        let Message::Submit(submit) = self.hear().await.expect("the stream goes on") else {
            panic!("something else than a sequence");
        };
        submit
    }

    async fn asked(&mut self) -> (u64, About) {
        let Message::Question(asked) = self.hear().await.expect("the stream goes on") else {
            panic!("something else than a question");
        };
        (asked.question, asked.about.expect("something"))
    }

    /// Takes a sequence, and makes the token of this index, which is its id, too.
    async fn make(&self, sequence: u64, index: u32) {
        self.say(Said::Accepted(proto::Accepted { sequence })).await;
        let entry = proto::SequenceStep {
            sequence,
            first_index: index,
            ids: proto::PackedVarints::from_iter([index]),
            bytes: b"x".to_vec(),
            lengths: proto::PackedVarints::from_iter([1]),
            ..proto::SequenceStep::default()
        };
        let sequences = vec![entry];
        self.say(Said::Step(proto::Step { sequences })).await;
    }

    async fn answer(&self, question: u64, answer: Answer) {
        let answer = Some(answer);
        self.say(Said::Answer(proto::Answer { question, answer }))
            .await;
    }
}

#[tokio::test]
async fn who_does_not_belong_is_told_so() {
    let engine = engine(|_| ()).await;
    let other = |change: fn(&mut proto::Hello)| {
        let mut hello = hello();
        change(&mut hello);
        Said::Hello(hello)
    };
    for (first, code, said) in [
        (
            other(|hello| hello.protocol_version = 2),
            Code::FailedPrecondition,
            "this engine speaks protocol_version 1",
        ),
        (
            other(|hello| hello.model = "nobody".to_owned()),
            Code::NotFound,
            "there is no model 'nobody'; there are: llm_test",
        ),
        (
            other(|hello| hello.child_token = "stolen".to_owned()),
            Code::PermissionDenied,
            "there is no such child",
        ),
        (
            other(|hello| hello.name = "two\nlines".to_owned()),
            Code::InvalidArgument,
            "hello.name must be",
        ),
        (
            Said::Heartbeat(proto::Heartbeat { step_ms: 0 }),
            Code::FailedPrecondition,
            "hello comes first",
        ),
    ] {
        let status = engine.dial(first).await.err().expect("it is refused");
        assert_eq!(status.code(), code, "{status:?}");
        assert!(status.message().contains(said), "{status:?}");
    }
}

#[tokio::test]
async fn a_worker_that_breaks_the_contract_is_told_which_rule() {
    let engine = engine(|_| ()).await;
    let changed = |change: fn(&mut proto::Ready)| {
        let mut ready = ready();
        change(&mut ready);
        Said::Ready(ready)
    };
    fn of_model(ready: &mut proto::Ready) -> &mut proto::Model {
        ready.model.as_mut().expect("it is there")
    }
    let too_large = proto::Crashed {
        reason: "x".repeat(17 * 1024 * 1024),
    };
    for (said, rule) in [
        (Said::Crashed(too_large), "too large"),
        (changed(|ready| ready.slots = 0), "ready.slots"),
        (changed(|ready| ready.life = 0), "ready.life"),
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
        (Said::Hello(hello()), "hello comes once"),
        (
            Said::Step(proto::Step::default()),
            "ready comes before anything about sequences",
        ),
    ] {
        let status = engine.broke(rule, [said]).await;
        assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
        assert!(status.message().contains(rule), "{status:?}");
    }
    let sequences = vec![proto::SequenceStep::default(); proto::MAX_STEP_ENTRIES + 1];
    let many = [Said::Ready(ready()), Said::Step(proto::Step { sequences })];
    let status = engine.broke("many entries", many).await;
    assert_eq!(status.code(), Code::FailedPrecondition, "{status:?}");
    assert!(status.message().contains("at most 131072"), "{status:?}");
    let crashed = Said::Crashed(proto::Crashed::default());
    let twice = [Said::Ready(ready()), crashed, Said::Ready(ready())];
    let status = engine.broke("the same life", twice).await;
    assert!(
        status.message().contains("ready.life must be higher"),
        "{status:?}"
    );
    let _first = engine.worker().await;
    let other = changed(|ready| of_model(ready).context_length = 99);
    let status = engine.broke("other", [other]).await;
    assert!(
        status.message().contains("differs from what another"),
        "{status:?}"
    );
}

#[tokio::test]
async fn a_worker_that_broke_the_contract_has_to_wait_and_others_have_not() {
    let engine = engine(|_| ()).await;
    let broken = Said::Step(proto::Step::default());
    let _ = engine.broke("one", [broken]).await;
    let called = |name: &str| {
        Said::Hello(proto::Hello {
            name: name.to_owned(),
            ..hello()
        })
    };
    let status = engine.dial(called("one")).await.err();
    let status = status.expect("it is refused");
    assert_eq!(status.code(), Code::Unavailable);
    assert!(
        status.message().contains("may dial in again in"),
        "{status:?}"
    );
    assert!(engine.dial(called("another")).await.is_ok());
}

#[tokio::test]
async fn a_worker_that_leaves_a_sequence_alone_is_lost() {
    let engine = engine(|setup| {
        let patience = &mut setup.engine().workers.patience;
        patience.heartbeat_timeout = Duration::from_millis(200);
        patience.step_limit = Some(Duration::from_millis(100));
    })
    .await;
    let mut worker = engine.worker().await;
    let body = json!({"prompt": [5], "max_tokens": 2});
    let asked = post("/v1/completions", body.to_string());
    let address = engine.server.http_address();
    let _asked = tokio::spawn(async move { asked.send_to(&address).await });
    let mut beat = tokio::time::interval(Duration::from_millis(20));
    let status = loop {
        tokio::select! {
            heard = worker.hear() => match heard {
                Ok(Message::Question(proto::Question { question, .. })) => {
                    let pieces = proto::Pieces { bytes: b"x".to_vec(), lengths: vec![1] };
                    worker.answer(question, Answer::Pieces(pieces)).await;
                }
                Ok(_) => {}
                Err(status) => break status,
            },
            _ = beat.tick() => worker.say(Said::Heartbeat(proto::Heartbeat::default())).await,
        }
    };
    let told = "neither accepted nor refused a sequence";
    assert!(status.message().contains(told), "{status:?}");
}

#[tokio::test]
async fn every_sequence_reaches_a_worker_with_thousands_of_slots() {
    const SLOTS: u32 = 4_096;
    const CHOICES: u32 = 128;
    let engine = engine(|_| ()).await;
    let mut worker = engine
        .dial(Said::Hello(hello()))
        .await
        .expect("it is taken");
    let offer = proto::Ready {
        slots: SLOTS,
        ..ready()
    };
    worker.say(Said::Ready(offer)).await;
    engine.server.loaded().await;
    let client = engine.server.grpc().await;
    let asked = (0..SLOTS / CHOICES).map(|_| {
        let mut client = client.clone();
        let request = v1::CompletionRequest {
            n: Some(CHOICES),
            ..grpc::request("a", 1)
        };
        async move { client.complete(request).await }
    });
    let asked = tokio::spawn(join_all(asked));
    let mut submitted = 0;
    while submitted < SLOTS {
        match worker.hear().await.expect("the stream goes on") {
            Message::Submit(_) => submitted += 1,
            Message::Question(proto::Question { question, .. }) => {
                let ids = proto::TokenIds { ids: vec![1] };
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
    asked.abort();
}

#[tokio::test]
async fn a_worker_that_falls_silent_is_lost_and_told_so() {
    let engine = engine(|setup| {
        setup.engine().workers.patience.heartbeat_timeout = Duration::from_millis(100);
    })
    .await;
    let mut worker = engine.worker().await;
    let status = worker.hear().await.expect_err("it says nothing");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    engine.server.not_ready().await;
    let no_worker = refused(503, "no_worker", None);
    assert_eq!(refusal(&engine.server, get("/readyz")).await, no_worker);
    let (_, absent) = get("/readyz").fetch(&engine.server).await;
    assert!(
        absent
            .text
            .contains("No worker of the model 'llm_test' has dialled in"),
        "{}",
        absent.text
    );
}

#[tokio::test]
async fn a_heartbeat_timeout_that_is_out_of_range_is_refused_with_its_field() {
    let engine = engine(|_| ()).await;
    for out_of_range in [1, 99, 3_600_001] {
        let refused = engine
            .connect_with_heartbeat_timeout(out_of_range)
            .await
            .err();
        let status = refused.expect("it is refused");
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
async fn a_worker_is_lost_after_the_silence_that_it_declared_and_not_before() {
    let engine = engine(|setup| {
        setup.engine().workers.patience.heartbeat_timeout = Duration::from_millis(100);
        // A worker's stream is one long request: the limits of clients' requests are none of it.
        setup.parts.limits.body_timeout = Duration::from_millis(500);
        setup.parts.limits.write_timeout = Duration::from_millis(500);
    })
    .await;
    let began = Instant::now();
    let declared = Duration::from_millis(1_500);
    let mut worker = engine
        .connect_with_heartbeat_timeout(1_500)
        .await
        .expect("it is taken");
    let status = worker.ended().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("no heartbeat"), "{status:?}");
    assert!(began.elapsed() >= declared, "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_device_call_as_long_as_the_declared_silence_is_within_the_step_limit() {
    let engine = engine(|setup| {
        setup.engine().workers.patience.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine
        .connect_with_heartbeat_timeout(60_000)
        .await
        .expect("it is taken");
    let heartbeat = |step_ms| Said::Heartbeat(proto::Heartbeat { step_ms });
    worker.say(heartbeat(60_000)).await;
    // The engine has read the heartbeat when it knows that the worker is ready.
    worker.say(Said::Ready(ready())).await;
    tokio::select! {
        () = engine.server.loaded() => {}
        status = worker.ended() => panic!("{status:?}"),
    }
    worker.say(heartbeat(60_001)).await;
    let status = worker.ended().await;
    assert!(status.message().contains("step limit"), "{status:?}");
}

/// A request whose workers end their streams right after this, each time: its resumptions, and how it ends.
async fn resumptions(until_it_leaves: impl AsyncFn(&Worker, u64, u32)) -> (f64, Refusal) {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let request = post("/v1/completions", r#"{"prompt": [5], "max_tokens": 90}"#);
    let address = engine.server.http_address();
    let asked = tokio::spawn(async move {
        let mut response = request.send_to(&address).await;
        let (code, param) = response.rest().await.error();
        (response.status, code, param)
    });
    let (question, _) = worker.asked().await;
    worker.answer(question, Answer::Pieces(piece())).await;
    for index in 0.. {
        let sequence = worker.submitted().await.sequence;
        until_it_leaves(&worker, sequence, index).await;
        worker.leave().await;
        if index == 8 {
            break;
        }
        worker = engine.another(&index.to_string()).await;
    }
    let ended = asked.await.expect("it does not panic");
    let resumptions = Counts::now(&engine.server).get("tokenway_resumptions_total");
    (resumptions, ended)
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_after_each_token_ends_with_worker_lost() {
    let make = async |worker: &Worker, sequence, index| worker.make(sequence, index).await;
    let worker_lost = refused(502, "worker_lost", None);
    assert_eq!(resumptions(make).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_before_they_accept_it_ends_with_worker_lost() {
    let nothing = async |_: &Worker, _, _| ();
    let worker_lost = refused(502, "worker_lost", None);
    assert_eq!(resumptions(nothing).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_worker_whose_device_does_not_return_is_lost() {
    let engine = engine(|setup| {
        setup.engine().workers.patience.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine.worker().await;
    worker
        .say(Said::Heartbeat(proto::Heartbeat { step_ms: 1_001 }))
        .await;
    let status = worker.hear().await.expect_err("its device is stuck");
    assert!(status.message().contains("step limit"), "{status:?}");
    engine.server.not_ready().await;
}

#[tokio::test]
async fn what_a_worker_says_of_a_request_is_what_its_client_gets() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let client = engine.server.grpc().await;
    let asked = tokio::spawn(async move {
        let mut client = client;
        let stream = client.complete(grpc::request("hi", 3)).await;
        grpc::collect(stream.expect("it is admitted").into_inner()).await
    });
    let (question, about) = worker.asked().await;
    let tokenize = proto::Tokenize {
        text: "hi".to_owned(),
        begins: true,
    };
    assert_eq!(about, About::Tokenize(tokenize));
    let ids = vec![7, 8];
    worker
        .answer(question, Answer::Ids(proto::TokenIds { ids }))
        .await;
    let submit = worker.submitted().await;
    assert_eq!(
        (submit.prompt, submit.max_tokens, submit.life),
        (vec![7, 8], 3, 1)
    );
    assert_eq!(submit.credit, 3);
    let sequence = submit.sequence;
    worker
        .say(Said::Accepted(proto::Accepted { sequence }))
        .await;
    // One character in two tokens, and the end of the sequence.
    let entry = proto::SequenceStep {
        sequence,
        ids: proto::PackedVarints::from_iter([1, 2, 3]),
        bytes: "é".as_bytes().to_vec(),
        lengths: proto::PackedVarints::from_iter([1, 1, 0]),
        end: proto::End::Stop.into(),
        ..proto::SequenceStep::default()
    };
    let sequences = vec![entry];
    worker.say(Said::Step(proto::Step { sequences })).await;
    let completion = asked.await.expect("it does not panic");
    assert_eq!(completion.texts(0), ["", "é", ""]);
    assert_eq!(completion.usage().completion_tokens, 3);
}

#[tokio::test]
async fn choices_whose_worker_crashes_go_on_one_by_one_and_the_second_crash_in_a_row_ends_them() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let mut client = engine.server.grpc().await;
    let request = v1::CompletionRequest {
        n: Some(2),
        ..grpc::request("hi", 9)
    };
    let asked = tokio::spawn(async move {
        let stream = client.complete(request).await;
        grpc::collect(stream.expect("it is admitted").into_inner()).await
    });
    let (question, _) = worker.asked().await;
    let ids = proto::TokenIds { ids: vec![7] };
    worker.answer(question, Answer::Ids(ids)).await;
    let (first, second) = (worker.submitted().await, worker.submitted().await);
    for submit in [&first, &second] {
        worker.make(submit.sequence, 0).await;
    }
    let crashes = |life| {
        let again = Said::Ready(proto::Ready { life, ..ready() });
        [Said::Crashed(proto::Crashed::default()), again]
    };
    for said in crashes(2) {
        worker.say(said).await;
    }
    // Each may be why it crashed: the other waits until this one has made a token.
    let one = worker.submitted().await;
    worker.make(one.sequence, 1).await;
    let other = worker.submitted().await;
    for again in [&one, &other] {
        assert_eq!((&*again.delivered, again.life), (&[0][..], 2));
    }
    let choice = |submit: &proto::Submit| submit.sampling.as_ref().map(|it| it.choice);
    let mut resumed = [choice(&one), choice(&other)];
    resumed.sort_unstable();
    assert_eq!(resumed, [choice(&first), choice(&second)]);
    for said in crashes(3) {
        worker.say(said).await;
    }
    let error = asked.await.expect("it does not panic").error;
    assert_eq!(
        error.map(|error| Error::from(&error).kind),
        Some(ErrorKind::WorkerLost)
    );
}

#[tokio::test]
async fn what_a_worker_refuses_its_client_is_told() {
    let engine = engine(|_| ()).await;
    let mut worker = engine.worker().await;
    let address = engine.server.http_address();
    let ask = |path: &str, body: serde_json::Value| {
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
        let asked = ask("/tokenize", json!({"prompt": "hi"}));
        let (question, _) = worker.asked().await;
        worker
            .answer(question, Answer::Failure(failure(is_invalid)))
            .await;
        let (told, (of, _)) = asked.await.expect("it does not panic");
        assert_eq!((told, &*of), (status, code));
    }
    let asked = ask("/v1/completions", json!({"prompt": [5], "max_tokens": 2}));
    let (question, about) = worker.asked().await;
    assert_eq!(about, About::Detokenize(proto::Detokenize { ids: vec![5] }));
    let pieces = proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    };
    worker.answer(question, Answer::Pieces(pieces)).await;
    let sequence = worker.submitted().await.sequence;
    let failure = Some(failure(true));
    worker
        .say(Said::Refused(proto::Refused { sequence, failure }))
        .await;
    let (told, (code, _)) = asked.await.expect("it does not panic");
    assert_eq!((told, &*code), (400, "invalid_value"));
}

#[tokio::test]
async fn a_prompt_that_a_worker_scores_wrong_is_scored_by_another() {
    let engine = engine(|_| ()).await;
    let mut wrong = engine.worker().await;
    let body = json!({"prompt": [5], "max_tokens": 1, "echo": true, "logprobs": 0});
    let asked = engine.post("/v1/completions", &body);
    let (question, _) = wrong.asked().await;
    wrong.answer(question, Answer::Pieces(piece())).await;
    let sequence = wrong.submitted().await.sequence;
    let mut right = engine.another("right").await;
    wrong
        .say(Said::Accepted(proto::Accepted { sequence }))
        .await;
    let completion = scored(sequence, 7, proto::End::Length);
    wrong.say(step(completion)).await;
    let status = wrong.ended().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status.message().contains("before all of its prompt's"),
        "{status:?}"
    );
    let submit = right.submitted().await;
    assert!(submit.scores_prompt);
    let sequence = submit.sequence;
    right
        .say(Said::Accepted(proto::Accepted { sequence }))
        .await;
    let prompt = proto::SequenceStep {
        is_prompt: true,
        ..scored(sequence, 5, proto::End::Unspecified)
    };
    right.say(step(prompt)).await;
    let completion = scored(sequence, 7, proto::End::Length);
    right.say(step(completion)).await;
    assert_eq!(asked.await.expect("it does not panic"), 200);
}

#[tokio::test]
async fn a_wrong_answer_costs_the_worker_and_another_is_asked() {
    let engine = engine(|_| ()).await;
    let [mut wrong, mut right] = engine.two_workers().await;
    let (posts, question) = engine.ask_both(&mut wrong, &mut right).await;
    let text = Answer::Text("no ids".to_owned());
    wrong.answer(question, text).await;
    let status = wrong.ended().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("does not fit"), "{status:?}");
    let (question, _) = right.asked().await;
    right.answer(question, ids()).await;
    for post in posts {
        assert_eq!(post.await.expect("it does not panic"), 200);
    }
}

#[tokio::test]
async fn a_worker_that_leaves_a_question_alone_is_lost_and_another_is_asked() {
    let engine = engine(|setup| {
        setup.engine().workers.patience.tokenizer_call_timeout = Duration::from_millis(500);
    })
    .await;
    let [mut slow, mut right] = engine.two_workers().await;
    let (posts, _) = engine.ask_both(&mut slow, &mut right).await;
    let (question, _) = right.asked().await;
    right.answer(question, ids()).await;
    for post in posts {
        assert_eq!(post.await.expect("it does not panic"), 200);
    }
    let status = slow.ended().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let told = "answered none in time";
    assert!(status.message().contains(told), "{status:?}");
}

fn ids() -> Answer {
    Answer::Ids(proto::TokenIds { ids: vec![7] })
}

/// The only piece of an answer.
fn piece() -> proto::Pieces {
    proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    }
}

/// A token with its log probabilities.
fn scored(sequence: u64, id: u32, end: proto::End) -> proto::SequenceStep {
    proto::SequenceStep {
        sequence,
        ids: proto::PackedVarints::from_iter([id]),
        bytes: b"x".to_vec(),
        lengths: proto::PackedVarints::from_iter([1]),
        logprobs: vec![proto::Logprobs {
            logprob: Some(-1.0),
            ..proto::Logprobs::default()
        }],
        end: end.into(),
        ..proto::SequenceStep::default()
    }
}

fn step(entry: proto::SequenceStep) -> Said {
    let sequences = vec![entry];
    Said::Step(proto::Step { sequences })
}
