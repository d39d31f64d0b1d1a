//! What the program says of doors with a planted fault.

use serde_json::json;

use crate::doors::{FakeGrpcDoor, FakeHttpDoor, Summary, chunked, token_line, token_lines};
use crate::program::{Outcome, run_at_full_speed};

/// What the program says of an HTTP door that answers this to a request for four tokens.
async fn judge(answer: impl Into<Vec<u8>>) -> Outcome {
    let door = FakeHttpDoor::open().await;
    let url = door.url();
    let arguments = ["--http", &url];
    let (_, outcome) = tokio::join!(
        door.answer(answer.into()),
        run_at_full_speed("4", &arguments)
    );
    outcome
}

#[tokio::test]
async fn the_request_asks_for_lines_with_stamps() {
    let door = FakeHttpDoor::open().await;
    let url = format!("{}/base/", door.url());
    let arguments = ["--http", &url, "--model", "m"];
    let answer = chunked(&token_lines(&[0, 1, 2, 3]));
    let (request, _) = tokio::join!(door.answer(answer), run_at_full_speed("4", &arguments));
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let head: Vec<_> = head.split("\r\n").collect();
    assert_eq!(head[0], "POST /base/v1/completions HTTP/1.1");
    assert!(head.contains(&"accept: application/x-ndjson"), "{head:?}");
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let stream_options = json!({"include_stamps": true});
    let expected = json!({
        "model": "m", "prompt": body["prompt"], "max_tokens": 4, "stream": true,
        "stream_options": stream_options,
    });
    assert_eq!(body, expected);
}

#[tokio::test]
async fn a_door_without_stamps_is_measured_and_said_to_have_none() {
    let outcome = judge(chunked(&token_lines(&[0, 1, 2, 3]))).await;
    assert_eq!(outcome.code, Some(0), "{outcome}");
    let figures = outcome.figures("HTTP");
    figures.assert_consistent(4.0, 0.0);
    assert_eq!(
        figures.rest,
        ["One-way latency: unknown, the server sends no stamps"]
    );
}

#[tokio::test]
async fn tokens_out_of_order_are_told_as_what_they_are() {
    let table: [(&[u32], &str); 5] = [
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
    for (indices, reason) in table {
        judge(chunked(&token_lines(indices)))
            .await
            .assert_failed(&format!("HTTP: {reason}"));
        let door = FakeGrpcDoor::open().await;
        let address = door.address();
        let arguments = ["--grpc", &address];
        door.serve_while(run_at_full_speed("4", &arguments), indices, Summary::Sent)
            .await
            .assert_failed(&format!("gRPC: {reason}"));
    }
}

#[tokio::test]
async fn a_body_without_its_last_chunk_was_cut_off() {
    let whole = chunked(&token_lines(&[0, 1, 2, 3]));
    let cut = whole.strip_suffix(b"0\r\n\r\n").unwrap();
    let outcome = judge(cut).await;
    assert_eq!(outcome.code, Some(1), "{outcome}");
    let reason = "error: HTTP: the stream was cut off after 4 tokens: ";
    assert!(outcome.err.starts_with(reason), "{outcome}");
    assert_eq!(outcome.err.lines().count(), 1, "{outcome}");
}

#[tokio::test]
async fn a_body_without_a_finish_reason_was_cut_off() {
    let lines: String = (0..4).map(|index| token_line(index, None)).collect();
    judge(chunked(&lines))
        .await
        .assert_failed("HTTP: the stream was cut off after 4 tokens: no line has a finish_reason");
}

#[tokio::test]
async fn a_stream_of_events_without_its_summary_was_cut_off() {
    let door = FakeGrpcDoor::open().await;
    let address = door.address();
    let arguments = ["--grpc", &address];
    let run = run_at_full_speed("4", &arguments);
    door.serve_while(run, &[0, 1, 2, 3], Summary::Missing)
        .await
        .assert_failed("gRPC: the stream was cut off after 4 tokens: there is no summary");
}

#[tokio::test]
async fn an_answer_in_another_form_is_no_stream() {
    let body = "data: [DONE]\n\n";
    let length = body.len();
    let answer = format!(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncontent-length: {length}\r\n\r\n{body}"
    );
    judge(answer).await.assert_failed(
        "HTTP: the server answered with 'text/event-stream', and application/x-ndjson was asked for",
    );
}

#[tokio::test]
async fn another_models_tokens_are_not_the_test_runners() {
    let line = json!({"choices": [{"text": " Paris", "finish_reason": null}]});
    judge(chunked(&format!("{line}\n"))).await.assert_failed(
        "HTTP: place 0 has the token \" Paris\", and the test runner's are token_0, token_1, …",
    );
}
