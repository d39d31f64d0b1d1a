//! Layer that authenticates requests by their API key, and checks that the key's scopes permit the route.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request;
use axum::http::header::AUTHORIZATION;
use axum::http::{HeaderMap, HeaderName};
use axum::response::Response;
use tokio::time::{Instant, sleep};

use super::failed_attempts::FailedAttempts;
use super::response;
use crate::context::RequestContext;
use crate::error::{Error, ErrorKind};
use crate::keys::{Key, Keys, Scope};
use crate::listen::PeerAddress;
use crate::telemetry::{Api, AuthenticationFailure, Route, RouteKind};

const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");

/// Authenticates the requests of a server. Both APIs share it.
pub(crate) struct Authenticator {
    keys: Keys,
    failed: FailedAttempts,
}

impl Authenticator {
    /// Creates an authenticator that accepts these keys.
    pub(crate) fn new(keys: Keys) -> Self {
        Self {
            keys,
            failed: FailedAttempts::default(),
        }
    }

    /// Sets the key of the request's context.
    ///
    /// # Errors
    /// The route needs a key, and the request has no valid one, or its key lacks the scope.
    pub(super) fn authenticate(
        &self,
        context: &RequestContext,
        request: &Request,
    ) -> Result<(), Rejection> {
        let Some(scope) = required_scope(context.api(), context.route()) else {
            return Ok(());
        };
        let failure = match self.find_key(request.headers()) {
            Ok(key) if key.has_scope(scope) => {
                context.set_key(key);
                return Ok(());
            }
            Ok(key) => {
                context.set_key(key);
                AuthenticationFailure::Scope
            }
            Err(failure) => failure,
        };
        let telemetry = context.record().telemetry();
        telemetry.count_authentication_failure(context.api(), failure);
        match failure {
            AuthenticationFailure::Scope => {
                let message = format!("The API key needs the scope `{}`.", scope.name());
                Err(Rejection {
                    error: Error::new(ErrorKind::InsufficientScope, message),
                    delay: Duration::ZERO,
                })
            }
            // All failures have the same response, so that it does not tell which keys exist.
            AuthenticationFailure::MissingKey | AuthenticationFailure::InvalidKey => {
                let peer = request.extensions().get().and_then(PeerAddress::ip);
                let message = "A valid API key is required. Send it in the header `Authorization: Bearer KEY` or \
                               `x-api-key: KEY`.";
                Err(Rejection {
                    error: Error::new(ErrorKind::InvalidApiKey, message),
                    delay: self.failed.record(peer, Instant::now()),
                })
            }
        }
    }

    fn find_key(&self, headers: &HeaderMap) -> Result<Arc<Key>, AuthenticationFailure> {
        let secret = presented_secret(headers)?;
        let key = self.keys.find(secret);
        key.ok_or(AuthenticationFailure::InvalidKey)
    }
}

/// Rejection of a request that was not authenticated.
pub(super) struct Rejection {
    error: Error,
    /// Time by which the response is delayed, because the client has failed often.
    delay: Duration,
}

impl Rejection {
    /// Waits for the delay, and then builds the response.
    pub(super) async fn into_response(self, api: Api) -> Response {
        if !self.delay.is_zero() {
            sleep(self.delay).await;
        }
        response::error_response(api, self.error)
    }
}

/// Returns the scope that a route needs. `None` for health and reflection, which need no key.
fn required_scope(api: Api, route: Route) -> Option<Scope> {
    match (api, route.kind) {
        (Api::Http, RouteKind::Probe) if route.name == "/metrics" => Some(Scope::Metrics),
        (_, RouteKind::Probe) => None,
        (_, RouteKind::Admin) => Some(Scope::Admin),
        (Api::Grpc, RouteKind::Unary) if route.name.starts_with("grpc.reflection.") => None,
        (_, RouteKind::Completion | RouteKind::Unary | RouteKind::Unmatched) => {
            Some(Scope::Inference)
        }
    }
}

/// Returns the secret in the request's headers: of `Authorization` with the scheme `Bearer`, or else of `x-api-key`.
pub(super) fn presented_secret(headers: &HeaderMap) -> Result<&[u8], AuthenticationFailure> {
    let mut authorizations = headers.get_all(AUTHORIZATION).iter();
    let secret = match (authorizations.next(), authorizations.next()) {
        (Some(authorization), None) => bearer_secret(authorization.as_bytes()),
        // A proxy and this server could read different ones of several headers.
        (Some(_), Some(_)) => return Err(AuthenticationFailure::InvalidKey),
        (None, _) => {
            let mut keys = headers.get_all(X_API_KEY).iter();
            match (keys.next(), keys.next()) {
                (Some(key), None) => Some(key.as_bytes()),
                (Some(_), Some(_)) => return Err(AuthenticationFailure::InvalidKey),
                (None, _) => return Err(AuthenticationFailure::MissingKey),
            }
        }
    };
    secret.ok_or(AuthenticationFailure::InvalidKey)
}

/// Returns the part of an `Authorization` header after `Bearer `. The scheme's case does not matter (RFC 9110,
/// section 11.1).
fn bearer_secret(authorization: &[u8]) -> Option<&[u8]> {
    let (scheme, secret) = authorization.split_at_checked(b"Bearer ".len())?;
    scheme
        .eq_ignore_ascii_case(b"Bearer ")
        .then(|| secret.trim_ascii())
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn secret(headers: &[(HeaderName, &'static str)]) -> Result<String, AuthenticationFailure> {
        let headers = headers.iter().cloned();
        let headers: HeaderMap = headers
            .map(|(name, value)| (name, HeaderValue::from_static(value)))
            .collect();
        let secret = presented_secret(&headers)?;
        Ok(String::from_utf8(secret.to_vec()).unwrap())
    }

    #[test]
    fn a_key_is_read_from_either_header() {
        let (authorization, x_api_key) = (AUTHORIZATION, X_API_KEY);
        for headers in [
            &[(authorization.clone(), "Bearer a")][..],
            &[(authorization.clone(), "bearer  a ")],
            &[(x_api_key.clone(), "a")],
            &[
                (authorization.clone(), "Bearer a"),
                (x_api_key.clone(), "b"),
            ],
        ] {
            assert_eq!(secret(headers).as_deref(), Ok("a"), "{headers:?}");
        }
        assert_eq!(secret(&[]), Err(AuthenticationFailure::MissingKey));
        for headers in [
            &[(authorization.clone(), "Basic a")][..],
            &[(authorization.clone(), "a")],
            &[
                (authorization.clone(), "Bearer a"),
                (authorization.clone(), "Bearer a"),
            ],
            &[(authorization, "Basic a"), (x_api_key.clone(), "a")],
            &[(x_api_key.clone(), "a"), (x_api_key, "a")],
        ] {
            assert_eq!(
                secret(headers),
                Err(AuthenticationFailure::InvalidKey),
                "{headers:?}"
            );
        }
    }

    #[test]
    fn only_health_and_reflection_need_no_key() {
        let scope = |api, name, kind| required_scope(api, Route { name, kind });
        for (api, name, kind, expected) in [
            (Api::Http, "/health", RouteKind::Probe, None),
            (
                Api::Http,
                "/metrics",
                RouteKind::Probe,
                Some(Scope::Metrics),
            ),
            (
                Api::Http,
                "/admin/drain",
                RouteKind::Admin,
                Some(Scope::Admin),
            ),
            (
                Api::Http,
                "/v1/models",
                RouteKind::Unary,
                Some(Scope::Inference),
            ),
            (
                Api::Http,
                "/v1/completions",
                RouteKind::Completion,
                Some(Scope::Inference),
            ),
            (
                Api::Http,
                "unmatched",
                RouteKind::Unmatched,
                Some(Scope::Inference),
            ),
            (
                Api::Grpc,
                "grpc.health.v1.Health/Check",
                RouteKind::Probe,
                None,
            ),
            (
                Api::Grpc,
                "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                RouteKind::Unary,
                None,
            ),
            (
                Api::Grpc,
                "tokenway.v1.Inference/Tokenize",
                RouteKind::Unary,
                Some(Scope::Inference),
            ),
        ] {
            assert_eq!(scope(api, name, kind), expected, "{name}");
        }
    }
}
