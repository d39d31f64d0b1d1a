//! Handles a completion request of any dialect.
//!
//! A request passes through four stages: [`BufferedRequest`], [`ParsedRequest`], [`AdmittedRequest`] and
//! [`StartedCompletion`]. The result is a streamed body or one JSON response. This module must not know how a dialect
//! reads bodies or writes responses.

use std::borrow::Cow;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::VARY;
use axum::response::Response;
use axum::routing::{MethodRouter, post};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::CancellationToken;
use utoipa::ToSchema;
use utoipa::openapi::OpenApi;

use super::Gateway;
use super::accept::StreamFormat;
use super::buffered_request::BufferedRequest;
use super::completion_stream::{CompletionStream, MergedStreams, deadline_exceeded};
use super::dialect::{
    Dialect, ParsedBody, RecordWriter, ResponseFacts, ResponseOptions, StreamRequest,
};
use super::echoed_prompts::EchoedPrompts;
use super::error_response;
use super::extra_fields::ExtraFieldNames;
use super::fields::Fields;
use super::large_json::LargeJson;
use super::queued_body::{QueuedBody, StartFuture};
use super::response_size;
use super::stream_body::{self, StreamBody, StreamParts};
use super::unary::{self, ResponseCollector};
use super::unknown::IgnoredFields;
use crate::cluster::CallContext;
use crate::context::RequestContext;
use crate::error::Error;
use crate::proto::v1;
use crate::request::DEFAULT_MAX_TOKENS;
use crate::request_memory::Work;
use crate::telemetry::ResponseFormat;

/// Extra time for the engine to report a passed deadline before the gateway does.
const DEADLINE_GRACE: Duration = Duration::from_secs(1);

/// The route of a dialect. The same code handles all dialects; the compiler creates a copy of the handler for each.
pub(super) struct DialectRoute {
    pub(super) path: &'static str,
    pub(super) handler: fn() -> MethodRouter<Arc<Gateway>>,
    /// Describes the route and its schemas.
    pub(super) describe: fn() -> OpenApi,
    /// Returns the name of the OpenAPI schema of the dialect's errors.
    pub(super) error_schema: fn() -> Cow<'static, str>,
}

impl DialectRoute {
    pub(super) const fn of<D: Dialect>() -> Self {
        Self {
            path: D::PATH,
            handler: || post(complete::<D>),
            describe: D::describe,
            error_schema: <D::ErrorObject<'static> as ToSchema>::name,
        }
    }
}

/// Handles a completion request.
async fn complete<D: Dialect>(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    request: Request,
) -> Response {
    match respond::<D>(&gateway, context, request).await {
        Ok(response) => response,
        Err(error) => error_response::with_object(&error, &D::ErrorObject::from(&error)),
    }
}

async fn respond<D: Dialect>(
    gateway: &Arc<Gateway>,
    context: RequestContext,
    request: Request,
) -> Result<Response, Error> {
    let mut parsed = ParsedRequest::<D>::read(gateway, &context, request).await?;
    context.record().set_format(parsed.format());
    let ignored = std::mem::take(&mut parsed.ignored);
    ignored.add_to_metric(&gateway.telemetry);
    let names = parsed.body.names;
    let extra = std::mem::take(&mut parsed.extra);
    let response = complete_parsed(gateway, context, parsed).await;
    let response = response.map_err(|error| {
        let error = names.with_client_field_name(error);
        extra.with_client_field_name(error)
    })?;
    Ok(ignored.add_header(response))
}

async fn complete_parsed<D: Dialect>(
    gateway: &Gateway,
    context: RequestContext,
    parsed: ParsedRequest<D>,
) -> Result<Response, Error> {
    let stream = parsed.stream.clone();
    if stream.is_none() {
        let bytes = expected_bytes(&parsed.body.messages, parsed.body.response);
        context.memory_shares().wait_for_response(bytes).await?;
    }
    let admitted = AdmittedRequest::admit(gateway, context, parsed).await?;
    match stream {
        Some(stream) => admitted.stream(stream, gateway.headers_after).await,
        None => {
            let started = admitted.wait_for_start().await?;
            started.collect(&gateway.large_json).await
        }
    }
}

/// Returns the expected size of the log probabilities in a response in one piece. Other responses get memory as they
/// grow: most are much smaller than `max_tokens` allows.
fn expected_bytes(messages: &[v1::CompletionRequest], response: ResponseOptions) -> u64 {
    let Some(top) = response.logprobs else {
        return 0;
    };
    let tokens = messages.iter().map(|message| {
        let max_tokens = message.max_tokens.unwrap_or(DEFAULT_MAX_TOKENS);
        u64::from(max_tokens).saturating_mul(message.n.unwrap_or(1).into())
    });
    response_size::expected_size(tokens.fold(0, u64::saturating_add), top)
}

/// A request with a valid body.
struct ParsedRequest<D: Dialect> {
    body: ParsedBody<D::StreamOptions>,
    /// Unknown fields of the body that were ignored.
    ignored: IgnoredFields,
    /// Unknown fields of the body that the engine gets.
    extra: ExtraFieldNames,
    /// Options of the stream. `None` for a response that is not streamed.
    stream: Option<StreamRequest<D::StreamOptions>>,
    call: CallContext,
}

impl<D: Dialect> ParsedRequest<D> {
    async fn read(
        gateway: &Arc<Gateway>,
        context: &RequestContext,
        request: Request,
    ) -> Result<Self, Error> {
        let request = BufferedRequest::read(context, request).await?;
        let (own_gateway, own_context) = (Arc::clone(gateway), context.clone());
        let bytes = request.body.len();
        let parse = move || Self::parse(&own_gateway, &own_context, &request);
        let large_json = &gateway.large_json;
        large_json
            .parse(context, Work::Completion, bytes, parse)
            .await
    }

    fn parse(
        gateway: &Gateway,
        context: &RequestContext,
        request: &BufferedRequest,
    ) -> Result<Self, Error> {
        let mut fields = Fields::parse(&request.body, gateway.unknown_fields)?;
        if gateway
            .cluster
            .takes_extra_fields(fields.peek_text("model"))
        {
            fields.keep_unknown();
        }
        let mut body = D::parse(&mut fields)?;
        let extra = ExtraFieldNames::add_to(&mut body.messages, fields.take_kept())?;
        let stream = match &body.stream {
            Some(options) => Some(StreamRequest {
                format: D::stream_format(&request.headers, gateway.stream_format)?,
                options: options.clone(),
                response: body.response,
            }),
            None => None,
        };
        (gateway.check_accepting)()?;
        Ok(Self {
            body,
            ignored: fields.into_ignored(),
            extra,
            stream,
            call: CallContext::with_headers(context, &request.headers),
        })
    }

    fn format(&self) -> ResponseFormat {
        match self.stream.as_ref().map(|stream| stream.format) {
            Some(StreamFormat::Ndjson) => ResponseFormat::HttpNdjson,
            Some(StreamFormat::Sse) => ResponseFormat::HttpSse,
            None => ResponseFormat::HttpUnary,
        }
    }
}

/// A request whose prompts an engine has checked and queued.
struct AdmittedRequest<D: Dialect> {
    /// The parsed body. Its messages have been sent to the engine.
    body: ParsedBody<D::StreamOptions>,
    /// Number of prompts that the response repeats: all of them if the request sets `echo`, or none.
    echoing_prompts: usize,
    merged: MergedStreams,
    context: RequestContext,
    /// Cancelled when the drain has timed out and running requests must end.
    stopping: CancellationToken,
}

impl<D: Dialect> AdmittedRequest<D> {
    async fn admit(
        gateway: &Gateway,
        context: RequestContext,
        parsed: ParsedRequest<D>,
    ) -> Result<Self, Error> {
        let mut body = parsed.body;
        let messages = std::mem::take(&mut body.messages);
        context.memory_shares().set_prompts(messages.len());
        let echoing_prompts = messages.iter().filter(|message| message.echo).count();
        let merged = MergedStreams::new(body.candidates);
        let merged = admit(gateway, &parsed.call, messages, merged).await?;
        Ok(Self {
            body,
            echoing_prompts,
            merged,
            context,
            stopping: gateway.stopping.clone(),
        })
    }

    /// Responds with a stream. The headers are sent when a worker has started the request, or when the request has
    /// waited in the queue for `headers_after`.
    async fn stream(
        self,
        stream: StreamRequest<D::StreamOptions>,
        headers_after: Option<Duration>,
    ) -> Result<Response, Error> {
        let format = stream.format;
        let (names, context) = (self.body.names, self.context.clone());
        let request = stream.clone();
        let mut start: StartFuture<D::Writer> =
            Box::pin(async move { Ok(self.wait_for_start().await?.into_body(request)) });
        let started = match headers_after {
            None => Ok(start.as_mut().await),
            Some(after) => timeout(after, &mut start).await,
        };
        if let Ok(body) = started {
            let body = body?;
            let keep_alive = body.keep_alive();
            return Ok(stream_body::response(body, keep_alive, format));
        }
        // The served model is not known yet. Keep-alives and error records do not contain its name.
        let writer = D::writer(stream, response_facts(&context, ""));
        let parts = StreamParts {
            writer,
            echo: None,
            names,
            context,
        };
        let keep_alive = parts.writer.keep_alive();
        let body = QueuedBody::new(start, parts);
        Ok(stream_body::response(body, keep_alive, format))
    }

    /// Waits until a worker starts one of the prompts. An error before that gets a response with its own status. A
    /// later error can only be a record in the stream.
    async fn wait_for_start(self) -> Result<StartedCompletion<D>, Error> {
        let stream = wait_for_start(self.merged, &self.context, self.stopping).await?;
        Ok(StartedCompletion {
            facts: response_facts(&self.context, &stream.first_started().model),
            echo: echo(self.echoing_prompts, &self.body, &stream)?,
            body: self.body,
            stream,
            context: self.context,
        })
    }
}

/// Sends one RPC per prompt, one after the other, so that the prompts are queued in order.
async fn admit(
    gateway: &Gateway,
    call: &CallContext,
    messages: Vec<v1::CompletionRequest>,
    mut merged: MergedStreams,
) -> Result<MergedStreams, Error> {
    let admitting = async {
        for message in messages {
            merged.push(gateway.cluster.complete(message, call).await?);
        }
        Ok(merged)
    };
    until_deadline(call.request.deadline(), &gateway.stopping, admitting).await
}

async fn wait_for_start(
    merged: MergedStreams,
    context: &RequestContext,
    stopping: CancellationToken,
) -> Result<CompletionStream, Error> {
    let deadline = context.deadline();
    let stream =
        CompletionStream::wait_for_start(merged, deadline + DEADLINE_GRACE, stopping.clone());
    let stream = until_deadline(deadline, &stopping, stream).await?;
    let started = stream.first_started();
    // The engine reports the served name of the model, which may differ from the alias in the request.
    context.record().set_model(&started.model);
    context.record_start(started.prompt_tokens);
    Ok(stream)
}

/// Runs `future` until the drain has timed out, or until [`DEADLINE_GRACE`] after the deadline.
async fn until_deadline<T>(
    deadline: Instant,
    stopping: &CancellationToken,
    future: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::select! {
        result = timeout_at(deadline + DEADLINE_GRACE, future) => {
            result.unwrap_or_else(|_| Err(deadline_exceeded()))
        }
        () = stopping.cancelled() => Err(Error::shutting_down()),
    }
}

/// Prepares to repeat this number of prompts. Returns `None` for 0.
///
/// # Errors
/// The response would be too large.
fn echo<O>(
    prompts: usize,
    body: &ParsedBody<O>,
    stream: &CompletionStream,
) -> Result<Option<EchoedPrompts>, Error> {
    if prompts == 0 {
        return Ok(None);
    }
    let echo = EchoedPrompts::new(prompts, stream.choices() / prompts);
    if let Some(top) = body.response.logprobs {
        echo.check_logprobs(stream.first_started().prompt_tokens, top)?;
    }
    Ok(Some(echo))
}

/// A request that a worker has started.
struct StartedCompletion<D: Dialect> {
    body: ParsedBody<D::StreamOptions>,
    stream: CompletionStream,
    facts: ResponseFacts,
    /// The prompts to repeat, if the request sets `echo`.
    echo: Option<EchoedPrompts>,
    context: RequestContext,
}

impl<D: Dialect> StartedCompletion<D> {
    /// Collects the whole completion. Returns one JSON response.
    async fn collect(self, large_json: &LargeJson) -> Result<Response, Error> {
        let collecting = ResponseCollector {
            stream: self.stream,
            echo: self.echo,
            candidates: self.body.candidates,
            response: self.body.response,
            context: self.context,
        };
        let facts = self.facts;
        let answer = move |choices, usage| D::unary_body(facts, choices, usage);
        let mut response = unary::collect(collecting, large_json, answer).await?;
        let headers = response.headers_mut();
        headers.insert(VARY, HeaderValue::from_static("accept"));
        Ok(response)
    }

    /// Returns the body of the streamed response.
    fn into_body(self, stream: StreamRequest<D::StreamOptions>) -> StreamBody<D::Writer> {
        let parts = StreamParts {
            writer: D::writer(stream, self.facts),
            echo: self.echo,
            names: self.body.names,
            context: self.context,
        };
        StreamBody::new(self.stream, parts)
    }
}

fn response_facts(context: &RequestContext, model: &str) -> ResponseFacts {
    let since_epoch = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    ResponseFacts {
        request_id: context.id().clone(),
        created: since_epoch.as_secs(),
        model: model.to_owned(),
    }
}
