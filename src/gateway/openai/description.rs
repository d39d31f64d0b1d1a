//! OpenAPI descriptions of OpenAI's dialects.

use utoipa::openapi::header::HeaderBuilder;
use utoipa::openapi::path::{HttpMethod, OperationBuilder};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{
    ComponentsBuilder, Content, Header, Info, OpenApi, PathItem, Paths, Ref, RefOr, Required,
    Response, ResponseBuilder,
};
use utoipa::{PartialSchema, ToSchema};

use super::message::Message;
use super::shared_fields::SharedFields;
use super::stream_options::StreamOptions;
use crate::gateway::body_schema::{Schemas, add_unsupported, object_schema};
use crate::gateway::fields::Unsupported;

/// The route of a dialect.
pub(super) struct Operation {
    pub(super) path: &'static str,
    pub(super) id: &'static str,
    pub(super) summary: &'static str,
    /// Fields that the server does not support, besides those of both dialects.
    pub(super) unsupported: &'static [Unsupported],
    /// Adds the fields that only this dialect has in a struct of their own to the schema of the body with this name.
    pub(super) embed_more: fn(&mut Schemas, &str),
}

/// One server-sent event of a stream.
#[derive(ToSchema)]
#[expect(dead_code, reason = "only describes what `LineWriter` writes")]
struct ServerSentEvent {
    /// A JSON object, or `[DONE]` in the last event of a successful stream.
    data: String,
}

/// Describes a route with a body `B` and an answer `A`.
pub(super) fn describe<B: ToSchema, A: ToSchema>(operation: &Operation) -> OpenApi {
    let body = RequestBodyBuilder::new()
        .content("application/json", reference::<B>())
        .required(Some(Required::True))
        .build();
    let post = OperationBuilder::new()
        .tag("completions")
        .operation_id(Some(operation.id))
        .summary(Some(operation.summary))
        .request_body(Some(body))
        .response("200", response::<A>())
        .build();
    let mut paths = Paths::new();
    let item = PathItem::new(HttpMethod::Post, post);
    paths.paths.insert(operation.path.to_owned(), item);
    let schemas = schemas::<B, A>(operation);
    let components = ComponentsBuilder::new().schemas_from_iter(schemas).build();
    let mut description = OpenApi::new(Info::default(), paths);
    description.components = Some(components);
    description
}

fn response<A: ToSchema>() -> Response {
    ResponseBuilder::new()
        .description(
            "The completion. With `stream: true`, one line or server-sent event per token. The headers of a \
             stream are sent when a worker starts the request, or after the server's `--headers-after`. A later \
             rejection is an error record in the stream.",
        )
        .content("application/json", reference::<A>())
        .content("application/x-ndjson", Content::new(Some(String::schema())))
        .content("text/event-stream", reference::<ServerSentEvent>())
        .header("vary", header("`accept`."))
        .header("cache-control", header("Streams only: disables caching."))
        .header(
            "x-accel-buffering",
            header("Streams only: disables buffering."),
        )
        .build()
}

fn reference<T: ToSchema>() -> Content {
    Content::new(Some(Ref::from_schema_name(T::name())))
}

fn header(description: &str) -> Header {
    HeaderBuilder::new()
        .schema(Some(ObjectBuilder::new().schema_type(Type::String)))
        .description(Some(description))
        .build()
}

fn schemas<B: ToSchema, A: ToSchema>(operation: &Operation) -> Schemas {
    let mut schemas = Schemas::new();
    add::<B>(&mut schemas);
    add::<Message>(&mut schemas);
    add::<A>(&mut schemas);
    add::<ServerSentEvent>(&mut schemas);
    embed::<SharedFields>(&mut schemas, &B::name());
    (operation.embed_more)(&mut schemas, &B::name());
    let properties = &mut object_schema(&mut schemas, &B::name()).properties;
    let hints = SharedFields::HINTS;
    properties.extend(hints.map(|(field, text)| (field.to_owned(), hint_schema(text))));
    add_unsupported(&mut schemas, &B::name(), SharedFields::UNSUPPORTED);
    add_unsupported(&mut schemas, &B::name(), operation.unsupported);
    add_unsupported(&mut schemas, "StreamOptions", StreamOptions::UNSUPPORTED);
    add_unsupported(&mut schemas, "Message", Message::UNSUPPORTED);
    schemas
}

/// Adds a schema and the schemas that it refers to.
fn add<T: ToSchema>(schemas: &mut Schemas) {
    let mut all = vec![(T::name().into_owned(), T::schema())];
    T::schemas(&mut all);
    schemas.extend(all);
}

/// Adds the fields of the struct `T` to the schema of the body with this name.
pub(super) fn embed<T: ToSchema>(schemas: &mut Schemas, body: &str) {
    add::<T>(schemas);
    let fields = object_schema(schemas, &T::name()).properties.clone();
    schemas.remove(&*T::name());
    object_schema(schemas, body).properties.extend(fields);
}

/// Schema of a field that is ignored.
fn hint_schema(description: &str) -> RefOr<Schema> {
    ObjectBuilder::new()
        .schema_type(SchemaType::Array(vec![Type::String, Type::Null]))
        .description(Some(description))
        .into()
}
