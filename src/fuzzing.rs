//! Entry points of the fuzz targets in `fuzz/`. Each gives arbitrary bytes to the code that reads untrusted input, and
//! panics if an invariant does not hold. The targets themselves are next to the code that they check.
//!
//! The module exists in tests and with the feature `fuzzing`. It is no public API.

use crate::{
    certificates, cluster, config, frontend, gateway, grpc, keys, listen, proto,
    text as completion_text, worker,
};

/// `Accept` headers.
pub fn accept(data: &[u8]) {
    gateway::fuzzing::accept(data);
}

/// Addresses of engines, and addresses to listen on.
pub fn addresses(data: &[u8]) {
    cluster::fuzzing::addresses(data);
}

/// The body of `POST /v1/chat/completions`.
pub fn chat_body(data: &[u8]) {
    gateway::fuzzing::chat_body(data);
}

/// The chat template of a model, and messages.
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
pub fn chat_template(data: &[u8]) {
    crate::runner::llama::fuzzing::chat_template(data);
}

/// Events of a remote engine, and their tokens.
pub fn completion_events(data: &[u8]) {
    gateway::fuzzing::completion_events(data);
    proto::fuzzing::tokens(data);
}

/// Requests of gRPC clients.
pub fn completion_request(data: &[u8]) {
    grpc::fuzzing::completion_request(data);
}

/// The body of `POST /v1/completions`.
pub fn completions_body(data: &[u8]) {
    gateway::fuzzing::completions_body(data);
}

/// Messages of an engine to a worker.
pub fn engine_messages(data: &[u8]) {
    worker::attach::fuzzing::engine_messages(data);
}

/// The first bytes of a connection to a port with TLS.
pub fn first_bytes(data: &[u8]) {
    listen::fuzzing::first_bytes(data);
}

/// `Host` and `Origin`, and the settings that allow them.
pub fn host(data: &[u8]) {
    gateway::fuzzing::host(data);
}

/// Responses of the Hugging Face Hub.
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
pub fn hub_responses(data: &[u8]) {
    crate::hub::fuzzing::hub_responses(data);
}

/// Keys files, and changes of them.
pub fn keys_file(data: &[u8]) {
    keys::fuzzing::keys_file(data);
}

/// The header of a model file.
#[cfg(any(feature = "fuzzing", feature = "llama-cpp"))]
pub fn model_file(data: &[u8]) {
    crate::runner::llama::fuzzing::model_file(data);
}

/// Responses of OpenAI-compatible engines.
pub fn openai_responses(data: &[u8]) {
    cluster::fuzzing::openai_responses(data);
}

/// PEM files with certificates and keys.
pub fn pem_file(data: &[u8]) {
    certificates::fuzzing::pem_file(data);
}

/// The id, the timeout and the key of a request.
pub fn request_headers(data: &[u8]) {
    frontend::fuzzing::request_headers(data);
}

/// A completion whose stream breaks and goes on.
pub fn seams(data: &[u8]) {
    cluster::fuzzing::seams(data);
}

/// Settings files.
pub fn settings(data: &[u8]) {
    config::fuzzing::settings(data);
}

/// The bytes of tokens, matched against stop strings and written as JSON.
pub fn text(data: &[u8]) {
    if let Some(text) = completion_text::fuzzing::text(data) {
        gateway::fuzzing::json_text(&text);
    }
}

/// The bodies of `POST /tokenize` and `POST /detokenize`.
pub fn tokenize_body(data: &[u8]) {
    gateway::fuzzing::tokenize_body(data);
}

/// Responses of vLLM's gRPC API.
pub fn vllm_responses(data: &[u8]) {
    cluster::fuzzing::vllm_responses(data);
}

/// Messages of a worker to the engine.
pub fn worker_messages(data: &[u8]) {
    worker::attached::fuzzing::worker_messages(data);
}

/// The message with the tokens of a device step.
pub fn worker_step(data: &[u8]) {
    proto::fuzzing::step(data);
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use proptest::collection::vec;
    use proptest::prelude::*;
    use proptest::sample::Index;
    use proptest::test_runner::TestRunner;

    /// A target with its name.
    type Target = (&'static str, fn(&[u8]));

    const TARGETS: [Target; 20] = [
        ("accept", super::accept),
        ("addresses", super::addresses),
        ("chat_body", super::chat_body),
        ("completion_events", super::completion_events),
        ("completion_request", super::completion_request),
        ("completions_body", super::completions_body),
        ("engine_messages", super::engine_messages),
        ("first_bytes", super::first_bytes),
        ("host", super::host),
        ("keys_file", super::keys_file),
        ("openai_responses", super::openai_responses),
        ("pem_file", super::pem_file),
        ("request_headers", super::request_headers),
        ("seams", super::seams),
        ("settings", super::settings),
        ("text", super::text),
        ("tokenize_body", super::tokenize_body),
        ("vllm_responses", super::vllm_responses),
        ("worker_messages", super::worker_messages),
        ("worker_step", super::worker_step),
    ];

    #[cfg(feature = "llama-cpp")]
    const MODEL_TARGETS: [Target; 3] = [
        ("chat_template", super::chat_template),
        ("hub_responses", super::hub_responses),
        ("model_file", super::model_file),
    ];
    #[cfg(not(feature = "llama-cpp"))]
    const MODEL_TARGETS: [Target; 0] = [];

    fn targets() -> impl Iterator<Item = Target> {
        TARGETS.into_iter().chain(MODEL_TARGETS)
    }

    /// Returns the inputs in the folder of a target in `fuzz/corpus/`, with their paths.
    fn corpus(name: &str) -> Vec<(String, Vec<u8>)> {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let files = std::fs::read_dir(corpus.join(name));
        let files = files.unwrap_or_else(|error| panic!("{name}: {error}"));
        let inputs = files.map(|file| {
            let path = file.expect("the folder can be listed").path();
            let input = std::fs::read(&path).expect("the file can be read");
            (path.display().to_string(), input)
        });
        inputs.collect()
    }

    /// Examples, and inputs that once broke an invariant.
    #[test]
    fn every_input_of_the_fuzz_corpus_keeps_the_invariants() {
        for (name, target) in targets() {
            let inputs = corpus(name);
            for (path, input) in &inputs {
                let checked = std::panic::catch_unwind(|| target(input));
                assert!(checked.is_ok(), "{path} breaks an invariant");
            }
            assert!(inputs.len() >= 3, "{name} has {} inputs", inputs.len());
        }
    }

    /// A short version of a fuzz run: inputs of the corpus in which a few random bytes are replaced.
    #[test]
    fn inputs_with_a_fault_keep_the_invariants() {
        let fault = (
            any::<Index>(),
            any::<Index>(),
            0..9_usize,
            vec(any::<u8>(), 0..3),
        );
        for (name, target) in targets() {
            let inputs = corpus(name);
            let mut runner = TestRunner::new(ProptestConfig {
                cases: 64,
                failure_persistence: None,
                ..ProptestConfig::default()
            });
            let checked = runner.run(&fault, |(input, at, removed, added)| {
                let mut input = input.get(&inputs).1.clone();
                let at = at.index(input.len() + 1);
                let end = input.len().min(at + removed);
                input.splice(at..end, added);
                target(&input);
                Ok(())
            });
            checked.unwrap_or_else(|error| panic!("{name}: {error}"));
        }
    }
}
