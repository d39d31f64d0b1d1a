//! Running `tokenway-perf streaming`, and what it printed.

use std::process::Stdio;

use tokio::process::Command;

/// What the program did.
pub(crate) struct Outcome {
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

/// The program with the subcommand and these arguments; nothing of the tests' own environment.
pub(crate) fn streaming(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"));
    command.arg("streaming").args(arguments);
    for variable in [
        "TEST_RUNNER_FREQUENCY_MS",
        "TEST_RUNNER_MAX_PER_TOKEN_OVERHEAD_MS",
        "SERVER_BASE_URL",
    ] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

pub(crate) async fn outcome(mut command: Command) -> Outcome {
    let output = command.output().await.expect("the program runs");
    let text = |bytes| String::from_utf8(bytes).expect("it prints text");
    Outcome {
        code: output.status.code(),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

pub(crate) async fn run(arguments: &[&str]) -> Outcome {
    outcome(streaming(arguments)).await
}

/// So many tokens as fast as they come, with any overhead.
pub(crate) async fn run_at_full_speed(tokens: &str, door: &[&str]) -> Outcome {
    let mut arguments = vec!["--tokens", tokens, "--interval-ms", "0"];
    arguments.extend(["--max-overhead-ms", "60000"]);
    arguments.extend(door);
    run(&arguments).await
}

impl Outcome {
    /// The figures of one door, from the reference's two lines, which must have their exact form.
    pub(crate) fn figures(&self, door: &str) -> Figures {
        let mut lines = self
            .out
            .lines()
            .skip_while(|line| !line.starts_with(&format!("{door} at http://127.0.0.1:")));
        lines.next().unwrap_or_else(|| panic!("no {door}: {self}"));
        let metrics = lines.next().expect("its metrics");
        let overhead = lines.next().expect("its overhead");
        let inner = metrics.strip_prefix("StreamingMetrics(").expect(metrics);
        let inner = inner.strip_suffix(")").expect(metrics);
        let figures: Vec<f64> = inner
            .split(", ")
            .zip([
                "received_tokens=",
                "total_streaming_time_ms=",
                "mean_receive_interval_ms=",
                "throughput_tokens_per_second=",
            ])
            .map(|(figure, name)| figure.strip_prefix(name).expect(metrics))
            .map(|figure| figure.parse().expect(metrics))
            .collect();
        let overhead = overhead
            .strip_prefix("Overhead per token: ")
            .expect(overhead);
        let overhead = overhead.strip_suffix("ms").expect(overhead);
        let [tokens, total_ms, interval_ms, throughput] = figures[..] else {
            panic!("{metrics}")
        };
        Figures {
            tokens,
            total_ms,
            interval_ms,
            throughput,
            overhead_ms: overhead.parse().expect(overhead),
            rest: lines
                .take_while(|line| !line.is_empty())
                .map(str::to_owned)
                .collect(),
        }
    }

    /// It failed, and said why in one line.
    pub(crate) fn assert_failed(&self, reason: &str) {
        assert_eq!(self.code, Some(1), "{self}");
        assert_eq!(self.err, format!("error: {reason}\n"), "{self}");
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}\n{}\n{}", self.code, self.out, self.err)
    }
}

pub(crate) struct Figures {
    pub(crate) tokens: f64,
    pub(crate) total_ms: f64,
    pub(crate) interval_ms: f64,
    pub(crate) throughput: f64,
    pub(crate) overhead_ms: f64,
    /// The lines after the reference's own.
    pub(crate) rest: Vec<String>,
}

impl Figures {
    /// The figures fit to each other and to the interval that was asked for.
    pub(crate) fn assert_consistent(&self, tokens: f64, interval_ms: f64) {
        assert_eq!(self.tokens, tokens);
        let overhead_ms = self.interval_ms - interval_ms;
        assert!((self.overhead_ms - overhead_ms).abs() < 0.02);
        let total_ms = (tokens - 1.0) / self.throughput * 1e3;
        assert!((self.total_ms - total_ms).abs() < 0.02);
    }
}
