//! The fields that all objects of a response share.

use crate::gateway::dialect::ResponseFacts;

/// One of OpenAI's routes for completions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Route {
    /// `/v1/completions`.
    Completions,
    /// `/v1/chat/completions`.
    Chat,
}

/// Fields that all objects of a response share.
#[derive(Clone)]
pub struct ResponseMetadata {
    /// Endpoint, which determines the type of the objects.
    pub route: Route,
    /// Id of the response: `cmpl-…` or `chatcmpl-…`.
    pub id: String,
    /// Creation time, in seconds since the Unix epoch.
    pub created: u64,
    /// Name of the model.
    pub model: String,
}

impl ResponseMetadata {
    pub(super) fn new(route: Route, facts: ResponseFacts) -> Self {
        let prefix = match route {
            Route::Completions => "cmpl",
            Route::Chat => "chatcmpl",
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
            Route::Completions => "text_completion",
            Route::Chat => "chat.completion.chunk",
        }
    }
}
