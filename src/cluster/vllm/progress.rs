//! The part of one `GenerateStream` that has been read: responses in, completion events out. This is a pure struct.

use std::collections::VecDeque;

use tokio::time::Instant;
use vllm_proto::finish_info::FinishReason;
use vllm_proto::{FinishInfo, GenerateResponse, SequenceOutput};

use super::rejection::broken_stream;
use crate::error::{Error, ErrorKind};
use crate::proto::v1;
use crate::proto::v1::completion_event::Event;
use crate::tokens::{Logprobs, MIN_LOGPROB, Timestamps, TokenBatch};

#[cfg(test)]
mod tests;

/// Facts about a request that its events repeat.
pub(super) struct RequestFacts {
    pub(super) request_id: String,
    pub(super) model: String,
    pub(super) choices: u32,
    pub(super) seed: i64,
    /// True if the engine was asked for the log probabilities of its tokens.
    pub(super) has_logprobs: bool,
    pub(super) arrived: Instant,
}

/// The part of the stream that has been read.
pub(super) struct Progress {
    facts: RequestFacts,
    choices: Vec<ChoiceProgress>,
    /// Events to return.
    ready: VecDeque<Event>,
    /// Number of prompt tokens. `None` until the engine has reported it.
    prompt_tokens: Option<u32>,
    first_token: Option<Instant>,
}

#[derive(Clone, Default)]
struct ChoiceProgress {
    /// Index of the next token.
    next_index: u32,
    /// Number of generated tokens that the engine reported at the end. `None` until the choice has ended.
    output_tokens: Option<u32>,
}

impl Progress {
    pub(super) fn new(facts: RequestFacts) -> Self {
        let choices = usize::try_from(facts.choices).unwrap_or(0);
        Self {
            choices: vec![ChoiceProgress::default(); choices],
            facts,
            ready: VecDeque::new(),
            prompt_tokens: None,
            first_token: None,
        }
    }

    /// Returns the next event, if one is ready. The summary comes last, once all choices have ended.
    pub(super) fn next_event(&mut self) -> Option<Event> {
        self.ready.pop_front()
    }

    /// Reads a response.
    ///
    /// # Errors
    /// The engine gave up a choice, or the response is malformed, so that tokens may be missing.
    pub(super) fn read(&mut self, response: GenerateResponse) -> Result<(), Error> {
        if let Some(prompt) = response.prompt_info {
            self.start(prompt.num_prompt_tokens);
        }
        let Some(output) = response.outputs else {
            return Ok(());
        };
        self.read_output(&output)?;
        if self.choices.iter().all(|it| it.output_tokens.is_some()) {
            self.ready.push_back(Event::Summary(self.summary()));
        }
        Ok(())
    }

    /// Reports the start of the completion, once.
    fn start(&mut self, prompt_tokens: u32) {
        if self.prompt_tokens.is_some() {
            return;
        }
        self.prompt_tokens = Some(prompt_tokens);
        self.ready.push_back(Event::Started(v1::Started {
            request_id: self.facts.request_id.clone(),
            model: self.facts.model.clone(),
            prompt_tokens,
            seed: self.facts.seed,
            text_only: false,
        }));
    }

    fn read_output(&mut self, output: &SequenceOutput) -> Result<(), Error> {
        let has_logprobs = self.facts.has_logprobs;
        if self.prompt_tokens.is_none() || !is_complete(output, has_logprobs) {
            return Err(malformed_response());
        }
        let index = usize::try_from(output.index).ok();
        let choice = index.and_then(|index| self.choices.get_mut(index));
        let choice = choice
            .filter(|choice| choice.output_tokens.is_none())
            .ok_or_else(malformed_response)?;
        // The tokens that arrive together with a failure are delivered before it.
        let (finish_reason, end) = match output.finish_info.as_ref().map(finish_reason) {
            None => (None, Ok(())),
            Some(Ok(reason)) => (reason, Ok(())),
            Some(Err(error)) => (None, Err(error)),
        };
        if output.token_ids.is_empty() && finish_reason.is_none() {
            return end;
        }
        let first_index = choice.next_index;
        let count = u32::try_from(output.token_ids.len()).map_err(|_| malformed_response())?;
        choice.next_index = first_index
            .checked_add(count)
            .ok_or_else(malformed_response)?;
        if let (Some(_), Some(info)) = (finish_reason, &output.finish_info) {
            choice.output_tokens = Some(info.num_output_tokens);
        }
        if count > 0 {
            self.first_token.get_or_insert_with(Instant::now);
        }
        self.ready.push_back(Event::Tokens(v1::Tokens {
            choice: output.index,
            first_index,
            tokens: token_batch(output, has_logprobs),
            finish_reason: finish_reason.unwrap_or_default().into(),
        }));
        end
    }

    fn summary(&self) -> v1::Summary {
        let output_tokens = self
            .choices
            .iter()
            .filter_map(|choice| choice.output_tokens);
        let since_arrival = |then: Instant| {
            let elapsed = then.saturating_duration_since(self.facts.arrived);
            u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
        };
        v1::Summary {
            usage: Some(v1::Usage {
                prompt_tokens: self.prompt_tokens.unwrap_or_default(),
                completion_tokens: output_tokens.fold(0, u32::saturating_add),
                ..v1::Usage::default()
            }),
            timings: Some(v1::Timings {
                first_token_ns: self.first_token.map_or(0, since_arrival),
                total_ns: since_arrival(Instant::now()),
                ..v1::Timings::default()
            }),
        }
    }
}

/// Returns true if the output has the ids and the log probabilities of all its tokens. The gateway asked for them, so an
/// output without them cannot be delivered.
fn is_complete(output: &SequenceOutput, has_logprobs: bool) -> bool {
    let ids = output.token_ids.len();
    let has_ids = usize::try_from(output.num_tokens).is_ok_and(|count| count <= ids);
    // Text belongs to the last token of its output.
    let has_token_for_text = ids > 0 || output.text.is_empty();
    has_ids && has_token_for_text && (!has_logprobs || output.logprobs.len() == ids)
}

/// Returns the tokens of an output. Its text belongs to the last of them.
fn token_batch(output: &SequenceOutput, has_logprobs: bool) -> TokenBatch {
    let mut batch = TokenBatch::default();
    batch.reserve(output.token_ids.len(), output.text.len());
    let last = output.token_ids.len().saturating_sub(1);
    for (at, id) in output.token_ids.iter().enumerate() {
        let text = if at == last { &*output.text } else { "" };
        batch.push_with(*id, Timestamps::default(), |out| out.push_str(text));
        if has_logprobs && let Some(logprob) = output.logprobs.get(at) {
            batch.set_last_logprobs(Some(Box::new(Logprobs {
                logprob: Some(logprob.max(MIN_LOGPROB)),
                // vLLM does not report the bytes of tokens.
                token_bytes: text.as_bytes().to_vec(),
                top: Vec::new(),
            })));
        }
    }
    batch
}

/// Converts the engine's finish reason. Returns `None` if the choice goes on.
///
/// # Errors
/// The reason is not one of a successful end. vLLM reports `ABORTED` in a stream with the status OK.
fn finish_reason(info: &FinishInfo) -> Result<Option<v1::FinishReason>, Error> {
    match FinishReason::try_from(info.finish_reason) {
        Ok(FinishReason::NotFinished) => Ok(None),
        Ok(FinishReason::Stop) => Ok(Some(v1::FinishReason::Stop)),
        Ok(FinishReason::Length) => Ok(Some(v1::FinishReason::Length)),
        Ok(FinishReason::Aborted) | Err(_) => Err(Error::new(
            ErrorKind::UpstreamError,
            "The engine gave up the request.",
        )),
    }
}

fn malformed_response() -> Error {
    tracing::debug!("an engine sent a response that contradicts vLLM's protocol");
    broken_stream()
}
