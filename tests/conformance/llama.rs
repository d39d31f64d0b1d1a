//! Runs every row of the conformance table (`table.rs`) against a real model.

use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};

use crate::support::Setup;
use crate::table::{ExpectedEnd, STOP, chat, completion};
use crate::transport::{Servers, Transport};
use crate::{PROMPT, TableModel, assert_all_transports_agree, assert_expected_end, assert_table};

const CONTEXT_LENGTH: u32 = 2_048;

async fn servers() -> Servers {
    let loader = LlamaLoader::new(LlamaOptions {
        model_path: crate::support::model_path(),
        threads: 1,
        context_length: None,
        ..LlamaOptions::default()
    });
    Servers::start(Setup::runner("smollm2", Arc::new(loader), 4)).await
}

fn model() -> TableModel {
    TableModel {
        name: "smollm2",
        stop: " United",
        stop_id: 30,
        biased_id: 100,
        context_length: CONTEXT_LENGTH,
    }
}

#[tokio::test]
async fn every_transport_returns_the_same_for_a_real_model() {
    let servers = servers().await;
    assert_table(&servers, &model()).await;
}

#[tokio::test]
async fn the_eos_of_a_real_model_is_the_same_over_every_transport() {
    let servers = servers().await;
    let turn = "<|im_start|>user\nSay only: yes<|im_end|>\n<|im_start|>assistant\n";
    let fields = json!({"temperature": 0, "max_tokens": 200, "logprobs": 1});
    for row in [
        completion("an end of sequence", &json!(turn), &fields, STOP),
        chat(
            "an end of a chat",
            &json!("Say only: yes"),
            &json!({"temperature": 0}),
            STOP,
        ),
        completion(
            "an id outside the vocabulary",
            &json!([1, 1_000_000]),
            &json!({}),
            ExpectedEnd::Failing("invalid_value"),
        ),
    ] {
        assert_all_transports_agree(&servers, &row).await;
    }
}

#[tokio::test]
async fn an_expired_deadline_on_a_real_model_is_the_same_error_over_every_transport() {
    let servers = servers().await;
    let fields = json!({"max_tokens": 2_000, "ignore_eos": true});
    let ends = ExpectedEnd::Failing("deadline_exceeded");
    let row = completion("a deadline", &json!(PROMPT), &fields, ends);
    let row = row.with_deadline(Duration::from_millis(300));
    for transport in Transport::ALL {
        // The number of tokens before the deadline varies, so only the error is compared.
        assert_expected_end(&row, &servers.run(transport, &row).await);
    }
}
