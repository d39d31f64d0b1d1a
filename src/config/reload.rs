//! Reads the settings of a running gateway again, on SIGHUP.

use std::path::Path;
use std::sync::Arc;

use clap::ArgMatches;

use super::cluster::ENGINE_KEY;
use super::commands::{PREFIX_INDEX_BLOCKS_KEY, ServerCommand, resolve_server};
use super::error::ConfigError;
use super::merge_settings;
use super::settings::Settings;
use crate::server::Source;
use crate::server::run::{ModelFiles, OnHangup, ReloadedSettings};

/// Returns the effect of SIGHUP on a server that was started with these arguments and this settings file.
/// `in_force` has the settings with which it starts.
pub(super) fn on_hangup<S: ServerCommand>(
    matches: &ArgMatches,
    file: Option<&Path>,
    in_force: Settings,
) -> OnHangup {
    if !S::RELOADS_SETTINGS {
        return OnHangup::NoEffect("only a gateway reloads its settings");
    }
    let Some(path) = file else {
        return OnHangup::NoEffect("there is no settings file to reload");
    };
    let (matches, path) = (matches.clone(), path.to_owned());
    OnHangup::Reload(Arc::new(move || {
        let read = read_again::<S>(&matches, &path, &in_force);
        read.map_err(|error| error.first().to_string())
    }))
}

fn read_again<S: ServerCommand>(
    matches: &ArgMatches,
    path: &Path,
    in_force: &Settings,
) -> Result<ReloadedSettings, ConfigError> {
    let settings = merge_settings::<S>(matches, Some(path))?;
    let (parts, _) = resolve_server::<S>(&settings, &ModelFiles::new())?;
    let Source::Remote(cluster) = parts.source else {
        let problem = "a server with an engine of its own has no settings to reload";
        return Err(ConfigError::Invalid(problem.to_owned()));
    };
    let mut unapplied = settings.changed_keys(in_force);
    // The returned cluster contains the new values of these settings.
    unapplied.retain(|key| ![ENGINE_KEY, PREFIX_INDEX_BLOCKS_KEY].contains(&key.as_str()));
    Ok(ReloadedSettings { cluster, unapplied })
}
