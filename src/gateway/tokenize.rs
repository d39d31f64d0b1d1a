//! `POST /tokenize`, `POST /detokenize` and `GET /tokenizer_info`.

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::extract::rejection::QueryRejection;
use axum::extract::{Query, Request, State};
use axum::response::Response;
use bytes::Bytes;
use tokio::time::timeout_at;

use super::Gateway;
use super::answer::{self, Detokenized, Tokenized, TokenizerInfo};
use super::body::tokenize::{DetokenizeBody, TokenizeBody};
use super::buffered_request::BufferedRequest;
use super::completion_stream::{deadline_exceeded, stopped};
use super::error_response::{ErrorResponse, FieldNames};
use super::fields::Fields;
use crate::error::{Error, ErrorKind};
use crate::telemetry::Frontend;

/// Turns text, or a conversation, into token ids.
#[utoipa::path(
    post,
    path = "/tokenize",
    request_body = TokenizeBody,
    responses((status = 200, description = "The tokens.", body = Tokenized))
)]
pub(super) async fn tokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let gateway = &gateway;
    let tokenized = |body: Bytes| async move {
        let mut fields = Fields::parse(&body, gateway.unknown_fields)?;
        let message = TokenizeBody::parse(&mut fields)?;
        (gateway.open)()?;
        let tokenized = gateway.cluster.tokenize(&message).await?;
        let answer = answer::json(&Tokenized {
            count: tokenized.token_ids.len(),
            max_model_len: tokenized.context_length,
            tokens: tokenized.token_ids,
        });
        Ok(with_ignored(gateway, fields, answer))
    };
    counted(gateway, request, FieldNames::TOKENIZE, tokenized).await
}

/// Turns token ids into text.
#[utoipa::path(
    post,
    path = "/detokenize",
    request_body = DetokenizeBody,
    responses((status = 200, description = "The text.", body = Detokenized))
)]
pub(super) async fn detokenize(
    State(gateway): State<Arc<Gateway>>,
    request: Request,
) -> Result<Response, ErrorResponse> {
    let gateway = &gateway;
    let detokenized = |body: Bytes| async move {
        let mut fields = Fields::parse(&body, gateway.unknown_fields)?;
        let message = DetokenizeBody::parse(&mut fields)?;
        (gateway.open)()?;
        let detokenized = gateway.cluster.detokenize(&message).await?;
        let answer = answer::json(&Detokenized {
            prompt: detokenized.text,
        });
        Ok(with_ignored(gateway, fields, answer))
    };
    counted(gateway, request, FieldNames::DETOKENIZE, detokenized).await
}

/// Describes a model's tokenizer.
#[utoipa::path(
    get,
    path = "/tokenizer_info",
    params((
        "model" = Option<String>,
        Query,
        description = "The model. It may be left out where only one is served.",
        max_length = 256
    )),
    responses((status = 200, description = "The tokenizer.", body = TokenizerInfo))
)]
pub(super) async fn info(
    State(gateway): State<Arc<Gateway>>,
    of: Result<Query<BTreeMap<String, String>>, QueryRejection>,
) -> Result<Response, ErrorResponse> {
    let Query(mut of) = of.map_err(|error| {
        tracing::debug!(%error, "a query could not be read");
        Error::invalid_value(
            "model",
            "The query may hold one name of a model, as model=….",
        )
    })?;
    let model = of.remove("model").unwrap_or_default();
    if let Some(name) = of.into_keys().next() {
        let message = format!("The field '{name}' is unknown.");
        let error = Error::new(ErrorKind::UnknownParameter, message);
        return Err(error.with_param(name).into());
    }
    let model = gateway.cluster.get_model(&model).await?;
    Ok(answer::json(&TokenizerInfo::from(model)))
}

/// The answer, which names the fields that were ignored.
fn with_ignored(gateway: &Gateway, fields: Fields, answer: Response) -> Response {
    let ignored = fields.into_ignored();
    ignored.count_in(&gateway.telemetry);
    ignored.name_in(answer)
}

/// Answers a request within its deadline, and counts it as a completion is counted.
async fn counted<F>(
    gateway: &Gateway,
    request: Request,
    names: FieldNames,
    answer: impl FnOnce(Bytes) -> F,
) -> Result<Response, ErrorResponse>
where
    F: Future<Output = Result<Response, Error>>,
{
    let mut counted = gateway.telemetry.track_request(Frontend::Http);
    let answered = async {
        let buffered_request = BufferedRequest::read(gateway, request).await?;
        tokio::select! {
            answered = timeout_at(buffered_request.deadline, answer(buffered_request.body)) => {
                answered.unwrap_or_else(|_| Err(deadline_exceeded()))
            }
            () = gateway.stopping.cancelled() => Err(stopped()),
        }
    };
    let answered = answered
        .await
        .map_err(|error| names.with_client_field_name(error));
    counted.ended(answered.as_ref().map(|_| ()));
    answered.map_err(|error| {
        gateway.telemetry.refused(Frontend::Http, &error);
        error.into()
    })
}
