//! Reloads the keys and the TLS certificates while the server runs.

use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::keys::Keys;
use crate::listen::ServerTls;
use crate::watched_files::WatchedFiles;

/// Interval between two checks of the files. Not every file system reports changes, so the files are polled.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Cause of a reload, which the log names.
#[derive(Clone, Copy, Debug)]
pub(super) enum Trigger {
    FileChange,
    Hangup,
}

impl Trigger {
    fn text(self) -> &'static str {
        match self {
            Self::FileChange => "file change",
            Self::Hangup => "SIGHUP",
        }
    }
}

/// Reloads the keys whenever their file changes, until `stop` is cancelled.
pub(super) async fn reload_keys_on_change(keys: Keys, stop: CancellationToken) {
    if keys.file().is_none() {
        return;
    }
    let mut files = keys.files_at_start();
    while let Some(changed) = wait_for_change(files, &stop).await {
        files = changed;
        reload_keys(&keys, Trigger::FileChange).await;
    }
}

/// Reloads the certificates whenever one of their files changes, until `stop` is cancelled.
pub(super) async fn reload_certificates_on_change(tls: ServerTls, stop: CancellationToken) {
    let mut files = tls.files_at_start();
    while let Some(changed) = wait_for_change(files, &stop).await {
        files = changed;
        reload_certificates(&tls, Trigger::FileChange).await;
    }
}

/// Waits until a file has changed. Returns the files as they are then, or `None` if `stop` is cancelled.
async fn wait_for_change(
    mut files: WatchedFiles,
    stop: &CancellationToken,
) -> Option<WatchedFiles> {
    loop {
        stop.run_until_cancelled(sleep(CHECK_INTERVAL)).await?;
        // A slow disk must not delay requests, so the files are read on another thread.
        let checked = spawn_blocking(move || {
            let have_changed = files.have_changed();
            (files, have_changed)
        });
        let have_changed;
        (files, have_changed) = checked.await.ok()?;
        if have_changed {
            return Some(files);
        }
    }
}

/// Reads the keys again. If they cannot be read, the previous ones stay in use.
pub(super) async fn reload_keys(keys: &Keys, trigger: Trigger) {
    let trigger = trigger.text();
    let read = keys.clone();
    match spawn_blocking(move || read.reload()).await {
        Ok(Ok(keys)) => tracing::info!(keys, trigger, "the keys were reloaded"),
        Ok(Err(error)) => {
            tracing::error!(%error, trigger, "cannot reload the keys; the previous ones stay in use");
        }
        Err(panicked) => tracing::error!(%panicked, "cannot reload the keys"),
    }
}

/// Reads the certificates again. If they cannot be used, the previous ones stay in use.
pub(super) async fn reload_certificates(tls: &ServerTls, trigger: Trigger) {
    let trigger = trigger.text();
    let read = tls.clone();
    match spawn_blocking(move || read.reload()).await {
        Ok(Ok(())) => {
            let certificate = tls.certificate_path().display();
            tracing::info!(%certificate, trigger, "the TLS certificates were reloaded");
        }
        Ok(Err(error)) => {
            tracing::error!(
                %error,
                trigger,
                "cannot reload the TLS certificates; the previous ones stay in use"
            );
        }
        Err(panicked) => tracing::error!(%panicked, "cannot reload the TLS certificates"),
    }
}
