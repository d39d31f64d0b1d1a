//! The figures of `tokenway-perf compare` show the delays and faults that a test server makes on purpose. Times have
//! only lower bounds, because a busy machine may add any delay.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;

use serde_json::Value;
use support::comparison::{Comparison, compare};
use support::grpc::{PlantedGrpcServer, StreamEnd};
use support::planted::{PlantedServer, Response, Stamp, token_record, wait_until};
use support::{ServerProcess, WRONG_ORDERS};
use tokenway::runner::monotonic_ns;

mod support;

const US: u64 = 1_000;
const MS: u64 = 1_000 * US;

fn compare_timed(server: &PlantedServer, tokens: &str) -> Comparison {
    let url = server.url();
    let flags = ["--http", &url, "--tokens", tokens];
    compare(&[&flags[..], &["--stamps", "--expect-test-runner"]].concat())
}

fn send_token(response: &mut Response, index: u32, of: u32, stamp: Stamp) {
    response.write_record(&token_record(index, index + 1 == of, Some(stamp)));
}

#[test]
fn a_delay_of_200_us_on_every_token_is_in_every_one_way_latency() {
    let server = PlantedServer::start(|_, response| {
        response.write_head();
        for index in 0..50 {
            let emitted_ns = monotonic_ns();
            wait_until(emitted_ns + 200 * US);
            let due_ns = emitted_ns;
            send_token(response, index, 50, Stamp { due_ns, emitted_ns });
        }
        response.write_last_chunk();
    });
    let comparison = compare_timed(&server, "50");
    comparison.assert_complete();
    let one_way = comparison.time_values("one_way");
    assert_eq!(one_way.len(), 50);
    assert!(one_way[0] >= 200 * US, "{comparison}");
    assert_eq!(comparison.time_values("inter_token").len(), 49);
}

/// Sends 40 tokens, one per millisecond, except that tokens 10 to 29 are sent only when token 30 is due. `emits`
/// returns the emission time to report for a token that was due at `due_ns` and is sent at `now_ns`.
fn send_with_stall(response: &mut Response, emits: fn(due_ns: u64, now_ns: u64) -> u64) {
    response.write_head();
    let start_ns = monotonic_ns();
    for index in 0..40 {
        let due_ns = start_ns + u64::from(index) * MS;
        let is_delayed = (10..30).contains(&index);
        let sent_ns = if is_delayed {
            start_ns + 30 * MS
        } else {
            due_ns
        };
        wait_until(sent_ns);
        let emitted_ns = emits(due_ns, monotonic_ns());
        send_token(response, index, 40, Stamp { due_ns, emitted_ns });
    }
    response.write_last_chunk();
}

/// Returns the number of recorded values of 10 ms or more. Tokens 10 to 20 always have such values.
fn count_late(comparison: &Comparison, time: &str) -> usize {
    let values = comparison.time_values(time);
    values.iter().filter(|value| **value >= 10 * MS).count()
}

#[test]
fn a_stall_of_the_device_makes_every_delayed_token_late() {
    let server = PlantedServer::start(|_, response| send_with_stall(response, |_, now_ns| now_ns));
    let comparison = compare_timed(&server, "40");
    comparison.assert_complete();
    assert_eq!(comparison.time_values("schedule_lateness").len(), 40);
    assert!(
        count_late(&comparison, "schedule_lateness") >= 11,
        "{comparison}"
    );
    assert!(
        count_late(&comparison, "runner_lateness") >= 11,
        "{comparison}"
    );
}

#[test]
fn a_stall_of_the_server_makes_every_delayed_token_late() {
    let server = PlantedServer::start(|_, response| send_with_stall(response, |due_ns, _| due_ns));
    let comparison = compare_timed(&server, "40");
    comparison.assert_complete();
    assert!(count_late(&comparison, "one_way") >= 11, "{comparison}");
    assert!(
        count_late(&comparison, "schedule_lateness") >= 11,
        "{comparison}"
    );
    assert_eq!(comparison.time_values("runner_lateness"), vec![0; 40]);
}

#[test]
fn tokens_in_a_wrong_order_are_classified_over_http() {
    for (indices, reason) in WRONG_ORDERS {
        let url = PlantedServer::streaming(indices).url();
        let comparison = compare(&["--http", &url, "--expect-test-runner"]);
        comparison.assert_failed(reason);
        assert_eq!(comparison.round_number("lost_requests"), 1, "{comparison}");
    }
}

#[test]
fn tokens_in_a_wrong_order_are_classified_over_grpc() {
    for (indices, reason) in WRONG_ORDERS {
        let address = PlantedGrpcServer::streaming(indices, StreamEnd::Summary).address();
        compare(&["--grpc", &address, "--expect-test-runner"]).assert_failed(reason);
    }
}

#[test]
fn stamps_of_another_clock_are_not_used_as_latency() {
    let server = PlantedServer::start(|_, response| {
        response.write_head();
        for index in 0..4 {
            let emitted_ns = monotonic_ns() + 3_600_000 * MS;
            let due_ns = emitted_ns;
            send_token(response, index, 4, Stamp { due_ns, emitted_ns });
        }
        response.write_last_chunk();
    });
    let comparison = compare_timed(&server, "4");
    comparison.assert_complete();
    assert_eq!(comparison.time_values("one_way"), [0_u64; 0]);
    let why =
        "one-way latency is unknown: the server's timestamps come from another machine's clock";
    assert!(comparison.ran.out.contains(why), "{comparison}");
}

#[test]
fn a_stamp_of_another_process_lies_between_the_request_and_the_read() {
    let server = ServerProcess::start(1);
    let mut socket = TcpStream::connect(&server.http).expect("the server listens");
    let body = "{\"prompt\":\"x\",\"max_tokens\":20,\"stream\":true,\
                \"stream_options\":{\"include_stamps\":true}}";
    let length = body.len();
    let head = "POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\
                accept: application/x-ndjson\r\ncontent-type: application/json\r\n";
    let requested_ns = monotonic_ns();
    write!(socket, "{head}content-length: {length}\r\n\r\n{body}").expect("it is sent");
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
fn the_stamps_of_a_server_in_another_process_are_known() {
    let server = ServerProcess::start(1);
    let url = server.url();
    let comparison = compare(&["--http", &url, "--stamps", "--expect-test-runner"]);
    comparison.assert_complete();
    assert_eq!(comparison.json["servers"][0]["stamps"], "known");
    for time in ["one_way", "schedule_lateness", "runner_lateness"] {
        assert_eq!(comparison.time_values(time).len(), 4, "{comparison}");
    }
}
