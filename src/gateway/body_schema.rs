//! Completes the schemas of request bodies in the API description.

use std::collections::BTreeMap;

use serde_json::Value;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{Object, ObjectBuilder, Schema, SchemaType, Type};

use super::fields::Unsupported;

/// Schemas by name.
pub(super) type Schemas = BTreeMap<String, RefOr<Schema>>;

/// Adds the accepted but unsupported fields to a body's schema: each unsupported field with the values that have no
/// effect, and any unknown field if it is null.
pub(super) fn add_unsupported(schemas: &mut Schemas, name: &str, unsupported: &[Unsupported]) {
    let body = object_schema(schemas, name);
    for (field, no_op_values) in unsupported {
        let schema = unsupported_field(no_op_values);
        body.properties.insert((*field).to_owned(), schema);
    }
    body.additional_properties = Some(Box::new(null_schema().into()));
}

/// Returns the schema of a body.
pub(super) fn object_schema<'a>(schemas: &'a mut Schemas, name: &str) -> &'a mut Object {
    match schemas.get_mut(name) {
        Some(RefOr::T(Schema::Object(object))) => object,
        _ => panic!("the schema {name} is not an object"),
    }
}

pub(super) fn null_schema() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Null)
}

/// Schema of an unsupported field. `no_op_values` is a JSON list of the values that have no effect.
fn unsupported_field(no_op_values: &str) -> RefOr<Schema> {
    let mut values: Vec<Value> =
        serde_json::from_str(no_op_values).expect("no_op_values is a JSON list");
    values.push(Value::Null);
    ObjectBuilder::new()
        .schema_type(SchemaType::AnyValue)
        .description(Some(
            "Not supported. Only these values are accepted; they have no effect.",
        ))
        .enum_values(Some(values))
        .into()
}
