// OpenAI's official library for Node: chat completions. `tests/clients` starts the servers.

import assert from "node:assert/strict";
import OpenAI from "openai";

import { all, reading, run, tokens } from "./cases.mjs";

const ASK = {
  model: "llm_test",
  messages: [{ role: "user", content: "What is the capital of France?" }],
};

function connect(url) {
  return new OpenAI({ baseURL: `${url}/v1`, apiKey: "unused", maxRetries: 0 });
}

/** The texts of a choice's chunks, without the empty text of the role. */
function texts(chunks, choice = 0) {
  const parts = chunks.flatMap((chunk) => chunk.choices).filter((part) => part.index === choice);
  return parts.map((part) => part.delta.content).filter((text) => text);
}

async function a_stream_has_the_role_then_every_token_then_the_usage(url) {
  const stream = await connect(url).chat.completions.create({
    ...ASK,
    max_completion_tokens: 256,
    stream: true,
    stream_options: { include_usage: true },
  });
  const [first, ...chunks] = await all(stream);
  const last = chunks.pop();
  assert.match(first.id, /^chatcmpl-/);
  assert.deepEqual(first.choices[0].delta, { role: "assistant", content: "" });
  assert.deepEqual(texts(chunks), tokens(256));
  const reasons = chunks.map((chunk) => chunk.choices[0].finish_reason);
  assert.deepEqual(reasons, [...Array(256).fill(null), "length"]);
  assert.equal(last.usage.completion_tokens, 256);
}

async function the_stream_helper_collects_the_whole_message(url) {
  const stream = connect(url).chat.completions.stream({ ...ASK, max_completion_tokens: 256 });
  const { choices } = await stream.finalChatCompletion();
  assert.equal(choices[0].message.content, tokens(256).join(""));
}

async function the_stream_helper_joins_a_tool_call(url) {
  const parameters = { type: "object", properties: { city: { type: "string" } } };
  const tools = [{ type: "function", function: { name: "weather", parameters } }];
  const stream = connect(url).chat.completions.stream({ ...ASK, model: "m", tools });
  const { choices } = await stream.finalChatCompletion();
  assert.equal(choices[0].finish_reason, "tool_calls");
  const [call] = choices[0].message.tool_calls;
  assert.deepEqual([call.id, call.type, call.function.name], ["call_a", "function", "weather"]);
  assert.deepEqual(JSON.parse(call.function.arguments), { city: "Paris" });
}

async function a_unary_completion_has_the_whole_message_and_its_usage(url) {
  const ask = { ...ASK, max_completion_tokens: 256 };
  const { choices, usage } = await connect(url).chat.completions.create(ask);
  assert.equal(choices[0].message.role, "assistant");
  assert.equal(choices[0].message.content, tokens(256).join(""));
  assert.equal(choices[0].finish_reason, "length");
  assert.equal(usage.completion_tokens, 256);
}

async function a_rejected_request_raises_bad_request_with_param_and_code(url) {
  const tool = { type: "function", function: { name: "f", parameters: {} } };
  for (const [fields, param, code] of [
    [{ max_tokens: -1 }, "max_tokens", "invalid_value"],
    [{ tools: [tool] }, "tools", "unsupported_parameter"],
    [{ response_format: { type: "json_object" } }, "response_format", "unsupported_parameter"],
  ]) {
    for (const stream of [false, true]) {
      await assert.rejects(
        connect(url).chat.completions.create({ ...ASK, stream, ...fields }),
        (error) => {
          assert(error instanceof OpenAI.BadRequestError, error);
          assert.deepEqual([error.param, error.code], [param, code]);
          return true;
        },
      );
    }
  }
}

/** Reads a stream that must fail. Returns the chunks and the error. */
async function untilItFails(stream) {
  const received = [];
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

async function a_failing_stream_raises_after_its_last_token(url) {
  const ask = { ...ASK, max_completion_tokens: 256, stream: true };
  const { received, error } = await untilItFails(await connect(url).chat.completions.create(ask));
  assert(error instanceof OpenAI.APIError, error);
  assert.equal(error.code, "internal_error");
  assert.deepEqual(texts(received), tokens(10));
}

async function a_truncated_stream_raises(url) {
  const ask = { ...ASK, max_completion_tokens: 100_000, stream: true };
  const { received, error } = await untilItFails(await connect(url).chat.completions.create(ask));
  assert(error instanceof TypeError, error);
  assert.deepEqual(texts(received), tokens(texts(received).length));
}

await run({
  a_stream_has_the_role_then_every_token_then_the_usage,
  the_stream_helper_collects_the_whole_message,
  the_stream_helper_joins_a_tool_call,
  a_unary_completion_has_the_whole_message_and_its_usage,
  a_rejected_request_raises_bad_request_with_param_and_code,
  a_failing_stream_raises_after_its_last_token,
  a_truncated_stream_raises,
});
