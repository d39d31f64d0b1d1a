//! A comparison as JSON.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::consumer::Check;
use super::results::{Comparison, Round};
use crate::figures::Stamps;
use crate::report::{Histograms, Machine, write_json};

/// Version of the file's format.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct ComparisonObject<'a> {
    format: u32,
    machine: &'a Machine,
    load: LoadObject<'a>,
    servers: Vec<ServerObject<'a>>,
}

#[derive(Serialize)]
struct LoadObject<'a> {
    streams: u32,
    requests: u32,
    tokens: u32,
    model: Option<&'a str>,
    /// Set if each token's index was checked.
    expect_test_runner: bool,
}

#[derive(Serialize)]
struct ServerObject<'a> {
    name: &'a str,
    #[serde(rename = "door")]
    address: String,
    stamps: Stamps,
    rounds: &'a [Round],
    /// Times of all rounds.
    histograms: Histograms,
    faults: &'a [String],
}

/// Writes the comparison to a file.
pub(super) fn write(path: &Path, comparison: &Comparison) -> io::Result<()> {
    let Comparison {
        machine,
        load,
        model,
        check,
        servers,
    } = comparison;
    let servers = servers.iter().map(|results| ServerObject {
        name: &results.server.name,
        address: results.server.address.to_string(),
        stamps: results.stamps,
        rounds: &results.rounds,
        histograms: Histograms::of(&results.times),
        faults: &results.faults,
    });
    let object = ComparisonObject {
        format: FORMAT,
        machine,
        load: LoadObject {
            streams: load.streams,
            requests: load.requests,
            tokens: load.tokens,
            model: model.as_deref(),
            expect_test_runner: *check == Check::TestRunner,
        },
        servers: servers.collect(),
    };
    write_json(path, &object)
}
