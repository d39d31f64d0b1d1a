//! The result of a run, which the tables, the HTML page and the JSON file show.

use serde::Serialize;

use super::completions::STREAMS;
use super::results::Results;
use super::scenario::Scenario;
use super::servers::{CONTEXT, ServerKind, ServerPlan};
use super::targets;
use crate::report::Machine;
use crate::target::TargetResult;

const JSON_FORMAT_VERSION: u32 = 1;

/// Result of a run, as the JSON file contains it.
#[derive(Debug, Serialize)]
pub(super) struct Report {
    format: u32,
    pub(super) machine: Machine,
    pub(super) settings: Settings,
    #[serde(rename = "cells")]
    pub(super) results: Results,
    /// Targets whose figures the run has measured.
    pub(super) targets: Vec<TargetResult>,
    /// Differences between the servers' counts of prompt tokens that are small enough to compare the servers.
    pub(super) notes: Vec<String>,
    /// Failed requests, replies with a wrong number of tokens, and prompts whose token counts differ too much.
    pub(super) faults: Vec<String>,
}

/// Settings that all servers of a run share, and the versions of the servers.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Settings {
    /// Name of the model's file, for all servers without other weights.
    model: String,
    threads: u16,
    slots: u32,
    /// Maximum number of tokens in a slot.
    context: u32,
    rounds: u32,
    servers: Vec<ServerVersion>,
}

#[derive(Clone, Debug, Serialize)]
struct ServerVersion {
    server: ServerKind,
    version: String,
    /// Weights that the server computes, if they are not those of the model's file.
    other_weights: Option<String>,
}

impl Settings {
    /// Collects the settings. Runs each server's program to get its version.
    pub(super) async fn of_servers(plans: &[ServerPlan], rounds: u32) -> anyhow::Result<Self> {
        let mut servers = Vec::new();
        for plan in plans {
            let version = plan.version().await?;
            servers.push(ServerVersion {
                server: plan.kind,
                version,
                other_weights: plan.other_weights(),
            });
        }
        let plan = plans.first();
        let model = plan.and_then(|plan| plan.model_path.file_name());
        Ok(Self {
            model: model.unwrap_or_default().to_string_lossy().into_owned(),
            threads: plan.map_or(0, |plan| plan.threads),
            slots: STREAMS,
            context: CONTEXT,
            rounds,
            servers,
        })
    }

    /// Returns the lines above the tables that describe the run.
    pub(super) fn describe(&self) -> Vec<String> {
        let Self {
            model,
            threads,
            slots,
            context,
            rounds,
            servers,
        } = self;
        let of_decoding = rounds * Scenario::DecodeOne.rounds_factor();
        let rounds = match rounds {
            1 => "1 round".to_owned(),
            rounds => format!("{rounds} rounds"),
        };
        let rounds = format!("{rounds}, {of_decoding} of the decoding scenarios");
        let first =
            format!("{model}; threads: {threads}; slots: {slots} of {context} tokens; {rounds}");
        let servers = servers.iter().map(ServerVersion::describe);
        [first].into_iter().chain(servers).collect()
    }
}

impl ServerVersion {
    fn describe(&self) -> String {
        let version = format!("{}: {}", self.server.title(), self.version);
        match &self.other_weights {
            Some(weights) => format!("{version}; it serves {weights}"),
            None => version,
        }
    }
}

impl Report {
    pub(super) fn new(
        machine: Machine,
        settings: Settings,
        results: Results,
        mut faults: Vec<String>,
    ) -> Self {
        let mut notes = Vec::new();
        for difference in results.prompt_differences() {
            let list = if difference.is_large {
                &mut faults
            } else {
                &mut notes
            };
            list.push(difference.text);
        }
        let targets = targets::judge_targets(&results);
        Self {
            format: JSON_FORMAT_VERSION,
            machine,
            settings,
            results,
            targets,
            notes,
            faults,
        }
    }
}
