//! The caller of a request, as the plan sees it.

use crate::keys::{KeyName, Weight};

/// The caller of a request, and its share of slots and queue.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CallerShare {
    /// Name of the API key. `None` for requests without a key, which all belong to the same caller.
    pub key: Option<KeyName>,
    /// Share of slots and queue, relative to other callers.
    pub weight: Weight,
    /// The requests to which the caller's priorities apply.
    pub priority_reach: PriorityReach,
}

/// The requests to which a priority applies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PriorityReach {
    /// Requests of the same caller.
    #[default]
    OwnRequests,
    /// Requests of every caller.
    AllRequests,
}
