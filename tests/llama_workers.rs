//! A real model on worker processes that are killed: a resumed stream has the same tokens as an undisturbed one.

mod support;

use futures_util::future::join_all;
use rustix::process::Signal;
use support::grpc::{self, collect_from};
use support::model_path;
use support::program::start_server;
use tokenway::proto::v1;
use tokenway::proto::v1::inference_client::InferenceClient;
use tonic::transport::Channel;

const TOKENS: u32 = 60;

/// A prompt of more than 64 tokens, so that the device computes it with another kernel than the completion. The second
/// round of requests reuses the prompt. After a worker was killed, the next worker computes the prompt again.
const PROMPT: &str = "Once upon a time there was a lighthouse on a rock far out in the sea. An old keeper and his granddaughter lived in \
    it. Every evening, when the sun went down, they climbed the two hundred steps to the top and lit the great lamp, so that no ship \
    came too near to the rock. One night in autumn, when the wind was stronger than ever before, the lamp went out. The keeper";

/// Returns a request in which each token depends on all previous tokens, through sampling, penalties and a stop
/// string.
fn request(seed: i64) -> v1::CompletionRequest {
    v1::CompletionRequest {
        seed: Some(seed),
        presence_penalty: Some(0.5),
        repetition_penalty: Some(1.1),
        logprobs: Some(2),
        ignore_eos: true,
        stop: vec!["a stop string that never comes".to_owned()],
        ..grpc::request(PROMPT, TOKENS)
    }
}

async fn stream(
    client: &InferenceClient<Channel>,
    seed: i64,
    progress: impl FnMut(u32),
) -> Vec<v1::Token> {
    let stream = client.clone().complete(request(seed)).await;
    let completion = collect_from(
        stream.expect("the request is admitted").into_inner(),
        progress,
    )
    .await;
    assert!(completion.error.is_none(), "{:?}", completion.error);
    completion
        .choices
        .into_iter()
        .next()
        .expect("a choice")
        .tokens
}

#[tokio::test]
async fn killing_workers_does_not_change_the_tokens_of_a_real_model() {
    let path = model_path();
    let path = path.to_str().expect("a path in UTF-8");
    let arguments = [
        "--isolation",
        "process",
        "--workers",
        "2",
        "--slots",
        "6",
        "--threads",
        "1",
        "--model-path",
        path,
    ];
    let (server, [_, grpc_url]) = start_server(&arguments).await;
    let client = InferenceClient::connect(grpc_url)
        .await
        .expect("the server accepts connections");
    let undisturbed = join_all((0..6).map(|seed| stream(&client, seed, |_| ()))).await;
    let others = join_all((1..6).map(|seed| stream(&client, seed, |_| ())));
    let mut faults = [15, 40].into_iter().peekable();
    let with_faults = stream(&client, 0, |count| {
        if faults.next_if(|at| *at < count).is_some() {
            for worker in server.children() {
                server.signal_child(worker, Signal::KILL);
            }
        }
    });
    let (with_faults, others) = tokio::join!(with_faults, others);
    let resumed: Vec<_> = std::iter::once(with_faults).chain(others).collect();
    assert_eq!(resumed, undisturbed);
    assert!(resumed.iter().all(|tokens| tokens.len() == 60));
}
