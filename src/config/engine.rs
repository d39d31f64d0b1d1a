//! Settings of an engine's models: one model from flags, or one per `[[model]]` table of the settings file.
//!
//! If the file has tables, settings of a single model are rejected outside them, because they would be
//! ambiguous. `queue_depth`, `slow_reader_timeout` and `isolation` are allowed there and apply to every
//! model that does not set them.

use std::collections::BTreeMap;
use std::iter::once;

use clap::{ArgMatches, Args};
use serde::Deserialize;

use super::file::{SettingsFile, model_keys};
use super::model::{ModelSettings, Origin};
use super::worker::WorkerSettings;
use super::{ConfigError, variable};
use crate::runner::llm_test::LLM_TEST;
use crate::scheduler::UnknownModel;
use crate::server::{EngineParts, ModelParts, WorkerParts};

/// Model name that the reference system's performance test uses.
const REFERENCE_ALIAS: &str = "test";

/// Model settings that are allowed outside `[[model]]` tables.
const SHARED_KEYS: [&str; 3] = ["queue_depth", "slow_reader_timeout", "isolation"];

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct EngineSettings {
    /// Name by which requests select the model [default: llm_test, or the model file's name without its
    /// extension]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Additional names of the model. Separate several with commas, or repeat the flag. Each must differ from
    /// the others and from --model-name [default: test for llm_test, otherwise none]
    #[arg(
        long,
        env = "TOKENWAY_MODEL_ALIAS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    model_alias: Option<Vec<String>>,
    /// Serve requests that name an unknown model or none with the first model. Responses carry the model's
    /// own name [default: false]
    #[arg(long, env = "TOKENWAY_ANY_MODEL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true")]
    any_model: Option<bool>,
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelSettings,
    #[command(flatten)]
    #[serde(flatten)]
    workers: WorkerSettings,
}

/// A `[[model]]` table.
#[derive(Default, Deserialize)]
#[serde(default)]
struct ModelTable {
    name: Option<String>,
    aliases: Vec<String>,
    #[serde(flatten)]
    settings: ModelSettings,
}

impl EngineSettings {
    /// Builds the engine's models from flags and file. `matches` tells which flags and environment variables
    /// are set.
    pub(super) fn parts(
        self,
        file: &SettingsFile,
        matches: &ArgMatches,
    ) -> Result<EngineParts, ConfigError> {
        let keys: Self = file.settings()?;
        let settings = self.model.or(keys.model);
        let workers = self.workers.or(keys.workers).parts()?;
        let unknown_model = match self.any_model.or(keys.any_model).unwrap_or(false) {
            true => UnknownModel::First,
            false => UnknownModel::Refuse,
        };
        let tables: Vec<ModelTable> = file.models()?;
        if tables.is_empty() {
            let name = self.model_name.or(keys.model_name);
            let aliases = self.model_alias.or(keys.model_alias).unwrap_or_default();
            let model = settings.parts(name, aliases, &Origin::Flags)?;
            check_aliases(&model)?;
            return engine(vec![model], workers, unknown_model);
        }
        reject_single_model_keys(file, matches)?;
        let are_several = tables.len() > 1;
        let mut models = Vec::new();
        for (number, table) in (1..).zip(tables) {
            let origin = Origin::Table(file, number);
            if are_several && table.name.is_none() {
                let key = origin.name("name");
                return Err(file.error(format!(
                    "{key} is missing: each of several models needs a name"
                )));
            }
            let model = table.settings.or_shared(&settings);
            models.push(model.parts(table.name, table.aliases, &origin)?);
        }
        check_unique_names(&models, file)?;
        engine(models, workers, unknown_model)
    }
}

/// Builds the engine, after a check that attached models have a worker socket.
fn engine(
    mut models: Vec<ModelParts>,
    workers: WorkerParts,
    unknown_model: UnknownModel,
) -> Result<EngineParts, ConfigError> {
    let attached = models.iter().find(|model| model.workers == 0);
    if let Some(model) = attached.filter(|_| workers.listen.is_none()) {
        return Err(ConfigError::Invalid(format!(
            "--worker-listen is required: model '{}' has only remote workers, which connect to it",
            model.name
        )));
    }
    add_reference_alias(&mut models);
    Ok(EngineParts {
        models,
        unknown_model,
        workers,
    })
}

/// Adds the alias of the reference system's performance test to the first test runner, unless a model has
/// this name.
fn add_reference_alias(models: &mut [ModelParts]) {
    let is_reference = |name: &String| name == REFERENCE_ALIAS;
    let is_taken =
        |model: &ModelParts| is_reference(&model.name) || model.aliases.iter().any(is_reference);
    if models.iter().any(is_taken) {
        return;
    }
    let runs_test = |model: &&mut ModelParts| model.loader.name() == LLM_TEST;
    if let Some(model) = models.iter_mut().find(runs_test) {
        model.aliases.push(REFERENCE_ALIAS.to_owned());
    }
}

fn reject_single_model_keys(file: &SettingsFile, matches: &ArgMatches) -> Result<(), ConfigError> {
    let keys = model_keys()
        .into_iter()
        .chain(["model_name", "model_alias"].map(str::to_owned));
    for key in keys.filter(|key| !SHARED_KEYS.contains(&&**key)) {
        let in_file = || file.has(&key).then(|| key.clone());
        if let Some(setting) = variable::source(matches, &key).or_else(in_file) {
            let table_key = match &*key {
                "model_name" => "name",
                "model_alias" => "aliases",
                key => key,
            };
            return Err(file.error(format!(
                "{setting} cannot be set beside [[model]] tables; set '{table_key}' in each table"
            )));
        }
    }
    Ok(())
}

/// Rejects redundant aliases, as in `[[model]]` tables, because they are probably a mistake.
fn check_aliases(model: &ModelParts) -> Result<(), ConfigError> {
    for (at, alias) in model.aliases.iter().enumerate() {
        let problem = if *alias == model.name {
            "is the model's own name; remove it"
        } else if model.aliases[..at].contains(alias) {
            "is set twice; set it once"
        } else {
            continue;
        };
        let message = format!("--model-alias {alias} {problem}");
        return Err(ConfigError::Invalid(message));
    }
    Ok(())
}

/// Checks that no two models share a name or an alias.
fn check_unique_names(models: &[ModelParts], file: &SettingsFile) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<&str, String> = BTreeMap::new();
    for (number, model) in (1..).zip(models) {
        let origin = Origin::Table(file, number);
        let aliases = (1..).zip(&model.aliases);
        let aliases = aliases.map(|(at, alias)| (format!("aliases[{at}]"), alias));
        for (key, name) in once(("name".to_owned(), &model.name)).chain(aliases) {
            let setting = origin.name(&key);
            if let Some(other) = seen.insert(name, setting.clone()) {
                let problem =
                    format!("{other} and {setting} are both '{name}'; each must be different");
                return Err(file.error(problem));
            }
        }
    }
    Ok(())
}
