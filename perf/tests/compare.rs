//! What `tokenway-perf compare` asks, prints, writes and exits with, over servers that stream in any
//! form and end in any way. `planted` has what its figures must show.

use std::fs;
use std::sync::{Arc, Mutex};

use comparison::compare;
use planting::{PlantedServer, record};
use serde_json::{Value, json};

mod comparison;
mod planting;

/// Four tokens as server-sent events.
fn events() -> String {
    let events = (0..4).map(|index| format!("data: {}\n\n", record(index, index == 3, None)));
    events.chain(["data: [DONE]\n\n".to_owned()]).collect()
}

/// Four tokens as NDJSON.
fn lines() -> String {
    let lines = (0..4).map(|index| format!("{}\n", record(index, index == 3, None)));
    lines.collect()
}

/// An answer with this body, in chunks that begin and end anywhere.
fn in_chunks(body: &str, size: usize) -> Vec<u8> {
    let mut answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for chunk in body.as_bytes().chunks(size) {
        answer.extend_from_slice(format!("{:X};at=\"x\"\r\n", chunk.len()).as_bytes());
        answer.extend_from_slice(chunk);
        answer.extend_from_slice(b"\r\n");
    }
    answer.extend_from_slice(b"0\r\nx-sum: 1\r\n\r\n");
    answer
}

fn without_last_chunk(answer: &[u8]) -> Vec<u8> {
    let last = b"0\r\nx-sum: 1\r\n\r\n";
    answer.strip_suffix(last).expect("it has one").to_vec()
}

fn of_length(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

fn until_close(body: &str) -> Vec<u8> {
    format!("HTTP/1.0 200 OK\r\n\r\n{body}").into_bytes()
}

#[test]
fn a_stream_is_read_in_every_form_and_every_framing() {
    let with_returns = format!(": hello\n\n{}", events()).replace('\n', "\r\n");
    for body in [events(), lines(), with_returns] {
        let length = body.len();
        for answer in [
            in_chunks(&body, 7),
            in_chunks(&body, length),
            of_length(&body),
            until_close(&body),
        ] {
            let url = PlantedServer::answering(answer).url();
            let comparison = compare(&["--http", &url, "--expect-test-runner"]);
            comparison.assert_whole();
            assert_eq!(comparison.number("tokens"), 4, "{comparison}");
            assert_eq!(comparison.values("inter_token").len(), 3, "{comparison}");
            assert_eq!(comparison.values("ttft").len(), 1, "{comparison}");
            assert_eq!(comparison.values("time_per_output_token").len(), 1);
        }
    }
}

#[test]
fn without_stamps_one_way_latency_is_said_to_be_unknown() {
    let url = PlantedServer::answering(of_length(&events())).url();
    for (flags, why) in [
        (
            &[][..],
            "without stamps nobody can tell when a token left its device",
        ),
        (
            &["--stamps"],
            "--stamps asked for stamps, and the server sends none",
        ),
    ] {
        let comparison = compare(&[&["--http", &url, "--name", "it"], flags].concat());
        comparison.assert_whole();
        let told = format!("it: one-way latency is unknown: {why}");
        assert!(comparison.out.contains(&told), "{comparison}");
    }
}

#[test]
fn a_stream_without_its_end_is_a_fault() {
    let after = |what: &str| format!("the stream ended after {what}");
    let cut = |body: &str, end: &str| body.strip_suffix(end).expect(end).to_owned();
    let unfinished = |body: &str| body.replace("\"length\"", "null");
    for (answer, reason) in [
        (
            of_length(&cut(&events(), "data: [DONE]\n\n")),
            after("4 tokens without [DONE]"),
        ),
        (
            of_length(&cut(&events(), "\n")),
            after("4 tokens without the end of its last record"),
        ),
        (
            of_length(&unfinished(&events())),
            after("4 tokens without a finish_reason"),
        ),
        (
            until_close(&unfinished(&lines())),
            after("4 tokens without a finish_reason"),
        ),
        (
            until_close(&cut(&lines(), "}\n")),
            after("3 tokens without the end of its last record"),
        ),
        (of_length(""), after("0 tokens without a finish_reason")),
        (
            without_last_chunk(&in_chunks(&lines(), 9)),
            after("4 tokens without its end"),
        ),
        (
            of_length(&(cut(&events(), "data: [DONE]\n\n") + "data: {\"error\":\"no\"}\n\n")),
            "the stream ended with an error after 4 tokens: no".to_owned(),
        ),
        (
            of_length("event: error\ndata: gone\n\n"),
            "the stream ended with an error after 0 tokens: gone".to_owned(),
        ),
        (
            b"HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nlater".to_vec(),
            "the server answered HTTP/1.1 503 Busy: later".to_owned(),
        ),
    ] {
        let url = PlantedServer::answering(answer).url();
        let comparison = compare(&["--http", &url]);
        comparison.assert_failed(&reason);
        assert_eq!(comparison.number("lost_requests"), 1, "{comparison}");
    }
}

#[test]
fn a_stream_that_hangs_is_told_as_such() {
    let server = PlantedServer::start(|_, answer| {
        answer.begin();
        answer.piece(&format!("{}\n", record(0, false, None)));
        answer.stall_for_ever();
    });
    let comparison = compare(&["--http", &server.url(), "--timeout-ms", "1000"]);
    comparison.assert_failed("the stream hangs: 1 tokens came within 1 s");
}

#[test]
fn the_request_asks_for_what_the_arguments_say() {
    let requests = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&requests);
    let server = PlantedServer::start(move |request, answer| {
        seen.lock().expect("no panic").push(request.to_owned());
        answer.raw(&of_length(&events()));
    });
    let url = format!("{}/base/", server.url());
    let model = "a \"model\"";
    compare(&["--http", &url, "--model", model, "--stamps"]).assert_whole();
    compare(&["--http", &url, "--form", "ndjson"]).assert_whole();
    let requests = requests.lock().expect("no panic");
    let parsed = requests.iter().map(|request| {
        let (head, body) = request.split_once("\r\n\r\n").expect("a head");
        let body: Value = serde_json::from_str(body).expect("an object");
        (head, body)
    });
    let [(first, stamped), (second, plain)] = &parsed.collect::<Vec<_>>()[..] else {
        panic!("{requests:?}")
    };
    assert!(
        first.starts_with("POST /base/v1/completions HTTP/1.1\r\n"),
        "{first}"
    );
    assert!(first.contains("accept: text/event-stream\r\n"), "{first}");
    assert!(
        second.contains("accept: application/x-ndjson\r\n"),
        "{second}"
    );
    let prompt = &plain["prompt"];
    let expected = json!({"prompt": prompt, "max_tokens": 4, "stream": true});
    assert_eq!(*plain, expected);
    let options = json!({"include_stamps": true});
    assert_eq!(stamped["stream_options"], options);
    assert_eq!(stamped["model"], model);
}

#[test]
fn servers_take_turns_and_a_connection_that_is_kept_is_used_again() {
    let turns = Arc::new(Mutex::new(Vec::new()));
    let start = |name: char, answer: Vec<u8>, closes: bool| {
        let turns = Arc::clone(&turns);
        PlantedServer::start(move |_, connection| {
            let mut turns = turns.lock().expect("no panic");
            turns.push(format!("{name}{}", connection.number));
            connection.raw(&answer);
            if closes {
                connection.close();
            }
        })
    };
    let kept = start('A', of_length(&events()), false).url();
    let closed = start('B', until_close(&lines()), true).url();
    let arguments = [
        "--http",
        &kept,
        "--http",
        &closed,
        "--rounds",
        "2",
        "--requests",
        "2",
    ];
    let comparison = compare(&arguments);
    comparison.assert_whole();
    let turns = turns.lock().expect("no panic").concat();
    assert_eq!(turns, "A1A2B1B1A1A2B1B1");
    for server in comparison.json["servers"].as_array().expect("servers") {
        for round in server["rounds"].as_array().expect("rounds") {
            assert_eq!(
                (&round["requests"], &round["tokens"]),
                (&json!(2), &json!(8))
            );
        }
    }
}

#[test]
fn one_request_that_fails_does_not_end_its_stream() {
    let count = Mutex::new(0);
    let server = PlantedServer::start(move |_, answer| {
        let mut count = count.lock().expect("no panic");
        *count += 1;
        let whole = of_length(&lines());
        answer.raw(if *count == 1 { &whole[..40] } else { &whole });
        if *count == 1 {
            answer.close();
        }
    });
    let comparison = compare(&["--http", &server.url(), "--requests", "3"]);
    assert_eq!(comparison.code, Some(1), "{comparison}");
    let numbers = ["requests", "lost_requests"].map(|name| comparison.number(name));
    assert_eq!(numbers, [2, 1], "{comparison}");
}

#[test]
fn the_page_has_every_server_and_needs_nothing_from_elsewhere() {
    let folder = tempfile::tempdir().expect("a folder");
    let html = folder.path().join("page.html");
    let html = html.to_str().expect("a path of ASCII");
    let url = PlantedServer::answering(of_length(&events())).url();
    let names = [
        "--http", &url, "--name", "<ours>", "--http", &url, "--name", "theirs",
    ];
    let comparison = compare(&[&names[..], &["--html", html]].concat());
    comparison.assert_whole();
    let page = fs::read_to_string(html).expect("a page");
    assert!(
        page.contains("&lt;ours&gt;") && page.contains("theirs"),
        "{page}"
    );
    assert!(!page.contains("<ours"), "{page}");
    for picture in [
        "TTFT, µs",
        "Inter-token latency, µs",
        "TPOT, µs",
        "tokens per second",
    ] {
        assert!(page.contains(picture), "{picture}");
    }
    for foreign in ["src=", "href=", "@import", "url("] {
        assert!(!page.contains(foreign), "the page needs {foreign}");
    }
}

#[test]
fn wrong_arguments_are_refused_with_their_flag() {
    for (arguments, flag) in [
        (&["--name", "a"][..], "--name a"),
        (&[], "--http or --grpc"),
        (&["--http", "https://a"], "--http"),
        (&["--http", "http://a", "--streams", "0"], "--streams"),
        (
            &["--http", "http://a", "--timeout-ms", "never"],
            "--timeout-ms",
        ),
    ] {
        let comparison = compare(arguments);
        assert_eq!(comparison.code, Some(2), "{comparison}");
        assert!(comparison.err.contains(flag), "{comparison}");
        assert_eq!(comparison.out, "", "{comparison}");
    }
}
