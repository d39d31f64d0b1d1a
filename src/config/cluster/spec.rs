//! Builds the engines and routes from their tables, and checks the tables against each other.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use toml::Spanned;

use super::api_key::{KeySource, ReadKey};
use super::tables::{ClusterTables, EngineTable, Located, RouteTable, TargetTable};
use crate::certificates::{CertificateError, ClientTls, ClientTlsFiles};
use crate::cluster::{ApiKey, ClusterSpec, EngineAddress, EngineSpec, RouteSpec, TargetSpec};
use crate::config::error::FileError;
use crate::config::file::SettingLocation;
use crate::config::nested_tables::{DeserialisedTables, Locations};

/// Reads the certificates for an engine.
pub(super) type ReadCertificates<'a> =
    dyn Fn(&ClientTlsFiles) -> Result<ClientTls, CertificateError> + 'a;

/// Engines of `--engine`, default certificates, and the functions that read keys and certificates.
pub(in crate::config) struct EngineDefaults<'a> {
    /// Addresses of engines that have no table.
    pub(in crate::config) listed: Vec<EngineAddress>,
    /// Certificates for engines whose tables name none.
    pub(in crate::config) tls: ClientTls,
    pub(in crate::config) read_key: &'a ReadKey<'a>,
    pub(in crate::config) read_certificates: &'a ReadCertificates<'a>,
}

/// Builds a [`ClusterSpec`], and collects the errors.
pub(super) struct SpecBuilder<'a> {
    tables: &'a ClusterTables,
    locations: &'a Locations,
    defaults: &'a EngineDefaults<'a>,
    errors: Vec<FileError>,
}

/// A list of targets of a route.
#[derive(Clone, Copy, PartialEq, Eq)]
enum TargetList {
    /// `targets`: they share the requests by weight.
    Shared,
    /// `fallback`: they are tried in order.
    Fallback,
}

impl<'a> SpecBuilder<'a> {
    pub(super) fn new(
        tables: &'a DeserialisedTables<ClusterTables>,
        defaults: &'a EngineDefaults<'a>,
    ) -> Self {
        Self {
            tables: &tables.values,
            locations: &tables.locations,
            defaults,
            errors: Vec::new(),
        }
    }

    /// Builds the engines and routes.
    pub(super) fn build(mut self) -> Result<ClusterSpec, Vec<FileError>> {
        let tables = self.tables;
        let listed = self.defaults.listed.iter().map(|address| EngineSpec {
            tls: self.defaults.tls.clone(),
            ..EngineSpec::at(address.clone())
        });
        let mut engines: Vec<_> = listed.collect();
        engines.extend(tables.engine.iter().filter_map(|table| self.engine(table)));
        let names = tables
            .engine
            .iter()
            .filter_map(|it| it.get_ref().0.name.as_ref());
        self.reject_repeated(names.map(|name| (name, name.get_ref().as_str())));
        let routes = tables.route.iter();
        let routes = routes.filter_map(|table| self.route(table, &engines));
        let routes: Vec<_> = routes.collect();
        let models = tables
            .route
            .iter()
            .filter_map(|it| it.get_ref().0.model.as_ref());
        self.reject_repeated(models.map(|model| (model, model.get_ref().as_str())));
        self.errors.sort_by_key(|error| error.position);
        match self.errors.is_empty() {
            true => Ok(ClusterSpec {
                engines,
                routes,
                ..ClusterSpec::default()
            }),
            false => Err(self.errors),
        }
    }

    fn engine(&mut self, located: &Located<EngineTable>) -> Option<EngineSpec> {
        let table = &located.get_ref().0;
        let name = self.required(located, table.name.as_ref(), "name");
        let address = self.required(located, table.address.as_ref(), "address");
        let api_key = self.api_key(table);
        let tls = self.tls(table);
        if let (Some(address), Some(server)) = (address, &table.server)
            && !address.value.is_openai()
        {
            self.error(server, |name| {
                format!("{name} applies to OpenAI-compatible engines only; remove it")
            });
        }
        Some(EngineSpec {
            name: name?.as_str().into(),
            address: address?.value.clone(),
            api_key,
            tls: tls?,
            server: table.server.as_ref().map(|server| server.get_ref().value),
            context_length: table.context_length.map(Into::into),
        })
    }

    fn api_key(&mut self, table: &EngineTable) -> Option<ApiKey> {
        let (variable, file) = (table.api_key_env.as_ref(), table.api_key_file.as_ref());
        if let (Some(variable), Some(file)) = (variable, file) {
            let other = self.locations.of(variable).name.clone();
            self.error(file, |name| {
                format!("{other} and {name} are both set; remove one of them")
            });
            return None;
        }
        let variable =
            variable.map(|it| (self.locations.of(it), KeySource::Variable(it.get_ref())));
        let file = file.map(|it| (self.locations.of(it), KeySource::File(it.get_ref())));
        let (location, source) = variable.or(file)?;
        let key = (self.defaults.read_key)(source);
        key.map_err(|problem| self.push(location, &problem)).ok()
    }

    fn tls(&mut self, table: &EngineTable) -> Option<ClientTls> {
        let set = [&table.tls_ca, &table.tls_cert, &table.tls_key].map(Option::as_ref);
        let Some(first) = set.into_iter().flatten().next() else {
            return Some(self.defaults.tls.clone());
        };
        let address = table.address.as_ref();
        if address.is_some_and(|address| !address.get_ref().value.uses_tls()) {
            self.error(first, |name| {
                format!("{name} applies to addresses with https only; remove it")
            });
            return None;
        }
        let path = |setting: &Spanned<PathBuf>| setting.get_ref().clone();
        let identity = match (&table.tls_cert, &table.tls_key) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((path(certificate), path(key))),
            (Some(alone), None) | (None, Some(alone)) => {
                self.error(alone, |name| {
                    format!("{name} is set alone; set tls_cert and tls_key together")
                });
                return None;
            }
        };
        let files = ClientTlsFiles {
            ca: table.tls_ca.as_ref().map(path),
            identity,
        };
        let tls = (self.defaults.read_certificates)(&files);
        let location = self.locations.of(first);
        let tls = tls.map_err(|error| self.push(location, &error.to_string()));
        Some(tls.ok()?.or(&self.defaults.tls))
    }

    fn route(
        &mut self,
        located: &Located<RouteTable>,
        engines: &[EngineSpec],
    ) -> Option<RouteSpec> {
        let table = &located.get_ref().0;
        let model = self.required(located, table.model.as_ref(), "model");
        let targets = match &table.targets {
            Some(targets) if targets.get_ref().is_empty() => {
                self.error(targets, |name| {
                    format!("{name} must not be empty; write at least one target, such as {{ engine = \"a\" }}")
                });
                None
            }
            targets => self.required(located, targets.as_ref(), "targets"),
        };
        let mut targets_of = |list, tables: &[Located<TargetTable>]| {
            let tables = tables.iter();
            let specs = tables.filter_map(|table| self.target(table, list, engines));
            specs.collect::<Vec<_>>()
        };
        let shared = targets.map(|tables| targets_of(TargetList::Shared, tables));
        let fallback = targets_of(TargetList::Fallback, &table.fallback);
        self.reject_repeated_targets(table);
        Some(RouteSpec {
            model: model?.as_str().to_owned(),
            targets: shared?,
            fallback,
            policy: table.policy.0.policy(),
        })
    }

    fn target(
        &mut self,
        located: &Located<TargetTable>,
        list: TargetList,
        engines: &[EngineSpec],
    ) -> Option<TargetSpec> {
        let table = &located.get_ref().0;
        if let (TargetList::Fallback, Some(weight)) = (list, &table.weight) {
            self.error(weight, |name| {
                format!("{name} has no effect, because fallbacks are tried in order; remove it")
            });
        }
        self.required(located, table.engine.as_ref(), "engine")?;
        let name = table.engine.as_ref()?;
        let engine = engines
            .iter()
            .find(|it| *it.name == *name.get_ref().as_str());
        let Some(engine) = engine else {
            let unknown = name.get_ref().as_str();
            let names: Vec<_> = engines.iter().map(|engine| &*engine.name).collect();
            self.error(name, |setting| {
                let names = names.join(", ");
                format!("{setting}: there is no engine '{unknown}'; the engines are {names}")
            });
            return None;
        };
        let weight = table.weight.as_ref().map(|weight| *weight.get_ref());
        Some(TargetSpec {
            engine: Arc::clone(&engine.name),
            model: table.model.as_ref().map(|model| model.as_str().to_owned()),
            weight: weight.map_or(1, Into::into),
        })
    }

    /// Rejects a target or fallback with the engine and the model of an earlier one.
    fn reject_repeated_targets(&mut self, route: &RouteTable) {
        let route_model = route.model.as_ref().map(|model| model.get_ref().as_str());
        let targets = route.targets.iter().flat_map(Spanned::get_ref);
        let mut seen = BTreeMap::new();
        for located in targets.chain(&route.fallback) {
            let table = &located.get_ref().0;
            let Some(engine) = &table.engine else {
                continue;
            };
            let model = table.model.as_ref().map(|model| model.as_str());
            let target = (engine.get_ref().as_str(), model.or(route_model));
            let location = self.locations.of(located);
            if let Some(first) = seen.insert(target, &location.name) {
                let problem = format!(
                    "{first} and {} are the same model of the same engine; remove one of them",
                    location.name
                );
                self.errors.push(location.error(problem));
            }
        }
    }

    /// Rejects settings with the same value, which must be different.
    fn reject_repeated<'v, T: 'v>(
        &mut self,
        settings: impl Iterator<Item = (&'v Spanned<T>, &'v str)>,
    ) {
        let mut seen = BTreeMap::new();
        for (setting, value) in settings {
            let location = self.locations.of(setting);
            if let Some(first) = seen.insert(value, &location.name) {
                let name = &location.name;
                let problem =
                    format!("{first} and {name} are both '{value}'; each must be different");
                self.errors.push(location.error(problem));
            }
        }
    }

    /// Returns the value of a required key, or reports that the table does not have it.
    fn required<'t, T, V>(
        &mut self,
        table: &Spanned<T>,
        value: Option<&'t Spanned<V>>,
        key: &str,
    ) -> Option<&'t V> {
        if value.is_none() {
            self.error(table, |name| format!("{name}.{key} is required"));
        }
        value.map(Spanned::get_ref)
    }

    /// Reports a problem with a setting. `problem` gets the name of the setting.
    fn error<T>(&mut self, setting: &Spanned<T>, problem: impl FnOnce(&str) -> String) {
        let location = self.locations.of(setting);
        self.errors.push(location.error(problem(&location.name)));
    }

    fn push(&mut self, location: &SettingLocation, problem: &str) {
        let problem = format!("{}: {problem}", location.name);
        self.errors.push(location.error(problem));
    }
}
