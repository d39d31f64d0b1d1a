//! `GET /openapi.json`: the door described, made from the structs that its bodies are read into and its
//! answers are written from, and from the table of errors.

use std::collections::BTreeMap;
use std::sync::LazyLock;

use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use utoipa::OpenApi;
use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{Operation, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{Object, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{
    ContentBuilder, Header, Ref, RefOr, Response as ResponseObject, ResponseBuilder,
};

use super::answer;
use super::body::chat::ChatBody;
use super::body::completions::CompletionsBody;
use super::body::message::Message;
use super::body::shared_fields::SharedFields;
use super::body::tokenize::{DetokenizeBody, TokenizeChat, TokenizeText};
use super::body::{StreamOptions, schema};
use super::error_response::ErrorObject;
use super::fields::Unsupported;
use super::unknown::X_IGNORED_FIELDS;
use super::{completions, tokenize};
use crate::error::ErrorKind;

/// Tokenway's HTTP door. It streams with `stream: true`: as newline-delimited JSON or as server-sent events,
/// by the request's `Accept`.
#[derive(OpenApi)]
#[openapi(
    paths(
        completions::complete,
        completions::chat,
        tokenize::tokenize,
        tokenize::detokenize,
        tokenize::info,
        super::list_models,
        super::get_model,
        super::livez,
        super::readyz,
        super::health,
        super::metrics,
        openapi,
    ),
    components(schemas(
        CompletionsBody,
        ChatBody,
        SharedFields,
        StreamOptions,
        Message,
        TokenizeText,
        TokenizeChat,
        DetokenizeBody,
        ErrorObject,
        answer::Completion,
        answer::ChatCompletion,
    ))
)]
struct Api;

/// What only a request with a body can be refused with.
const BODY_ERRORS: [ErrorKind; 14] = [
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
    ErrorKind::UpstreamError,
    ErrorKind::NotReady,
    ErrorKind::Draining,
    ErrorKind::DeadlineExceeded,
];

/// What only a request for tokens can be refused with.
const COMPLETION_ERRORS: [ErrorKind; 4] = [
    ErrorKind::NotAcceptable,
    ErrorKind::QueueFull,
    ErrorKind::RateLimited,
    ErrorKind::WorkerLost,
];

/// What a request for models can be refused with.
const MODEL_ERRORS: [ErrorKind; 5] = [
    ErrorKind::ModelNotFound,
    ErrorKind::UpstreamError,
    ErrorKind::NotReady,
    ErrorKind::NoWorker,
    ErrorKind::DeadlineExceeded,
];

/// Why the server takes no requests.
const READINESS_ERRORS: [ErrorKind; 3] = [
    ErrorKind::NotReady,
    ErrorKind::Draining,
    ErrorKind::NoWorker,
];

/// What every request can be refused with: for its headers, or by a panic.
const COMMON_ERRORS: [ErrorKind; 4] = [
    ErrorKind::HostNotAllowed,
    ErrorKind::InvalidValue,
    ErrorKind::HeadersTooLarge,
    ErrorKind::Internal,
];

/// Describes this door.
#[utoipa::path(
    get,
    path = "/openapi.json",
    responses((status = 200, description = "This description.", body = Object))
)]
pub(super) async fn openapi() -> Response {
    static DOCUMENT: LazyLock<String> = LazyLock::new(|| {
        let document = describe().to_json();
        document.expect("a description's keys are texts")
    });
    ([(CONTENT_TYPE, "application/json")], DOCUMENT.as_str()).into_response()
}

fn describe() -> utoipa::openapi::OpenApi {
    let mut api = Api::openapi();
    if let Some(components) = &mut api.components {
        describe_bodies(&mut components.schemas);
    }
    for (path, item) in &mut api.paths.paths {
        let has_body = item.post.is_some();
        for operation in [&mut item.get, &mut item.post].into_iter().flatten() {
            describe_operation(path, has_body, operation);
        }
    }
    api
}

type Schemas = BTreeMap<String, RefOr<Schema>>;

/// Adds to the bodies what their structs do not say: the fields that they share, those that only ask for
/// nothing, and that nothing else is taken but null.
fn describe_bodies(schemas: &mut Schemas) {
    let shared = object(schemas, "SharedFields").properties.clone();
    schemas.remove("SharedFields");
    for name in ["CompletionsBody", "ChatBody"] {
        let properties = &mut object(schemas, name).properties;
        properties.extend(shared.clone());
        let hints = SharedFields::HINTS;
        properties.extend(hints.map(|(field, text)| (field.to_owned(), hint(text))));
    }
    let tables: [(&str, &[Unsupported]); 8] = [
        ("CompletionsBody", SharedFields::UNSUPPORTED),
        ("ChatBody", SharedFields::UNSUPPORTED),
        ("ChatBody", ChatBody::UNSUPPORTED),
        ("StreamOptions", StreamOptions::UNSUPPORTED),
        ("Message", Message::UNSUPPORTED),
        ("TokenizeText", TokenizeText::UNSUPPORTED),
        ("TokenizeChat", TokenizeChat::UNSUPPORTED),
        ("DetokenizeBody", &[]),
    ];
    for (name, unsupported) in tables {
        let body = object(schemas, name);
        for (field, asks_nothing) in unsupported {
            body.properties
                .insert((*field).to_owned(), unsupported_field(asks_nothing));
        }
        body.additional_properties = Some(Box::new(schema::null().into()));
    }
}

fn object<'a>(schemas: &'a mut Schemas, name: &str) -> &'a mut Object {
    match schemas.get_mut(name) {
        Some(RefOr::T(Schema::Object(object))) => object,
        _ => panic!("{name} is not described as an object"),
    }
}

fn hint(description: &str) -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(SchemaType::Array(vec![Type::String, Type::Null]))
        .description(Some(description))
        .into()
}

fn unsupported_field(asks_nothing: &str) -> RefOr<Schema> {
    let mut values: Vec<Value> =
        serde_json::from_str(asks_nothing).expect("a table holds lists of JSON");
    values.push(Value::Null);
    ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .description(Some(
            "Not honoured: only these values are taken, which ask for nothing.",
        ))
        .enum_values(Some(values))
        .into()
}

/// Adds to an operation what all have in common: headers, and error_responses.
fn describe_operation(path: &str, has_body: bool, operation: &mut Operation) {
    let parameters = operation.parameters.get_or_insert_with(Vec::new);
    parameters.push(request_id());
    if has_body {
        parameters.push(request_timeout());
    }
    let responses = &mut operation.responses.responses;
    for (status, refused) in error_responses(path) {
        responses.insert(status, refused.into());
    }
    if has_body && let Some(RefOr::T(answer)) = responses.get_mut("200") {
        answer.headers.insert(
            X_IGNORED_FIELDS.to_owned(),
            header(
                Type::String,
                "With `--unknown-fields ignore`: the fields that were ignored, by commas.",
            ),
        );
    }
    for response in responses.values_mut() {
        if let RefOr::T(response) = response {
            response.headers.insert(
                "x-request-id".to_owned(),
                header(Type::String, "The request's own id, or one made here."),
            );
        }
    }
}

/// The error_kinds of error_response that a path can answer with.
fn error_kinds(path: &str) -> Vec<ErrorKind> {
    let own: &[&[ErrorKind]] = match path {
        "/v1/completions" | "/v1/chat/completions" => {
            &[&BODY_ERRORS, &COMPLETION_ERRORS, &MODEL_ERRORS]
        }
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
    let own = own.iter().copied().flatten();
    own.chain(&COMMON_ERRORS).copied().collect()
}

/// A path's error_responses by their status.
fn error_responses(path: &str) -> BTreeMap<String, ResponseObject> {
    let mut codes: BTreeMap<u16, Vec<&str>> = BTreeMap::new();
    for kind in error_kinds(path) {
        let row = kind.row();
        let codes = codes.entry(row.http.as_u16()).or_default();
        if !codes.contains(&row.code) {
            codes.push(row.code);
        }
    }
    let described = codes.into_iter().map(|(status, codes)| {
        let content = ContentBuilder::new()
            .schema(Some(Ref::from_schema_name("ErrorObject")))
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
                "Seconds until a retry may help.",
            ),
            (
                "retry-after-ms",
                Type::Integer,
                "Milliseconds until a retry may help.",
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
        .description(Some("Names the request in its answer and in logs."))
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
        .description(Some("The seconds that the whole answer may take."))
        .schema(Some(seconds));
    RefOr::T(parameter.build())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use serde_json::json;

    use super::*;
    use crate::error::Error;
    use crate::gateway::fields::Fields;
    use crate::gateway::unknown::UnknownFields;

    /// The names of a schema's fields.
    fn described(name: &str) -> BTreeSet<String> {
        let document = serde_json::to_value(describe()).expect("a description is JSON");
        let properties = &document["components"]["schemas"][name]["properties"];
        let properties = properties.as_object().expect("it is an object");
        properties.keys().cloned().collect()
    }

    /// The names of the fields that are looked for in a body.
    fn known<T>(
        body: &Value,
        read: impl FnOnce(&mut Fields) -> Result<T, Error>,
    ) -> BTreeSet<String> {
        let mut fields =
            Fields::parse(body.to_string().as_bytes(), UnknownFields::Refuse).expect("an object");
        assert!(read(&mut fields).is_ok(), "{body}");
        fields.requested
    }

    #[test]
    fn each_body_schema_lists_exactly_the_fields_that_are_read() {
        let message = json!({"role": "user", "content": "a"});
        let messages = json!({"messages": [message]});
        let prompt = json!({"prompt": "a"});
        let tokens = json!({"tokens": []});
        for (name, known) in [
            ("CompletionsBody", known(&prompt, CompletionsBody::read)),
            ("ChatBody", known(&messages, ChatBody::read)),
            ("StreamOptions", known(&json!({}), StreamOptions::read)),
            ("Message", known(&message, Message::read)),
            ("TokenizeText", known(&prompt, TokenizeText::read)),
            ("TokenizeChat", known(&messages, TokenizeChat::read)),
            ("DetokenizeBody", known(&tokens, DetokenizeBody::read)),
        ] {
            assert_eq!(described(name), known, "{name}");
        }
    }

    #[test]
    fn every_response_has_a_request_id_and_every_error_is_an_error_object() {
        let document = serde_json::to_value(describe()).expect("a description is JSON");
        let paths = document["paths"].as_object().expect("there are paths");
        assert_eq!(paths.len(), 12);
        for (path, item) in paths {
            for operation in item.as_object().expect("operations").values() {
                let responses = operation["responses"].as_object().expect("responses");
                for (status, response) in responses {
                    let headers = &response["headers"];
                    assert!(headers["x-request-id"].is_object(), "{path} {status}");
                    let schema = &response["content"]["application/json"]["schema"];
                    let is_error = schema["$ref"] == "#/components/schemas/ErrorObject";
                    assert_eq!(is_error, !status.starts_with('2'), "{path} {status}");
                }
            }
        }
    }
}
