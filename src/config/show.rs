//! `tokenway config show`: prints the settings in force as a settings file, with the source of each value as a
//! comment.

use std::fmt::Write;

use clap::{Arg, Args, Command};

use super::engine::single_model_keys;
use super::file::table_key;
use super::model::ModelSettings;
use super::runner::{RunnerSettings, other_runners_keys};
use super::settings::{SettingSource, Settings, flag};

/// Column in which the comment with the source starts, if the value is short enough.
const COMMENT_COLUMN: usize = 40;

/// Renders the settings that `S` declares, and those of each model, as the text of a settings file.
pub(super) fn render_settings<S: Args>(settings: &Settings, models: &[Settings]) -> String {
    let mut text = String::new();
    let is_in_tables = !settings.tables.is_empty();
    let left_out = match models {
        [model] if !is_in_tables => unused_keys(model),
        _ => single_model_keys(),
    };
    let mut all = settings.clone();
    if let ([model], false) = (models, is_in_tables) {
        all.values.extend(model.values.clone());
    }
    let command = S::augment_args(Command::new("settings"));
    let arguments = || command.get_arguments();
    let mut headings = Vec::new();
    for argument in arguments() {
        if !headings.contains(&argument.get_help_heading()) {
            headings.push(argument.get_help_heading());
        }
    }
    for heading in headings {
        let arguments = arguments().filter(|argument| argument.get_help_heading() == heading);
        let lines: Vec<_> = arguments
            .filter(|argument| !left_out.iter().any(|key| argument.get_id() == key.as_str()))
            .map(|argument| setting_line(argument, &all, |key| key))
            .collect();
        if !lines.is_empty() {
            let heading = heading.unwrap_or("Settings");
            let _ = writeln!(text, "# {heading}\n{}", lines.concat());
        }
    }
    if is_in_tables {
        for model in models {
            text.push_str(&model_table(model));
        }
    }
    format!("{}\n", text.trim_end())
}

/// Renders the settings of one model as a `[[model]]` table.
fn model_table(model: &Settings) -> String {
    let unused = unused_keys(model);
    let command = ModelSettings::augment_args(Command::new("settings"));
    let arguments = command.get_arguments();
    let used =
        arguments.filter(|argument| !unused.iter().any(|key| argument.get_id() == key.as_str()));
    let lines: Vec<_> = used
        .map(|argument| setting_line(argument, model, table_key))
        .collect();
    format!("[[model]]\n{}\n", lines.concat())
}

/// Returns the keys of settings that belong to runners other than this model's.
fn unused_keys(model: &Settings) -> Vec<String> {
    let runner = model.get::<RunnerSettings>();
    runner.map_or_else(|_| Vec::new(), |runner| other_runners_keys(runner.kind()))
}

/// Renders a setting as one line: key, value and source. A setting without a value becomes a comment.
fn setting_line(argument: &Arg, settings: &Settings, name: impl Fn(&str) -> &str) -> String {
    let key = argument.get_id().as_str();
    let setting = match settings.values.get(key) {
        Some(value) => format!("{} = {value}", name(key)),
        None => format!("# {}", name(key)),
    };
    let source = match settings.sources.get(key) {
        Some(SettingSource::Flag) => flag(key),
        Some(SettingSource::Variable(variable)) => format!("environment variable {variable}"),
        Some(SettingSource::File(location)) => {
            format!("{}:{}", location.path, location.position.line)
        }
        Some(SettingSource::Default) | None => match settings.values.get(key) {
            Some(_) => "default".to_owned(),
            None => default_text(argument),
        },
    };
    format!("{setting:COMMENT_COLUMN$} # {source}\n")
}

/// Returns the default of a setting that has no default value in clap. The help text names the default instead.
fn default_text(argument: &Arg) -> String {
    let help = argument.get_help().map(ToString::to_string);
    let help = help.unwrap_or_default();
    let default = help.rsplit_once("[default: ");
    default.map_or_else(
        || "not set".to_owned(),
        |(_, default)| format!("default: {}", default.trim_end_matches(']')),
    )
}
