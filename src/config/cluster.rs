//! The engines and routes of a gateway: a list of addresses, or `[[engine]]` and `[[route]]` tables of the settings
//! file.
//!
//! `tables` declares the keys, and each field's type checks its value. `spec` checks the tables against each other and
//! builds the [`ClusterSpec`]. Only `tokenway gateway` and `tokenway config check` do so; the other commands ignore the
//! tables.

use toml::de::{DeTable, DeValue};

use super::error::{ConfigError, FileError};
use super::nested_tables::{DeserialisedTables, SourceFile, deserialise};
use super::settings::Settings;
use crate::certificates::ClientTls;
use crate::cluster::{ClusterSpec, EngineAddress, EngineConflict};

pub(super) mod api_key;
mod spec;
mod tables;

pub(super) use spec::EngineDefaults;
use spec::SpecBuilder;
use tables::{ClusterTables, FORBIDDEN_KEYS};

/// Key of the list of addresses, and of the `[[engine]]` tables.
pub(super) const ENGINE_KEY: &str = "engine";

/// Key of the `[[route]]` tables.
const ROUTE_KEY: &str = "route";

const INVALID_ENGINES: &str = "write each engine as a table under [[engine]], or all engines as a list of addresses: \
                               engine = [\"http://host:port\"]";
const INVALID_ROUTES: &str = "write each route as a table under [[route]]";

/// The `[[engine]]` and `[[route]]` tables of a settings file.
#[derive(Debug, Default)]
pub(super) struct ClusterFile(DeserialisedTables<ClusterTables>);

impl ClusterFile {
    /// Removes the tables from the top level of a settings file and deserialises them. A list of addresses stays,
    /// because `--engine` declares it.
    pub(super) fn take_from(top: &mut DeTable<'_>, file: &SourceFile<'_>) -> Self {
        let (mut tables, mut errors) = (DeTable::new(), Vec::new());
        for (key, problem) in [(ENGINE_KEY, INVALID_ENGINES), (ROUTE_KEY, INVALID_ROUTES)] {
            let shape = top.get(key).map(|value| Shape::of(value.get_ref()));
            if key == ENGINE_KEY && shape == Some(Shape::List) {
                continue;
            }
            let Some((name, value)) = top.remove_entry(key) else {
                continue;
            };
            if shape == Some(Shape::Tables) {
                tables.insert(name, value);
            } else {
                let location = file.location(name.span().start, key);
                errors.push(location.error(format!("{key}: {problem}")));
            }
        }
        let mut read = deserialise(file, tables, &FORBIDDEN_KEYS);
        read.errors.extend(errors);
        Self(read)
    }

    /// Returns the errors of the values by themselves.
    pub(super) fn errors(&self) -> &[FileError] {
        &self.0.errors
    }

    /// Returns true if the file has `[[engine]]` tables.
    pub(super) fn has_engines(&self) -> bool {
        !self.0.values.engine.is_empty()
    }

    /// Builds the engines and routes. No engines may be listed if the file has `[[engine]]` tables.
    ///
    /// # Errors
    /// All problems of the tables.
    pub(super) fn cluster_spec(
        &self,
        defaults: &EngineDefaults<'_>,
    ) -> Result<ClusterSpec, Vec<FileError>> {
        match self.errors() {
            [] => SpecBuilder::new(&self.0, defaults).build(),
            errors => Err(errors.to_vec()),
        }
    }
}

/// Shape of the value of a key that may have tables.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Shape {
    /// Tables only, at least one.
    Tables,
    /// No table, so the value may be a list of addresses.
    List,
    /// A single table, or a list in which some items are tables.
    Invalid,
}

impl Shape {
    fn of(value: &DeValue<'_>) -> Self {
        let items = value.as_array().into_iter().flat_map(|items| items.iter());
        let (tables, others): (Vec<_>, Vec<_>) = items.partition(|item| item.get_ref().is_table());
        match (tables.is_empty(), others.is_empty()) {
            (false, true) => Self::Tables,
            (true, _) if !value.is_table() => Self::List,
            (true, _) | (false, false) => Self::Invalid,
        }
    }
}

/// Builds the engines and routes of a gateway from its settings. `listed` is the value of `--engine` or of its key in
/// the file, and `tls` has the certificates of `--engine-tls-…`.
pub(super) fn cluster_spec(
    settings: &Settings,
    listed: Vec<EngineAddress>,
    tls: ClientTls,
) -> Result<ClusterSpec, ConfigError> {
    let file = &settings.cluster;
    let name = settings.name(ENGINE_KEY);
    match (listed.is_empty(), file.0.values.engine.first()) {
        (false, Some(table)) => {
            let problem = format!(
                "{name} and the [[engine]] tables both list the engines; remove one of them"
            );
            return Err(ConfigError::File(file.0.locations.of(table).error(problem)));
        }
        (true, None) if file.errors().is_empty() => {
            let problem = format!(
                "{name} is required for a gateway: give http://host:port, https://host:port, unix:/path or \
                 openai+http://host:port/v1, or write [[engine]] tables in the settings file"
            );
            return Err(settings.error(ENGINE_KEY, problem));
        }
        (true, _) | (false, None) => {}
    }
    let spec = file.cluster_spec(&EngineDefaults {
        listed,
        tls,
        read_key: &api_key::read,
        read_certificates: &ClientTls::read,
    });
    spec.map_err(ConfigError::Check)
}

/// Reports the engines that are listed twice or that are the gateway itself.
pub(super) fn check_conflicts(
    settings: &Settings,
    conflicts: &[EngineConflict],
) -> Result<(), ConfigError> {
    let DeserialisedTables {
        values, locations, ..
    } = &settings.cluster.0;
    let mut errors = Vec::new();
    for EngineConflict { engine, problem } in conflicts {
        let table = values.engine.get(*engine);
        let Some(address) = table.and_then(|table| table.get_ref().0.address.as_ref()) else {
            // The engine is in the list of addresses, which is one setting.
            let name = settings.name(ENGINE_KEY);
            return Err(settings.error(ENGINE_KEY, format!("{name}: {problem}")));
        };
        let location = locations.of(address);
        errors.push(location.error(format!("{}: {problem}", location.name)));
    }
    match errors.is_empty() {
        true => Ok(()),
        false => Err(ConfigError::Check(errors)),
    }
}
