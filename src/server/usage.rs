//! Stores how much of their budgets the keys have used, while the server runs.

use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::keys::Keys;

/// Interval between two writes. A crash loses at most the usage of this time and of the time of the write.
const WRITE_INTERVAL: Duration = Duration::from_secs(1);

/// Stores the usage regularly, until `stop` is cancelled.
pub(super) async fn store_usage_regularly(keys: Keys, stop: CancellationToken) {
    if !keys.has_usage_file() {
        return;
    }
    let mut is_failing = false;
    while stop
        .run_until_cancelled(sleep(WRITE_INTERVAL))
        .await
        .is_some()
    {
        match (store_usage(&keys).await, is_failing) {
            (Err(error), false) => {
                tracing::error!(%error, "cannot store the usage of budgets; it would be lost on a restart");
                is_failing = true;
            }
            (Ok(()), true) => {
                tracing::info!("the usage of budgets is stored again");
                is_failing = false;
            }
            (Err(_), true) | (Ok(()), false) => {}
        }
    }
}

/// Stores the usage at the end, after the last request.
pub(super) async fn store_final_usage(keys: &Keys) {
    if let Err(error) = store_usage(keys).await {
        tracing::error!(%error, "cannot store the usage of budgets");
    }
}

/// Writes the file on another thread, because a slow disk must not delay requests.
async fn store_usage(keys: &Keys) -> Result<(), String> {
    let keys = keys.clone();
    let written = spawn_blocking(move || keys.store_usage()).await;
    let written = written.map_err(|panicked| panicked.to_string())?;
    if let Some(tokens) = written.map_err(|error| error.to_string())? {
        tracing::debug!(tokens, "the usage of budgets was stored");
    }
    Ok(())
}
