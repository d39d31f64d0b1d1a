//! A copy of a request for checks of its fields. The prompt may be large, so the copy leaves it out.

use crate::proto::v1;
use crate::proto::v1::completion_request::Input;

/// Copies a request without the text of its prompt and without the parameters that are passed on. The copy is valid
/// exactly if the request is. All fields are listed, so that a new one is not forgotten.
pub(super) fn without_prompt(message: &v1::CompletionRequest) -> v1::CompletionRequest {
    v1::CompletionRequest {
        model: message.model.clone(),
        input: message.input.as_ref().map(without_text),
        max_tokens: message.max_tokens,
        n: message.n,
        temperature: message.temperature,
        top_p: message.top_p,
        top_k: message.top_k,
        min_p: message.min_p,
        presence_penalty: message.presence_penalty,
        frequency_penalty: message.frequency_penalty,
        repetition_penalty: message.repetition_penalty,
        seed: message.seed,
        stop: message.stop.clone(),
        priority: message.priority,
        logprobs: message.logprobs,
        include_stamps: message.include_stamps,
        resume: message.resume.clone(),
        user: message.user.clone(),
        echo: message.echo,
        suffix: message.suffix.as_ref().map(|_| String::new()),
        logit_bias: message.logit_bias.clone(),
        min_tokens: message.min_tokens,
        ignore_eos: message.ignore_eos,
        stop_token_ids: message.stop_token_ids.clone(),
        include_stop_str_in_output: message.include_stop_str_in_output,
        tools: Vec::new(),
        tool_choice: None,
        parallel_tool_calls: None,
        response_format: None,
        reasoning_effort: String::new(),
        extra_fields: None,
        cache_salt: message.cache_salt.clone(),
    }
}

/// Keeps what the checks need: one token id, and the role of each message.
fn without_text(input: &Input) -> Input {
    match input {
        Input::Prompt(_) => Input::Prompt(String::new()),
        Input::PromptTokenIds(v1::TokenIds { ids }) => Input::PromptTokenIds(v1::TokenIds {
            ids: ids.first().copied().into_iter().collect(),
        }),
        Input::Chat(chat) => {
            let role = |message: &v1::ChatMessage| v1::ChatMessage {
                role: message.role.clone(),
                ..v1::ChatMessage::default()
            };
            Input::Chat(v1::Chat {
                messages: chat.messages.iter().map(role).collect(),
            })
        }
    }
}
