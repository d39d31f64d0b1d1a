//! `GET /openapi.json`: the description of the HTTP API.
//!
//! It is generated from the structs of request and response bodies, and from the table of errors.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};
use utoipa::openapi::{
    ContentBuilder, Header, Ref, RefOr, Response as ResponseObject, ResponseBuilder,
};
use utoipa::{OpenApi, ToSchema};

use super::Gateway;
use super::body_schema::{Schemas, add_unsupported};
use super::complete::DialectRoute;
use super::error_response::ErrorObject;
use super::fields::Unsupported;
use super::openai::message::Message;
use super::operations::{self, OperatorRoutes};
use super::tokenize;
use super::tokenize::body::{DetokenizeBody, TokenizeChat, TokenizeText};
use super::unknown::X_IGNORED_FIELDS;
use crate::error::ErrorKind;

/// Tokenway's HTTP API. With `stream: true` a completion is streamed as newline-delimited JSON or as server-sent
/// events, as the request's `Accept` header prefers.
#[derive(OpenApi)]
#[openapi(
    paths(
        tokenize::tokenize,
        tokenize::detokenize,
        tokenize::info,
        super::list_models,
        super::get_model,
        operations::livez,
        operations::readyz,
        operations::health,
        operations::metrics,
        operations::drain,
        openapi,
    ),
    components(schemas(Message, TokenizeText, TokenizeChat, DetokenizeBody, ErrorObject,))
)]
struct Api;

/// Errors of all requests with a body.
const BODY_ERRORS: [ErrorKind; 15] = [
    ErrorKind::InvalidJson,
    ErrorKind::InvalidType,
    ErrorKind::InvalidValue,
    ErrorKind::UnknownParameter,
    ErrorKind::UnsupportedParameter,
    ErrorKind::MissingParameter,
    ErrorKind::ContextLengthExceeded,
    ErrorKind::ModelNotFound,
    ErrorKind::UnsupportedMediaType,
    ErrorKind::RequestTooLarge,
    ErrorKind::BodyTimeout,
    ErrorKind::UpstreamError,
    ErrorKind::NotReady,
    ErrorKind::Draining,
    ErrorKind::DeadlineExceeded,
];

/// Additional errors of completion requests.
const COMPLETION_ERRORS: [ErrorKind; 7] = [
    ErrorKind::ContentFilter,
    ErrorKind::ContentPolicyViolation,
    ErrorKind::NotAcceptable,
    ErrorKind::QueueFull,
    ErrorKind::RateLimited,
    ErrorKind::BudgetExhausted,
    ErrorKind::WorkerLost,
];

/// Errors of requests that look up a model.
const MODEL_ERRORS: [ErrorKind; 5] = [
    ErrorKind::ModelNotFound,
    ErrorKind::UpstreamError,
    ErrorKind::NotReady,
    ErrorKind::NoWorker,
    ErrorKind::DeadlineExceeded,
];

/// Errors of `/readyz` and `/health`.
const READINESS_ERRORS: [ErrorKind; 3] = [
    ErrorKind::NotReady,
    ErrorKind::Draining,
    ErrorKind::NoWorker,
];

/// Errors of every request: invalid headers, or a panic of the handler.
const COMMON_ERRORS: [ErrorKind; 4] = [
    ErrorKind::HostNotAllowed,
    ErrorKind::InvalidValue,
    ErrorKind::HeadersTooLarge,
    ErrorKind::Internal,
];

/// This API description.
#[utoipa::path(
    get,
    path = "/openapi.json",
    responses((status = 200, description = "The description.", body = Object))
)]
pub(super) async fn openapi(State(gateway): State<Arc<Gateway>>) -> Response {
    static DOCUMENTS: [LazyLock<String>; 3] = [
        LazyLock::new(|| document(OperatorRoutes::None)),
        LazyLock::new(|| document(OperatorRoutes::Metrics)),
        LazyLock::new(|| document(OperatorRoutes::All)),
    ];
    let [without, with_metrics, with_all] = &DOCUMENTS;
    let document = match gateway.operator_routes {
        OperatorRoutes::None => without,
        OperatorRoutes::Metrics => with_metrics,
        OperatorRoutes::All => with_all,
    };
    ([(CONTENT_TYPE, "application/json")], document.as_str()).into_response()
}

/// Returns the description of an HTTP API that has these routes for operators.
fn document(operator_routes: OperatorRoutes) -> String {
    let mut api = describe();
    for path in operator_routes.missing_paths() {
        api.paths.paths.remove(path);
    }
    api.to_json()
        .expect("every key of the document is a string")
}

/// Describes all routes.
fn describe() -> utoipa::openapi::OpenApi {
    let mut api = Api::openapi();
    if let Some(components) = &mut api.components {
        describe_bodies(&mut components.schemas);
    }
    for dialect in super::DIALECTS {
        api.merge((dialect.describe)());
    }
    for (path, item) in &mut api.paths.paths {
        let has_body = item.post.is_some();
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            describe_operation(path, has_body, operation);
        }
    }
    api
}

/// Completes the schemas of the bodies.
fn describe_bodies(schemas: &mut Schemas) {
    let tables: [(&str, &[Unsupported]); 4] = [
        ("Message", Message::UNSUPPORTED),
        ("TokenizeText", TokenizeText::UNSUPPORTED),
        ("TokenizeChat", TokenizeChat::UNSUPPORTED),
        ("DetokenizeBody", &[]),
    ];
    for (name, unsupported) in tables {
        add_unsupported(schemas, name, unsupported);
    }
}

/// Adds the headers and error responses that all operations share.
fn describe_operation(path: &str, has_body: bool, operation: &mut Operation) {
    let parameters = operation.parameters.get_or_insert_with(Vec::new);
    parameters.push(request_id());
    if has_body {
        parameters.push(request_timeout());
    }
    let responses = &mut operation.responses.responses;
    for (status, response) in error_responses(path) {
        responses.insert(status, response.into());
    }
    if has_body && let Some(RefOr::T(response)) = responses.get_mut("200") {
        response.headers.insert(
            X_IGNORED_FIELDS.to_owned(),
            header(
                Type::String,
                "With `--unknown-fields ignore`: the ignored fields, separated by commas.",
            ),
        );
    }
    for response in responses.values_mut() {
        if let RefOr::T(response) = response {
            response.headers.insert(
                "x-request-id".to_owned(),
                header(
                    Type::String,
                    "Id of the request: the client's, or a random one.",
                ),
            );
        }
    }
}

/// Returns the dialect of a path, or `None` for a path that does not complete prompts.
fn dialect(path: &str) -> Option<&'static DialectRoute> {
    super::DIALECTS.iter().find(|dialect| dialect.path == path)
}

/// Returns the name of the schema of a path's errors.
fn error_schema(path: &str) -> Cow<'static, str> {
    dialect(path).map_or_else(ErrorObject::name, |dialect| (dialect.error_schema)())
}

/// Returns the errors that a path can return.
fn error_kinds(path: &str) -> Vec<ErrorKind> {
    let specific: &[&[ErrorKind]] = match path {
        _ if dialect(path).is_some() => &[&BODY_ERRORS, &COMPLETION_ERRORS, &MODEL_ERRORS],
        "/tokenize" | "/detokenize" => &[&BODY_ERRORS, &MODEL_ERRORS],
        "/v1/models/{id}" => &[&MODEL_ERRORS],
        "/v1/models" => &[&MODEL_ERRORS[1..]],
        "/tokenizer_info" => &[
            &MODEL_ERRORS,
            &[ErrorKind::MissingParameter, ErrorKind::UnknownParameter],
        ],
        "/readyz" | "/health" => &[&READINESS_ERRORS],
        _ => &[],
    };
    let specific = specific.iter().copied().flatten();
    specific.chain(&COMMON_ERRORS).copied().collect()
}

/// Returns the error responses of a path, by status.
fn error_responses(path: &str) -> BTreeMap<String, ResponseObject> {
    let mut codes: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for kind in error_kinds(path) {
        let row = kind.mapping();
        let codes = codes.entry(row.http.as_u16()).or_default();
        if !codes.contains(&row.code) {
            codes.push(row.code);
        }
    }
    let schema = error_schema(path);
    let described = codes.into_iter().map(|(status, codes)| {
        let content = ContentBuilder::new()
            .schema(Some(Ref::from_schema_name(schema.clone())))
            .build();
        let mut response = ResponseBuilder::new()
            .description(format!("`{}`.", codes.join("`, `")))
            .content("application/json", content)
            .build();
        response.headers = error_headers(status);
        (status.to_string(), response)
    });
    described.collect()
}

fn error_headers(status: u16) -> BTreeMap<String, RefOr<Header>> {
    let headers: &[(&str, Type, &str)] = match status {
        429 | 503 => &[
            (
                "retry-after",
                Type::Integer,
                "Seconds to wait before a retry.",
            ),
            (
                "retry-after-ms",
                Type::Integer,
                "Milliseconds to wait before a retry.",
            ),
        ],
        406 => &[
            ("vary", Type::String, "`accept`."),
            ("x-should-retry", Type::String, "`false`."),
        ],
        502 => &[],
        _ => &[("x-should-retry", Type::String, "`false`.")],
    };
    let described = headers
        .iter()
        .map(|(name, kind, text)| ((*name).to_owned(), header(kind.clone(), text)));
    described.collect()
}

fn header(kind: Type, description: &str) -> RefOr<Header> {
    let header = HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(kind)))
        .description(Some(description));
    RefOr::T(header.build())
}

fn request_id() -> RefOr<Parameter> {
    let id = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^[!-~]+$"))
        .min_length(Some(1))
        .max_length(Some(128));
    let parameter = ParameterBuilder::new()
        .name("x-request-id")
        .parameter_in(ParameterIn::Header)
        .description(Some(
            "Id of the request, returned in the response and used in logs.",
        ))
        .schema(Some(id));
    RefOr::T(parameter.build())
}

fn request_timeout() -> RefOr<Parameter> {
    let seconds = ObjectBuilder::new()
        .schema_type(Type::Number)
        .exclusive_minimum(Some(0.0));
    let parameter = ParameterBuilder::new()
        .name("x-request-timeout")
        .parameter_in(ParameterIn::Header)
        .description(Some(
            "Timeout of the whole response, in seconds from the arrival of the request.",
        ))
        .schema(Some(seconds));
    RefOr::T(parameter.build())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::{Value, json};

    use super::*;
    use crate::error::Error;
    use crate::gateway::ROUTES;
    use crate::gateway::dialect::Dialect;
    use crate::gateway::fields::Fields;
    use crate::gateway::openai::{Chat, Completions, StreamOptions};
    use crate::gateway::unknown::UnknownFieldPolicy;

    /// Returns the names of a schema's fields.
    fn fields_in_schema(name: &str) -> BTreeSet<String> {
        let document = serde_json::to_value(describe()).expect("the description is valid JSON");
        let properties = &document["components"]["schemas"][name]["properties"];
        let properties = properties.as_object().expect("the schema has properties");
        properties.keys().cloned().collect()
    }

    /// Returns the names of the fields that `read` looks up in a body.
    fn fields_read<T>(
        body: &Value,
        read: impl FnOnce(&mut Fields) -> Result<T, Error>,
    ) -> BTreeSet<String> {
        let mut fields = Fields::parse(body.to_string().as_bytes(), UnknownFieldPolicy::Refuse)
            .expect("a JSON object");
        assert!(read(&mut fields).is_ok(), "{body}");
        fields.requested
    }

    #[test]
    fn each_body_schema_lists_exactly_the_fields_that_are_read() {
        let message = json!({"role": "user", "content": "a"});
        let messages = json!({"messages": [message]});
        let prompt = json!({"prompt": "a"});
        let tokens = json!({"tokens": []});
        for (name, read) in [
            ("CompletionsBody", fields_read(&prompt, Completions::parse)),
            ("ChatBody", fields_read(&messages, Chat::parse)),
            (
                "StreamOptions",
                fields_read(&json!({}), StreamOptions::read),
            ),
            ("Message", fields_read(&message, Message::read)),
            ("TokenizeText", fields_read(&prompt, TokenizeText::read)),
            ("TokenizeChat", fields_read(&messages, TokenizeChat::read)),
            ("DetokenizeBody", fields_read(&tokens, DetokenizeBody::read)),
        ] {
            assert_eq!(fields_in_schema(name), read, "{name}");
        }
    }

    #[test]
    fn every_response_has_a_request_id_and_every_error_is_an_error_object() {
        let document = serde_json::to_value(describe()).expect("the description is valid JSON");
        let paths = document["paths"]
            .as_object()
            .expect("the description has paths");
        let described: BTreeSet<String> = paths.keys().cloned().collect();
        let served = ROUTES.iter().map(|(path, _)| path.replace("{*id}", "{id}"));
        let served: BTreeSet<String> = served.collect();
        assert_eq!(described, served);
        for (path, item) in paths {
            let error_object = format!("#/components/schemas/{}", error_schema(path));
            for operation in item.as_object().expect("a path has operations").values() {
                let responses = operation["responses"]
                    .as_object()
                    .expect("an operation has responses");
                for (status, response) in responses {
                    let headers = &response["headers"];
                    assert!(headers["x-request-id"].is_object(), "{path} {status}");
                    let schema = &response["content"]["application/json"]["schema"];
                    let is_error = schema["$ref"] == error_object;
                    assert_eq!(is_error, !status.starts_with('2'), "{path} {status}");
                }
            }
        }
    }
}
