//! The settings that select a runner, and the list of runners. An engine has these settings for each model; a worker
//! process has them for its one model.

use std::sync::Arc;

use clap::builder::PossibleValue;
use clap::{ArgMatches, Args, Command, FromArgMatches, ValueEnum};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use toml::Table;

use super::error::ConfigError;
use super::settings::Settings;
use super::values::PositiveInteger;
use crate::runner::Loader;

mod attached;
mod kind;
mod llama;
mod llm_test;

use attached::AttachedSettings;
use kind::KindSettings;
pub(super) use kind::{RunnerKind, RunnerPlace};
use llama::{LlamaSettings, MODEL_KEY, MODEL_PATH_KEY};
pub(super) use llama::{hub_model, use_downloaded};
use llm_test::TestRunnerSettings;

/// Every kind of runner.
static RUNNERS: [RunnerKind; 3] = [
    RunnerKind::of::<TestRunnerSettings>(),
    RunnerKind::of::<LlamaSettings>(),
    RunnerKind::of::<AttachedSettings>(),
];

#[derive(Args, Serialize, Deserialize)]
#[command(next_help_heading = "Model")]
pub(super) struct RunnerSettings {
    /// Runner of the model [default: llama if --model or --model-path is set, otherwise llm_test]
    #[arg(long, env = "MODEL_RUNNER", value_name = "RUNNER")]
    runner: Option<RunnerKind>,
    /// Number of sequences that each worker runs at the same time [default: 1024 for llm_test, 8 for llama]
    #[arg(
        long,
        env = "TOKENWAY_SLOTS",
        value_name = "N",
        help_heading = "Workers"
    )]
    slots: Option<PositiveInteger<u16>>,
    #[command(flatten)]
    #[serde(flatten)]
    of_runners: AllRunnerSettings,
}

impl RunnerSettings {
    /// Returns the runner of the model.
    pub(super) fn kind(&self) -> RunnerKind {
        let has_model = [MODEL_KEY, MODEL_PATH_KEY]
            .iter()
            .any(|key| self.of_runners.0.contains_key(*key));
        let by_model = match has_model {
            true => LlamaSettings::NAME,
            false => TestRunnerSettings::NAME,
        };
        let default = || RUNNERS.iter().find(|kind| kind.name == by_model);
        self.runner
            .or_else(|| default().copied())
            .expect("RUNNERS lists the runners `llama` and `llm_test`")
    }

    /// Returns the number of sequences that each worker runs at the same time.
    pub(super) fn slots(&self) -> usize {
        self.slots.map_or(1, usize::from)
    }
}

/// Adds the defaults that depend on the runner, and builds the runner's loader.
pub(super) fn resolve(
    settings: &mut Settings,
) -> Result<(RunnerKind, Arc<dyn Loader>), ConfigError> {
    let kind = settings.get::<RunnerSettings>()?.kind();
    reject_unused(kind, settings)?;
    settings.set_default("runner", kind.name);
    for (key, value) in (kind.defaults)(settings)? {
        settings.set_default(&key, value);
    }
    let loader = (kind.loader)(settings)?;
    Ok((kind, loader))
}

/// Returns the settings to pass to a worker process that runs this kind of runner.
pub(super) fn worker_values(kind: RunnerKind, settings: &Settings) -> Table {
    let mut keys = (kind.keys)();
    keys.extend(["runner", "slots"].map(str::to_owned));
    if settings.values.contains_key(MODEL_PATH_KEY) {
        // The engine has downloaded the model, so its workers get only the path of the file.
        keys.retain(|key| key != MODEL_KEY);
    }
    let values = settings.values.iter();
    let values = values.filter(|(key, _)| keys.contains(key));
    values
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Returns the keys of the settings that only other kinds of runners use.
pub(super) fn other_runners_keys(kind: RunnerKind) -> Vec<String> {
    let own = (kind.keys)();
    let all = RUNNERS.iter().flat_map(|kind| (kind.keys)());
    all.filter(|key| !own.contains(key)).collect()
}

/// Rejects settings that the selected runner does not use, because they are probably a mistake.
fn reject_unused(kind: RunnerKind, settings: &Settings) -> Result<(), ConfigError> {
    let mut unused = other_runners_keys(kind);
    if kind.place == RunnerPlace::Remote {
        unused.push("slots".to_owned());
    }
    let Some(key) = unused.into_iter().find(|key| settings.is_set(key)) else {
        return Ok(());
    };
    let purpose = match kind.place {
        RunnerPlace::Remote => "a setting of `tokenway worker`".to_owned(),
        RunnerPlace::Local => {
            let users = RUNNERS.iter().filter(|kind| (kind.keys)().contains(&key));
            let users: Vec<_> = users.map(|kind| kind.name).collect();
            format!("for the runner {} only", users.join(" or "))
        }
    };
    let (name, runner) = (settings.name(&key), kind.name);
    Err(settings.error(
        &key,
        format!("{name} is {purpose} (the runner is {runner})"),
    ))
}

/// The settings of all kinds of runners, in one table.
struct AllRunnerSettings(Table);

impl Args for AllRunnerSettings {
    fn augment_args(command: Command) -> Command {
        let runners = RUNNERS.iter();
        runners.fold(command, |command, kind| (kind.augment)(command))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for AllRunnerSettings {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let mut all = Table::new();
        for kind in &RUNNERS {
            all.extend((kind.parsed)(matches)?);
        }
        Ok(Self(all))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Serialize for AllRunnerSettings {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for AllRunnerSettings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let values = Table::deserialize(deserializer)?;
        for kind in &RUNNERS {
            let checked = (kind.check)(values.clone());
            checked.map_err(|error| serde::de::Error::custom(error.message()))?;
        }
        Ok(Self(values))
    }
}

impl ValueEnum for RunnerKind {
    fn value_variants<'a>() -> &'a [Self] {
        &RUNNERS
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name).help(self.help))
    }
}

impl Serialize for RunnerKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for RunnerKind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let kind = RUNNERS.iter().find(|kind| kind.name == name);
        kind.copied().ok_or_else(|| {
            let names = RUNNERS.map(|kind| kind.name);
            let [others @ .., last] = &names;
            let others = others.join(", ");
            serde::de::Error::custom(format!("must be {others} or {last}"))
        })
    }
}
