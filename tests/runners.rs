//! Runners with special behaviour: an end-of-sequence token, no timestamps, a failing device, or more tokens than
//! credit.

mod support;

use std::sync::Arc;

use serde_json::{Value, json};
use support::http::completion;
use support::{Setup, TestServer, grpc};
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::request::{ChatMessage, EndUser, TokenId};
use tokenway::runner::{
    BosPolicy, LoadError, LoadedModel, Loader, Model, ModelError, ModelFacts, NextStep, Resumption,
    Runner, Sequence, SequenceStart, Slot, SlotCredit, Step, StepError, Token, TokenBytes,
};
use tokio::sync::mpsc;

/// Behaviour of the runner in its first step with a sequence.
#[derive(Clone, Copy)]
enum DeviceBehaviour {
    /// Emits one token, then the end-of-sequence token.
    EmitEos,
    /// Fails, and loses all its sequences.
    Fail,
    /// Emits more tokens than the sequence has credit for.
    IgnoreCredit,
    /// Emits two tokens without timestamps.
    NoTimestamps,
}

struct Device {
    behaviour: DeviceBehaviour,
    running: Option<Slot>,
}

/// A loader whose device reports the field `user` of each sequence.
struct UserRecordingLoader(mpsc::Sender<EndUser>);

struct UserRecordingRunner {
    users: mpsc::Sender<EndUser>,
    device: Device,
}

struct FactsOnlyModel(ModelFacts);

fn token(id: TokenId) -> Token {
    Token {
        id,
        bytes: TokenBytes::from_slice(b"x"),
        due_ns: 0,
        emitted_ns: 0,
        logprobs: None,
    }
}

impl Runner for Device {
    fn admit(&mut self, slot: Slot, _sequence: Sequence) -> Result<SequenceStart, ModelError> {
        self.running = Some(slot);
        Ok(SequenceStart::default())
    }

    fn release(&mut self, _slot: Slot) {
        self.running = None;
    }

    fn next_step(&mut self, _room: &dyn SlotCredit) -> NextStep {
        self.running.map_or(NextStep::Idle, |_| NextStep::Now)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        let Some(slot) = self.running else {
            return Ok(());
        };
        match self.behaviour {
            DeviceBehaviour::EmitEos => {
                step.emit(slot, token(0));
                step.end(slot, token(1));
            }
            DeviceBehaviour::Fail => return Err(StepError("the device is gone".to_owned())),
            DeviceBehaviour::IgnoreCredit => (0..10_000).for_each(|id| step.emit(slot, token(id))),
            DeviceBehaviour::NoTimestamps => (0..2).for_each(|id| step.emit(slot, token(id))),
        }
        Ok(())
    }
}

impl Loader for UserRecordingLoader {
    fn load(&self, slots: usize, progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let LoadedModel { model, .. } = DeviceBehaviour::EmitEos.load(slots, progress)?;
        let device = Device {
            behaviour: DeviceBehaviour::EmitEos,
            running: None,
        };
        let users = self.0.clone();
        Ok(LoadedModel {
            model,
            runner: Box::new(UserRecordingRunner { users, device }),
        })
    }

    fn name(&self) -> &'static str {
        "scripted"
    }
}

impl Runner for UserRecordingRunner {
    fn admit(&mut self, slot: Slot, sequence: Sequence) -> Result<SequenceStart, ModelError> {
        let user = sequence.options.user.clone();
        self.users
            .blocking_send(user)
            .expect("the test receives the users");
        self.device.admit(slot, sequence)
    }

    fn release(&mut self, slot: Slot) {
        self.device.release(slot);
    }

    fn next_step(&mut self, credit: &dyn SlotCredit) -> NextStep {
        self.device.next_step(credit)
    }

    fn step(&mut self, step: &mut Step<'_>) -> Result<(), StepError> {
        self.device.step(step)
    }
}

impl Model for FactsOnlyModel {
    fn facts(&self) -> &ModelFacts {
        &self.0
    }

    fn tokenize(&self, _text: &str, _: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        Ok(vec![0])
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        Ok(vec![TokenBytes::new(); ids.len()])
    }

    fn render_chat(&self, _messages: &[ChatMessage]) -> Result<String, ModelError> {
        Err(ModelError::Invalid(
            "the model has no chat template".to_owned(),
        ))
    }
}

impl Loader for DeviceBehaviour {
    fn load(&self, _slots: usize, _progress: &dyn Fn(f32)) -> Result<LoadedModel, LoadError> {
        let facts = ModelFacts {
            name: "scripted".to_owned(),
            context_length: 100_000,
            max_prompt_bytes: 8,
            vocabulary_size: 10,
            resumption: Resumption::No,
            reuses_prefixes: false,
            device: None,
            unsupported: Vec::new(),
            bos_token: None,
            eos_token: None,
        };
        Ok(LoadedModel {
            model: Arc::new(FactsOnlyModel(facts)),
            runner: Box::new(Device {
                behaviour: *self,
                running: None,
            }),
        })
    }

    fn name(&self) -> &'static str {
        "scripted"
    }
}

async fn server(behaviour: DeviceBehaviour) -> TestServer {
    Setup::runner("scripted", Arc::new(behaviour), 1)
        .start()
        .await
}

async fn complete(server: &TestServer, request: v1::CompletionRequest) -> grpc::Completion {
    let stream = server.grpc().await.complete(request).await;
    let stream = stream.expect("the request is admitted");
    grpc::collect(stream.into_inner()).await
}

fn error_kind(completion: &grpc::Completion) -> ErrorKind {
    Error::from(completion.error.as_ref().expect("an error")).kind
}

#[tokio::test]
async fn an_eos_token_is_a_last_line_without_text_and_counts_in_the_usage() {
    let server = server(DeviceBehaviour::EmitEos).await;
    let options = json!({"include_usage": true});
    let body = json!({"prompt": "a", "max_tokens": 9, "stream": true, "stream_options": options});
    let (_, body) = completion(&body).fetch(&server).await;
    let lines = body.lines();
    let shown = |line: &Value| {
        let choice = &line["choices"][0];
        (choice["text"].clone(), choice["finish_reason"].clone())
    };
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(shown(&lines[0]), (json!("x"), Value::Null));
    assert_eq!(shown(&lines[1]), (json!(""), json!("stop")));
    assert_eq!(lines[2]["usage"]["completion_tokens"], 2);
}

#[tokio::test]
async fn a_device_failure_ends_its_sequences_with_worker_lost() {
    let server = server(DeviceBehaviour::Fail).await;
    let completion = complete(&server, grpc::request("a", 9)).await;
    assert_eq!(error_kind(&completion), ErrorKind::WorkerLost);
}

#[tokio::test]
async fn a_runner_that_ignores_credit_fails_the_sequence() {
    let server = server(DeviceBehaviour::IgnoreCredit).await;
    let completion = complete(&server, grpc::request("a", 10_000)).await;
    assert_eq!(error_kind(&completion), ErrorKind::Internal);
}

#[tokio::test]
async fn the_worker_sets_timestamps_that_the_runner_leaves_out() {
    let server = server(DeviceBehaviour::NoTimestamps).await;
    let mut request = grpc::request("a", 2);
    request.include_stamps = true;
    let completion = complete(&server, request).await;
    let mut tokens = completion.choices[0].tokens.iter();
    assert!(tokens.all(|token| token.emitted_ns.is_some() && token.due_ns.is_none()));
}

#[tokio::test]
async fn an_invalid_prompt_is_rejected() {
    let server = server(DeviceBehaviour::EmitEos).await;
    let mut client = server.grpc().await;
    let too_long = client.complete(grpc::request("123456789", 1)).await;
    let kind = |status: &tonic::Status| Error::from(status).kind;
    assert_eq!(
        kind(&too_long.unwrap_err()),
        ErrorKind::ContextLengthExceeded
    );
    let ids = v1::TokenIds { ids: vec![1, 10] };
    let unknown = v1::CompletionRequest {
        input: Some(v1::completion_request::Input::PromptTokenIds(ids)),
        ..grpc::request("a", 1)
    };
    let unknown = client.complete(unknown).await;
    assert_eq!(kind(&unknown.unwrap_err()), ErrorKind::InvalidValue);
}

#[tokio::test]
async fn the_runner_receives_the_user_over_both_apis() {
    let (sender, mut users) = mpsc::channel(2);
    let server = Setup::runner("scripted", Arc::new(UserRecordingLoader(sender)), 1)
        .start()
        .await;
    let over_grpc = v1::CompletionRequest {
        user: "ada".to_owned(),
        ..grpc::request("a", 9)
    };
    complete(&server, over_grpc).await;
    assert_eq!(users.recv().await, Some(EndUser(Some("ada".into()))));
    let over_http = completion(&json!({"prompt": "a", "user": "grace"}));
    assert_eq!(over_http.fetch(&server).await.0.status, 200);
    assert_eq!(users.recv().await, Some(EndUser(Some("grace".into()))));
}
