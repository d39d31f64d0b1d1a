//! Helpers for the tests of settings, which are grouped by subject.

use std::ffi::OsString;

use super::*;
use crate::server::{EngineParts, Source};

mod check;
mod cluster;
mod http;
mod hub_variables;
mod log;
mod models;
mod servers;
mod show;
mod sources;
mod workers;

/// Reads the command line `tokenway <arguments>`.
fn read_line(arguments: &[&str]) -> Result<ParsedCommand, ConfigError> {
    read(["tokenway"].iter().chain(arguments).map(OsString::from))
}

fn server_parts(arguments: &[&str]) -> ServerParts {
    match read_line(arguments) {
        Ok(ParsedCommand::Serve(server)) => server.parts.build(&ModelFiles::new()).unwrap(),
        Ok(
            ParsedCommand::Work(_)
            | ParsedCommand::Complete(_)
            | ParsedCommand::Keys(_)
            | ParsedCommand::Tls(_)
            | ParsedCommand::Print(_),
        ) => {
            panic!("{arguments:?} is not a server command")
        }
        Err(error) => panic!("{arguments:?}: {error}"),
    }
}

fn error_of(arguments: &[&str]) -> String {
    match read_line(arguments) {
        Ok(_) => panic!("{arguments:?} is accepted"),
        Err(error) => error.to_string(),
    }
}

fn engine(parts: &ServerParts) -> &EngineParts {
    match &parts.source {
        Source::Engine(engine) => engine,
        Source::Remote(_) => panic!("the source is not a local engine"),
    }
}

fn settings_file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenway.toml");
    std::fs::write(&path, text).unwrap();
    let path = path.display().to_string();
    (folder, path)
}
