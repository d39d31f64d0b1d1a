//! Errors of environment variables: clap speaks of the flag, also where nobody gave it.

use std::ffi::OsString;

use clap::error::{ContextKind, ContextValue};
use clap::{Arg, Command, CommandFactory};

use super::CommandLine;

/// The error, with the variable's name where a variable is at fault.
pub(super) fn named(mut error: clap::Error, arguments: &[OsString]) -> clap::Error {
    if let Some(ContextValue::String(flag)) = error.get(ContextKind::InvalidArg)
        && let Some(flag) = flag.split([' ', '[', '=']).next()
        && !arguments.iter().any(|argument| is_for(argument, flag))
        && let Some(variable) = variable_of(flag)
    {
        let tip = format!("the value is that of the environment variable {variable}");
        error.insert(
            ContextKind::Suggested,
            ContextValue::StyledStrs(vec![tip.into()]),
        );
    }
    error
}

/// Whether an argument is this flag, alone or with its value.
fn is_for(argument: &OsString, flag: &str) -> bool {
    let text = argument.to_string_lossy();
    text.strip_prefix(flag)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
}

fn variable_of(flag: &str) -> Option<String> {
    let is_flag = |argument: &&Arg| argument.get_long() == flag.strip_prefix("--");
    let command = CommandLine::command();
    let commands = std::iter::once(&command).chain(command.get_subcommands());
    let variable = commands
        .flat_map(Command::get_arguments)
        .find(is_flag)?
        .get_env()?;
    Some(variable.to_string_lossy().into_owned())
}
