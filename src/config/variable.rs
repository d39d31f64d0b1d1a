//! Names the flag or the environment variable that set a value, in errors. clap always names the flag,
//! even if the value comes from the environment.

use std::ffi::OsString;
use std::iter::once;

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};

use super::CommandLine;

/// Names the environment variable in `error` if the flag is not among the arguments.
pub(super) fn name_variable(mut error: clap::Error, arguments: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    // clap gives the flag with the name of its value, such as `--slots <N>`.
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let is_on_command_line = arguments.iter().any(|argument| {
        let rest = argument.to_str().and_then(|it| it.strip_prefix(flag));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    if !is_on_command_line && let Some(variable) = variable_of(flag) {
        error.insert(ContextKind::InvalidArg, ContextValue::String(variable));
    }
    error
}

/// The flag or the environment variable that set this field, or `None` if neither did.
pub(super) fn source(matches: &ArgMatches, field: &str) -> Option<String> {
    let flag = format!("--{}", field.replace('_', "-"));
    match matches.value_source(field)? {
        ValueSource::EnvVariable => variable_of(&flag),
        ValueSource::CommandLine => Some(flag),
        ValueSource::DefaultValue | _ => None,
    }
}

fn variable_of(flag: &str) -> Option<String> {
    let command = CommandLine::command();
    let name = flag.strip_prefix("--")?;
    let mut arguments = once(&command)
        .chain(command.get_subcommands())
        .flat_map(clap::Command::get_arguments);
    let argument = arguments.find(|argument| argument.get_long() == Some(name))?;
    Some(argument.get_env()?.to_string_lossy().into_owned())
}
