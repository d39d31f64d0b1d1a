//! Requests, output, files and exit codes of `tokenway-perf compare`, over servers that stream in any format and end
//! in any way. `planted` tests its figures.

use std::fs;
use std::sync::{Arc, Mutex};

use serde_json::{Value, json};
use support::planted::{PlantedServer, Response, token_record};
use support::{assert_self_contained, comparison::compare, path_text, split_words};

mod support;

/// Returns a body with four tokens as server-sent events.
fn sse_body() -> String {
    let events = (0..4).map(|index| format!("data: {}\n\n", token_record(index, index == 3, None)));
    events.chain(["data: [DONE]\n\n".to_owned()]).collect()
}

/// Returns a body with four tokens as NDJSON.
fn ndjson_body() -> String {
    let lines = (0..4).map(|index| format!("{}\n", token_record(index, index == 3, None)));
    lines.collect()
}

/// Returns a response whose body is sent in chunks of this size, with extensions and trailers.
fn chunked_response(body: &str, size: usize) -> Vec<u8> {
    let mut response = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
    for chunk in body.as_bytes().chunks(size) {
        response.extend_from_slice(format!("{:X};at=\"x\"\r\n", chunk.len()).as_bytes());
        response.extend_from_slice(chunk);
        response.extend_from_slice(b"\r\n");
    }
    response.extend_from_slice(b"0\r\nx-sum: 1\r\n\r\n");
    response
}

fn without_last_chunk(response: &[u8]) -> Vec<u8> {
    let last = b"0\r\nx-sum: 1\r\n\r\n";
    let cut = response.strip_suffix(last);
    cut.expect("it has a last chunk").to_vec()
}

fn response_of_length(body: &str) -> Vec<u8> {
    let length = body.len();
    format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}").into_bytes()
}

fn response_until_close(body: &str) -> Vec<u8> {
    format!("HTTP/1.0 200 OK\r\n\r\n{body}").into_bytes()
}

#[test]
fn a_stream_is_read_in_every_format_and_every_framing() {
    let with_returns = format!(": hello\n\n{}", sse_body()).replace('\n', "\r\n");
    for body in [sse_body(), ndjson_body(), with_returns] {
        let length = body.len();
        for response in [
            chunked_response(&body, 7),
            chunked_response(&body, length),
            response_of_length(&body),
            response_until_close(&body),
        ] {
            let url = PlantedServer::answering(response).url();
            let comparison = compare(&["--http", &url, "--expect-test-runner"]);
            comparison.assert_complete();
            assert_eq!(comparison.round_number("tokens"), 4, "{comparison}");
            let times = ["inter_token", "ttft", "time_per_output_token"];
            let counts = times.map(|time| comparison.time_values(time).len());
            assert_eq!(counts, [3, 1, 1], "{comparison}");
        }
    }
}

#[test]
fn without_stamps_one_way_latency_is_reported_as_unknown() {
    let url = PlantedServer::answering(response_of_length(&sse_body())).url();
    let absent = "timestamps were requested, but the server sends none";
    for (flags, why) in [
        (&[][..], "timestamps were not requested (use --stamps)"),
        (&["--stamps"], absent),
    ] {
        let comparison = compare(&[&["--http", &url, "--name", "it"], flags].concat());
        comparison.assert_complete();
        let reason = format!("it: one-way latency is unknown: {why}");
        assert!(comparison.ran.out.contains(&reason), "{comparison}");
    }
}

#[test]
fn a_stream_without_its_end_is_a_fault() {
    let cut = |body: &str, end: &str| body.strip_suffix(end).expect(end).to_owned();
    let unfinished = |body: &str| body.replace("\"length\"", "null");
    let no_done = cut(&sse_body(), "data: [DONE]\n\n");
    let (cut_event, cut_line) = (cut(&sse_body(), "\n"), cut(&ndjson_body(), "}\n"));
    let after_error = no_done.clone() + "data: {\"error\":\"no\"}\n\n";
    let in_event = "event: error\ndata: gone\n\n";
    let no_last_chunk = without_last_chunk(&chunked_response(&ndjson_body(), 9));
    let refusal = b"HTTP/1.1 503 Busy\r\ncontent-length: 5\r\n\r\nlater".to_vec();
    let no_end = |tokens| format!("after {tokens} tokens without the end of its last record");
    let no_reason = |tokens| format!("after {tokens} tokens without a finish_reason");
    let with_error = |error: &str| format!("with an error after {error}");
    let (sized, closed) = (response_of_length, response_until_close);
    let cases = [
        (sized(&no_done), "after 4 tokens without [DONE]".to_owned()),
        (sized(&cut_event), no_end(4)),
        (sized(&unfinished(&sse_body())), no_reason(4)),
        (closed(&unfinished(&ndjson_body())), no_reason(4)),
        (closed(&cut_line), no_end(3)),
        (sized(""), no_reason(0)),
        (no_last_chunk, "after 4 tokens without its end".to_owned()),
        (sized(&after_error), with_error("4 tokens: no")),
        (sized(in_event), with_error("0 tokens: gone")),
    ];
    let ended = cases.map(|(response, reason)| (response, format!("the stream ended {reason}")));
    let refused = (refusal, "the server refused: 503 Busy: later".to_owned());
    for (response, reason) in ended.into_iter().chain([refused]) {
        let url = PlantedServer::answering(response).url();
        let comparison = compare(&["--http", &url]);
        comparison.assert_failed(&reason);
        assert_eq!(comparison.round_number("lost_requests"), 1, "{comparison}");
    }
}

#[test]
fn a_stream_that_hangs_is_reported_after_its_time_limit() {
    let records = vec![token_record(0, false, None)];
    let server = PlantedServer::sending(records, Response::wait_for_close);
    let comparison = compare(&["--http", &server.url(), "--timeout-ms", "1000"]);
    comparison.assert_failed("the stream hangs: 1 tokens arrived within 1 s");
}

#[test]
fn the_request_has_what_the_arguments_ask_for() {
    let server =
        PlantedServer::start(|_, response| response.write_bytes(&response_of_length(&sse_body())));
    let url = format!("{}/base/", server.url());
    let model = "a \"model\"";
    compare(&["--http", &url, "--model", model, "--stamps"]).assert_complete();
    compare(&["--http", &url, "--form", "ndjson"]).assert_complete();
    let requests = server.requests();
    let parsed = requests.iter().map(|request| {
        let (head, body) = request.split_once("\r\n\r\n").expect("a head");
        let body: Value = serde_json::from_str(body).expect("an object");
        (head, body)
    });
    let [(first, stamped), (second, plain)] = &parsed.collect::<Vec<_>>()[..] else {
        panic!("{requests:?}")
    };
    let line = "POST /base/v1/completions HTTP/1.1\r\n";
    assert!(first.starts_with(line), "{first}");
    assert!(first.contains("accept: text/event-stream\r\n"), "{first}");
    let ndjson = "accept: application/x-ndjson\r\n";
    assert!(second.contains(ndjson), "{second}");
    let prompt = &plain["prompt"];
    let expected = json!({"prompt": prompt, "max_tokens": 4, "stream": true});
    assert_eq!(*plain, expected);
    assert_eq!(stamped["stream_options"], json!({"include_stamps": true}));
    assert_eq!(stamped["model"], model);
}

#[test]
fn servers_take_turns_and_an_open_connection_is_used_again() {
    let turns = Arc::new(Mutex::new(Vec::new()));
    let start = |name: char, answer: Vec<u8>, closes: bool| {
        let turns = Arc::clone(&turns);
        PlantedServer::start(move |_, response| {
            let mut turns = turns.lock().expect("no panic");
            turns.push(format!("{name}{}", response.number));
            response.write_bytes(&answer);
            if closes {
                response.close();
            }
        })
    };
    let kept = start('A', response_of_length(&sse_body()), false).url();
    let closed = start('B', response_until_close(&ndjson_body()), true).url();
    let servers = ["--http", &kept, "--http", &closed];
    let comparison = compare(&[&servers[..], &["--rounds", "2", "--requests", "2"]].concat());
    comparison.assert_complete();
    let turns = turns.lock().expect("no panic").concat();
    assert_eq!(turns, "A1A2B1B1A1A2B1B1");
    for server in comparison.json["servers"].as_array().expect("servers") {
        for round in server["rounds"].as_array().expect("rounds") {
            assert_eq!(round["requests"], 2);
            assert_eq!(round["tokens"], 8);
        }
    }
}

#[test]
fn the_remaining_requests_are_sent_after_one_fails() {
    let count = Mutex::new(0);
    let server = PlantedServer::start(move |_, response| {
        let mut count = count.lock().expect("no panic");
        *count += 1;
        let whole = response_of_length(&ndjson_body());
        response.write_bytes(if *count == 1 { &whole[..40] } else { &whole });
        if *count == 1 {
            response.close();
        }
    });
    let comparison = compare(&["--http", &server.url(), "--requests", "3"]);
    assert_eq!(comparison.ran.code, Some(1), "{comparison}");
    let numbers = ["requests", "lost_requests"].map(|name| comparison.round_number(name));
    assert_eq!(numbers, [2, 1], "{comparison}");
}

#[test]
fn the_page_has_every_server_and_is_self_contained() {
    let folder = tempfile::tempdir().expect("a folder");
    let html = folder.path().join("page.html");
    let url = PlantedServer::answering(response_of_length(&sse_body())).url();
    let names = [
        "--http", &url, "--name", "<ours>", "--http", &url, "--name", "theirs",
    ];
    let comparison = compare(&[&names[..], &["--html", path_text(&html)]].concat());
    comparison.assert_complete();
    let page = fs::read_to_string(html).expect("a page");
    for name in ["&lt;ours&gt;", "theirs"] {
        assert!(page.contains(name), "{page}");
    }
    assert!(!page.contains("<ours"), "{page}");
    let charts = ["TTFT, µs", "Inter-token latency, µs", "TPOT, µs"];
    for chart in charts.into_iter().chain(["tokens per second"]) {
        assert!(page.contains(chart), "{chart}");
    }
    assert_self_contained(&page);
}

#[test]
fn wrong_arguments_are_refused_with_their_flag() {
    for (arguments, flag) in [
        ("--name a", "--name a"),
        ("", "--http or --grpc"),
        ("--http https://a", "--http"),
        ("--http http://a --streams 0", "--streams"),
        ("--http http://a --timeout-ms never", "--timeout-ms"),
    ] {
        let comparison = compare(&split_words(arguments).collect::<Vec<_>>());
        assert_eq!(comparison.ran.code, Some(2), "{comparison}");
        assert!(comparison.ran.err.contains(flag), "{comparison}");
        assert_eq!(comparison.ran.out, "", "{comparison}");
    }
}
