//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use serde::Serialize;

use super::Gateway;
use super::buffered_request::BufferedRequest;
use super::error_response::ErrorResponse;
use super::field_names::FieldNames;
use super::fields::Fields;
use super::response::{self, Detokenized, Tokenized, TokenizerInfo};
use crate::cluster::CallContext;
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};
use crate::request_memory::Work;

pub(super) mod body;

use body::{DETOKENIZE_NAMES, DetokenizeBody, TOKENIZE_NAMES, TokenizeBody};

/// Typical size of a token id in JSON, with its comma, in bytes.
const BYTES_PER_ID: usize = 6;

/// Converts text or a chat into token ids.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeBody,
    responses((status = 200, description = "Token ids.", body = Tokenized))
)]
pub(super) async fn tokenize(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (gateway, context) = (&gateway, &context);
    let handler = |body: Vec<u8>| async move {
        let (unknown, bytes) = (gateway.unknown_fields, body.len());
        let parse = move || {
            let mut fields = Fields::parse(&body, unknown)?;
            Ok((TokenizeBody::parse(&mut fields)?, fields))
        };
        let parsed = gateway
            .large_json
            .parse(context, Work::Tokenizer, bytes, parse);
        let (message, fields) = parsed.await?;
        (gateway.check_accepting)()?;
        let call = CallContext::new(context);
        let tokenized = gateway.cluster.tokenize(&message, &call).await?;
        let size = tokenized.token_ids.len().saturating_mul(BYTES_PER_ID);
        let object = move || Tokenized {
            count: tokenized.token_ids.len(),
            max_model_len: tokenized.context_length,
            tokens: tokenized.token_ids,
        };
        let response = write_response(gateway, context, size, object).await?;
        Ok(with_ignored_fields(gateway, fields, response))
    };
    run_handler(gateway, (context, request), TOKENIZE_NAMES, handler).await
}

/// Converts token ids into text.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = DetokenizeBody,
    responses((status = 200, description = "Text of the tokens.", body = Detokenized))
)]
pub(super) async fn detokenize(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let (gateway, context) = (&gateway, &context);
    let handler = |body: Vec<u8>| async move {
        let (unknown, bytes) = (gateway.unknown_fields, body.len());
        let parse = move || {
            let mut fields = Fields::parse(&body, unknown)?;
            Ok((DetokenizeBody::parse(&mut fields)?, fields))
        };
        let parsed = gateway
            .large_json
            .parse(context, Work::Tokenizer, bytes, parse);
        let (message, fields) = parsed.await?;
        (gateway.check_accepting)()?;
        let call = CallContext::new(context);
        let detokenized = gateway.cluster.detokenize(&message, &call).await?;
        let (size, prompt) = (detokenized.text.len(), detokenized.text);
        let object = move || Detokenized { prompt };
        let response = write_response(gateway, context, size, object).await?;
        Ok(with_ignored_fields(gateway, fields, response))
    };
    run_handler(gateway, (context, request), DETOKENIZE_NAMES, handler).await
}

/// Describes a model's tokenizer.
#[utoipa::path(
    get,
    path = "/tokenizer_info",
    params((
        "model" = Option<String>,
        Query,
        description = "Name or alias of the model. Optional if the server has only one model.",
        max_length = 256
    )),
    responses((status = 200, description = "Facts about the tokenizer.", body = TokenizerInfo))
)]
pub(super) async fn info(
    State(gateway): State<Arc<Gateway>>,
    context: RequestContext,
    query: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Response, ErrorResponse> {
    let Query(mut query) = query.map_err(|error| {
        tracing::debug!(%error, "invalid query string");
        Error::invalid_value("model", "The query string must be empty or model=NAME.")
    })?;
    let model = query.remove("model").unwrap_or_default();
    if let Some(name) = query.into_keys().next() {
        let message =
            format!("The query parameter '{name}' is unknown. The only parameter is 'model'.");
        let error = Error::new(ErrorKind::UnknownParameter, message);
        return Err(error.with_param(name).into());
    }
    let model = gateway
        .cluster
        .get_model(&model, &CallContext::new(&context))
        .await
        .map_err(Error::from)?;
    Ok(response::json(&TokenizerInfo::from(model)))
}

/// Writes a response of about this size, then frees the memory of the request.
async fn write_response<A: Serialize>(
    gateway: &Gateway,
    context: &RequestContext,
    bytes: usize,
    object: impl FnOnce() -> A + Send + 'static,
) -> Result<Response, Error> {
    let shares = context.memory_shares();
    // Other requests must not wait for this one while it waits for a client to read another response.
    shares.release_request();
    let expected = u64::try_from(bytes).unwrap_or(u64::MAX);
    shares.wait_for_response(expected).await?;
    gateway.large_json.write(bytes, object).await
}

/// Counts the ignored fields, and lists them in a response header.
fn with_ignored_fields(gateway: &Gateway, fields: Fields, response: Response) -> Response {
    let ignored = fields.into_ignored();
    ignored.add_to_metric(&gateway.telemetry);
    ignored.add_header(response)
}

/// Runs a handler on the request's body, until the drain has timed out.
async fn run_handler<F>(
    gateway: &Gateway,
    (context, request): (&RequestContext, Request),
    names: FieldNames,
    handler: impl FnOnce(Vec<u8>) -> F,
) -> Result<Response, ErrorResponse>
where
    F: Future<Output = Result<Response, Error>>,
{
    let handled = async {
        let request = BufferedRequest::read(context, request).await?;
        handler(request.body).await
    };
    let result = tokio::select! {
        result = handled => result,
        () = gateway.stopping.cancelled() => Err(Error::shutting_down()),
    };
    result.map_err(|error| names.with_client_field_name(error).into())
}
