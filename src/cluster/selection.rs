//! Pure functions that compare models, members and failures.

use std::sync::Arc;

use super::failure::Failure;
use super::health::Availability;
use super::member::Member;
use super::policy::Fault;
use crate::proto::v1;

/// Returns all members, except engines that turned out to be this gateway itself.
pub(super) fn without_self(members: &[Arc<Member>]) -> Vec<Arc<Member>> {
    let is_usable = |it: &&Arc<Member>| {
        let health = it.upstream.health().borrow();
        health.availability != Availability::Loop
    };
    members.iter().filter(is_usable).cloned().collect()
}

/// Returns a model's name and aliases, for error messages.
pub(super) fn name_with_aliases(model: &v1::Model) -> String {
    match &model.aliases[..] {
        [] => model.name.clone(),
        aliases => format!("{} (also {})", model.name, aliases.join(", ")),
    }
}

/// Chooses which of two failures to report. This is the later failure, unless it only says that an engine cannot serve
/// the request, which would hide why another engine that can serve it rejected it.
pub(super) fn more_informative(earlier: Option<Failure>, later: Failure) -> Failure {
    match earlier {
        Some(earlier) if later.fault() == Fault::NotServed => earlier,
        Some(_) | None => later,
    }
}

/// Returns true if a model has this name or alias.
pub(super) fn has_name(model: &v1::Model, name: &str) -> bool {
    model.name == name || model.aliases.iter().any(|alias| alias == name)
}
