//! SIGHUP: reloads the keys and the certificates, reads the settings again, and replaces the engines and routes of a
//! running gateway. This module must not know where settings come from.

use std::convert::Infallible;
use std::sync::Arc;

use tokio::signal::unix::Signal;
use tokio::task::spawn_blocking;

use crate::cluster::ClusterSpec;
use crate::server::reload::Trigger;
use crate::server::{Server, reload};

/// Effect of SIGHUP on a server, besides reloading its keys and certificates.
#[derive(Clone)]
pub enum OnHangup {
    /// No effect, for this reason.
    NoEffect(&'static str),
    /// Calls this function, and replaces the engines and routes by those that it returns. The error says what is wrong
    /// with the settings, in one line.
    Reload(Arc<dyn Fn() -> Result<ReloadedSettings, String> + Send + Sync>),
}

/// Settings that were read again while the server runs.
pub struct ReloadedSettings {
    /// Engines and routes.
    pub cluster: ClusterSpec,
    /// Keys of the other settings that differ from those in force. They take effect with the next start only.
    pub unapplied: Vec<String>,
}

/// Handles each SIGHUP that arrives. Without a handler, the signal would end the process.
pub(super) async fn reload_on_each_hangup(
    server: &Server,
    hangups: &mut Signal,
    on_hangup: &OnHangup,
) -> Infallible {
    loop {
        if hangups.recv().await.is_none() {
            // The runtime shuts down, so no further signal arrives.
            std::future::pending::<()>().await;
        }
        if let Some(keys) = server.keys() {
            reload::reload_keys(keys, Trigger::Hangup).await;
        }
        for tls in server.tls() {
            reload::reload_certificates(tls, Trigger::Hangup).await;
        }
        let has_reloaded = server.keys().is_some() || !server.tls().is_empty();
        match on_hangup {
            OnHangup::NoEffect(_) if has_reloaded => {}
            OnHangup::NoEffect(reason) => {
                tracing::warn!(reason = *reason, "SIGHUP has no effect");
            }
            OnHangup::Reload(read) => {
                let read = Arc::clone(read);
                // Files may be on a slow disk. Reading them must not delay requests.
                let settings = spawn_blocking(move || read()).await;
                let settings = settings.unwrap_or_else(|panicked| Err(panicked.to_string()));
                let outcome = match settings {
                    Ok(settings) => apply(server, settings).await,
                    Err(error) => Err(error),
                };
                log_outcome(outcome);
            }
        }
    }
}

/// Numbers of engines and routes that are now in force, and the keys of settings that were not applied.
struct Applied {
    engines: usize,
    routes: usize,
    unapplied: Vec<String>,
}

async fn apply(server: &Server, settings: ReloadedSettings) -> Result<Applied, String> {
    let cluster = settings.cluster;
    let applied = Applied {
        engines: cluster.engines.len(),
        routes: cluster.routes.len(),
        unapplied: settings.unapplied,
    };
    let replaced = server.set_cluster(cluster).await;
    replaced.map_err(|error| error.to_string())?;
    Ok(applied)
}

fn log_outcome(outcome: Result<Applied, String>) {
    let applied = match outcome {
        Ok(applied) => applied,
        Err(error) => {
            tracing::error!(%error, "cannot reload the settings; the previous ones stay in use");
            return;
        }
    };
    let Applied {
        engines, routes, ..
    } = applied;
    tracing::info!(engines, routes, "the engines and routes were reloaded");
    if !applied.unapplied.is_empty() {
        let settings = applied.unapplied.join(", ");
        tracing::warn!(
            settings,
            "changed settings were not applied; restart the gateway to apply them"
        );
    }
}
