//! The servers on the command line: each address, and the name that follows it.

use std::collections::BTreeMap;
use std::fmt;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::arguments::{ServerUrl, grpc_address};

/// A server to compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    /// Name in reports; its address if it has no name.
    pub(super) name: String,
    pub(super) address: Address,
}

/// Address of a server's API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Address {
    /// OpenAI's completions over HTTP.
    Http(ServerUrl),
    /// Tokenway's gRPC API.
    Grpc(ServerUrl),
}

/// All servers in the order of the command line; at least one.
#[derive(Clone, Debug)]
pub(super) struct Servers(pub(super) Vec<Server>);

/// An argument about a server.
enum Given {
    Address(Address),
    Name(String),
}

impl Args for Servers {
    fn augment_args(command: Command) -> Command {
        let many = |id: &'static str| Arg::new(id).long(id).action(ArgAction::Append);
        command
            .arg(
                many("http")
                    .value_name("URL")
                    .value_parser(clap::value_parser!(ServerUrl))
                    .help("A server with OpenAI's completions, without `/v1`. May be given again"),
            )
            .arg(
                many("grpc")
                    .value_name("ADDR")
                    .value_parser(grpc_address)
                    .help("gRPC API of a Tokenway server, as `host:port`. May be given again"),
            )
            .arg(
                many("name")
                    .value_name("NAME")
                    .value_parser(clap::builder::NonEmptyStringValueParser::new())
                    .help("Name in the report of the server before it [default: its address]"),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Servers {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // The positions of all three flags show which name follows which address.
        let mut given = BTreeMap::new();
        given.extend(placed(matches, "http", |url| {
            Given::Address(Address::Http(url))
        }));
        given.extend(placed(matches, "grpc", |url| {
            Given::Address(Address::Grpc(url))
        }));
        given.extend(placed(matches, "name", Given::Name));
        named(given.into_values())
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// Values of a flag, with their positions on the command line.
fn placed<T: Clone + Send + Sync + 'static>(
    matches: &ArgMatches,
    id: &str,
    given: fn(T) -> Given,
) -> Vec<(usize, Given)> {
    let places = matches.indices_of(id).into_iter().flatten();
    let values = matches.get_many::<T>(id).into_iter().flatten();
    places.zip(values.cloned().map(given)).collect()
}

/// Gives each server the name that follows it.
fn named(given: impl Iterator<Item = Given>) -> Result<Servers, clap::Error> {
    let mut addresses: Vec<(Address, Option<String>)> = Vec::new();
    for given in given {
        match (given, addresses.last_mut()) {
            (Given::Address(address), _) => addresses.push((address, None)),
            (Given::Name(name), None) => {
                let why = format!("--name {name} must follow the --http or --grpc that it names");
                return Err(wrong(ErrorKind::ArgumentConflict, &why));
            }
            (Given::Name(name), Some((_, Some(known)))) => {
                let why = format!("--name {name} follows --name {known}: a server has one name");
                return Err(wrong(ErrorKind::ArgumentConflict, &why));
            }
            (Given::Name(name), Some((_, unnamed))) => *unnamed = Some(name),
        }
    }
    let mut servers: Vec<Server> = Vec::new();
    for (address, name) in addresses {
        let name = name.unwrap_or_else(|| address.to_string());
        if servers.iter().any(|server| server.name == name) {
            let why = format!("two servers have the name {name}: use --name to tell them apart");
            return Err(wrong(ErrorKind::ArgumentConflict, &why));
        }
        servers.push(Server { name, address });
    }
    if servers.is_empty() {
        let why = "there is no server to measure: name one with --http or --grpc";
        return Err(wrong(ErrorKind::MissingRequiredArgument, why));
    }
    Ok(Servers(servers))
}

fn wrong(kind: ErrorKind, why: &str) -> clap::Error {
    clap::Error::raw(kind, format!("{why}\n"))
}

impl fmt::Display for Address {
    /// Writes the address as it is given on the command line.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http(url) => url.fmt(f),
            Self::Grpc(url) => f.write_str(&url.authority),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct CommandLine {
        #[command(flatten)]
        servers: Servers,
    }

    fn names(arguments: &str) -> Result<Vec<String>, String> {
        let parsed = CommandLine::try_parse_from(format!("perf {arguments}").trim().split(' '));
        let names = |line: CommandLine| line.servers.0.into_iter().map(|server| server.name);
        parsed
            .map(|line| names(line).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_name_is_that_of_the_server_before_it() {
        let arguments = "--http http://a --grpc b:1 --name bee --http http://c:2/base/ --name cee";
        let expected = ["http://a:80", "bee", "cee"].map(str::to_owned);
        assert_eq!(names(arguments), Ok(expected.to_vec()));
    }

    #[test]
    fn a_name_without_a_server_of_its_own_is_refused_with_its_flag() {
        for (arguments, why) in [
            ("--name a --http http://a", "--name a must follow"),
            (
                "--http http://a --name a --name b",
                "--name b follows --name a",
            ),
            (
                "--http http://a --http http://a:80",
                "use --name to tell them apart",
            ),
            ("", "--http or --grpc"),
            ("--http a:80", "--http <URL>"),
            ("--http http://a --name ", "--name <NAME>"),
        ] {
            let found = names(arguments).expect_err(why);
            assert!(found.contains(why), "{arguments:?}: {found}");
        }
    }
}
