//! Tests of completions that go on when the stream of a remote engine breaks or falls silent.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::error::ErrorKind;
use crate::tokens::{Timestamps, TokenBatch};

type Item = Result<v1::CompletionEvent, Status>;

fn tokens(choice: u32, first_index: u32, tokens: &[(u32, &str)], ended: bool) -> Item {
    let mut batch = TokenBatch::default();
    for (id, text) in tokens {
        batch.push_with(*id, Timestamps::default(), |out| out.push_str(text));
    }
    let finish_reason = match ended {
        true => v1::FinishReason::Stop,
        false => v1::FinishReason::Unspecified,
    };
    let event = Event::Tokens(v1::Tokens {
        choice,
        first_index,
        tokens: batch,
        finish_reason: finish_reason.into(),
    });
    Ok(v1::CompletionEvent { event: Some(event) })
}

fn started_with(model: &str, seed: i64) -> Item {
    let event = Event::Started(v1::Started {
        model: model.to_owned(),
        seed,
        prompt_tokens: 3,
        ..v1::Started::default()
    });
    Ok(v1::CompletionEvent { event: Some(event) })
}

fn summary_of(completion_tokens: u32) -> Item {
    let usage = v1::Usage {
        prompt_tokens: 3,
        completion_tokens,
        ..v1::Usage::default()
    };
    let event = Event::Summary(v1::Summary {
        usage: Some(usage),
        timings: None,
    });
    Ok(v1::CompletionEvent { event: Some(event) })
}

fn broken() -> Item {
    Err(Status::unknown("h2"))
}

fn request() -> v1::CompletionRequest {
    v1::CompletionRequest {
        input: Some(Input::Prompt("p".to_owned())),
        max_tokens: Some(9),
        ..v1::CompletionRequest::default()
    }
}

/// Creates an engine that sends these events and nothing more.
fn sending(events: Vec<Item>) -> ScriptedEngine {
    engine(move |_| Ok(Box::pin(tokio_stream::iter(events.clone()))))
}

/// Creates an engine that sends these events and then falls silent.
fn falling_silent_after(events: Vec<Item>) -> ScriptedEngine {
    engine(move |_| {
        let events = tokio_stream::iter(events.clone());
        Ok(Box::pin(events.chain(tokio_stream::pending())))
    })
}

/// Creates an engine that resumes with `rest`, if it is asked for what `expected` describes.
fn resuming(
    expected: impl Fn(&v1::CompletionRequest) + Send + Sync + 'static,
    rest: Vec<Item>,
) -> ScriptedEngine {
    engine(move |request| {
        expected(request);
        Ok(Box::pin(tokio_stream::iter(rest.clone())))
    })
}

async fn run(cluster: &Cluster, request: v1::CompletionRequest) -> Vec<Result<Event, Error>> {
    let events = cluster.complete(request, &call_context()).await;
    events
        .map_err(Error::from)
        .expect("it is admitted")
        .collect()
        .await
}

/// What a client has seen of a completion.
#[derive(Debug, Default, PartialEq)]
struct Seen {
    models: Vec<String>,
    /// Index, id and text of the tokens of each choice.
    tokens: Vec<Vec<(u32, u32, String)>>,
    usage: Option<v1::Usage>,
    resumptions: Vec<(u32, v1::ResumptionMethod)>,
    errors: Vec<ErrorKind>,
}

fn seen(events: Vec<Result<Event, Error>>) -> Seen {
    let mut seen = Seen::default();
    for event in events {
        match event {
            Ok(Event::Started(started)) => seen.models.push(started.model),
            Ok(Event::Tokens(tokens)) => {
                let choice = usize::try_from(tokens.choice).expect("a choice");
                if seen.tokens.len() <= choice {
                    seen.tokens.resize(choice + 1, Vec::new());
                }
                for (at, token) in (tokens.first_index..).zip(tokens.tokens.iter()) {
                    seen.tokens[choice].push((at, token.id, token.text.to_owned()));
                }
            }
            Ok(Event::Summary(summary)) => {
                seen.usage = summary.usage;
                let timings = summary.timings.unwrap_or_default();
                seen.resumptions
                    .push((timings.resumptions, timings.resumption_method()));
            }
            Ok(Event::Prompt(_) | Event::Chat(_)) => panic!("unexpected event"),
            Err(error) => seen.errors.push(error.kind),
        }
    }
    seen
}

fn numbered(tokens: &[(u32, &str)]) -> Vec<(u32, u32, String)> {
    let tokens = (0..).zip(tokens);
    tokens
        .map(|(at, (id, text))| (at, *id, (*text).to_owned()))
        .collect()
}

#[tokio::test(start_paused = true)]
async fn a_stream_is_resumed_after_the_delivered_ids() {
    let first = sending(vec![
        started_with("m", 42),
        tokens(0, 0, &[(5, "a"), (6, "b")], false),
        broken(),
    ]);
    let second = resuming(
        |request| {
            assert_eq!(request.seed, Some(42));
            assert_eq!(request.resume[0].token_ids, [5, 6]);
        },
        vec![
            started_with("m", 42),
            tokens(0, 2, &[(7, "c")], true),
            summary_of(3),
        ],
    );
    let seen = seen(run(&cluster([first, second]), request()).await);
    assert_eq!(seen.models, ["m"]);
    assert_eq!(seen.tokens, [numbered(&[(5, "a"), (6, "b"), (7, "c")])]);
    assert_eq!(seen.resumptions, [(1, v1::ResumptionMethod::Resume)]);
    assert_eq!(seen.usage.map(|usage| usage.completion_tokens), Some(3));
    assert_eq!(seen.errors, []);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_breaks_before_its_first_token_is_never_seen() {
    let first = sending(vec![started_with("first", 1), broken()]);
    let second = sending(vec![
        started_with("second", 2),
        tokens(0, 0, &[(5, "a")], true),
        summary_of(1),
    ]);
    let seen = seen(run(&cluster([first, second]), request()).await);
    assert_eq!(seen.models, ["second"]);
    assert_eq!(seen.resumptions, [(0, v1::ResumptionMethod::Unspecified)]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_falls_silent_is_resumed_after_ten_seconds() {
    let first = falling_silent_after(vec![started_with("m", 1), tokens(0, 0, &[(5, "a")], false)]);
    let second = sending(vec![
        started_with("m", 1),
        tokens(0, 1, &[(6, "b")], true),
        summary_of(2),
    ]);
    let start = Instant::now();
    let seen = seen(run(&cluster([first, second]), request()).await);
    assert_eq!(seen.tokens, [numbered(&[(5, "a"), (6, "b")])]);
    let waited = start.elapsed().as_secs();
    assert!((10..12).contains(&waited), "{waited} s");
}

#[tokio::test(start_paused = true)]
async fn without_another_engine_the_first_token_is_waited_for() {
    let cluster = cluster([falling_silent_after(vec![started_with("m", 1)])]);
    let mut events = complete(&cluster).await.unwrap();
    assert_eq!(started_by(&mut events).await, "m");
    let most_of_a_minute = Duration::from_secs(55);
    assert!(timeout(most_of_a_minute, events.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_silent_stream_ends_at_the_requests_deadline() {
    let cluster = cluster([falling_silent_after(vec![started_with("m", 1)])]);
    let start = Instant::now();
    let seen = seen(run(&cluster, request()).await);
    assert_eq!(seen.errors, [ErrorKind::DeadlineExceeded]);
    let waited = start.elapsed().as_secs();
    assert!((60..63).contains(&waited), "{waited} s");
}

#[tokio::test(start_paused = true)]
async fn only_an_engine_that_knows_the_deadline_gets_time_to_report_it() {
    let silent = || {
        let events = vec![started_with("m", 1)];
        remote_engine(falling_silent_after(events), Health::always_up())
    };
    let foreign = || -> Arc<dyn Upstream> {
        Arc::new(WrappedUpstream::new(silent()).without(Parameter::Suffix))
    };
    for (upstream, expected) in [(silent(), 61), (foreign(), 60)] {
        let start = Instant::now();
        let seen = seen(run(&cluster_of(vec![upstream]), request()).await);
        assert_eq!(seen.errors, [ErrorKind::DeadlineExceeded]);
        assert_eq!(start.elapsed().as_secs(), expected);
    }
}

#[tokio::test(start_paused = true)]
async fn the_wait_in_a_tokenway_engines_queue_is_no_silence() {
    let queued = falling_silent_after(Vec::new());
    let other = sending(vec![started_with("other", 1)]);
    let mut events = complete(&cluster([queued, other])).await.unwrap();
    let most_of_a_minute = Duration::from_secs(55);
    assert!(timeout(most_of_a_minute, events.next()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn an_ended_choice_is_resumed_without_its_last_token_and_not_repeated() {
    let first = sending(vec![
        started_with("m", 1),
        tokens(0, 0, &[(5, "a")], false),
        tokens(1, 0, &[(8, "x"), (9, "y")], true),
        broken(),
    ]);
    let second = resuming(
        |request| {
            let resumed: Vec<_> = request.resume.iter().map(|it| &it.token_ids[..]).collect();
            assert_eq!(resumed, [&[5][..], &[8]]);
        },
        vec![
            started_with("m", 1),
            tokens(1, 1, &[(9, "y")], true),
            tokens(0, 1, &[(6, "b")], true),
            summary_of(4),
        ],
    );
    let request = v1::CompletionRequest {
        n: Some(2),
        ..request()
    };
    let seen = seen(run(&cluster([first, second]), request).await);
    let expected = [
        numbered(&[(5, "a"), (6, "b")]),
        numbered(&[(8, "x"), (9, "y")]),
    ];
    assert_eq!(seen.tokens, expected);
}

#[tokio::test(start_paused = true)]
async fn a_whole_text_without_a_summary_is_whole() {
    let first = sending(vec![
        started_with("m", 1),
        tokens(0, 0, &[(5, "a"), (6, "b")], true),
        broken(),
    ]);
    let requests = Arc::new(AtomicUsize::new(0));
    let second = resuming(
        {
            let requests = Arc::clone(&requests);
            move |_| {
                requests.fetch_add(1, Ordering::Relaxed);
            }
        },
        Vec::new(),
    );
    let seen = seen(run(&cluster([first, second]), request()).await);
    let usage = seen.usage.expect("a usage");
    assert_eq!((usage.prompt_tokens, usage.completion_tokens), (3, 2));
    assert_eq!((seen.errors, requests.load(Ordering::Relaxed)), (vec![], 0));
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_cannot_resume_replays_the_request() {
    let first = sending(vec![
        started_with("m", 42),
        tokens(0, 0, &[(5, "a"), (6, "b")], false),
        broken(),
    ]);
    let second = engine(|request| {
        if !request.resume.is_empty() || request.input != self::request().input {
            let message = "The model 'm' does not support `resume`.";
            let error = Error::new(ErrorKind::UnsupportedParameter, message);
            return Err(error.with_param("resume").into());
        }
        assert_eq!(request.seed, Some(42));
        Ok(Box::pin(tokio_stream::iter(vec![
            started_with("m", 42),
            tokens(0, 0, &[(5, "a"), (6, "b"), (7, "c")], true),
            summary_of(3),
        ])))
    });
    let seen = seen(run(&cluster([first, second]), request()).await);
    assert_eq!(seen.tokens, [numbered(&[(5, "a"), (6, "b"), (7, "c")])]);
    assert_eq!(seen.resumptions, [(1, v1::ResumptionMethod::Replay)]);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_no_engine_continues_ends_with_the_first_failure() {
    let first = sending(vec![
        started_with("m", 1),
        tokens(0, 0, &[(5, "a")], false),
        broken(),
    ]);
    let full = rejecting_engine(ErrorKind::Draining);
    let seen = seen(run(&cluster([first, full]), request()).await);
    assert_eq!(seen.tokens, [numbered(&[(5, "a")])]);
    assert_eq!(seen.errors, [ErrorKind::UpstreamError]);
    assert_eq!(seen.usage, None);
}

#[tokio::test(start_paused = true)]
async fn a_gap_after_the_seam_is_a_failure_and_not_passed_on() {
    let first = sending(vec![
        started_with("m", 1),
        tokens(0, 0, &[(5, "a")], false),
        broken(),
    ]);
    let wrong = sending(vec![
        started_with("m", 1),
        tokens(0, 2, &[(7, "c")], true),
        summary_of(3),
    ]);
    let seen = seen(run(&cluster([first, wrong]), request()).await);
    assert_eq!(seen.tokens, [numbered(&[(5, "a")])]);
    assert_eq!(seen.errors.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_often_does_not_use_up_the_retry_budget() {
    let breaking = engine(|request| {
        let resumed = request.resume.first();
        let next = resumed.map_or(0, |it| u32::try_from(it.token_ids.len()).unwrap());
        let is_last = next == 16 || request.max_tokens == Some(1);
        let end = if is_last {
            summary_of(next + 1)
        } else {
            broken()
        };
        let token = tokens(0, next, &[(5, "a")], is_last);
        let events = vec![started_with("m", 1), token, end];
        Ok(Box::pin(tokio_stream::iter(events)))
    });
    // Each resumption is tried here first, while the other engine recovers.
    let busy = engine(|request| {
        if request.max_tokens != Some(1) {
            return Err(Error::new(ErrorKind::QueueFull, "The queue is full.").into());
        }
        let events = vec![
            started_with("m", 1),
            tokens(0, 0, &[(5, "a")], true),
            summary_of(1),
        ];
        Ok(Box::pin(tokio_stream::iter(events)))
    });
    let cluster = cluster([breaking, busy]);
    let of_length = |max_tokens| v1::CompletionRequest {
        max_tokens: Some(max_tokens),
        ..request()
    };
    for _ in 0..20 {
        assert_eq!(seen(run(&cluster, of_length(1)).await).errors, []);
    }
    let seen = seen(run(&cluster, of_length(17)).await);
    assert_eq!(seen.errors, []);
    assert_eq!(seen.tokens[0].len(), 17);
}
