// `fetch` as in a browser: Node's implementation has the same streams, decoders and abort signals. `tests/clients`
// starts the servers.

import assert from "node:assert/strict";

import { all, reading, run, tokens } from "./cases.mjs";

const ASK = { prompt: "The capital of France is", max_tokens: 256 };
const SSE = { accept: "text/event-stream" };

function post(url, body, headers = {}, options = {}) {
  return fetch(`${url}/v1/completions`, {
    method: "POST",
    headers: { "content-type": "application/json", ...headers },
    body: JSON.stringify(body),
    ...options,
  });
}

/** Splits a body's text at the separator and yields each complete piece. */
async function* pieces(response, separator) {
  let rest = "";
  for await (const text of response.body.pipeThrough(new TextDecoderStream())) {
    const whole = (rest + text).split(separator);
    rest = whole.pop();
    yield* whole;
  }
  assert.equal(rest, "", "the body ends in the middle of a piece");
}

/** Yields the objects of an NDJSON stream. */
async function* lines(response) {
  for await (const line of pieces(response, "\n")) {
    yield JSON.parse(line);
  }
}

/** Yields the data of an SSE stream, as `EventSource` would. */
async function* events(response) {
  for await (const event of pieces(response, "\n\n")) {
    const data = event.split("\n").filter((line) => line.startsWith("data: "));
    if (data.length > 0) {
      yield data.map((line) => line.slice("data: ".length)).join("\n");
    }
  }
}

function texts(chunks) {
  return chunks.flatMap((chunk) => chunk.choices).map((choice) => choice.text);
}

async function a_stream_has_one_line_per_token(url) {
  const response = await post(url, { ...ASK, stream: true });
  assert.equal(response.status, 200);
  assert.equal(response.headers.get("content-type"), "application/x-ndjson");
  const chunks = await all(lines(response));
  assert.deepEqual(texts(chunks), tokens(256));
  assert.equal(chunks.at(-1).choices[0].finish_reason, "length");
}

async function an_sse_stream_has_one_event_per_token_and_done(url) {
  const ask = { ...ASK, stream: true, stream_options: { include_usage: true } };
  const response = await post(url, ask, SSE);
  assert.equal(response.headers.get("content-type"), "text/event-stream; charset=utf-8");
  const data = await all(events(response));
  assert.equal(data.pop(), "[DONE]");
  const chunks = data.map((event) => JSON.parse(event));
  assert.deepEqual(texts(chunks), tokens(256));
  assert.equal(chunks.at(-1).usage.completion_tokens, 256);
}

async function a_unary_response_is_one_object(url) {
  const response = await post(url, ASK);
  const { choices, usage } = await response.json();
  assert.equal(choices[0].text, tokens(256).join(""));
  assert.equal(usage.completion_tokens, 256);
}

async function each_rejection_has_a_status_and_an_error_object(url) {
  for (const [body, headers, status, code, param] of [
    [{ ...ASK, max_tokens: -1 }, {}, 400, "invalid_value", "max_tokens"],
    [{ ...ASK, model: "other" }, {}, 404, "model_not_found", "model"],
    [{ ...ASK, stream: true }, { accept: "text/html" }, 406, "not_acceptable", null],
    [{ prompt: "word ".repeat(1_000_000) }, {}, 413, "request_too_large", null],
    [ASK, { "content-type": "text/plain" }, 415, "unsupported_media_type", null],
  ]) {
    const response = await post(url, body, headers);
    const { error } = await response.json();
    assert.deepEqual([response.status, error.code, error.param], [status, code, param]);
  }
}

async function a_full_queue_says_when_to_retry(url) {
  const response = await post(url, { ...ASK, stream: true });
  assert.equal(response.status, 429);
  assert.equal(response.headers.get("retry-after"), "1");
  assert.equal((await response.json()).error.code, "queue_full");
}

/** Reads a stream into `received` until it fails. */
async function readUntilItBreaks(stream, received) {
  const read = async () => {
    for await (const item of stream) {
      received.push(item);
      if (received.length === 1) {
        reading();
      }
    }
  };
  await assert.rejects(read, TypeError);
}

async function a_failing_stream_has_an_error_record_and_then_raises(url) {
  const chunks = [];
  await readUntilItBreaks(lines(await post(url, { ...ASK, stream: true })), chunks);
  assert.equal(chunks.pop().error.code, "internal_error");
  assert.deepEqual(texts(chunks), tokens(10));
}

async function a_failing_sse_stream_has_an_error_record_and_then_raises(url) {
  const data = [];
  await readUntilItBreaks(events(await post(url, { ...ASK, stream: true }, SSE)), data);
  const chunks = data.map((event) => JSON.parse(event));
  assert.equal(chunks.pop().error.code, "internal_error");
  assert.deepEqual(texts(chunks), tokens(10));
}

async function a_truncated_stream_raises(url) {
  const chunks = [];
  const response = await post(url, { ...ASK, max_tokens: 100_000, stream: true });
  await readUntilItBreaks(lines(response), chunks);
  assert.deepEqual(texts(chunks), tokens(chunks.length));
}

async function aborting_a_stream_frees_its_slot(url) {
  const abort = new AbortController();
  const ask = { ...ASK, max_tokens: 100_000, stream: true };
  const response = await post(url, ask, {}, { signal: abort.signal });
  const read = async () => {
    for await (const chunk of lines(response)) {
      assert.equal(chunk.choices[0].text, "token_0");
      abort.abort();
      break;
    }
    await response.body.getReader().read();
  };
  await assert.rejects(read);
  const next = await post(url, { ...ASK, max_tokens: 3 });
  assert.equal((await next.json()).choices[0].text, tokens(3).join(""));
}

await run({
  a_stream_has_one_line_per_token,
  an_sse_stream_has_one_event_per_token_and_done,
  a_unary_response_is_one_object,
  each_rejection_has_a_status_and_an_error_object,
  a_full_queue_says_when_to_retry,
  a_failing_stream_has_an_error_record_and_then_raises,
  a_failing_sse_stream_has_an_error_record_and_then_raises,
  a_truncated_stream_raises,
  aborting_a_stream_frees_its_slot,
});
