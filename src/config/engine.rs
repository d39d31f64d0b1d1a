//! Settings of an engine's models: one model from flags, or one per `[[model]]` table of the settings file.
//!
//! If the file has tables, settings of a single model are rejected outside them, because they would be
//! ambiguous.

use std::collections::BTreeMap;
use std::iter::once;

use clap::{ArgAction, Args};
use serde::{Deserialize, Serialize};

use super::error::{ConfigError, first_error};
use super::file::table_key;
use super::model::{self, ModelSettings, SharedSettings};
use super::settings::{Settings, keys};
use super::worker::WorkerSettings;
use crate::models::UnknownModelPolicy;
use crate::runner::llm_test::LLM_TEST;
use crate::server::{EngineParts, ModelParts, WorkerParts};

/// Model name in the requests of the reference system's performance test.
const REFERENCE_ALIAS: &str = "test";

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct EngineSettings {
    #[command(flatten)]
    #[serde(flatten)]
    model: ModelSettings,
    /// Serve requests that name an unknown model or none with the first model. Responses carry the model's
    /// own name
    #[arg(long, env = "TOKENWAY_ANY_MODEL", num_args = 0..=1, require_equals = true,
        default_missing_value = "true", default_value = "false", action = ArgAction::Set,
        help_heading = "Model")]
    any_model: bool,
    #[command(flatten)]
    #[serde(flatten)]
    workers: WorkerSettings,
}

impl EngineSettings {
    /// Builds the parts of an engine with these models.
    pub(super) fn engine_parts(
        self,
        models: &mut [Settings],
        settings: &Settings,
    ) -> Result<EngineParts, ConfigError> {
        let workers = self.workers.worker_parts(settings)?;
        let unknown_model = match self.any_model {
            true => UnknownModelPolicy::First,
            false => UnknownModelPolicy::Refuse,
        };
        let parts = models.iter_mut().map(model::model_parts);
        let parts = parts.collect::<Result<Vec<_>, _>>()?;
        match models {
            [model] if settings.tables.is_empty() => check_aliases(&parts[0], model)?,
            models => check_unique_names(&parts, models)?,
        }
        build_engine(parts, workers, unknown_model)
    }
}

/// Returns the settings of each model: one per `[[model]]` table, or the settings outside the tables.
pub(super) fn model_settings(settings: &Settings) -> Result<Vec<Settings>, ConfigError> {
    if settings.tables.is_empty() {
        return Ok(vec![settings.only_declared::<ModelSettings>()]);
    }
    let tables = settings.tables.iter();
    let models = tables.map(|table| settings.for_model_table::<ModelSettings>(table));
    let models: Vec<_> = models.collect::<Result<_, _>>().map_err(first_error)?;
    reject_single_model_keys(settings)?;
    let unnamed = models.iter().find(|model| !model.is_set("model_name"));
    if let Some(model) = unnamed.filter(|_| models.len() > 1) {
        let name = model.name("model_name");
        let problem = format!("{name} is missing: each of several models needs a name");
        return Err(model.error("model_name", problem));
    }
    Ok(models)
}

/// Returns the keys of settings that are allowed only inside `[[model]]` tables, if the file has such tables.
pub(super) fn single_model_keys() -> Vec<String> {
    let shared = keys::<SharedSettings>();
    let keys = keys::<ModelSettings>().into_iter();
    keys.filter(|key| !shared.contains(key)).collect()
}

fn reject_single_model_keys(settings: &Settings) -> Result<(), ConfigError> {
    let keys = single_model_keys();
    match keys.iter().find(|key| settings.is_set(key)) {
        None => Ok(()),
        Some(key) => {
            let (setting, table_key) = (settings.name(key), table_key(key));
            let problem = format!(
                "{setting} cannot be set beside [[model]] tables; set '{table_key}' in each table"
            );
            Err(settings.error(key, problem))
        }
    }
}

/// Builds the parts of an engine. A model without local workers requires a worker socket.
fn build_engine(
    mut models: Vec<ModelParts>,
    workers: WorkerParts,
    unknown_model: UnknownModelPolicy,
) -> Result<EngineParts, ConfigError> {
    let attached = models.iter().find(|model| model.workers == 0);
    if let Some(model) = attached.filter(|_| workers.listen.is_none()) {
        return Err(ConfigError::Invalid(format!(
            "--worker-listen is required: the workers of model '{}' are remote and connect to this address",
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

/// Gives the first test runner the model alias that the reference system's performance test uses, unless another
/// model has this name.
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

/// Rejects an alias that repeats the model's name or another alias. The same rule applies to `[[model]]` tables. Such
/// an alias is probably a mistake.
fn check_aliases(model: &ModelParts, settings: &Settings) -> Result<(), ConfigError> {
    for (at, alias) in model.aliases.iter().enumerate() {
        let problem = if *alias == model.name {
            "is the model's own name; remove it"
        } else if model.aliases[..at].contains(alias) {
            "is set twice; set it once"
        } else {
            continue;
        };
        let name = settings.name("model_alias");
        return Err(settings.error("model_alias", format!("{name} {alias} {problem}")));
    }
    Ok(())
}

/// Checks that no two models share a name or an alias.
fn check_unique_names(models: &[ModelParts], settings: &[Settings]) -> Result<(), ConfigError> {
    let mut seen: BTreeMap<&str, String> = BTreeMap::new();
    for (model, settings) in models.iter().zip(settings) {
        let aliases = (1..).zip(&model.aliases);
        let aliases = aliases.map(|(at, alias)| ("model_alias", format!("[{at}]"), alias));
        for (key, index, name) in once(("model_name", String::new(), &model.name)).chain(aliases) {
            let setting = format!("{}{index}", settings.name(key));
            if let Some(other) = seen.insert(name, setting.clone()) {
                let problem =
                    format!("{other} and {setting} are both '{name}'; each must be different");
                return Err(settings.error(key, problem));
            }
        }
    }
    Ok(())
}
