//! Request fields over gRPC: each field has its effect, and a field that the model does not support is rejected.

mod support;

use std::f32::consts::LN_2;

use support::grpc::{self, Completion, grpc_error};
use support::{Setup, TestServer, full_speed};
use tokenway::error::{Error, ErrorKind};
use tokenway::proto::v1;
use tokenway::proto::v1::completion_request::Input;
use tokenway::proto::v1::tokenize_request::Input as TokenizeInput;
use tokenway::request::Parameter;

async fn server() -> TestServer {
    Setup::test_runner(full_speed()).start().await
}

async fn complete(request: v1::CompletionRequest) -> Completion {
    let server = server().await;
    let answer = server.grpc().await.complete(request).await;
    grpc::collect(answer.expect("the request is admitted").into_inner()).await
}

/// Sends a request that must be rejected. Returns the kind of the error and its field.
async fn error_of(request: v1::CompletionRequest) -> (ErrorKind, Option<String>) {
    let (_, error) = grpc_error(&server().await, request).await;
    (error.kind, error.param)
}

/// Returns a chat with one user message.
fn chat(content: &str) -> v1::Chat {
    let message = v1::ChatMessage {
        role: "user".to_owned(),
        content: content.to_owned(),
        ..v1::ChatMessage::default()
    };
    v1::Chat {
        messages: vec![message],
    }
}

fn logprobs_of(tokens: &[v1::Token]) -> Vec<Option<&v1::Logprobs>> {
    tokens.iter().map(|token| token.logprobs.as_ref()).collect()
}

#[tokio::test]
async fn each_token_has_its_logprob_and_the_top_logprobs() {
    let request = v1::CompletionRequest {
        logprobs: Some(2),
        ..grpc::request("a", 3)
    };
    let completion = complete(request).await;
    let tokens = &completion.choices[0].tokens;
    assert_eq!(completion.texts(0).concat(), "token_0token_1token_2");
    for (index, logprobs) in (0..).zip(logprobs_of(tokens)) {
        let logprobs = logprobs.expect("logprobs were requested");
        assert_eq!(logprobs.logprob, Some(-LN_2));
        assert_eq!(logprobs.token_bytes, format!("token_{index}").into_bytes());
        let top: Vec<_> = logprobs
            .top
            .iter()
            .map(|top| (top.id, top.logprob))
            .collect();
        assert_eq!(top, [(index, -LN_2), (index + 1, -2.0 * LN_2)]);
    }
    let without = complete(grpc::request("a", 3)).await;
    assert_eq!(logprobs_of(&without.choices[0].tokens), [None; 3]);
}

#[tokio::test]
async fn held_back_tokens_keep_their_logprobs() {
    let request = v1::CompletionRequest {
        logprobs: Some(0),
        stop: vec!["token_1token_9".to_owned()],
        ..grpc::request("a", 4)
    };
    let completion = complete(request).await;
    for (index, logprobs) in logprobs_of(&completion.choices[0].tokens)
        .into_iter()
        .enumerate()
    {
        let logprobs = logprobs.expect("logprobs were requested");
        assert_eq!(logprobs.token_bytes, format!("token_{index}").into_bytes());
    }
}

#[tokio::test]
async fn the_prompt_is_echoed_as_it_was_sent() {
    let long = "wörd ".repeat(40_000);
    for prompt in ["The capital  of\nFrance", &long] {
        let request = v1::CompletionRequest {
            echo: true,
            ..grpc::request(prompt, 1)
        };
        let completion = complete(request).await;
        assert_eq!(completion.prompt.text, prompt);
        assert!(completion.prompt.tokens.is_empty());
        assert_eq!(completion.texts(0), ["token_0"]);
    }
    let ids = v1::TokenIds { ids: vec![7, 8] };
    let request = v1::CompletionRequest {
        echo: true,
        input: Some(Input::PromptTokenIds(ids)),
        ..grpc::request("", 1)
    };
    assert_eq!(complete(request).await.prompt.text, "token_7token_8");
    assert_eq!(complete(grpc::request("a", 1)).await.prompt.text, "");
}

#[tokio::test]
async fn echoed_prompt_tokens_have_logprobs_except_the_first() {
    // The prompt has more tokens than the read-ahead buffer holds, and the request has several choices.
    let prompt = "word ".repeat(1_000);
    let request = v1::CompletionRequest {
        echo: true,
        logprobs: Some(1),
        n: Some(3),
        ..grpc::request(&prompt, 2)
    };
    let completion = complete(request).await;
    assert_eq!(completion.prompt.text, prompt);
    let tokens = &completion.prompt.tokens;
    assert_eq!(tokens.len(), 1_000);
    for (index, token) in (0..).zip(tokens) {
        assert_eq!(token.id, index);
        let logprobs = token.logprobs.as_ref().expect("logprobs were requested");
        let expected = (index > 0).then_some(-LN_2);
        assert_eq!(logprobs.logprob, expected, "token {index}");
        assert_eq!(logprobs.top.len(), usize::from(index > 0));
    }
    for choice in 0..3 {
        assert_eq!(completion.texts(choice), ["token_0", "token_1"]);
    }
    assert_eq!(completion.usage().completion_tokens, 6);
}

#[tokio::test]
async fn echo_with_max_tokens_0_scores_the_prompt_alone() {
    for logprobs in [None, Some(0)] {
        for prompt in ["one", "one two three"] {
            let request = v1::CompletionRequest {
                echo: true,
                logprobs,
                ..grpc::request(prompt, 0)
            };
            let completion = complete(request).await;
            assert_eq!(completion.prompt.text, prompt);
            let scored = logprobs.map_or(0, |_| prompt.split(' ').count());
            assert_eq!(completion.prompt.tokens.len(), scored);
            assert!(completion.choices[0].tokens.is_empty());
            assert_eq!(completion.choices[0].finish, v1::FinishReason::Length);
            assert_eq!(completion.usage().completion_tokens, 0);
        }
    }
    let without_echo = error_of(grpc::request("a", 0)).await;
    let expected = (ErrorKind::InvalidValue, Some("max_tokens".to_owned()));
    assert_eq!(without_echo, expected);
}

#[tokio::test]
async fn a_stop_token_ends_a_choice_only_after_min_tokens() {
    let with = |min_tokens, is_shown| v1::CompletionRequest {
        stop_token_ids: vec![5, 2],
        min_tokens,
        include_stop_str_in_output: is_shown,
        ..grpc::request("a", 20)
    };
    let completion = complete(with(0, false)).await;
    assert_eq!(completion.texts(0), ["token_0", "token_1", ""]);
    assert_eq!(completion.choices[0].finish, v1::FinishReason::Stop);
    assert_eq!(completion.usage().completion_tokens, 3);
    let completion = complete(with(2, true)).await;
    assert_eq!(completion.texts(0), ["token_0", "token_1", "token_2"]);
    let completion = complete(with(3, false)).await;
    assert_eq!(completion.choices[0].tokens.len(), 6);
    let over = v1::CompletionRequest {
        min_tokens: 21,
        ..with(0, false)
    };
    let expected = (ErrorKind::InvalidValue, Some("min_tokens".to_owned()));
    assert_eq!(error_of(over).await, expected);
}

#[tokio::test]
async fn a_stop_string_matches_only_after_min_tokens() {
    let with = |min_tokens, is_shown| v1::CompletionRequest {
        stop: vec!["en_2tok".to_owned()],
        min_tokens,
        include_stop_str_in_output: is_shown,
        ..grpc::request("a", 5)
    };
    let text = async |min_tokens, is_shown| {
        let completion = complete(with(min_tokens, is_shown)).await;
        (completion.texts(0).concat(), completion.choices[0].finish)
    };
    let (stop, length) = (v1::FinishReason::Stop, v1::FinishReason::Length);
    assert_eq!(text(0, false).await, ("token_0token_1tok".to_owned(), stop));
    assert_eq!(
        text(0, true).await,
        ("token_0token_1token_2tok".to_owned(), stop)
    );
    let whole = "token_0token_1token_2token_3token_4".to_owned();
    assert_eq!(text(3, false).await, (whole, length));
}

#[tokio::test]
async fn unsupported_parameters_are_rejected_with_their_field() {
    let infill = v1::CompletionRequest {
        suffix: Some("b".to_owned()),
        ..grpc::request("a", 1)
    };
    let expected = (ErrorKind::UnsupportedParameter, Some("suffix".to_owned()));
    assert_eq!(error_of(infill).await, expected);
    let server = server().await;
    let mut client = server.grpc().await;
    let models = client.list_models(v1::ListModelsRequest {}).await;
    let models = models.expect("a list").into_inner().models;
    let passed_on = Parameter::PASSED_ON.map(Parameter::name);
    assert_eq!(
        models[0].unsupported,
        [&["suffix"][..], &passed_on].concat()
    );
}

#[tokio::test]
async fn a_chat_without_max_tokens_may_fill_the_context() {
    let request = v1::CompletionRequest {
        input: Some(Input::Chat(chat("Hi"))),
        max_tokens: None,
        stop_token_ids: vec![100],
        echo: true,
        ..grpc::request("", 1)
    };
    let completion = complete(request).await;
    assert_eq!(completion.prompt.text, "user: Hi");
    assert_eq!(completion.usage().completion_tokens, 101);
    let too_long = v1::CompletionRequest {
        input: Some(Input::Chat(chat(&"word ".repeat(700_000)))),
        max_tokens: Some(400_000),
        ..grpc::request("", 1)
    };
    let expected = (ErrorKind::ContextLengthExceeded, Some("chat".to_owned()));
    assert_eq!(error_of(too_long).await, expected);
}

#[tokio::test]
async fn text_and_chats_are_tokenized() {
    let server = server().await;
    let tokenized = async |input| {
        let request = v1::TokenizeRequest {
            input,
            ..v1::TokenizeRequest::default()
        };
        server.grpc().await.tokenize(request).await
    };
    let text = TokenizeInput::Text("one two".to_owned());
    let answer = tokenized(Some(text)).await.expect("ids").into_inner();
    assert_eq!(
        (answer.token_ids, answer.context_length),
        (vec![0, 1], 1_048_576)
    );
    let chat = TokenizeInput::Chat(chat("one two"));
    let answer = tokenized(Some(chat)).await.expect("ids").into_inner();
    assert_eq!(answer.token_ids, [0, 1, 2], "the role is a word, too");
    let nothing = tokenized(None).await.expect_err("the request is rejected");
    assert_eq!(Error::from(&nothing).kind, ErrorKind::MissingParameter);
}
