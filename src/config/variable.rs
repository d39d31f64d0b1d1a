//! Tells a value by the name under which it was given: clap names the flag, also where the value is its
//! environment variable's.

use std::ffi::OsString;
use std::iter::once;

use clap::error::{ContextKind, ContextValue};
use clap::parser::ValueSource;
use clap::{ArgMatches, CommandFactory};

use super::CommandLine;

/// Names the environment variable where `error` is about a flag that is not among the arguments.
pub(super) fn name_in(mut error: clap::Error, arguments: &[OsString]) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    // It is the flag as the help shows it, with the name of its value.
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let is_given = arguments.iter().any(|given| {
        let rest = given.to_str().and_then(|given| given.strip_prefix(flag));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    if !is_given && let Some(variable) = variable_of(flag) {
        error.insert(ContextKind::InvalidArg, ContextValue::String(variable));
    }
    error
}

/// The flag or the environment variable by which this field's value was given, if it was.
pub(super) fn given(matches: &ArgMatches, field: &str) -> Option<String> {
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
