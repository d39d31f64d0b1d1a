//! Parses the servers on the command line: each address, and the name that follows it.

use std::collections::{BTreeMap, BTreeSet};

use clap::builder::NonEmptyStringValueParser;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, Command, FromArgMatches};
use serde::Serialize;

use crate::arguments::{ServerUrl, parse_grpc_address};

/// A server to compare.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Server {
    /// Name of the server in reports, which is its address unless --name sets another.
    pub(super) name: String,
    /// Address, as written on the command line.
    address: String,
    #[serde(skip)]
    pub(super) url: ServerUrl,
    /// True for Tokenway's gRPC API, false for OpenAI's completions over HTTP.
    #[serde(skip)]
    pub(super) is_grpc: bool,
}

/// All servers in the order of the command line; at least one.
#[derive(Clone, Debug)]
pub(super) struct Servers(pub(super) Vec<Server>);

#[derive(Args)]
struct ServerFlags {
    /// URL of a server with OpenAI's completions, without `/v1`. May be repeated
    #[arg(long, value_name = "URL")]
    http: Vec<ServerUrl>,
    /// gRPC address of a Tokenway server, as `host:port`. May be repeated
    #[arg(long, value_name = "ADDR", value_parser = parse_grpc_address)]
    grpc: Vec<ServerUrl>,
    /// Name, in the report, of the server that the preceding --http or --grpc names [default: that address]
    #[arg(long, value_name = "NAME", value_parser = NonEmptyStringValueParser::new())]
    name: Vec<String>,
}

impl Args for Servers {
    fn augment_args(command: Command) -> Command {
        ServerFlags::augment_args(command)
    }

    fn augment_args_for_update(command: Command) -> Command {
        ServerFlags::augment_args_for_update(command)
    }
}

impl FromArgMatches for Servers {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let ServerFlags { http, grpc, name } = ServerFlags::from_arg_matches(matches)?;
        // The positions of all three flags show which name follows which address.
        let places = |flag| matches.indices_of(flag).into_iter().flatten();
        let server = |address: String, url, is_grpc| Server {
            name: address.clone(),
            address,
            url,
            is_grpc,
        };
        let http = http
            .into_iter()
            .map(|url| server(url.to_string(), url, false));
        let grpc = grpc
            .into_iter()
            .map(|url| server(url.authority.clone(), url, true));
        let servers = places("http").zip(http).chain(places("grpc").zip(grpc));
        let mut servers: BTreeMap<_, _> = servers.collect();
        let mut named = BTreeSet::new();
        for (place, name) in places("name").zip(name) {
            let Some((at, server)) = servers.range_mut(..place).next_back() else {
                let why = format!("--name {name} must follow the --http or --grpc that it names");
                return Err(argument_error(&why));
            };
            if !named.insert(*at) {
                let known = &server.name;
                let why = format!("--name {name} follows --name {known}: a server has one name");
                return Err(argument_error(&why));
            }
            server.name = name;
        }
        let servers: Vec<_> = servers.into_values().collect();
        let mut names = BTreeSet::new();
        if let Some(Server { name, .. }) = servers.iter().find(|server| !names.insert(&server.name))
        {
            let why = format!("two servers have the name {name}: give each another --name");
            return Err(argument_error(&why));
        }
        if servers.is_empty() {
            return Err(argument_error(
                "there is no server to measure: add one with --http or --grpc",
            ));
        }
        Ok(Self(servers))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

fn argument_error(why: &str) -> clap::Error {
    clap::Error::raw(ErrorKind::ArgumentConflict, format!("{why}\n"))
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
        let twice = "--http http://a --name a --name b";
        let same = "--http http://a --http http://a:80";
        for (arguments, why) in [
            (twice, "--name b follows --name a"),
            (same, "give each another --name"),
            ("--http a:80", "--http <URL>"),
            ("--http http://a --name ", "--name <NAME>"),
        ] {
            let found = names(arguments).expect_err(why);
            assert!(found.contains(why), "{arguments:?}: {found}");
        }
    }
}
