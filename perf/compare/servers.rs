//! The servers on the command line: each door, and the name that follows it. What is asked of them is
//! others' affair.

use std::collections::BTreeMap;

use clap::error::ErrorKind;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches};

use crate::arguments::{ServerUrl, grpc_address};

/// A server that is compared with others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Server {
    /// What reports call it: its name, or where its door is.
    pub(super) name: String,
    pub(super) door: Door,
}

/// How a server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Door {
    /// OpenAI's completions over HTTP.
    Http(ServerUrl),
    /// Tokenway's own gRPC.
    Grpc(ServerUrl),
}

/// All servers, in the order in which they were given; at least one.
#[derive(Clone, Debug)]
pub(super) struct Servers(pub(super) Vec<Server>);

/// One argument of the three.
enum Given {
    Door(Door),
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
                    .help("A Tokenway server's gRPC door, as `host:port`. May be given again"),
            )
            .arg(
                many("name")
                    .value_name("NAME")
                    .value_parser(clap::builder::NonEmptyStringValueParser::new())
                    .help("What the report calls the server before it [default: where it is]"),
            )
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Servers {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        // What follows what is only known from the places of all three.
        let mut given = BTreeMap::new();
        given.extend(placed(matches, "http", |url| Given::Door(Door::Http(url))));
        given.extend(placed(matches, "grpc", |url| Given::Door(Door::Grpc(url))));
        given.extend(placed(matches, "name", Given::Name));
        named(given.into_values())
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

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
    let mut doors: Vec<(Door, Option<String>)> = Vec::new();
    for given in given {
        match (given, doors.last_mut()) {
            (Given::Door(door), _) => doors.push((door, None)),
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
    for (door, name) in doors {
        let name = name.unwrap_or_else(|| door.place());
        if servers.iter().any(|server| server.name == name) {
            let why = format!("two servers are called {name}: --name tells them apart");
            return Err(wrong(ErrorKind::ArgumentConflict, &why));
        }
        servers.push(Server { name, door });
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

impl Door {
    /// Where it is, as it is given on the command line.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Http(url) => url.to_string(),
            Self::Grpc(url) => url.authority.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        servers: Servers,
    }

    fn names(arguments: &[&str]) -> Result<Vec<String>, String> {
        let line = Line::try_parse_from([&["perf"], arguments].concat());
        let names = |line: Line| line.servers.0.into_iter().map(|server| server.name);
        line.map(|line| names(line).collect())
            .map_err(|error| error.to_string())
    }

    #[test]
    fn a_name_is_that_of_the_server_before_it() {
        let arguments = [
            "--http", "http://a", "--grpc", "b:1", "--name", "bee", "--http",
        ];
        let arguments = [&arguments[..], &["http://c:2/base/", "--name", "cee"]].concat();
        let expected = ["http://a:80", "bee", "cee"].map(str::to_owned);
        assert_eq!(names(&arguments), Ok(expected.to_vec()));
    }

    #[test]
    fn a_name_without_a_server_of_its_own_is_refused_with_its_flag() {
        for (arguments, why) in [
            (
                &["--name", "a", "--http", "http://a"][..],
                "--name a must follow",
            ),
            (
                &["--http", "http://a", "--name", "a", "--name", "b"],
                "--name b follows --name a",
            ),
            (
                &["--http", "http://a", "--http", "http://a:80"],
                "--name tells them apart",
            ),
            (&[], "--http or --grpc"),
            (&["--http", "a:80"], "--http <URL>"),
            (&["--http", "http://a", "--name", ""], "--name <NAME>"),
        ] {
            let told = names(arguments).expect_err(why);
            assert!(told.contains(why), "{arguments:?}: {told}");
        }
    }
}
