//! Servers that are not Tokenway. The first truncates its streams: the body ends cleanly, but without a finish reason or a
//! summary, and clients must report the truncation. The other one rejects every completion with a given status.

use axum::Router;
use axum::http::HeaderMap;
use axum::http::header::{ACCEPT, CONTENT_TYPE};
use axum::response::{IntoResponse, Response as HttpResponse};
use axum::routing::{get, post};
use tokenway::proto::DESCRIPTORS;
use tokenway::proto::v1;
use tokenway::proto::v1::completion_event::Event;
use tokenway::proto::v1::inference_server::{Inference, InferenceServer};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::service::Routes;
use tonic::{Request, Response, Status};

const MODELS: &str = r#"{"object":"list","data":[
    {"id":"short","object":"model","created":0,"owned_by":"test"}]}"#;

const LINE: &str = r#"{"id":"cmpl-1","object":"text_completion","created":0,"model":"short",
    "choices":[{"index":0,"text":"token_0","logprobs":null,"finish_reason":null}]}"#;

/// Starts an HTTP server that truncates its streams. Returns its URL. The server ends with the test's runtime.
pub async fn http() -> String {
    let router = Router::new()
        .route("/v1/models", get(|| async { json(MODELS) }))
        .route("/v1/completions", post(one_token));
    let (listener, address) = listen().await;
    tokio::spawn(axum::serve(listener, router).into_future());
    format!("http://{address}")
}

/// Starts a gRPC server that truncates its streams. Returns its address.
pub async fn grpc() -> String {
    engine(ForeignEngine { rejection: None }).await
}

/// Starts a gRPC server that rejects every completion with this status. Returns its address.
pub async fn rejecting(status: Status) -> String {
    let rejection = Some(status);
    engine(ForeignEngine { rejection }).await
}

async fn engine(service: ForeignEngine) -> String {
    let (reporter, health) = tonic_health::server::health_reporter();
    reporter
        .set_service_status(
            "tokenway.v1.Inference",
            tonic_health::ServingStatus::Serving,
        )
        .await;
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .build_v1alpha()
        .expect("the descriptors are valid");
    let routes = Routes::new(InferenceServer::new(service))
        .add_service(health)
        .add_service(reflection);
    let (listener, address) = listen().await;
    let server = tonic::transport::Server::builder().add_routes(routes);
    tokio::spawn(server.serve_with_incoming(TcpListenerStream::new(listener)));
    address
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0")
        .await
        .expect("a free port exists");
    let address = listener
        .local_addr()
        .expect("the listener is bound")
        .to_string();
    (listener, address)
}

async fn one_token(headers: HeaderMap) -> HttpResponse {
    let line = LINE.replace('\n', "");
    if headers
        .get(ACCEPT)
        .is_some_and(|accept| accept == "application/x-ndjson")
    {
        return ([(CONTENT_TYPE, "application/x-ndjson")], line + "\n").into_response();
    }
    let events = format!("data: {line}\n\n");
    ([(CONTENT_TYPE, "text/event-stream")], events).into_response()
}

fn json(body: &'static str) -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], body)
}

struct ForeignEngine {
    rejection: Option<Status>,
}

#[tonic::async_trait]
impl Inference for ForeignEngine {
    type CompleteStream = tokio_stream::Once<Result<v1::CompletionEvent, Status>>;

    async fn complete(
        &self,
        _request: Request<v1::CompletionRequest>,
    ) -> Result<Response<Self::CompleteStream>, Status> {
        if let Some(rejection) = &self.rejection {
            return Err(rejection.clone());
        }
        let token = v1::Token {
            text: "token_0".to_owned(),
            ..v1::Token::default()
        };
        let tokens = v1::Tokens {
            tokens: [token].into_iter().collect(),
            ..v1::Tokens::default()
        };
        let event = v1::CompletionEvent {
            event: Some(Event::Tokens(tokens)),
        };
        Ok(Response::new(tokio_stream::once(Ok(event))))
    }

    async fn list_models(
        &self,
        _request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Err(Status::unimplemented("only Complete is implemented"))
    }

    async fn get_model(
        &self,
        _request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::GetModelResponse>, Status> {
        Err(Status::unimplemented("only Complete is implemented"))
    }

    async fn tokenize(
        &self,
        _request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        Err(Status::unimplemented("only Complete is implemented"))
    }

    async fn detokenize(
        &self,
        _request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        Err(Status::unimplemented("only Complete is implemented"))
    }
}
