//! The attackers' process: the hidden subcommand `attacker`, and the handle with which `attack` runs it.
//!
//! The process prepares its requests, writes the line `ready`, and starts the attack once it has read a byte. At the
//! end it writes the outcome as a line of JSON and exits, which closes all its connections.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::io::{self, Write};
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::time::{Instant, timeout};

use super::kind::AttackKind;
use super::priority;
use super::server::Server;
use crate::arguments::{ServerUrl, format_ms, parse_duration_ms};
use crate::fault::Fault;
use crate::{CommandResult, Verdict};

/// Time by which an attack may exceed its duration before the run fails.
const GRACE: Duration = Duration::from_secs(30);

/// Attack a server once a byte arrives on standard input.
#[derive(Args)]
pub(crate) struct Options {
    kind: AttackKind,
    #[arg(long)]
    http: ServerUrl,
    #[arg(long)]
    grpc: ServerUrl,
    #[arg(long, value_parser = parse_duration_ms)]
    duration_ms: Duration,
}

/// The server under attack, and the time that the attack may take.
pub(super) struct AttackTarget<'a> {
    pub(super) http: ServerUrl,
    pub(super) grpc: ServerUrl,
    duration: Duration,
    out: RefCell<&'a mut dyn Write>,
}

/// Result of an attack.
#[derive(Debug, Default, Deserialize, Serialize)]
pub(super) struct Outcome {
    /// Number of requests or connections, by how they ended.
    pub(super) ends: BTreeMap<String, u64>,
    /// Number of connections or streams that the server should have ended but had not.
    pub(super) not_ended: u64,
}

/// The attackers' process, which waits for the start of the attack. Dropping this handle ends the process.
pub(super) struct AttackerProcess {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

pub(crate) async fn run(options: Options, out: &mut dyn Write) -> CommandResult {
    priority::lower()?;
    let target = AttackTarget {
        http: options.http,
        grpc: options.grpc,
        duration: options.duration_ms,
        out: RefCell::new(out),
    };
    let outcome = options.kind.run(&target).await?;
    let out = target.out.into_inner();
    writeln!(out, "{}", serde_json::to_string(&outcome)?)?;
    Ok(Verdict::Passed)
}

impl AttackTarget<'_> {
    fn write_ready(&self) -> io::Result<()> {
        let mut out = self.out.borrow_mut();
        writeln!(out, "ready")?;
        out.flush()
    }

    /// Waits until the attack is to start. Returns the time at which it is to end.
    pub(super) async fn start(&self) -> Result<Instant, Fault> {
        self.write_ready()?;
        tokio::io::stdin().read_u8().await?;
        Ok(Instant::now() + self.duration)
    }
}

impl Outcome {
    pub(super) fn add(&mut self, end: impl Into<String>, count: u64) {
        if count > 0 {
            *self.ends.entry(end.into()).or_default() += count;
        }
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ends = self.ends.iter();
        let ends: Vec<_> = ends.map(|(end, count)| format!("{end}: {count}")).collect();
        f.write_str(&ends.join(", "))
    }
}

impl AttackerProcess {
    /// Starts the process, and waits until it has prepared its requests.
    pub(super) async fn start(
        kind: AttackKind,
        duration: Duration,
        server: &Server,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .args(["attacker", &kind.name()])
            .args(["--http", &server.http.to_string()])
            .args(["--grpc", &server.grpc.to_string()])
            .args(["--duration-ms", &format_ms(duration)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("cannot start the attackers' process")?;
        let input = child.stdin.take().expect("its input is piped");
        let output = child.stdout.take().expect("its output is piped");
        let mut output = BufReader::new(output);
        output.read_line(&mut String::new()).await?;
        Ok(Self {
            child,
            input,
            output,
        })
    }

    /// Runs the attack to its end, after which all its connections are closed.
    pub(super) async fn attack(mut self, duration: Duration) -> anyhow::Result<Outcome> {
        let attack = async {
            self.input.write_all(b"\n").await?;
            let mut line = String::new();
            self.output.read_line(&mut line).await?;
            self.child.wait().await?;
            serde_json::from_str(&line).context("the attackers' process failed")
        };
        let ended = timeout(duration + GRACE, attack).await;
        ended.context("the attack did not end in time")?
    }
}
