//! The harness itself: what is planted in a server must be in the figures. A time is only ever asserted
//! from below, for a machine may add any delay of its own to the one that was planted.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use comparison::{Comparison, compare};
use doors::{FakeGrpcDoor, Summary};
use planting::{Answer, PlantedServer, Stamp, record, wait_until};
use serde_json::Value;
use tokenway::runner::monotonic_ns;

mod comparison;
mod doors;
mod planting;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;

/// What the program says of this server and its stamps, of so many tokens.
fn timed(server: &PlantedServer, tokens: &str) -> Comparison {
    let url = server.url();
    let arguments = [
        "--http",
        &url,
        "--tokens",
        tokens,
        "--stamps",
        "--expect-test-runner",
    ];
    compare(&arguments)
}

fn line(index: u32, of: u32, stamp: Stamp) -> String {
    format!("{}\n", record(index, index + 1 == of, Some(stamp)))
}

#[test]
fn a_delay_of_200_us_on_every_token_is_in_every_tokens_one_way_latency() {
    let server = PlantedServer::start(|_, answer| {
        answer.begin();
        for index in 0..50 {
            let emitted_ns = monotonic_ns();
            wait_until(emitted_ns + 200 * US);
            let due_ns = emitted_ns;
            answer.piece(&line(index, 50, Stamp { due_ns, emitted_ns }));
        }
        answer.end();
    });
    let comparison = timed(&server, "50");
    comparison.assert_whole();
    let one_way = comparison.values("one_way");
    assert_eq!(one_way.len(), 50);
    assert!(one_way[0] >= 200 * US, "{comparison}");
    // A constant delay cancels out of the intervals: they are no longer than the server made them.
    assert_eq!(comparison.values("inter_token").len(), 49);
}

/// Sends 40 tokens at a cadence of a millisecond, but those from 10 to 29 only when token 30 is due.
/// `emits` says when a token was emitted that was due then and is sent now.
fn stall(answer: &mut Answer, emits: fn(due_ns: u64, now_ns: u64) -> u64) {
    answer.begin();
    let began_ns = monotonic_ns();
    for index in 0..40 {
        let due_ns = began_ns + u64::from(index) * MS;
        let is_held_up = (10..30).contains(&index);
        wait_until(if is_held_up {
            began_ns + 30 * MS
        } else {
            due_ns
        });
        let emitted_ns = emits(due_ns, monotonic_ns());
        answer.piece(&line(index, 40, Stamp { due_ns, emitted_ns }));
    }
    answer.end();
}

/// How many values are 10 ms or more: of the tokens that the stall held up at least 10 to 20.
fn late(comparison: &Comparison, time: &str) -> usize {
    let values = comparison.values(time);
    values.iter().filter(|value| **value >= 10 * MS).count()
}

#[test]
fn a_device_that_stalls_is_late_with_every_token_that_it_owes() {
    let server = PlantedServer::start(|_, answer| stall(answer, |_, now_ns| now_ns));
    let comparison = timed(&server, "40");
    comparison.assert_whole();
    assert_eq!(comparison.values("schedule_lateness").len(), 40);
    assert!(late(&comparison, "schedule_lateness") >= 11, "{comparison}");
    assert!(late(&comparison, "runner_lateness") >= 11, "{comparison}");
}

#[test]
fn a_server_that_stalls_is_late_with_every_token_that_it_holds_up() {
    let server = PlantedServer::start(|_, answer| stall(answer, |due_ns, _| due_ns));
    let comparison = timed(&server, "40");
    comparison.assert_whole();
    assert!(late(&comparison, "one_way") >= 11, "{comparison}");
    assert!(late(&comparison, "schedule_lateness") >= 11, "{comparison}");
    assert_eq!(comparison.values("runner_lateness"), vec![0; 40]);
}

/// Indices in the place of 0, 1, 2, 3, and what is to be said of them.
const WRONG: [(&[u32], &str); 5] = [
    (&[0, 1, 3], "token_2 is lost: token_3 came in its place"),
    (&[0, 1, 2], "token_3 is lost: 3 of 4 tokens came"),
    (
        &[0, 1, 1, 2, 3],
        "token_1 is repeated: it came again where token_2 was due",
    ),
    (
        &[0, 2, 1, 3],
        "token_2 and token_1 are swapped: token_2 came first",
    ),
    (
        &[0, 1, 2, 3, 4],
        "token_4 is extra: it came at place 4, and 4 tokens were asked for",
    ),
];

#[test]
fn tokens_out_of_order_are_told_as_what_they_are_over_http() {
    for (indices, reason) in WRONG {
        let url = PlantedServer::streaming(indices).url();
        let comparison = compare(&["--http", &url, "--expect-test-runner"]);
        comparison.assert_failed(reason);
        assert_eq!(comparison.number("lost_requests"), 1, "{comparison}");
    }
}

#[tokio::test]
async fn tokens_out_of_order_are_told_as_what_they_are_over_grpc() {
    for (indices, reason) in WRONG {
        let door = FakeGrpcDoor::open().await;
        let address = door.address();
        let run = async move {
            let run = move || compare(&["--grpc", &address, "--expect-test-runner"]);
            tokio::task::spawn_blocking(run).await.expect("it ran")
        };
        let comparison = door.serve_while(run, indices, Summary::Sent).await;
        comparison.assert_failed(reason);
    }
}

#[test]
fn stamps_of_another_clock_are_no_latency() {
    let server = PlantedServer::start(|_, answer| {
        answer.begin();
        for index in 0..4 {
            let emitted_ns = monotonic_ns() + 3_600_000 * MS;
            let due_ns = emitted_ns;
            answer.piece(&line(index, 4, Stamp { due_ns, emitted_ns }));
        }
        answer.end();
    });
    let comparison = timed(&server, "4");
    comparison.assert_whole();
    assert_eq!(comparison.values("one_way"), [0_u64; 0]);
    let why = "one-way latency is unknown: the server's stamps are not of this machine's clock";
    assert!(comparison.out.contains(why), "{comparison}");
}

/// The program's own server in a process of its own, which ends with this.
struct ServerProcess {
    child: Child,
    http: String,
}

impl ServerProcess {
    fn start() -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_tokenway-perf"))
            .args(["serve", "product", "--interval-ms", "1"])
            .args(["--slots", "1", "--queue", "1"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the program runs");
        let mut doors = String::new();
        let stdout = child.stdout.take().expect("it is piped");
        BufReader::new(stdout).read_line(&mut doors).expect("text");
        let mut doors = doors.split_whitespace();
        let http = doors.find_map(|door| door.strip_prefix("http="));
        let http = http.expect("it says where it listens").to_owned();
        Self { child, http }
    }
}

impl Drop for ServerProcess {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_stamp_of_another_process_lies_between_the_request_and_the_read() {
    let server = ServerProcess::start();
    let mut socket = TcpStream::connect(&server.http).expect("it serves");
    let body = "{\"prompt\":\"x\",\"max_tokens\":20,\"stream\":true,\
                \"stream_options\":{\"include_stamps\":true}}";
    let length = body.len();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                accept: application/x-ndjson\r\ncontent-type: application/json\r\n";
    let requested_ns = monotonic_ns();
    write!(socket, "{head}content-length: {length}\r\n\r\n{body}").expect("it is taken");
    let mut stamps = 0;
    for line in BufReader::new(socket).lines() {
        let line = line.expect("a line");
        let received_ns = monotonic_ns();
        if !line.starts_with('{') {
            continue;
        }
        let record: Value = serde_json::from_str(&line).expect("an object");
        let emitted_ns = record["stamp"]["emitted_ns"].as_u64().expect("a stamp");
        assert!((requested_ns..=received_ns).contains(&emitted_ns), "{line}");
        stamps += 1;
    }
    assert_eq!(stamps, 20);
}

#[test]
fn the_stamps_of_a_server_in_another_process_are_known_times() {
    let server = ServerProcess::start();
    let url = format!("http://{}", server.http);
    let comparison = compare(&["--http", &url, "--stamps", "--expect-test-runner"]);
    comparison.assert_whole();
    assert_eq!(comparison.json["servers"][0]["stamps"], "known");
    for time in ["one_way", "schedule_lateness", "runner_lateness"] {
        assert_eq!(comparison.values(time).len(), 4, "{comparison}");
    }
}
