//! Tests of prompts on a model with a context of 8 tokens.

use super::*;
use crate::models::Models;
use crate::request::ChatMessage;
use crate::runner::{Model, ModelError};

/// A model with one token per byte.
struct ByteModel(ModelFacts);

impl Model for ByteModel {
    fn facts(&self) -> &ModelFacts {
        &self.0
    }

    fn tokenize(&self, text: &str, _: BosPolicy) -> Result<Vec<TokenId>, ModelError> {
        Ok(text.bytes().map(u32::from).collect())
    }

    fn token_bytes(&self, ids: &[TokenId]) -> Result<Vec<TokenBytes>, ModelError> {
        let byte = |id: &TokenId| u8::try_from(*id).expect("the vocabulary is the bytes");
        Ok(ids.iter().map(|id| [byte(id)][..].into()).collect())
    }

    fn render_chat(&self, _: &[ChatMessage]) -> Result<String, ModelError> {
        Ok("chat".to_owned())
    }
}

/// Returns a registry with a loaded model.
fn loaded() -> Models {
    let models = Models::for_test(&["m"]);
    let facts = ModelFacts {
        name: "m".to_owned(),
        context_length: 8,
        max_prompt_bytes: 16,
        vocabulary_size: 256,
        resumption: Resumption::Exact,
        reuses_prefixes: false,
        device: None,
        unsupported: Vec::new(),
        bos_token: None,
        eos_token: None,
    };
    models.entries()[0].set_loaded(Arc::new(ByteModel(facts)));
    models
}

async fn prepare(request: &CompletionRequest) -> Result<Prompt, (ErrorKind, Option<String>)> {
    let prompt = Prompt::prepare(&loaded().entries()[0], request).await;
    prompt.map_err(|error| (error.kind, error.param))
}

#[tokio::test]
async fn a_request_for_a_model_that_is_not_loaded_is_rejected_with_not_ready() {
    let models = Models::for_test(&["m"]);
    let request = CompletionRequest::for_test("a");
    let error = Prompt::prepare(&models.entries()[0], &request).await.err();
    assert_eq!(error.map(|error| error.kind), Some(ErrorKind::NotReady));
}

#[tokio::test]
async fn a_prompt_that_exceeds_the_context_is_rejected_with_the_field_to_shorten() {
    for (prompt, max_tokens, param) in [
        ("12345678", 1, "prompt"),
        ("1234567", 2, "prompt"),
        ("1", 8, "max_tokens"),
        ("12345678901234567", 1, "prompt"),
    ] {
        let request = CompletionRequest {
            max_tokens: Some(max_tokens),
            ..CompletionRequest::for_test(prompt)
        };
        let expected = (ErrorKind::ContextLengthExceeded, Some(param.to_owned()));
        assert_eq!(prepare(&request).await.err(), Some(expected), "{prompt}");
    }
}

#[tokio::test]
async fn a_chat_without_max_tokens_may_use_the_rest_of_the_context() {
    let request = CompletionRequest {
        input: Input::Chat(Vec::new()),
        ..CompletionRequest::for_test("")
    };
    let prompt = prepare(&request).await.expect("the prompt fits");
    assert_eq!((prompt.token_count(), prompt.max_tokens), (4, 4));
}

#[tokio::test]
async fn every_token_id_of_a_request_must_be_in_the_vocabulary() {
    let with_id = |param: &str, id: TokenId| {
        let mut request = CompletionRequest {
            max_tokens: Some(2),
            ..CompletionRequest::for_test("a")
        };
        match param {
            "prompt_token_ids" => request.input = Input::TokenIds(vec![id]),
            "stop_token_ids" => request.options.stop_tokens.ids = [id].into(),
            "logit_bias" => request.options.logit_bias = [(id, 1.0)].into(),
            "resume" => request.resume = vec![vec![id]],
            other => panic!("no such field: {other}"),
        }
        request
    };
    for param in ["prompt_token_ids", "stop_token_ids", "logit_bias", "resume"] {
        assert!(prepare(&with_id(param, 255)).await.is_ok(), "{param}");
        let expected = (ErrorKind::InvalidValue, Some(param.to_owned()));
        let rejected = prepare(&with_id(param, 256)).await.err();
        assert_eq!(rejected, Some(expected));
    }
}

#[tokio::test]
async fn each_choice_continues_after_its_delivered_tokens_and_the_first_scores_the_prompt() {
    let mut request = CompletionRequest {
        choices: 3,
        max_tokens: Some(4),
        echo: true,
        resume: vec![vec![65, 66], Vec::new()],
        ..CompletionRequest::for_test("abc")
    };
    request.options.logprobs = Some(0);
    let prompt = prepare(&request).await.expect("the prompt is valid");
    let sequences = prompt.sequences(&request);
    let delivered: Vec<_> = sequences
        .iter()
        .map(|sequence| &sequence.delivered[..])
        .collect();
    assert_eq!(delivered, [&[65, 66][..], &[], &[]]);
    let choices = sequences
        .iter()
        .map(|sequence| (sequence.choice, sequence.scores_prompt));
    assert_eq!(
        choices.collect::<Vec<_>>(),
        [(0, true), (1, false), (2, false)]
    );
    let bytes = prompt.resumed[0].iter().map(|token| token.bytes[0]);
    assert_eq!(bytes.collect::<Vec<_>>(), *b"AB");
}
