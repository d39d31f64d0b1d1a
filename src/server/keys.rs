//! Reloads the keys while the server runs.

use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::keys::{FileVersion, Keys};

/// Interval between two checks of the keys file. Not every file system reports changes, so the file is polled.
const CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Reloads the keys whenever their file changes, until `stop` is cancelled.
pub(super) async fn reload_on_change(keys: Keys, stop: CancellationToken) {
    let (Some(file), Some(mut known)) = (keys.file(), keys.version_at_start()) else {
        return;
    };
    while stop
        .run_until_cancelled(sleep(CHECK_INTERVAL))
        .await
        .is_some()
    {
        let path = file.to_owned();
        let Ok(version) = spawn_blocking(move || FileVersion::of(&path)).await else {
            continue;
        };
        if version != known {
            known = version;
            reload(&keys).await;
        }
    }
}

/// Reads the keys again, on another thread, because a slow disk must not delay requests. If they cannot be read, those
/// in force stay.
pub(super) async fn reload(keys: &Keys) {
    let read = keys.clone();
    match spawn_blocking(move || read.reload()).await {
        Ok(Ok(keys)) => tracing::info!(keys, "the keys were reloaded"),
        Ok(Err(error)) => {
            tracing::error!(%error, "the keys were not reloaded; those in force stay");
        }
        Err(panicked) => tracing::error!(%panicked, "the keys were not reloaded"),
    }
}
