//! The scenarios with text completions: one stream, eight streams at once, a long prompt, and a long prompt that
//! arrives among running streams.

use futures_util::future::{try_join, try_join_all};
use tokio::sync::Semaphore;

use super::client::{Client, Reply};
use super::interval::Interval;
use super::measurement::{Counts, Figure, Measurement};
use super::prose::Prose;
use crate::fault::Fault;
use crate::stream::RequestInput;

/// Number of streams that decode at the same time. It is also the number of slots of each server.
pub(super) const STREAMS: u32 = 8;
/// Number of streams that run when a long prompt arrives. The prompt gets the last free slot.
pub(super) const RUNNING_STREAMS: u32 = 7;
/// Number of words in a short prompt.
const SHORT_PROMPT_WORDS: usize = 16;
/// Number of words in a long prompt, which has about 1,350 tokens.
const LONG_PROMPT_WORDS: usize = 1_245;
/// Number of tokens of a stream: of one that decodes alone, of each of the eight, and of each among which a long prompt
/// arrives.
const LONE_TOKENS: u32 = 128;
const SHARED_TOKENS: u32 = 64;
const RUNNING_TOKENS: u32 = 256;
/// Number of tokens that each running stream has received when the long prompt is sent.
const TOKENS_BEFORE_PROMPT: usize = 8;
/// Number of tokens that follow a long prompt.
const TOKENS_AFTER_PROMPT: u32 = 8;

/// Measures the decode rate of a stream that runs alone.
pub(super) async fn decode_alone(client: &Client, prose: &mut Prose) -> Result<Measurement, Fault> {
    let prompt = prose.text(SHORT_PROMPT_WORDS);
    let reply = client.complete(&prompt, LONE_TOKENS).await?;
    let figures = [(Figure::DecodeRate, reply.decode_rate())];
    Ok(Measurement::new(figures, Counts::of_replies([&reply])))
}

/// Measures the sum of the streams' rates while all streams decode. The time in which other prompts are still computed
/// is excluded, because it would lower the rates of the streams that started first.
pub(super) async fn decode_together(
    client: &Client,
    prose: &mut Prose,
) -> Result<Measurement, Fault> {
    let prompts: Vec<_> = (0..STREAMS)
        .map(|_| prose.text(SHORT_PROMPT_WORDS))
        .collect();
    let streams = prompts
        .iter()
        .map(|prompt| client.complete(prompt, SHARED_TOKENS));
    let replies = try_join_all(streams).await?;
    let start_ns = replies.iter().map(Reply::first_ns).max().unwrap_or(0);
    let end_ns = replies.iter().map(Reply::last_ns).min().unwrap_or(0);
    if end_ns <= start_ns {
        let found = "a stream that ended before the first token of another".to_owned();
        return Err(Fault::unexpected("streams that decode together", found));
    }
    let rates = replies
        .iter()
        .map(|reply| reply.decode_rate_between(start_ns, end_ns));
    let rate = rates.sum();
    let figures = [(Figure::DecodeRate, rate)];
    Ok(Measurement::new(figures, Counts::of_replies(&replies)))
}

/// Measures the TTFT of a long prompt.
pub(super) async fn long_prompt(client: &Client, prose: &mut Prose) -> Result<Measurement, Fault> {
    let reply = client
        .complete(&prose.text(LONG_PROMPT_WORDS), TOKENS_AFTER_PROMPT)
        .await?;
    let figures = [
        (Figure::PromptRate, reply.prompt_rate()),
        (Figure::PromptTtft, ttft_ms(&reply)),
    ];
    Ok(Measurement::new(figures, Counts::of_replies([&reply])))
}

/// Measures the pauses of running streams while a long prompt is computed.
pub(super) async fn prompt_among_streams(
    client: &Client,
    prose: &mut Prose,
) -> Result<Measurement, Fault> {
    let prompts: Vec<_> = (0..RUNNING_STREAMS)
        .map(|_| prose.text(SHORT_PROMPT_WORDS))
        .collect();
    let long_prompt = prose.text(LONG_PROMPT_WORDS);
    let running = Semaphore::new(0);
    let streams = prompts.iter().map(|prompt| {
        let on_token = |tokens| {
            if tokens == TOKENS_BEFORE_PROMPT {
                running.add_permits(1);
            }
        };
        client.stream(RequestInput::Text { prompt }, RUNNING_TOKENS, on_token)
    });
    let among = async {
        // The result is ignored, because the semaphore is never closed. If a stream fails before it has these tokens,
        // `try_join` stops waiting.
        drop(running.acquire_many(RUNNING_STREAMS).await);
        client.complete(&long_prompt, TOKENS_AFTER_PROMPT).await
    };
    let (streams, among) = try_join(try_join_all(streams), among).await?;
    let during = Interval {
        start: among.sent_ns,
        end: among.first_ns(),
    };
    if let Some(ended) = streams
        .iter()
        .find(|stream| stream.token_ns.last() < Some(&during.end))
    {
        let tokens = ended.usage.completion_tokens;
        let found = format!("a stream that ended after {tokens} tokens");
        return Err(Fault::unexpected(
            "streams that run until the prompt's first token",
            found,
        ));
    }
    let times = || streams.iter().map(|stream| stream.token_ns.as_slice());
    let figures = [
        (Figure::RunningGapP99, during.gap_p99_ms(times())),
        (Figure::RunningRate, during.rate(times())),
        (Figure::PromptTtft, ttft_ms(&among)),
    ];
    Ok(Measurement::new(
        figures,
        Counts::of_replies(streams.iter().chain([&among])),
    ))
}

pub(super) fn ttft_ms(reply: &Reply) -> f64 {
    reply.ttft().as_secs_f64() * 1e3
}
