//! A comparison as JSON: everything that was measured, so that others can judge it again.

use std::io;
use std::path::Path;

use serde::Serialize;

use super::results::{Measured, Round, Stamps};
use super::{Asked, Check};
use crate::overhead::json::{Histograms, write_to};
use crate::overhead::machine::Machine;

/// The form of the file; another number is another form.
const FORMAT: u32 = 1;

#[derive(Serialize)]
struct Comparison<'a> {
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
    /// Whether each token's index was checked.
    expect_test_runner: bool,
}

#[derive(Serialize)]
struct ServerObject<'a> {
    name: &'a str,
    door: String,
    stamps: Stamps,
    rounds: &'a [Round],
    /// All rounds together: for each time, in nanoseconds, how often it occurred.
    histograms: Histograms,
    faults: &'a [String],
}

/// Writes the comparison to a file.
pub(super) fn write(
    path: &Path,
    machine: &Machine,
    servers: &[Measured],
    asked: &Asked,
) -> io::Result<()> {
    let comparison = Comparison {
        format: FORMAT,
        machine,
        load: LoadObject {
            streams: asked.load.streams,
            requests: asked.load.requests,
            tokens: asked.load.tokens,
            model: asked.model.as_deref(),
            expect_test_runner: asked.check == Check::TestRunner,
        },
        servers: servers.iter().map(of_server).collect(),
    };
    write_to(path, &comparison)
}

fn of_server(measured: &Measured) -> ServerObject<'_> {
    let Measured {
        server,
        rounds,
        times,
        stamps,
        faults,
    } = measured;
    ServerObject {
        name: &server.name,
        door: server.door.place(),
        stamps: *stamps,
        rounds,
        histograms: Histograms::of(times),
        faults,
    }
}
