//! Corrects clap's errors about environment variables. clap always names the flag, even if the value came from the
//! variable.

use std::ffi::OsString;

use clap::Command;
use clap::error::{ContextKind, ContextValue};

/// Replaces the flag in `error` by its environment variable, if the flag is not on the command line.
pub(super) fn name_environment_variable(
    mut error: clap::Error,
    command: &Command,
    arguments: &[OsString],
) -> clap::Error {
    let Some(ContextValue::String(argument)) = error.get(ContextKind::InvalidArg) else {
        return error;
    };
    // clap names the flag together with its value, such as `--slots <N>`.
    let flag = argument.split([' ', '=', '[']).next().unwrap_or_default();
    let is_on_command_line = arguments.iter().any(|argument| {
        let rest = argument.to_str().and_then(|it| it.strip_prefix(flag));
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('='))
    });
    let command = innermost_command(command, arguments);
    if !is_on_command_line && let Some(variable) = environment_variable_of(command, flag) {
        error.insert(ContextKind::InvalidArg, ContextValue::String(variable));
    }
    error
}

/// Returns the subcommand that the command line names, or `command` itself.
fn innermost_command<'a>(command: &'a Command, arguments: &[OsString]) -> &'a Command {
    let mut arguments = arguments.iter().skip(1);
    let named = arguments
        .next()
        .and_then(|name| command.find_subcommand(name));
    let Some(named) = named else {
        return command;
    };
    let inner = arguments
        .next()
        .and_then(|name| named.find_subcommand(name));
    inner.unwrap_or(named)
}

fn environment_variable_of(command: &Command, flag: &str) -> Option<String> {
    let name = flag.strip_prefix("--")?;
    let mut arguments = command.get_arguments();
    let argument = arguments.find(|argument| argument.get_long() == Some(name))?;
    Some(argument.get_env()?.to_string_lossy().into_owned())
}
