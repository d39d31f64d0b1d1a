//! The row of an attack in the table, and the targets that it missed.

use std::fmt;

use serde::Serialize;

use super::attacker::Outcome;
use super::bystanders::Disturbance;
use super::kind::AttackKind;
use super::memory::Memory;

/// Longest time between two tokens of a bystander's stream. The model emits one every 5 ms.
const MAX_GAP_MS: f64 = 50.0;
const MAX_PEAK_BYTES: u64 = 256 * MIB;
/// Memory after an attack, relative to the memory of the idle server.
const MAX_GROWTH: u64 = 2;
const MIB: u64 = 1024 * 1024;

/// Measurements of one attack.
#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) attack: AttackKind,
    /// Duration of the attack.
    pub(super) seconds: f64,
    pub(super) http: Disturbance,
    pub(super) grpc: Disturbance,
    /// Processor time of the server during the attack, in cores.
    pub(super) server_cores: f64,
    pub(super) memory: Memory,
    pub(super) outcome: Outcome,
}

pub(super) fn head() -> String {
    format!(
        "{:<16}{:>7}{:>10}{:>10}{:>6}{:>11}{:>10}{:>10}{:>11}{:>10}  {}",
        "attack",
        "time s",
        "gap HTTP",
        "gap gRPC",
        "lost",
        "CPU cores",
        "idle MiB",
        "peak MiB",
        "10 s later",
        "not ended",
        "answers"
    )
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let lost = self.http.lost_tokens + self.grpc.lost_tokens;
        write!(
            f,
            "{:<16}{:>7.1}{:>7.1} ms{:>7.1} ms{:>6}{:>11.2}{:>10}{:>10}{:>11}{:>10}  {}",
            self.attack.name(),
            self.seconds,
            self.http.longest_gap_ms,
            self.grpc.longest_gap_ms,
            lost,
            self.server_cores,
            self.memory.idle / MIB,
            self.memory.peak / MIB,
            self.memory.after / MIB,
            self.outcome.not_ended,
            self.outcome
        )
    }
}

impl Row {
    /// Describes each target that the attack missed. Rows for comparison have no targets.
    pub(super) fn missed_targets(&self) -> Vec<String> {
        if self.attack.is_comparison() {
            return Vec::new();
        }
        let mut missed = Vec::new();
        for (api, stream) in [("HTTP", &self.http), ("gRPC", &self.grpc)] {
            let (gap, delay) = (stream.longest_gap_ms, stream.longest_delay_ms);
            if gap > MAX_GAP_MS {
                missed.push(format!(
                    "a gap of {gap:.1} ms over {api}, ≤ {MAX_GAP_MS} (a token took up to {delay:.1} ms from the device)"
                ));
            }
            if stream.lost_tokens > 0 {
                missed.push(format!("{} tokens lost over {api}", stream.lost_tokens));
            }
            if let Some(fault) = &stream.fault {
                missed.push(format!("the stream over {api} failed: {fault}"));
            }
        }
        let Memory {
            idle, peak, after, ..
        } = self.memory;
        if peak > MAX_PEAK_BYTES {
            let (peak, most) = (peak / MIB, MAX_PEAK_BYTES / MIB);
            missed.push(format!("memory of {peak} MiB, ≤ {most}"));
        }
        if after > MAX_GROWTH * idle {
            let (after, idle) = (after / MIB, idle / MIB);
            missed.push(format!(
                "memory of {after} MiB 10 s later, ≤ {MAX_GROWTH} × {idle}"
            ));
        }
        if self.outcome.not_ended > 0 {
            missed.push(format!("{} clients not ended", self.outcome.not_ended));
        }
        let name = self.attack.name();
        let missed = missed.into_iter();
        missed.map(|what| format!("{name}: {what}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(attack: AttackKind) -> Row {
        let stream = || Disturbance {
            longest_gap_ms: MAX_GAP_MS,
            ..Disturbance::default()
        };
        let mut memory = Memory::default();
        (memory.idle, memory.peak, memory.after) = (10 * MIB, MAX_PEAK_BYTES, 20 * MIB);
        Row {
            attack,
            seconds: 1.0,
            http: stream(),
            grpc: stream(),
            server_cores: 0.0,
            memory,
            outcome: Outcome::default(),
        }
    }

    /// Returns the targets that a row missed after this change.
    fn missed(change: fn(&mut Row)) -> Vec<String> {
        let mut row = row(AttackKind::Pings);
        change(&mut row);
        row.missed_targets()
    }

    #[test]
    fn a_row_at_every_limit_misses_no_target() {
        assert_eq!(missed(|_| {}), [""; 0]);
    }

    #[test]
    fn each_value_above_its_limit_is_a_missed_target() {
        let missed_alone = |change: fn(&mut Row), what: &str| {
            assert_eq!(missed(change), [format!("pings: {what}")]);
        };
        let gap = "a gap of 50.1 ms over gRPC, ≤ 50 (a token took up to 2.0 ms from the device)";
        missed_alone(
            |row| (row.grpc.longest_gap_ms, row.grpc.longest_delay_ms) = (50.1, 2.0),
            gap,
        );
        missed_alone(|row| row.http.lost_tokens = 3, "3 tokens lost over HTTP");
        let broke = |row: &mut Row| row.grpc.fault = Some("it broke".to_owned());
        missed_alone(broke, "the stream over gRPC failed: it broke");
        let peak = "memory of 257 MiB, ≤ 256";
        missed_alone(|row| row.memory.peak = 257 * MIB, peak);
        let after = "memory of 21 MiB 10 s later, ≤ 2 × 10";
        missed_alone(|row| row.memory.after = 21 * MIB, after);
        missed_alone(|row| row.outcome.not_ended = 2, "2 clients not ended");
    }

    #[test]
    fn a_row_for_comparison_has_no_targets() {
        let mut row = row(AttackKind::BusyCore);
        row.http.longest_gap_ms = 1_000.0;
        assert_eq!(row.missed_targets(), [""; 0]);
    }
}
