//! lm-eval on a real model over the HTTP API. The client side of each test is the function of the same name in
//! `tests/clients/lm_eval_client.py`.

mod support;

use std::sync::Arc;

use support::program::lm_eval;
use support::{Setup, model_path};
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

async fn run(case: &str) {
    let options = LlamaOptions {
        model_path: model_path(),
        threads: 1,
        context_length: None,
        ..LlamaOptions::default()
    };
    let loader = Arc::new(LlamaLoader::new(options));
    let server = Setup::runner("smollm2", loader, 8).start().await;
    let cache = tempfile::tempdir().expect("a temporary folder");
    let program = lm_eval("tests/clients/lm_eval_client.py").arg(case);
    let program = program.arg(server.http_url()).env("HF_HOME", cache.path());
    program.run().await.expect_success();
}

#[tokio::test]
async fn the_right_choice_scores_highest() {
    run("the_right_choice_scores_highest").await;
}

#[tokio::test]
async fn the_right_answer_is_generated() {
    run("the_right_answer_is_generated").await;
}
