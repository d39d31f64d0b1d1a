//! The models of an engine: one by the flags, or one for each `[[model]]` table of the settings file.
//!
//! Beside tables, what is for one model alone is refused as a flag, as an environment variable and as
//! a key above them: it is not clear for which. `queue_depth`, `slow_reader_timeout` and `isolation` hold there
//! for every model that does not say otherwise.

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

/// Name of the model in the reference system's performance test.
const REFERENCE_ALIAS: &str = "test";

/// What may be given beside `[[model]]` tables, for every model.
const OF_EVERY_MODEL: [&str; 3] = ["queue_depth", "slow_reader_timeout", "isolation"];

#[derive(Args, Clone, Default, Deserialize)]
#[serde(default)]
pub(super) struct EngineSettings {
    /// The name that requests give the model [default: llm_test, or the model file's name]
    #[arg(long, env = "TOKENWAY_MODEL_NAME", value_name = "NAME")]
    model_name: Option<String>,
    /// Other names of the model; several by commas or by repeating the flag. Each must differ from the others and
    /// from --model-name [default: test for llm_test, else none]
    #[arg(
        long,
        env = "TOKENWAY_MODEL_ALIAS",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    model_alias: Option<Vec<String>>,
    /// Serve a request that names an unknown model, or none: with the first model. Answers say the model's own
    /// name [default: false]
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
    /// The models of the flags and the file; `matches` say how the flags were given.
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
                    "{key} is missing: requests choose one of several models by it"
                )));
            }
            let own = table.settings.or_of_every_model(&settings);
            models.push(own.parts(table.name, table.aliases, &origin)?);
        }
        check_unique_names(&models, file)?;
        engine(models, workers, unknown_model)
    }
}

/// An engine whose workers can all reach it.
fn engine(
    mut models: Vec<ModelParts>,
    workers: WorkerParts,
    unknown_model: UnknownModel,
) -> Result<EngineParts, ConfigError> {
    let attached = models.iter().find(|model| model.workers == 0);
    if let Some(model) = attached.filter(|_| workers.listen.is_none()) {
        return Err(ConfigError::Invalid(format!(
            "the workers of the model '{}' dial in, but there is no --worker-listen unix:/path for them",
            model.name
        )));
    }
    add_reference_name(&mut models);
    Ok(EngineParts {
        models,
        unknown_model,
        workers,
    })
}

/// Lets the first test runner answer to the name that the reference system's performance test asks for, unless a
/// model has this name.
fn add_reference_name(models: &mut [ModelParts]) {
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
    let of_one = model_keys()
        .into_iter()
        .chain(["model_name", "model_alias"].map(str::to_owned));
    for key in of_one.filter(|key| !OF_EVERY_MODEL.contains(&&**key)) {
        let in_file = || file.has(&key).then(|| key.clone());
        if let Some(given) = variable::given(matches, &key).or_else(in_file) {
            let own = match &*key {
                "model_name" => "name",
                "model_alias" => "aliases",
                key => key,
            };
            return Err(file.error(format!(
                "{given} cannot be given beside [[model]] tables, each of which has its own '{own}'"
            )));
        }
    }
    Ok(())
}

/// Refuses an alias that says nothing: it is a slip, as it is in a `[[model]]` table.
fn check_aliases(model: &ModelParts) -> Result<(), ConfigError> {
    for (at, alias) in model.aliases.iter().enumerate() {
        let problem = if *alias == model.name {
            "is the model's own name; leave it out"
        } else if model.aliases[..at].contains(alias) {
            "is given twice; give it once"
        } else {
            continue;
        };
        let message = format!("--model-alias {alias} {problem}");
        return Err(ConfigError::Invalid(message));
    }
    Ok(())
}

/// A name that two models have would be a request's guess.
fn check_unique_names(models: &[ModelParts], file: &SettingsFile) -> Result<(), ConfigError> {
    let mut known: BTreeMap<&str, String> = BTreeMap::new();
    for (number, model) in (1..).zip(models) {
        let origin = Origin::Table(file, number);
        let aliases = (1..).zip(&model.aliases);
        let aliases = aliases.map(|(at, alias)| (format!("aliases[{at}]"), alias));
        for (key, name) in once(("name".to_owned(), &model.name)).chain(aliases) {
            let here = origin.name(&key);
            if let Some(there) = known.insert(name, here.clone()) {
                let problem = format!("{there} and {here} are both '{name}'; each must differ");
                return Err(file.error(problem));
            }
        }
    }
    Ok(())
}
