//! The choice of the upstreams for a request, and of the error to report. Pure functions.

use std::sync::Arc;

use super::failure::Failure;
use super::upstream::{Availability, Upstream};
use crate::error::{Error, ErrorKind};
use crate::grpc;
use crate::proto::v1;

/// Returns the upstreams in the order to try them for a model: first those that list it by name, then those that list it
/// as an alias, then the others, each group by load. The others matter because an engine with `--any-model` accepts
/// models that it does not list.
pub(super) fn for_model(upstreams: Vec<Arc<dyn Upstream>>, model: &str) -> Vec<Arc<dyn Upstream>> {
    let mut upstreams = by_load(upstreams);
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

/// Returns the upstreams that are not known to be down, or all upstreams if none is left, sorted by load.
pub(super) fn by_load(mut upstreams: Vec<Arc<dyn Upstream>>) -> Vec<Arc<dyn Upstream>> {
    let is_up = |upstream: &Arc<dyn Upstream>| upstream.health().borrow().is_up();
    if upstreams.iter().any(is_up) {
        upstreams.retain(is_up);
    }
    upstreams.sort_by_key(|upstream| upstream.load());
    upstreams
}

/// Returns the upstreams besides this gateway itself.
pub(super) fn usable(upstreams: &[Arc<dyn Upstream>]) -> Vec<Arc<dyn Upstream>> {
    let is_usable =
        |it: &&Arc<dyn Upstream>| it.health().borrow().availability != Availability::Loop;
    upstreams.iter().filter(is_usable).cloned().collect()
}

/// Returns the upstreams that support every parameter of the request.
///
/// # Errors
/// Returns an error that names a parameter if no upstream is left, or the error of an invalid request.
pub(super) fn supporting(
    upstreams: Vec<Arc<dyn Upstream>>,
    message: &v1::CompletionRequest,
) -> Result<Vec<Arc<dyn Upstream>>, Error> {
    let mut rejected = None;
    let mut supporting = Vec::new();
    for upstream in upstreams {
        match grpc::first_used(message, upstream.unsupported())? {
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

/// Returns a model's name, and its entry in a list of models.
pub(super) fn listed(model: &v1::Model) -> (String, String) {
    let entry = match &model.aliases[..] {
        [] => model.name.clone(),
        aliases => format!("{} (also {})", model.name, aliases.join(", ")),
    };
    (model.name.clone(), entry)
}

/// Returns true if another engine may accept a request that one engine rejected with this error.
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

/// Chooses the failure to report: the later one, unless it is `ModelNotFound`, which does not explain why an engine that
/// may have the model rejected the request.
pub(super) fn more_informative(earlier: Option<Failure>, later: Failure) -> Failure {
    match earlier {
        Some(earlier) if later.error().kind == ErrorKind::ModelNotFound => earlier,
        Some(_) | None => later,
    }
}

pub(super) fn has_name(model: &v1::Model, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}
