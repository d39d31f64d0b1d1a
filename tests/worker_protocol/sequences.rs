//! Sequences and tokenizer calls on a worker: their messages, and what the engine does when the worker rejects
//! them, answers wrongly or is lost.

use super::*;

/// Runs one request on one worker after the other. Each worker calls `before_leaving` and then ends its stream.
/// Returns the number of resumptions and the error of the request.
async fn resumptions(before_leaving: impl AsyncFn(&Worker, u64, u32)) -> (f64, HttpError) {
    let engine = start_engine(|_| ()).await;
    let mut worker = engine.connect_ready_worker().await;
    let request = post("/v1/completions", r#"{"prompt": [5], "max_tokens": 90}"#);
    let address = engine.server.http_address();
    let response = tokio::spawn(async move {
        let mut response = request.send_to(&address).await;
        let (code, param) = response.read_rest().await.error();
        (response.status, code, param)
    });
    let (question, _) = worker.next_call().await;
    worker
        .answer_tokenizer_call(question, Answer::Pieces(one_token_piece()))
        .await;
    for index in 0.. {
        let sequence = worker.next_submit().await.sequence;
        before_leaving(&worker, sequence, index).await;
        worker.end_stream().await;
        if index == 8 {
            break;
        }
        worker = engine.connect_another(&index.to_string()).await;
    }
    let error = response.await.expect("the task does not panic");
    let resumptions = MetricsSnapshot::take(&engine.server).get("tokenway_resumptions_total");
    (resumptions, error)
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_after_each_token_ends_with_worker_lost() {
    let make = async |worker: &Worker, sequence, index| worker.emit_token(sequence, index).await;
    let worker_lost = expected_error(502, "worker_lost", None);
    assert_eq!(resumptions(make).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_request_whose_workers_are_lost_before_they_accept_it_ends_with_worker_lost() {
    let nothing = async |_: &Worker, _, _| ();
    let worker_lost = expected_error(502, "worker_lost", None);
    assert_eq!(resumptions(nothing).await, (8.0, worker_lost));
}

#[tokio::test]
async fn a_worker_over_the_step_limit_is_lost() {
    let engine = start_engine(|setup| {
        setup.engine().workers.timeouts.step_limit = Some(Duration::from_secs(1));
    })
    .await;
    let mut worker = engine.connect_ready_worker().await;
    worker
        .send(Sent::Heartbeat(proto::Heartbeat {
            step_ms: 1_001,
            prefix_cache: None,
        }))
        .await;
    let status = worker
        .receive()
        .await
        .expect_err("the step limit is exceeded");
    assert!(status.message().contains("step limit"), "{status:?}");
    engine.server.wait_until_not_ready().await;
}

#[tokio::test]
async fn worker_messages_become_the_clients_tokens() {
    let engine = start_engine(|_| ()).await;
    let mut worker = engine.connect_ready_worker().await;
    let client = engine.server.grpc().await;
    let response = tokio::spawn(async move {
        let mut client = client;
        let stream = client.complete(grpc::request("hi", 3)).await;
        grpc::collect(stream.expect("the request is admitted").into_inner()).await
    });
    let (question, operation) = worker.next_call().await;
    let tokenize = proto::Tokenize {
        text: "hi".to_owned(),
        begins: true,
    };
    assert_eq!(operation, Operation::Tokenize(tokenize));
    let ids = vec![7, 8];
    worker
        .answer_tokenizer_call(question, Answer::Ids(v1::TokenIds { ids }))
        .await;
    let submit = worker.next_submit().await;
    assert_eq!((submit.generation, submit.credit), (1, 3));
    let request = submit.request.expect("a submit carries its request");
    let ids = v1::TokenIds { ids: vec![7, 8] };
    assert_eq!(request.input, Some(Input::PromptTokenIds(ids)));
    assert_eq!(request.max_tokens, Some(3));
    let sequence = submit.sequence;
    worker
        .send(Sent::Accepted(proto::Accepted {
            sequence,
            cached_tokens: 0,
        }))
        .await;
    // One character that is spread over two tokens, followed by the end-of-sequence token.
    let entry = proto::SequenceStep {
        sequence,
        ids: proto::PackedVarints::from_iter([1, 2, 3]),
        bytes: "é".as_bytes().to_vec(),
        lengths: proto::PackedVarints::from_iter([1, 1, 0]),
        end: proto::End::Stop.into(),
        ..proto::SequenceStep::default()
    };
    let sequences = vec![entry];
    worker.send(Sent::Step(proto::Step { sequences })).await;
    let completion = response.await.expect("the task does not panic");
    assert_eq!(completion.texts(0), ["", "é", ""]);
    assert_eq!(completion.usage().completion_tokens, 3);
}

#[tokio::test]
async fn crashed_choices_resume_one_at_a_time_and_fail_on_the_second_crash() {
    let engine = start_engine(|_| ()).await;
    let mut worker = engine.connect_ready_worker().await;
    let mut client = engine.server.grpc().await;
    let request = v1::CompletionRequest {
        n: Some(2),
        ..grpc::request("hi", 9)
    };
    let response = tokio::spawn(async move {
        let stream = client.complete(request).await;
        grpc::collect(stream.expect("the request is admitted").into_inner()).await
    });
    let (question, _) = worker.next_call().await;
    let ids = v1::TokenIds { ids: vec![7] };
    worker
        .answer_tokenizer_call(question, Answer::Ids(ids))
        .await;
    let (first, second) = (worker.next_submit().await, worker.next_submit().await);
    for submit in [&first, &second] {
        worker.emit_token(submit.sequence, 0).await;
    }
    let crashes = |generation| {
        let again = Sent::Ready(proto::Ready {
            generation,
            ..ready_message()
        });
        [Sent::Crashed(proto::Crashed::default()), again]
    };
    for message in crashes(2) {
        worker.send(message).await;
    }
    // Either choice may have caused the crash. The second choice is therefore resumed only after the first one has a
    // token.
    let one = worker.next_submit().await;
    worker.emit_token(one.sequence, 1).await;
    let other = worker.next_submit().await;
    for again in [&one, &other] {
        assert_eq!((&*again.delivered, again.generation), (&[0][..], 2));
    }
    let mut resumed = [one.choice, other.choice];
    resumed.sort_unstable();
    assert_eq!(resumed, [first.choice, second.choice]);
    for message in crashes(3) {
        worker.send(message).await;
    }
    let error = response.await.expect("the task does not panic").error;
    assert_eq!(
        error.map(|error| Error::from(&error).kind),
        Some(ErrorKind::WorkerLost)
    );
}

#[tokio::test]
async fn a_workers_rejection_reaches_the_client() {
    let engine = start_engine(|_| ()).await;
    let mut worker = engine.connect_ready_worker().await;
    let address = engine.server.http_address();
    let post_json = |path: &str, body: serde_json::Value| {
        let request = post(path, body.to_string());
        let address = address.clone();
        tokio::spawn(async move {
            let mut response = request.send_to(&address).await;
            (response.status, response.read_rest().await.error())
        })
    };
    let failure = |is_invalid| proto::Failure {
        is_invalid,
        message: "not this text".to_owned(),
    };
    for (is_invalid, status, code) in [(true, 400, "invalid_value"), (false, 500, "internal_error")]
    {
        let response = post_json("/tokenize", json!({"prompt": "hi"}));
        let (question, _) = worker.next_call().await;
        worker
            .answer_tokenizer_call(question, Answer::Failure(failure(is_invalid)))
            .await;
        let (actual_status, (actual_code, _)) = response.await.expect("the task does not panic");
        assert_eq!((actual_status, &*actual_code), (status, code));
    }
    let response = post_json("/v1/completions", json!({"prompt": [5], "max_tokens": 2}));
    let (question, operation) = worker.next_call().await;
    assert_eq!(
        operation,
        Operation::Detokenize(proto::Detokenize { ids: vec![5] })
    );
    let pieces = proto::Pieces {
        bytes: b"x".to_vec(),
        lengths: vec![1],
    };
    worker
        .answer_tokenizer_call(question, Answer::Pieces(pieces))
        .await;
    let sequence = worker.next_submit().await.sequence;
    let failure = Some(failure(true));
    worker
        .send(Sent::Refused(proto::Refused { sequence, failure }))
        .await;
    let (status, (code, _)) = response.await.expect("the task does not panic");
    assert_eq!((status, &*code), (400, "invalid_value"));
}

#[tokio::test]
async fn an_invalid_prompt_score_moves_the_request_to_another_worker() {
    let engine = start_engine(|_| ()).await;
    let mut wrong = engine.connect_ready_worker().await;
    let body = json!({"prompt": [5], "max_tokens": 1, "echo": true, "logprobs": 0});
    let response = engine.post("/v1/completions", &body);
    let (question, _) = wrong.next_call().await;
    wrong
        .answer_tokenizer_call(question, Answer::Pieces(one_token_piece()))
        .await;
    let sequence = wrong.next_submit().await.sequence;
    let mut right = engine.connect_another("right").await;
    wrong
        .send(Sent::Accepted(proto::Accepted {
            sequence,
            cached_tokens: 0,
        }))
        .await;
    let completion = scored_step_entry(sequence, 7, proto::End::Length);
    wrong.send(step_message(completion)).await;
    let status = wrong.wait_for_end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(
        status
            .message()
            .contains("before the last of its prompt tokens"),
        "{status:?}"
    );
    let submit = right.next_submit().await;
    assert!(submit.request.is_some_and(|request| request.echo));
    let sequence = submit.sequence;
    right
        .send(Sent::Accepted(proto::Accepted {
            sequence,
            cached_tokens: 0,
        }))
        .await;
    let prompt = proto::SequenceStep {
        is_prompt: true,
        ..scored_step_entry(sequence, 5, proto::End::Unspecified)
    };
    right.send(step_message(prompt)).await;
    let completion = scored_step_entry(sequence, 7, proto::End::Length);
    right.send(step_message(completion)).await;
    assert_eq!(response.await.expect("the task does not panic"), 200);
}

#[tokio::test]
async fn a_mismatched_tokenizer_answer_loses_the_worker_and_another_is_asked() {
    let engine = start_engine(|_| ()).await;
    let [mut wrong, mut right] = engine.two_workers().await;
    let (posts, question) = engine.call_both_workers(&mut wrong, &mut right).await;
    let text = Answer::Text("no ids".to_owned());
    wrong.answer_tokenizer_call(question, text).await;
    let status = wrong.wait_for_end().await;
    assert_eq!(status.code(), Code::FailedPrecondition);
    assert!(status.message().contains("does not match"), "{status:?}");
    let (question, _) = right.next_call().await;
    right
        .answer_tokenizer_call(question, token_ids_answer())
        .await;
    for post in posts {
        assert_eq!(post.await.expect("the task does not panic"), 200);
    }
}

#[tokio::test]
async fn a_tokenizer_call_timeout_loses_the_worker_and_another_is_asked() {
    let engine = start_engine(|setup| {
        setup.engine().workers.timeouts.tokenizer_call_timeout = Duration::from_millis(500);
    })
    .await;
    let [mut slow, mut right] = engine.two_workers().await;
    let (posts, _) = engine.call_both_workers(&mut slow, &mut right).await;
    let (question, _) = right.next_call().await;
    right
        .answer_tokenizer_call(question, token_ids_answer())
        .await;
    for post in posts {
        assert_eq!(post.await.expect("the task does not panic"), 200);
    }
    let status = slow.wait_for_end().await;
    assert_eq!(status.code(), Code::DeadlineExceeded);
    let reason = "did not answer its tokenizer calls";
    assert!(status.message().contains(reason), "{status:?}");
}
