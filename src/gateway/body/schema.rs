//! OpenAPI schemas of fields that accept several JSON types.

use utoipa::openapi::schema::{AnyOfBuilder, ArrayBuilder, ObjectBuilder, Type};
use utoipa::openapi::{RefOr, Schema};

use super::completions::MAX_LOGPROBS;
use super::message::Message;
use crate::request::{MAX_LOGIT_BIASES, MAX_STOP_BYTES, MAX_STOP_STRINGS};

pub(super) fn prompt() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let ids = || ArrayBuilder::new().items(token_id()).min_items(Some(1));
    let many = || ArrayBuilder::new().min_items(Some(1)).max_items(Some(128));
    AnyOfBuilder::new()
        .description(Some(
            "One or more prompts, each a string or a list of token ids.",
        ))
        .item(text())
        .item(ids())
        .item(many().items(text()))
        .item(many().items(ids()))
        .into()
}

pub(super) fn stop() -> RefOr<Schema> {
    let text = || {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .min_length(Some(1))
            .max_length(Some(MAX_STOP_BYTES))
    };
    let many = ArrayBuilder::new()
        .items(text())
        .max_items(Some(MAX_STOP_STRINGS));
    AnyOfBuilder::new()
        .description(Some(
            "Up to 16 stop strings. A choice ends before the first match.",
        ))
        .item(text())
        .item(many)
        .item(null())
        .into()
}

pub(super) fn logprobs() -> RefOr<Schema> {
    let count = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(0))
        .maximum(Some(MAX_LOGPROBS));
    let none = ObjectBuilder::new()
        .schema_type(Type::Boolean)
        .enum_values(Some([false]));
    AnyOfBuilder::new()
        .description(Some(
            "Returns each token's log probability, and those of this many of the likeliest tokens at its \
             position. `false` means none.",
        ))
        .item(count)
        .item(none)
        .item(null())
        .into()
}

pub(super) fn logit_bias() -> RefOr<Schema> {
    let id = ObjectBuilder::new()
        .schema_type(Type::String)
        .pattern(Some("^(0|[1-9][0-9]{0,8})$"));
    let bias = ObjectBuilder::new()
        .schema_type(Type::Number)
        .minimum(Some(-100))
        .maximum(Some(100));
    let biases = ObjectBuilder::new()
        .schema_type(Type::Object)
        .property_names(Some(id))
        .additional_properties(Some(bias))
        .max_properties(Some(MAX_LOGIT_BIASES));
    AnyOfBuilder::new()
        .description(Some(
            "Values to add to token logits before sampling, by token id.",
        ))
        .item(biases)
        .item(null())
        .into()
}

pub(super) fn role() -> RefOr<Schema> {
    let roles = Message::ROLES.map(|(name, _)| name);
    ObjectBuilder::new()
        .schema_type(Type::String)
        .description(Some(
            "The role of the author. `developer` is treated as `system`.",
        ))
        .enum_values(Some(roles))
        .into()
}

pub(super) fn content() -> RefOr<Schema> {
    let text = || ObjectBuilder::new().schema_type(Type::String);
    let part = ObjectBuilder::new()
        .property("type", text().enum_values(Some(["text"])))
        .required("type")
        .property("text", text())
        .required("text")
        .additional_properties(Some(null()));
    AnyOfBuilder::new()
        .description(Some(
            "Text, or a list of text parts, which are joined with line breaks.",
        ))
        .item(text())
        .item(ArrayBuilder::new().items(part).min_items(Some(1)))
        .into()
}

fn token_id() -> ObjectBuilder {
    ObjectBuilder::new()
        .schema_type(Type::Integer)
        .minimum(Some(0))
        .maximum(Some(u32::MAX))
}

pub(in crate::gateway) fn null() -> ObjectBuilder {
    ObjectBuilder::new().schema_type(Type::Null)
}
