//! Pure functions that choose the upstreams for a request, and the error to report if all of them fail.

use std::sync::Arc;

use super::failure::Failure;
use super::upstream::{Availability, Upstream};
use crate::error::{Error, ErrorKind};
use crate::grpc;
use crate::proto::v1;
use crate::request::Parameter;

/// Orders the upstreams for a request to a model: first those that list the model's name, then those that list it as
/// an alias, then all others. Each group is sorted by load.
///
/// The last group matters because an engine with `--any-model` accepts models that it does not list.
pub(super) fn order_for_model(
    upstreams: Vec<Arc<dyn Upstream>>,
    model: &str,
) -> Vec<Arc<dyn Upstream>> {
    let mut upstreams = sort_by_load(upstreams);
    if upstreams.len() > 1 && !model.is_empty() {
        upstreams.sort_by_key(|upstream| {
            let health = upstream.health().borrow();
            let is_name = health.models.iter().any(|it| it.name == model);
            let is_alias = health.models.iter().any(|it| has_name(it, model));
            (!is_name, !is_alias)
        });
    }
    upstreams
}

/// Returns the upstreams that may be up, sorted by load. If all are down, returns all of them.
pub(super) fn sort_by_load(mut upstreams: Vec<Arc<dyn Upstream>>) -> Vec<Arc<dyn Upstream>> {
    let is_up = |upstream: &Arc<dyn Upstream>| upstream.health().borrow().is_up();
    if upstreams.iter().any(is_up) {
        upstreams.retain(is_up);
    }
    upstreams.sort_by_key(|upstream| upstream.load());
    upstreams
}

/// Returns all upstreams, except engines that turned out to be this gateway itself.
pub(super) fn without_self(upstreams: &[Arc<dyn Upstream>]) -> Vec<Arc<dyn Upstream>> {
    let is_usable =
        |it: &&Arc<dyn Upstream>| it.health().borrow().availability != Availability::Loop;
    upstreams.iter().filter(is_usable).cloned().collect()
}

/// Returns the upstreams that support every parameter of the request.
///
/// # Errors
/// Returns an error that names an unsupported parameter if no upstream is left, or the error of an invalid
/// request.
pub(super) fn filter_supporting(
    upstreams: Vec<Arc<dyn Upstream>>,
    message: &v1::CompletionRequest,
) -> Result<Vec<Arc<dyn Upstream>>, Error> {
    let mut rejected = None;
    let mut supporting = Vec::new();
    for upstream in upstreams {
        match grpc::first_used_parameter(message, upstream.unsupported())? {
            None => supporting.push(upstream),
            Some(parameter) => rejected = Some(parameter),
        }
    }
    match rejected {
        Some(parameter) if supporting.is_empty() => {
            let param = parameter.name();
            let message = format!("No engine that is up supports {param}. Leave it out.");
            Err(Error::new(ErrorKind::UnsupportedParameter, message).with_param(param))
        }
        Some(_) | None => Ok(supporting),
    }
}

/// Returns true if a request to this model may have fields that Tokenway does not know: if an upstream takes them that
/// lists the model, or any upstream if none lists it.
pub(super) fn takes_extra_fields(mut upstreams: Vec<Arc<dyn Upstream>>, model: &str) -> bool {
    let lists_model = |upstream: &Arc<dyn Upstream>| {
        let health = upstream.health().borrow();
        health.models.iter().any(|it| has_name(it, model))
    };
    if upstreams.iter().any(lists_model) {
        upstreams.retain(lists_model);
    }
    let takes = |it: &Arc<dyn Upstream>| !it.unsupported().contains(&Parameter::ExtraFields);
    upstreams.iter().any(takes)
}

/// Returns a model's name and aliases, for error messages.
pub(super) fn name_with_aliases(model: &v1::Model) -> String {
    match &model.aliases[..] {
        [] => model.name.clone(),
        aliases => format!("{} (also {})", model.name, aliases.join(", ")),
    }
}

/// Returns true if another engine may accept a request that one engine rejected with this kind of error.
pub(super) fn another_engine_may_accept(kind: ErrorKind) -> bool {
    matches!(
        kind,
        ErrorKind::ModelNotFound
            | ErrorKind::NoWorker
            | ErrorKind::NotReady
            | ErrorKind::Draining
            | ErrorKind::QueueFull
            | ErrorKind::UpstreamError
            | ErrorKind::Internal
    )
}

/// Chooses which of two failures to report. This is the later failure, unless it is `ModelNotFound`, which would hide
/// why an engine that has the model rejected the request.
pub(super) fn more_informative(earlier: Option<Failure>, later: Failure) -> Failure {
    match earlier {
        Some(earlier) if later.error().kind == ErrorKind::ModelNotFound => earlier,
        Some(_) | None => later,
    }
}

pub(super) fn has_name(model: &v1::Model, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}
