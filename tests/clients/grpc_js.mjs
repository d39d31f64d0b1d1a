// gRPC's library for Node with the gRPC API, which it knows only by reflection. `tests/clients` starts the servers.

import assert from "node:assert/strict";
import grpc from "@grpc/grpc-js";
import { GrpcReflection } from "grpc-js-reflection-client";
import protobuf from "protobufjs";
import "protobufjs/ext/descriptor/index.js";

import { all, reading, run, tokens } from "./cases.mjs";

const PROMPT = "The capital of France is";
const INSECURE = grpc.credentials.createInsecure();
const OPTIONS = { keepCase: true, enums: String, longs: Number, defaults: true, oneofs: true };

// The parts of `google/rpc/status.proto` and `error_details.proto` that are read here.
const { root: RPC } = protobuf.parse(`
  syntax = "proto3";
  message Status { int32 code = 1; string message = 2; repeated Any details = 3; }
  message Any { string type_url = 1; bytes value = 2; }
  message ErrorInfo { string reason = 1; string domain = 2; map<string, string> metadata = 3; }
  message BadRequest {
    message FieldViolation { string field = 1; string description = 2; }
    repeated FieldViolation field_violations = 1;
  }
  message RetryInfo { Duration retry_delay = 1; }
  message Duration { int64 seconds = 1; int32 nanos = 2; }
`, { keepCase: true });

/** A client of a service, built from the server's reflection. */
async function connect(address, service) {
  const reflection = new GrpcReflection(address, INSECURE);
  const described = (await reflection.getDescriptorBySymbol(service)).getPackageObject(OPTIONS);
  const Client = service.split(".").reduce((found, name) => found[name], described);
  return new Client(address, INSECURE);
}

async function complete(address, fields, timeout = Infinity) {
  const client = await connect(address, "tokenway.v1.Inference");
  return client.Complete({ prompt: PROMPT, ...fields }, { deadline: Date.now() + timeout });
}

/** The texts of all tokens. Checks their indices. */
function texts(events) {
  const found = [];
  for (const { tokens } of events.filter((event) => event.event === "tokens")) {
    assert.equal(tokens.first_index, found.length);
    found.push(...tokens.tokens.map((token) => token.text));
  }
  return found;
}

/** Reads a stream that must fail. Returns the events and the error. */
async function untilItFails(stream) {
  const received = [];
  try {
    for await (const event of stream) {
      received.push(event);
      if (received.length === 1) {
        reading();
      }
    }
  } catch (error) {
    return { received, error };
  }
  assert.fail("the stream ended cleanly instead of failing");
}

/** The details of an error by type name. */
function details(error) {
  const [bytes] = error.metadata.get("grpc-status-details-bin");
  const found = {};
  for (const { type_url, value } of RPC.lookupType("Status").decode(bytes).details) {
    const name = type_url.replace("type.googleapis.com/google.rpc.", "");
    const type = RPC.lookupType(name);
    found[name] = type.toObject(type.decode(value), { longs: Number });
  }
  return found;
}

async function reflection_lists_the_services(address) {
  const services = await new GrpcReflection(address, INSECURE).listServices();
  assert.deepEqual(services.sort(), [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "tokenway.v1.Inference",
  ]);
}

async function health_reports_serving(address) {
  const client = await connect(address, "grpc.health.v1.Health");
  for (const service of ["", "tokenway.v1.Inference"]) {
    const status = await new Promise((resolve, reject) => {
      client.Check({ service }, (error, answer) => (error ? reject(error) : resolve(answer.status)));
    });
    assert.equal(status, "SERVING");
  }
}

async function health_watch_reports_not_serving_while_draining(address) {
  const client = await connect(address, "grpc.health.v1.Health");
  const seen = [];
  for await (const { status } of client.Watch({ service: "tokenway.v1.Inference" })) {
    seen.push(status);
    if (status === "SERVING") {
      reading();
    } else {
      break;
    }
  }
  assert.deepEqual(seen, ["SERVING", "NOT_SERVING"]);
}

async function a_stream_has_a_start_every_token_and_a_summary(address) {
  const [{ started }, ...events] = await all(await complete(address, { max_tokens: 256 }));
  assert.deepEqual([started.model, started.prompt_tokens], ["llm_test", 5]);
  const { summary } = events.pop();
  assert.deepEqual(texts(events), tokens(256));
  assert.equal(events.at(-1).tokens.finish_reason, "FINISH_REASON_LENGTH");
  assert.equal(summary.usage.completion_tokens, 256);
}

async function choices_are_identified_by_index(address) {
  const events = await all(await complete(address, { max_tokens: 20, n: 3 }));
  for (let choice = 0; choice < 3; choice += 1) {
    const own = events.filter((event) => event.tokens?.choice === choice);
    assert.deepEqual(texts(own), tokens(20));
  }
}

async function cancelling_a_stream_frees_its_slot(address) {
  const stream = await complete(address, { max_tokens: 100_000 });
  const read = async () => {
    for await (const event of stream) {
      if (event.event === "tokens") {
        stream.cancel();
      }
    }
  };
  await assert.rejects(read, { code: grpc.status.CANCELLED });
  assert.deepEqual(texts(await all(await complete(address, { max_tokens: 3 }))), tokens(3));
}

async function an_expired_deadline_ends_the_stream_and_frees_its_slot(address) {
  const stream = await complete(address, { max_tokens: 10 }, 300);
  const { error } = await untilItFails(stream);
  assert.equal(error.code, grpc.status.DEADLINE_EXCEEDED);
  assert.deepEqual(texts(await all(await complete(address, { max_tokens: 3 }))), tokens(3));
}

async function an_error_carries_its_reason_and_field(address) {
  for (const [fields, code, reason, field] of [
    [{ max_tokens: 0 }, grpc.status.INVALID_ARGUMENT, "invalid_value", "max_tokens"],
    [{ model: "other" }, grpc.status.NOT_FOUND, "model_not_found", "model"],
  ]) {
    const { error } = await untilItFails(await complete(address, fields));
    assert.equal(error.code, code);
    const { ErrorInfo, BadRequest } = details(error);
    assert.deepEqual([ErrorInfo.reason, ErrorInfo.domain], [reason, "tokenway"]);
    assert.deepEqual(BadRequest.field_violations.map((violation) => violation.field), [field]);
  }
}

async function a_full_queue_says_when_to_retry(address) {
  const { error } = await untilItFails(await complete(address, {}));
  assert.equal(error.code, grpc.status.RESOURCE_EXHAUSTED);
  const { ErrorInfo, RetryInfo } = details(error);
  assert.equal(ErrorInfo.reason, "queue_full");
  assert.equal(RetryInfo.retry_delay.seconds, 1);
}

async function a_failing_stream_raises_after_its_last_token(address) {
  const { received, error } = await untilItFails(await complete(address, { max_tokens: 256 }));
  assert.equal(error.code, grpc.status.INTERNAL);
  assert.equal(details(error).ErrorInfo.reason, "internal_error");
  assert.deepEqual(texts(received), tokens(10));
}

async function a_truncated_stream_raises(address) {
  const { received, error } = await untilItFails(await complete(address, { max_tokens: 100_000 }));
  assert.equal(error.code, grpc.status.UNAVAILABLE);
  assert(!received.some((event) => event.event === "summary"));
}

await run({
  reflection_lists_the_services,
  health_reports_serving,
  health_watch_reports_not_serving_while_draining,
  a_stream_has_a_start_every_token_and_a_summary,
  choices_are_identified_by_index,
  cancelling_a_stream_frees_its_slot,
  an_expired_deadline_ends_the_stream_and_frees_its_slot,
  an_error_carries_its_reason_and_field,
  a_full_queue_says_when_to_retry,
  a_failing_stream_raises_after_its_last_token,
  a_truncated_stream_raises,
});
