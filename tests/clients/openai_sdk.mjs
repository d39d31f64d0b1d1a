// OpenAI's official library for Node: completions. `tests/clients` starts the servers.

import assert from "node:assert/strict";
import OpenAI from "openai";

import { all, reading, run, tokens } from "./cases.mjs";

const ASK = { model: "llm_test", prompt: "The capital of France is" };

function connect(url) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
}

/** The chunks of one choice. */
function parts(chunks, choice = 0) {
  return chunks.flatMap((chunk) => chunk.choices).filter((part) => part.index === choice);
}

function texts(chunks, choice = 0) {
  return parts(chunks, choice).map((part) => part.text);
}

function finishReasons(chunks, choice = 0) {
  return parts(chunks, choice).map((part) => part.finish_reason);
}

/** Reads a stream that must fail. Returns the chunks and the error. */
async function untilItFails(stream, received = []) {
  try {
    for await (const chunk of stream) {
      received.push(chunk);
      if (received.length === 1) {
        reading();
      }
    }
  } catch (error) {
    return { received, error };
  }
  assert.fail(`${received.length} tokens were accepted as a complete response`);
}

async function a_stream_has_every_token_in_order_and_the_usage_last(url) {
  const stream = await connect(url).completions.create({
    ...ASK,
    max_tokens: 256,
    stream: true,
    stream_options: { include_usage: true },
  });
  const chunks = await all(stream);
  const last = chunks.pop();
  assert.deepEqual(texts(chunks), tokens(256));
  assert.deepEqual(finishReasons(chunks), [...Array(255).fill(null), "length"]);
  assert.deepEqual(last.choices, []);
  assert.deepEqual(last.usage, { prompt_tokens: 5, completion_tokens: 256, total_tokens: 261 });
}

async function a_unary_completion_has_the_whole_text_and_its_usage(url) {
  const completion = await connect(url).completions.create({ ...ASK, max_tokens: 256 });
  const [choice] = completion.choices;
  assert.equal(choice.text, tokens(256).join(""));
  assert.equal(choice.finish_reason, "length");
  assert.equal(completion.usage.completion_tokens, 256);
}

async function prompts_and_choices_are_identified_by_index(url) {
  const ask = { ...ASK, prompt: ["a", "b c", "d"], max_tokens: 20, n: 2 };
  const chunks = await all(
    await connect(url).completions.create({ ...ask, stream: true }),
  );
  for (let choice = 0; choice < 6; choice += 1) {
    assert.deepEqual(texts(chunks, choice), tokens(20));
    assert.equal(finishReasons(chunks, choice).at(-1), "length");
  }
  const completion = await connect(url).completions.create(ask);
  assert.deepEqual(completion.choices.map((choice) => choice.index), [0, 1, 2, 3, 4, 5]);
  assert.equal(completion.usage.completion_tokens, 6 * 20);
}

async function models_are_listed_and_described(url) {
  const models = await all(connect(url).models.list());
  assert.deepEqual(models.map((model) => model.id), ["llm_test"]);
  assert.equal((await connect(url).models.retrieve("llm_test")).owned_by, "tokenway");
}

async function a_rejected_request_raises_bad_request_with_param_and_code(url) {
  for (const [fields, param, code] of [
    [{ max_tokens: -1 }, "max_tokens", "invalid_value"],
    [{ max_tokens: "many" }, "max_tokens", "invalid_type"],
    [{ temprature: 1 }, "temprature", "unknown_parameter"],
  ]) {
    for (const stream of [false, true]) {
      await assert.rejects(connect(url).completions.create({ ...ASK, stream, ...fields }), (error) => {
        assert(error instanceof OpenAI.BadRequestError, error);
        assert.deepEqual([error.param, error.code], [param, code]);
        assert.equal(error.type, "invalid_request_error");
        return true;
      });
    }
  }
}

/** Sends a request, unary and streamed, and asserts that it fails with this error of the library. */
async function assertRejected(url, kind, status, code, { fields = {}, headers = {} } = {}) {
  const errors = [];
  for (const stream of [false, true]) {
    const asked = connect(url).completions.create({ ...ASK, stream, ...fields }, { headers });
    await assert.rejects(asked, (error) => {
      assert(error instanceof kind, error);
      assert.deepEqual([error.status, error.code], [status, code]);
      errors.push(error);
      return true;
    });
  }
  return errors;
}

async function an_unknown_model_is_not_found(url) {
  const fields = { model: "other" };
  await assertRejected(url, OpenAI.NotFoundError, 404, "model_not_found", { fields });
}

async function an_oversized_request_is_rejected(url) {
  const fields = { prompt: "word ".repeat(1_000_000) };
  await assertRejected(url, OpenAI.APIError, 413, "request_too_large", { fields });
}

async function an_unsupported_accept_header_is_rejected(url) {
  const asked = connect(url).completions.create(
    { ...ASK, stream: true },
    { headers: { Accept: "text/html" } },
  );
  await assert.rejects(asked, { status: 406, code: "not_acceptable" });
}

async function a_full_queue_raises_rate_limit_with_retry_after(url) {
  for (const error of await assertRejected(url, OpenAI.RateLimitError, 429, "queue_full")) {
    assert.equal(error.headers.get("retry-after"), "1");
    assert.equal(error.headers.get("retry-after-ms"), "1000");
  }
}

async function a_model_that_is_not_ready_is_unavailable(url) {
  await assertRejected(url, OpenAI.InternalServerError, 503, "not_ready");
}

async function a_deadline_that_expires_in_the_queue_raises(url) {
  const headers = { "x-request-timeout": "0.2" };
  await assertRejected(url, OpenAI.InternalServerError, 504, "deadline_exceeded", { headers });
}

async function a_failing_stream_raises_after_its_last_token(url) {
  const stream = await connect(url).completions.create({ ...ASK, max_tokens: 256, stream: true });
  const { received, error } = await untilItFails(stream);
  assert(error instanceof OpenAI.APIError, error);
  assert.equal(error.code, "internal_error");
  assert.equal(error.error.tokens_delivered, 10);
  assert.deepEqual(texts(received), tokens(10));
}

async function a_unary_failure_raises_and_is_not_retried(url) {
  // The library's default number of retries, which the response disables.
  const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused" });
  await assert.rejects(client.completions.create({ ...ASK, max_tokens: 256 }), {
    status: 500,
    code: "internal_error",
  });
}

async function a_truncated_stream_raises(url) {
  const stream = await connect(url).completions.create({
    ...ASK,
    max_tokens: 100_000,
    stream: true,
  });
  const { received, error } = await untilItFails(stream);
  assert(error instanceof TypeError, error);
  assert.deepEqual(texts(received), tokens(received.length));
}

async function closing_a_stream_early_frees_the_slot(url) {
  const client = connect(url);
  const stream = await client.completions.create({ ...ASK, max_tokens: 100_000, stream: true });
  for await (const chunk of stream) {
    assert.equal(chunk.choices[0].text, "token_0");
    break;
  }
  const completion = await client.completions.create({ ...ASK, max_tokens: 3 });
  assert.equal(completion.choices[0].text, tokens(3).join(""));
}

await run({
  a_stream_has_every_token_in_order_and_the_usage_last,
  a_unary_completion_has_the_whole_text_and_its_usage,
  prompts_and_choices_are_identified_by_index,
  models_are_listed_and_described,
  a_rejected_request_raises_bad_request_with_param_and_code,
  an_unknown_model_is_not_found,
  an_oversized_request_is_rejected,
  an_unsupported_accept_header_is_rejected,
  a_full_queue_raises_rate_limit_with_retry_after,
  a_model_that_is_not_ready_is_unavailable,
  a_deadline_that_expires_in_the_queue_raises,
  a_failing_stream_raises_after_its_last_token,
  a_unary_failure_raises_and_is_not_retried,
  a_truncated_stream_raises,
  closing_a_stream_early_frees_the_slot,
});
