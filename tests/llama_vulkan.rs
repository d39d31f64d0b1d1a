//! A real model on a GPU, through Vulkan. `scripts/test_vulkan.sh` runs these tests on Mesa's software device, which
//! computes on the processor what a GPU would compute.
#![cfg(feature = "vulkan")]

mod support;

use std::sync::Arc;

use serde_json::{Value, json};
use support::http::{completion, get};
use support::program::{start_serving, tokenway};
use support::{Setup, TestServer, model_path};
use tokenway::runner::llama::{LlamaLoader, LlamaOptions};
use tokenway::runner::{Loader, Resumption};

/// Name of the first GPU in llama.cpp's Vulkan backend.
const GPU: &str = "Vulkan0";

fn options() -> LlamaOptions {
    LlamaOptions {
        model_path: model_path(),
        ..LlamaOptions::default()
    }
}

async fn start(options: LlamaOptions) -> TestServer {
    Setup::runner("smollm2", Arc::new(LlamaLoader::new(options)), 2)
        .start()
        .await
}

/// Returns the name of the device that computes the model, from `/readyz`.
async fn device(server: &TestServer) -> String {
    let (response, body) = get("/readyz").fetch(server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    let device = &body.json()["devices"]["smollm2"];
    assert_eq!(device["slot_bytes"], 47_185_920, "{device}");
    device["name"].as_str().expect("a name").to_owned()
}

async fn complete(server: &TestServer, prompt: &str) -> Value {
    let body = json!({"prompt": prompt, "max_tokens": 16, "temperature": 0});
    let (response, body) = completion(&body).fetch(server).await;
    assert_eq!(response.status, 200, "{}", body.text);
    body.json()
}

#[tokio::test]
async fn a_gpu_holds_all_layers_by_default() {
    let server = start(options()).await;
    let device = device(&server).await;
    assert!(device.starts_with(GPU), "{device}");
    assert!(device.ends_with(", all layers"), "{device}");
    let answer = complete(&server, "The capital of France is").await;
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    assert!(text.starts_with(" Paris."), "{text}");
    assert_eq!(answer["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn a_gpu_and_the_cpu_share_the_layers() {
    let half = LlamaOptions {
        devices: vec![GPU.to_owned()],
        gpu_layers: Some(15),
        ..options()
    };
    let server = start(half).await;
    let device = device(&server).await;
    assert!(device.ends_with(", 15 layers; CPU, 1 thread"), "{device}");
    let answer = complete(&server, "The capital of France is").await;
    let text = answer["choices"][0]["text"].as_str().expect("a text");
    assert!(text.starts_with(" Paris."), "{text}");
}

#[tokio::test]
async fn a_sequence_on_a_gpu_reuses_the_computed_start_of_its_prompt() {
    let server = start(options()).await;
    let prompt = "The clocks of the museum tell the time in every town. ".repeat(8);
    complete(&server, &format!("{prompt}The first clock")).await;
    let answer = complete(&server, &format!("{prompt}The second clock")).await;
    let cached = &answer["usage"]["prompt_tokens_details"]["cached_tokens"];
    assert!(cached.as_u64() > Some(80), "{cached}");
    assert_eq!(answer["usage"]["completion_tokens"], 16);
}

#[tokio::test]
async fn without_gpu_layers_the_cpu_computes_the_model() {
    let on_cpu = LlamaOptions {
        gpu_layers: Some(0),
        ..options()
    };
    let server = start(on_cpu).await;
    assert_eq!(device(&server).await, "CPU, 1 thread");
}

#[tokio::test]
async fn without_gpu_layers_the_results_are_those_of_a_machine_without_a_gpu() {
    let path = model_path();
    let path = path.to_str().expect("a path in UTF-8");
    let arguments = [
        "--runner",
        "llama",
        "--model-path",
        path,
        "--threads",
        "1",
        "--gpu-layers",
        "0",
    ];
    // Long enough for the batches that llama.cpp would otherwise compute on a GPU.
    let prompt = "The clocks of the museum tell the time in every town. ".repeat(40);
    let body = json!({"prompt": prompt, "max_tokens": 8, "temperature": 0, "logprobs": 2});
    let mut choices = Vec::new();
    for visible_devices in ["0", ""] {
        let program = tokenway().env("GGML_VK_VISIBLE_DEVICES", visible_devices);
        let (_server, [http, _]) = start_serving(program, &arguments).await;
        let address = http.trim_start_matches("http://");
        let mut response = completion(&body).send_to(address).await;
        choices.push(response.read_rest().await.json()["choices"].clone());
    }
    assert_eq!(choices[0], choices[1]);
    assert!(choices[0][0]["text"].is_string(), "{choices:?}");
}

#[test]
fn the_same_text_is_promised_for_a_resumed_stream_on_the_cpu_only() {
    for (gpu_layers, promised) in [(None, Resumption::Contiguous), (Some(0), Resumption::Exact)] {
        let loader = LlamaLoader::new(LlamaOptions {
            gpu_layers,
            ..options()
        });
        let loaded = loader.load(1, &|_| ()).map_err(|error| error.0);
        let facts = loaded.expect("the model loads").model.facts().clone();
        assert_eq!(facts.resumption, promised, "{gpu_layers:?}");
    }
}

#[test]
fn an_unknown_gpu_is_an_error_that_lists_the_known_ones() {
    let unknown = LlamaOptions {
        devices: vec!["Vulkan7".to_owned()],
        ..options()
    };
    let error = LlamaLoader::new(unknown).load(1, &|_| ());
    let error = error.map(|_| ()).expect_err("the device is unknown").0;
    assert!(
        error.contains("'Vulkan7' is unknown; this machine has Vulkan0"),
        "{error}"
    );
}
