//! Streams whose worker is lost are resumed on another worker, or on the same worker after a restart. Clients see
//! only a pause.

mod support;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use serde_json::json;
use support::grpc::{collect, collect_from, grpc_error};
use support::http::{completion, texts};
use support::metrics::MetricsSnapshot;
use support::{Setup, full_speed, grpc, with_interval};
use tokenway::error::ErrorKind;
use tokenway::proto::v1;
use tokenway::runner::llm_test::{TestRunnerLoader, TestRunnerOptions};
use tokenway::runner::{
    LoadError, LoadedModel, Loader, ModelError, NextStep, Runner, Sequence, SequenceStart, Slot,
    SlotCredit, Step, StepError,
};
use tonic::Code;

/// A prompt that crashes the device in its first step, because it has `POISON_WORDS` words.
const POISON: &str = "this prompt has seven words exactly here";
const POISON_WORDS: usize = 7;

/// Loader of a test runner whose devices crash when the test requests it.
struct CrashingLoader {
    loader: TestRunnerLoader,
    /// Number of the next steps that crash their device.
    crashes: Arc<AtomicUsize>,
}

struct CrashingRunner {
    runner: Box<dyn Runner>,
    crashes: Arc<AtomicUsize>,
    is_poisoned: bool,
}

impl Loader for CrashingLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, runner } = self.loader.load(slots, progress)?;
        let runner = Box::new(CrashingRunner {
            runner,
            crashes: Arc::clone(&self.crashes),
            is_poisoned: false,
        });
        Ok(LoadedModel { model, runner })
    }

    fn name(&self) -> &'static str {
        "llm_test"
    }
}

impl Runner for CrashingRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.is_poisoned |= sequence.prompt.len() == POISON_WORDS;
        self.runner.admit(slot, sequence)
    }

    fn release(&mut self, slot: Slot) {
        self.runner.release(slot);
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        self.runner.next_step(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        let decrement = |left: usize| left.checked_sub(1);
        let order = Ordering::SeqCst;
        if self.is_poisoned || self.crashes.fetch_update(order, order, decrement).is_ok() {
            return Err(StepError("the test made the device crash".to_owned()));
        }
        self.runner.step(step)
    }
}

/// Returns a server whose workers crash when the test says so, and the number of upcoming crashes, which the test
/// sets.
fn crashing_setup(options: TestRunnerOptions, workers: usize) -> (Setup, Arc<AtomicUsize>) {
    let crashes = Arc::new(AtomicUsize::new(0));
    let loader = CrashingLoader {
        loader: TestRunnerLoader::new(options),
        crashes: Arc::clone(&crashes),
    };
    let mut setup = Setup::runner("llm_test", Arc::new(loader), 64);
    setup.engine().models[0].workers = workers;
    (setup, crashes)
}

fn token_texts(from: u32, to: u32) -> Vec<String> {
    (from..to).map(|index| format!("token_{index}")).collect()
}

#[tokio::test]
async fn a_worker_crash_loses_and_repeats_no_token() {
    let (setup, crashes) = crashing_setup(with_interval(Duration::from_millis(1)), 2);
    let server = setup.start().await;
    let body = json!({"prompt": "a", "max_tokens": 300, "stream": true});
    let http = (0..8).map(|_| completion(&body).fetch(&server));
    let grpc =
        (0..8).map(|_| async { collect(server.stream(grpc::request("a", 300)).await).await });
    // One worker crashes early and the other one late.
    let crash = async {
        let stream = server.stream(grpc::request("a", 300)).await;
        let mut faults = [10, 200].into_iter().peekable();
        collect_from(stream, |count| {
            if faults.next_if(|at| *at < count).is_some() {
                crashes.store(1, Ordering::SeqCst);
            }
        })
        .await
    };
    let (http, mut grpc, last) = tokio::join!(join_all(http), join_all(grpc), crash);
    grpc.push(last);
    for (response, answer) in http {
        assert_eq!(response.status, 200);
        assert_eq!(texts(&answer.lines(), 0), token_texts(0, 300));
    }
    for completion in grpc {
        assert_eq!(completion.texts(0), token_texts(0, 300));
        let usage = completion.usage();
        assert_eq!((usage.prompt_tokens, usage.completion_tokens), (1, 300));
    }
    let counts = server.drain().await;
    counts.assert_all_gauges_are_zero();
    assert!(counts.get("tokenway_resumptions_total") > 0.0);
    let gaps = counts.get("tokenway_resumption_gap_seconds_count");
    assert!(gaps > 0.0, "{}", counts.0);
}

#[tokio::test]
async fn a_request_that_crashes_two_workers_fails_and_others_continue() {
    let (setup, _) = crashing_setup(with_interval(Duration::from_millis(1)), 3);
    let server = setup.start().await;
    let others =
        (0..12).map(|_| async { collect(server.stream(grpc::request("a", 200)).await).await });
    let poison = async {
        let (_, answer) = completion(&json!({"prompt": POISON, "max_tokens": 5}))
            .fetch(&server)
            .await;
        answer.error().0
    };
    let (others, code) = tokio::join!(join_all(others), poison);
    assert_eq!(code, "worker_lost");
    for completion in others {
        assert_eq!(completion.texts(0), token_texts(0, 200));
    }
    assert_eq!(
        MetricsSnapshot::take(&server).get("tokenway_workers_lost_total"),
        2.0
    );
}

#[tokio::test]
async fn delivered_tokens_are_not_resent_and_count_in_the_usage() {
    let server = Setup::test_runner(full_speed()).start().await;
    let request = v1::CompletionRequest {
        n: Some(2),
        seed: Some(1),
        resume: vec![v1::ResumedChoice {
            choice: 1,
            token_ids: vec![0, 1, 2],
        }],
        ..grpc::request("a", 5)
    };
    let mut stream = server.stream(request).await;
    let mut indices = Vec::new();
    let mut usage = None;
    while let Some(event) = stream.message().await.expect("the stream continues") {
        match event.event.expect("the event has a known type") {
            v1::completion_event::Event::Tokens(tokens) if tokens.choice == 1 => {
                indices.extend(tokens.tokens.iter().map(|token| token.id));
            }
            v1::completion_event::Event::Summary(summary) => usage = summary.usage,
            v1::completion_event::Event::Started(_)
            | v1::completion_event::Event::Tokens(_)
            | v1::completion_event::Event::Prompt(_)
            | v1::completion_event::Event::Chat(_) => {}
        }
    }
    assert_eq!(indices, [3, 4]);
    assert_eq!(usage.expect("a summary").completion_tokens, 10);
}

#[tokio::test]
async fn a_held_back_token_is_not_sent_twice_after_resuming() {
    let server = Setup::test_runner(full_speed()).start().await;
    // `token_1` may be the start of the stop string. It is held back until `token_2` shows that it is not.
    let request = |resume| v1::CompletionRequest {
        stop: vec!["token_1token_3".to_owned()],
        seed: Some(1),
        resume,
        ..grpc::request("a", 5)
    };
    let held = v1::ResumedChoice {
        choice: 0,
        token_ids: vec![0, 1],
    };
    let mut stream = server.stream(request(vec![held])).await;
    let mut received = Vec::new();
    while let Some(event) = stream.message().await.expect("the stream continues") {
        if let Some(v1::completion_event::Event::Tokens(tokens)) = event.event {
            for (index, token) in (tokens.first_index..).zip(tokens.tokens.iter()) {
                received.push((index, token.text.to_owned()));
            }
        }
    }
    let expected: Vec<_> = (2..5).zip(token_texts(2, 5)).collect();
    assert_eq!(received, expected);
}

#[tokio::test]
async fn invalid_resumptions_are_rejected_with_their_field() {
    let server = Setup::test_runner(full_speed()).start().await;
    let resume = |ids: &[u32]| {
        vec![v1::ResumedChoice {
            choice: 0,
            token_ids: ids.to_vec(),
        }]
    };
    let request = |resume| v1::CompletionRequest {
        seed: Some(1),
        resume,
        ..grpc::request("a", 3)
    };
    let stopped = v1::CompletionRequest {
        stop: vec!["token_1".to_owned()],
        ..request(resume(&[0, 1]))
    };
    let unseeded = v1::CompletionRequest {
        seed: None,
        ..request(resume(&[0]))
    };
    for (request, param) in [
        (request(resume(&[0, 1, 2])), "resume"),
        (stopped, "resume"),
        (unseeded, "seed"),
    ] {
        let (code, error) = grpc_error(&server, request).await;
        assert_eq!(
            (code, error.kind),
            (Code::InvalidArgument, ErrorKind::InvalidValue)
        );
        assert_eq!(error.param.as_deref(), Some(param));
    }
}
