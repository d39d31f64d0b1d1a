//! The health of an upstream: whether it accepts requests, and its models.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;

use super::selection::has_name;
use super::spec::EngineSpec;
use crate::backoff::BackoffPolicy;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;

/// Delays between health checks of an engine that is down. The maximum is short, because requests for the engine's
/// models fail until the next check succeeds.
pub(super) const HEALTH_CHECK_BACKOFF: BackoffPolicy = BackoffPolicy {
    first: Duration::from_millis(250),
    max: Duration::from_secs(1),
    jitter: 0.5,
};

/// Health of an upstream.
#[derive(Clone, Debug, Default)]
pub(crate) struct Health {
    /// Availability for requests.
    pub availability: Availability,
    /// Models that the upstream listed when it last came up. Empty for the engine in this process, which resolves
    /// model names itself.
    pub models: Vec<v1::Model>,
    /// Number of times that the upstream went down or came up again.
    pub changes: u64,
}

/// Availability of an upstream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Availability {
    /// The upstream has not answered a health check yet. It counts as up, so requests are sent to it.
    #[default]
    Unknown,
    /// The upstream accepts requests.
    Up,
    /// The upstream rejects requests or cannot be reached. It gets requests only if no other upstream is up.
    Down,
    /// The upstream is this gateway itself, under another address. It gets no requests.
    Loop,
}

impl Health {
    /// Returns the health of an upstream that is always up.
    #[must_use]
    pub(crate) fn always_up() -> Self {
        Self {
            availability: Availability::Up,
            ..Self::default()
        }
    }

    /// Returns the model with this name or alias, or the only model if the name is empty. `None` if the models are not
    /// known yet.
    ///
    /// # Errors
    /// The upstream does not have the model, or the name is empty and there are several models.
    pub(super) fn find_model(&self, name: &str) -> Result<Option<v1::Model>, Error> {
        let found = match (name, &self.models[..]) {
            (_, []) => return Ok(None),
            ("", [only]) => Some(only),
            ("", _) => {
                let message = "`model` is required: the engine has several models.";
                return Err(Error::new(ErrorKind::MissingParameter, message).with_param("model"));
            }
            (name, models) => models.iter().find(|model| has_name(model, name)),
        };
        let missing = || {
            let message = format!("There is no model '{name}'.");
            Error::new(ErrorKind::ModelNotFound, message).with_param("model")
        };
        found.cloned().map(Some).ok_or_else(missing)
    }

    /// Returns true unless the upstream is known to be unavailable.
    #[must_use]
    pub(crate) fn is_up(&self) -> bool {
        matches!(self.availability, Availability::Unknown | Availability::Up)
    }
}

/// Publishes the health of an engine, and logs its changes.
pub(super) struct HealthPublisher {
    /// Name of the engine, for the log.
    engine: Arc<str>,
    /// Context length of all models, if the settings override what the engine reports.
    context_length: Option<u32>,
    health: watch::Sender<Health>,
}

impl HealthPublisher {
    /// Creates a publisher, and the watch of what it publishes.
    pub(super) fn new(engine: &EngineSpec) -> (Self, watch::Receiver<Health>) {
        let (sender, health) = watch::channel(Health::default());
        let publisher = Self {
            engine: Arc::clone(&engine.name),
            context_length: engine.context_length,
            health: sender,
        };
        (publisher, health)
    }

    /// Publishes the availability, and the models if they are known. Logs a change of the availability.
    pub(super) fn publish(&self, availability: Availability, mut models: Option<Vec<v1::Model>>) {
        if let Some(context_length) = self.context_length {
            for model in models.iter_mut().flatten() {
                model.context_length = context_length;
            }
        }
        let mut earlier = availability;
        self.health.send_if_modified(|health| {
            let was_up = health.is_up();
            earlier = std::mem::replace(&mut health.availability, availability);
            health.changes += u64::from(was_up != health.is_up());
            let new_models = models.filter(|models| *models != health.models);
            let has_new_models = new_models.is_some();
            if let Some(models) = new_models {
                health.models = models;
            }
            has_new_models || earlier != availability
        });
        let engine = &*self.engine;
        match availability {
            _ if earlier == availability => {}
            Availability::Up => tracing::info!(engine, "an engine is up"),
            Availability::Loop => {
                tracing::error!(
                    engine,
                    "this engine is the gateway itself; it gets no requests; remove it from the settings"
                );
            }
            Availability::Unknown | Availability::Down => {
                tracing::warn!(engine, "an engine is down");
            }
        }
    }
}
