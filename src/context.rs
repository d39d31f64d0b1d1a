//! The context of one request, from its arrival until its response has left.
//!
//! The layer chain in `frontend` creates the context and inserts it into the request's extensions. The HTTP API
//! passes the context on to the gRPC service of the same process. A request therefore has one id, one deadline, one
//! count and one line in the access log, however many parts handle it. A handler without a context fails: there is no
//! default context.

use std::sync::{Arc, OnceLock};

use http::Extensions;
use tokio::time::Instant;

use crate::caller::Caller;
use crate::delivery::FlushHandle;
use crate::error::{Error, ErrorKind};
use crate::keys::{Key, LimitedRequest, RateStatus, Reservation, Scope, TokenNeed};
use crate::request::RequestId;
use crate::request_memory::{MemoryShares, RequestMemory};
use crate::runner::monotonic_ns;
use crate::scheduler::plan::{CallerShare, PriorityReach};
use crate::telemetry::{Api, RequestRecord, Route, TokenUsage};

/// The context of one request. Clones share it.
#[derive(Clone)]
pub struct RequestContext(Arc<ContextParts>);

/// Facts about a request that are known on its arrival.
pub struct Arrival {
    /// The request id: the client's, or a random one.
    pub id: RequestId,
    /// The time at which the request fails with `deadline_exceeded`.
    pub deadline: Instant,
    /// Handle that waits for flushes of the connection that carries the response.
    pub flush: FlushHandle,
    /// Record of the request, for the metrics and the access log.
    pub record: RequestRecord,
    /// The caller, if prefix caches must isolate callers.
    pub caller: Option<Caller>,
    /// Error to return because the client's request id or timeout is invalid. `None` if both are valid.
    pub invalid: Option<Error>,
    /// Memory for large requests and responses.
    pub memory: RequestMemory,
}

struct ContextParts {
    id: RequestId,
    arrived: Instant,
    deadline: Instant,
    flush: FlushHandle,
    record: Arc<RequestRecord>,
    caller: Option<Caller>,
    key: OnceLock<Arc<Key>>,
    invalid: Option<Error>,
    memory: MemoryShares,
}

impl RequestContext {
    /// Creates the context of a request that arrives now.
    #[must_use]
    pub fn new(arrival: Arrival) -> Self {
        Self(Arc::new(ContextParts {
            id: arrival.id,
            arrived: Instant::now(),
            deadline: arrival.deadline,
            flush: arrival.flush,
            record: Arc::new(arrival.record),
            caller: arrival.caller,
            key: OnceLock::new(),
            invalid: arrival.invalid,
            memory: MemoryShares::new(arrival.memory),
        }))
    }

    /// Returns the context in a request's extensions.
    ///
    /// # Errors
    /// Returns `internal_error` if there is no context. That is a bug: the request has bypassed the layer
    /// chain.
    pub(crate) fn from_extensions(extensions: &Extensions) -> Result<Self, Error> {
        extensions.get::<Self>().cloned().ok_or_else(|| {
            tracing::error!(
                "a request has bypassed the layers: its handler found no request context"
            );
            Error::internal()
        })
    }

    /// The id of the request.
    #[must_use]
    pub fn id(&self) -> &RequestId {
        &self.0.id
    }

    /// The API that received the request.
    #[must_use]
    pub fn api(&self) -> Api {
        self.0.record.api()
    }

    /// The route of the request.
    #[must_use]
    pub fn route(&self) -> Route {
        self.0.record.route()
    }

    /// The time when the request arrived.
    #[must_use]
    pub fn arrived(&self) -> Instant {
        self.0.arrived
    }

    /// The time at which the request fails with `deadline_exceeded`.
    #[must_use]
    pub fn deadline(&self) -> Instant {
        self.0.deadline
    }

    /// The handle that waits for flushes of the connection that carries the response.
    #[must_use]
    pub fn flush_handle(&self) -> &FlushHandle {
        &self.0.flush
    }

    /// The record of the request, for the metrics and the access log.
    #[must_use]
    pub fn record(&self) -> &Arc<RequestRecord> {
        &self.0.record
    }

    /// Returns the salt of the request's prompt in prefix caches: the request's `cache_salt`, or, if callers must be
    /// isolated, a hash of the caller, `user` and `cache_salt`.
    #[must_use]
    pub fn cache_salt(&self, user: &str, cache_salt: &str) -> String {
        match (&self.0.caller, self.0.key.get()) {
            (None, _) => cache_salt.to_owned(),
            (Some(_), Some(key)) => Caller::with_key(&key.name).cache_salt(user, cache_salt),
            (Some(caller), None) => caller.cache_salt(user, cache_salt),
        }
    }

    /// Sets the API key with which the request was authenticated. Later calls have no effect.
    pub(crate) fn set_key(&self, key: Arc<Key>) {
        self.0.record.set_key(&key.name);
        self.0.key.get_or_init(|| key);
    }

    /// Returns the caller's share of slots and queue. All requests without a key belong to the same caller.
    #[must_use]
    pub fn caller_share(&self) -> CallerShare {
        let key = self.0.key.get();
        key.map_or_else(CallerShare::default, |key| CallerShare {
            key: Some(key.name.clone()),
            weight: key.weight,
            priority_reach: match key.has_scope(Scope::Priority) {
                true => PriorityReach::AllRequests,
                false => PriorityReach::OwnRequests,
            },
        })
    }

    /// Counts the request toward the limits of its key. Without a key, there are no limits.
    ///
    /// # Errors
    /// The key has reached a limit.
    pub(crate) fn start_limited(&self) -> Result<(), Error> {
        if let Some(key) = self.0.key.get() {
            let limited = LimitedRequest::start(&key.quotas, Instant::now())?;
            self.0.record.set_limited(limited);
        }
        Ok(())
    }

    /// Reserves the tokens that a prompt of the request and its completion need: in the limits of tokens per minute
    /// until the request ends, and in the budgets of the key until the reservation is dropped. Returns `None` if the
    /// key has no budgets.
    ///
    /// # Errors
    /// A limit does not allow so many tokens, or a budget is used up.
    pub(crate) fn reserve_tokens(&self, need: TokenNeed) -> Result<Option<Reservation>, Error> {
        let Some(limited) = self.0.record.limited() else {
            return Ok(None);
        };
        let tokens = need.prompt.saturating_add(need.completion);
        limited.hold_tokens(tokens, Instant::now())?;
        let key = self.0.key.get();
        key.map_or(Ok(None), |key| key.budgets.reserve(need))
    }

    /// Returns the states of the limits that apply to the request: of requests per minute, and of tokens per minute.
    pub(crate) fn rate_status(&self) -> [Option<RateStatus>; 2] {
        let key = self.0.key.get();
        key.map_or([None; 2], |key| key.quotas.status(Instant::now()))
    }

    /// Returns true if the request's key may use the model that has one of these names. Without keys, every request
    /// may.
    pub(crate) fn allows_model<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> bool {
        let key = self.0.key.get();
        key.is_none_or(|key| key.allows_model(names.into_iter()))
    }

    /// Removes the names of other models from an error about a model that does not exist, if the request's key may not
    /// use all models.
    pub(crate) fn hide_models(&self, error: Error, requested: &str) -> Error {
        if self.0.key.get().is_none_or(|key| key.models.is_none()) {
            return error;
        }
        Error {
            message: format!("There is no model '{requested}'."),
            ..error
        }
    }

    /// Checks that the request's key may use a model.
    ///
    /// # Errors
    /// The key allows neither the name that the request used nor the name of the model. `served` is `None` if there is
    /// no such model.
    pub(crate) fn check_model(&self, requested: &str, served: Option<&str>) -> Result<(), Error> {
        if self.allows_model([requested].into_iter().chain(served)) {
            return Ok(());
        }
        let message = match requested {
            "" => "`model` is required: the API key does not permit the server's model.".to_owned(),
            _ => format!("The API key does not permit the model '{requested}'."),
        };
        Err(Error::new(ErrorKind::InsufficientScope, message).with_param("model"))
    }

    /// The request's shares of the memory for large requests and responses.
    pub(crate) fn memory_shares(&self) -> &MemoryShares {
        &self.0.memory
    }

    /// Checks the id and the timeout that the client sent.
    ///
    /// # Errors
    /// One of them is invalid.
    pub fn check(&self) -> Result<(), Error> {
        self.0.invalid.clone().map_or(Ok(()), Err)
    }

    /// Reports that a worker has started a prompt with this number of tokens.
    pub fn record_start(&self, prompt_tokens: u32) {
        self.0.memory.record_start();
        self.0.record.record_start(prompt_tokens, monotonic_ns());
    }

    /// Sets the token counts that the engine reported at the end of the completion.
    pub(crate) fn set_usage(&self, prompt_tokens: u32, completion_tokens: u32) {
        self.0.record.set_usage(TokenUsage {
            prompt: prompt_tokens.into(),
            completion: completion_tokens.into(),
        });
    }

    /// Counts the end of the request. Later calls have no effect.
    pub fn record_end(&self, outcome: Result<(), &Error>) {
        let outcome = outcome.map_err(|error| error.kind);
        self.0.record.record_end(outcome, monotonic_ns());
    }

    /// Counts the end of a request that was rejected before any part of a response was sent.
    pub(crate) fn record_rejection(&self, kind: ErrorKind) {
        self.0.record.record_rejection(kind, monotonic_ns());
    }

    /// Ends a request whose response has been sent completely or was dropped.
    pub(crate) fn record_close(&self) {
        self.0.record.record_close(monotonic_ns());
    }
}

#[cfg(test)]
impl RequestContext {
    /// Creates a context for tests: a completion request with a timeout of one minute, on a connection with this HTTP
    /// version.
    pub(crate) fn for_test(api: Api, version: http::Version) -> Self {
        Self::with_memory(api, version, &RequestMemory::new(0))
    }

    /// Like [`Self::for_test`], with this memory.
    pub(crate) fn with_memory(api: Api, version: http::Version, memory: &RequestMemory) -> Self {
        use crate::telemetry::{RouteKind, Telemetry};
        let route = Route {
            name: "test",
            kind: RouteKind::Completion,
        };
        Self::new(Arrival {
            id: RequestId::random(),
            deadline: Instant::now() + std::time::Duration::from_secs(60),
            flush: FlushHandle::new(Arc::default(), version),
            record: RequestRecord::new(&Telemetry::new(), api, route, monotonic_ns()),
            caller: None,
            invalid: None,
            memory: memory.clone(),
        })
    }
}
