//! The fields that all objects of a response share.

use crate::gateway::dialect::ResponseFacts;

/// One of OpenAI's routes for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CompletionRoute {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// Fields that all objects of a response share.
#[derive(Clone)]
pub struct ResponseMetadata {
    /// Endpoint, which determines the type of the objects.
    pub route: CompletionRoute,
    /// Id of the response: `cmpl-…` or `chatcmpl-…`.
    pub id: String,
    /// Creation time, in seconds since the Unix epoch.
    pub created: u64,
    /// Name of the model.
    pub model: String,
}

impl ResponseMetadata {
    pub(super) fn new(route: CompletionRoute, facts: ResponseFacts) -> Self {
        let prefix = match route {
            CompletionRoute::Completions => "cmpl",
            CompletionRoute::Chat => "chatcmpl",
        };
        Self {
            route,
            id: format!("{prefix}-{}", facts.request_id.0),
            created: facts.created,
            model: facts.model,
        }
    }

    /// The field `object` of a line.
    pub(super) fn object(&self) -> &'static str {
        match self.route {
            CompletionRoute::Completions => "text_completion",
            CompletionRoute::Chat => "chat.completion.chunk",
        }
    }
}
