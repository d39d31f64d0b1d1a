//! A server of vLLM's gRPC API that answers each completion as a script says.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, Response as HttpResponse};
use futures_util::{Stream, StreamExt, stream};
use http_body_util::{BodyStream, StreamBody};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;
use tokio::sync::{Notify, watch};
use tonic::service::Routes;
use tonic::{Request, Response, Status};
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;
use vllm_proto::control_server::{Control, ControlServer};
use vllm_proto::finish_info::FinishReason;
use vllm_proto::inference_server::{Inference, InferenceServer};
use vllm_proto::*;

/// Trailer that makes the engine reset the stream instead of sending the trailers.
const RESET: &str = "x-reset";

/// One step of a response.
#[derive(Clone, Debug)]
pub enum Step {
    /// Rejects the request. Only as the first step.
    Reject(Status),
    /// Never sends the response headers. Only as the first step. Any other first step sends them.
    WithholdHeaders,
    /// Sends a message.
    Send(Box<GenerateResponse>),
    /// Ends the stream with this status.
    Fail(Status),
    /// Ends the stream with the status OK.
    End,
    /// Resets the stream.
    Reset,
    /// Waits for [`VllmEngine::resume`].
    WaitForSignal,
    /// Waits until the gateway cancels the RPC.
    WaitForCancel,
}

/// Returns the step that reports the number of prompt tokens.
pub fn prompt(num_prompt_tokens: u32) -> Step {
    let prompt_info = Some(PromptInfo {
        num_prompt_tokens,
        ..PromptInfo::default()
    });
    Step::Send(Box::new(GenerateResponse {
        prompt_info,
        outputs: None,
    }))
}

/// Returns an output of one choice.
pub fn output(index: u32, text: &str, ids: &[u32]) -> SequenceOutput {
    SequenceOutput {
        index,
        text: text.to_owned(),
        num_tokens: u32::try_from(ids.len()).expect("a small number"),
        token_ids: ids.to_vec(),
        ..SequenceOutput::default()
    }
}

/// Makes an output the last one of its choice. `total` is the number of tokens of the choice.
pub fn ending(mut output: SequenceOutput, reason: impl Into<i32>, total: u32) -> SequenceOutput {
    output.finish_info = Some(FinishInfo {
        num_output_tokens: total,
        finish_reason: reason.into(),
        ..FinishInfo::default()
    });
    output
}

/// Returns the step that sends an output.
pub fn send(output: SequenceOutput) -> Step {
    Step::Send(Box::new(GenerateResponse {
        prompt_info: None,
        outputs: Some(output),
    }))
}

/// Returns the steps of a whole response to a prompt of three tokens: one token per text, with the ids 10, 11 and so
/// on. It ends with `LENGTH`.
pub fn whole(texts: &[&str]) -> Vec<Step> {
    let total = u32::try_from(texts.len()).expect("a small number");
    let outputs = (10..).zip(texts).map(|(id, text)| {
        let output = output(0, text, &[id]);
        send(if id + 1 == 10 + total {
            ending(output, FinishReason::Length, total)
        } else {
            output
        })
    });
    let mut steps = vec![prompt(3)];
    steps.extend(outputs);
    steps.push(Step::End);
    steps
}

/// A completion request that the engine received.
#[derive(Clone, Debug)]
pub struct Received {
    pub message: GenerateRequest,
    /// Value of the header `authorization`.
    pub authorization: Option<String>,
}

/// An engine that runs until it is dropped.
pub struct VllmEngine {
    /// The engine has a runtime of its own, so that shutting down the runtime closes its connections.
    runtime: Option<Runtime>,
    address: String,
    service: Service,
    health: HealthReporter,
}

/// A script: returns the steps of the response to each completion request.
type Script = Arc<dyn Fn(&GenerateRequest) -> Vec<Step> + Send + Sync>;

#[derive(Clone)]
struct Service {
    script: Script,
    model: Arc<Mutex<ModelInfo>>,
    received: Arc<Mutex<Vec<Received>>>,
    /// Number of completion requests so far.
    requests: watch::Sender<usize>,
    /// Number of completions that the gateway cancelled.
    cancelled: watch::Sender<usize>,
    signal: Arc<Notify>,
}

impl VllmEngine {
    /// Starts an engine that answers every completion with these steps.
    pub async fn answering(steps: Vec<Step>) -> Self {
        Self::start(move |_| steps.clone()).await
    }

    /// Starts an engine with the model `m`, which has the alias `other` and a context of 64 tokens.
    pub async fn start(
        script: impl Fn(&GenerateRequest) -> Vec<Step> + Send + Sync + 'static,
    ) -> Self {
        let service = Service {
            script: Arc::new(script),
            model: Arc::new(Mutex::new(ModelInfo {
                model_id: "/models/m".to_owned(),
                served_model_name: "m".to_owned(),
                served_model_aliases: vec!["other".to_owned()],
                ..ModelInfo::default()
            })),
            received: Arc::default(),
            requests: watch::Sender::new(0),
            cancelled: watch::Sender::new(0),
            signal: Arc::default(),
        };
        let (health, health_service) = tonic_health::server::health_reporter();
        let router = Routes::new(InferenceServer::new(service.clone()))
            .add_service(ControlServer::new(service.clone()))
            .add_service(health_service)
            .into_axum_router()
            .layer(axum::middleware::map_response(reset_marked_streams));
        let runtime = Runtime::new().expect("a runtime");
        let listening = runtime.spawn(TcpListener::bind("127.0.0.1:0"));
        let listener = listening.await.expect("no panic").expect("a port is free");
        let address = listener.local_addr().expect("it is bound").to_string();
        runtime.spawn(axum::serve(listener, router).into_future());
        Self {
            runtime: Some(runtime),
            address,
            service,
            health,
        }
    }

    /// Returns the address for `--engine`.
    pub fn url(&self) -> String {
        format!("vllm+grpc://{}", self.address)
    }

    /// Returns the completion requests so far.
    pub fn received(&self) -> Vec<Received> {
        self.service.received.lock().expect("no panic").clone()
    }

    /// Makes one response continue that waits for a signal, now or later.
    pub fn resume(&self) {
        self.service.signal.notify_one();
    }

    /// Sets the name under which the engine serves its model.
    pub fn rename_model(&self, name: &str) {
        let mut model = self.service.model.lock().expect("no panic");
        name.clone_into(&mut model.served_model_name);
    }

    /// Sets the status of the engine's health service.
    pub async fn set_health(&self, status: ServingStatus) {
        self.health.set_service_status("", status).await;
    }

    /// Closes all connections and the listener.
    pub fn kill(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }

    /// Waits until the engine has received this many completion requests.
    pub async fn wait_for_requests(&self, count: usize) {
        wait_for_count(&self.service.requests, count).await;
    }

    /// Waits until the gateway has cancelled this many completions.
    pub async fn wait_for_cancelled(&self, count: usize) {
        wait_for_count(&self.service.cancelled, count).await;
    }

    /// Returns the number of completions that the gateway has cancelled.
    pub fn cancelled(&self) -> usize {
        *self.service.cancelled.borrow()
    }
}

impl Drop for VllmEngine {
    fn drop(&mut self) {
        self.kill();
    }
}

async fn wait_for_count(counter: &watch::Sender<usize>, count: usize) {
    let mut counter = counter.subscribe();
    let waiting = counter.wait_for(|now| *now >= count);
    let waited = tokio::time::timeout(Duration::from_secs(30), waiting).await;
    waited
        .expect("the count is reached")
        .expect("the engine exists");
}

/// A response in progress. Dropping it before its end counts as a cancellation.
struct Scripted {
    steps: VecDeque<Step>,
    signal: Arc<Notify>,
    cancelled: watch::Sender<usize>,
    ended: bool,
}

impl Scripted {
    async fn next_message(&mut self) -> Option<Result<GenerateResponse, Status>> {
        loop {
            let status = match self.steps.pop_front()? {
                Step::Send(message) => return Some(Ok(*message)),
                Step::WaitForSignal => {
                    self.signal.notified().await;
                    continue;
                }
                Step::WaitForCancel | Step::WithholdHeaders => std::future::pending().await,
                Step::End => {
                    self.ended = true;
                    return None;
                }
                Step::Fail(status) | Step::Reject(status) => status,
                Step::Reset => {
                    let mut status = Status::unknown("reset");
                    let marker = "1".parse().expect("it is ASCII");
                    status.metadata_mut().insert(RESET, marker);
                    status
                }
            };
            self.ended = true;
            return Some(Err(status));
        }
    }
}

impl Drop for Scripted {
    fn drop(&mut self) {
        if !self.ended {
            self.cancelled.send_modify(|cancelled| *cancelled += 1);
        }
    }
}

#[tonic::async_trait]
impl Inference for Service {
    type GenerateStreamStream =
        Pin<Box<dyn Stream<Item = Result<GenerateResponse, Status>> + Send>>;

    async fn generate(
        &self,
        _request: Request<GenerateRequest>,
    ) -> Result<Response<GenerateResponse>, Status> {
        Err(Status::unimplemented("the gateway streams"))
    }

    async fn generate_stream(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Self::GenerateStreamStream>, Status> {
        let authorization = request.metadata().get("authorization");
        let authorization = authorization.and_then(|value| value.to_str().ok());
        let received = Received {
            authorization: authorization.map(str::to_owned),
            message: request.into_inner(),
        };
        let mut scripted = Scripted {
            steps: (self.script)(&received.message).into(),
            signal: Arc::clone(&self.signal),
            cancelled: self.cancelled.clone(),
            ended: false,
        };
        self.received.lock().expect("no panic").push(received);
        self.requests.send_modify(|requests| *requests += 1);
        if let Some(Step::Reject(_) | Step::WithholdHeaders) = scripted.steps.front()
            && let Some(Err(status)) = scripted.next_message().await
        {
            return Err(status);
        }
        let messages = stream::unfold(scripted, |mut scripted| async move {
            let message = scripted.next_message().await?;
            Some((message, scripted))
        });
        Ok(Response::new(Box::pin(messages)))
    }
}

/// Resets the streams whose trailers have the marker.
async fn reset_marked_streams(response: HttpResponse<Body>) -> HttpResponse<Body> {
    response.map(|body| {
        Body::new(StreamBody::new(BodyStream::new(body).map(|frame| {
            let frame = frame?;
            let is_marked = |trailers: &HeaderMap| trailers.contains_key(RESET);
            if frame.trailers_ref().is_some_and(is_marked) {
                return Err(axum::Error::new("reset"));
            }
            Ok(frame)
        })))
    })
}

/// Implements RPCs of `Control` that the gateway does not use.
macro_rules! unused_rpcs {
    ($($name:ident($request:ty) -> $response:ty;)*) => {$(
        fn $name<'a, 'async_trait>(
            &'a self,
            _request: Request<$request>,
        ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'async_trait>>
        where
            'a: 'async_trait,
            Self: 'async_trait,
        {
            Box::pin(async { Err(Status::unimplemented("the gateway does not use it")) })
        }
    )*};
}

#[tonic::async_trait]
impl Control for Service {
    async fn get_server_info(
        &self,
        _request: Request<GetServerInfoRequest>,
    ) -> Result<Response<ServerInfo>, Status> {
        Ok(Response::new(ServerInfo {
            engine_version: "0.0.0".to_owned(),
            max_model_len: 64,
            ..ServerInfo::default()
        }))
    }

    async fn get_model_info(
        &self,
        _request: Request<GetModelInfoRequest>,
    ) -> Result<Response<ModelInfo>, Status> {
        let model = self.model.lock().expect("no panic").clone();
        Ok(Response::new(model))
    }

    unused_rpcs! {
        shutdown(ShutdownRequest) -> ShutdownResponse;
        abort(AbortRequest) -> AbortResponse;
        load_lora(LoadLoraRequest) -> LoadLoraResponse;
        unload_lora(UnloadLoraRequest) -> UnloadLoraResponse;
        list_loras(ListLorasRequest) -> ListLorasResponse;
        get_kv_event_sources(GetKvEventSourcesRequest) -> GetKvEventSourcesResponse;
        pause_generation(PauseGenerationRequest) -> PauseGenerationResponse;
        resume_generation(ResumeGenerationRequest) -> ResumeGenerationResponse;
        is_paused(IsPausedRequest) -> IsPausedResponse;
        sleep(SleepRequest) -> SleepResponse;
        wake_up(WakeUpRequest) -> WakeUpResponse;
        is_sleeping(IsSleepingRequest) -> IsSleepingResponse;
        init_weight_transfer_engine(InitWeightTransferEngineRequest) -> InitWeightTransferEngineResponse;
        start_weight_update(StartWeightUpdateRequest) -> StartWeightUpdateResponse;
        start_draft_weight_update(StartDraftWeightUpdateRequest) -> StartDraftWeightUpdateResponse;
        update_weights(UpdateWeightsRequest) -> UpdateWeightsResponse;
        finish_weight_update(FinishWeightUpdateRequest) -> FinishWeightUpdateResponse;
        update_weight_version(UpdateWeightVersionRequest) -> UpdateWeightVersionResponse;
        get_weight_version(GetWeightVersionRequest) -> GetWeightVersionResponse;
    }
}
