// Runs one case of a client file: `node FILE CASE ADDRESS`. A case passes if it returns.

import { argv } from "node:process";

/** @param {Record<string, (address: string) => Promise<void>>} cases */
export async function run(cases) {
  const [name, address] = argv.slice(2);
  await cases[name](address);
}

/** The first tokens of the test runner. */
export function tokens(count) {
  return Array.from({ length: count }, (_, index) => `token_${index}`);
}

/** All items of a stream. */
export async function all(stream) {
  const received = [];
  for await (const item of stream) {
    received.push(item);
  }
  return received;
}

/** Tells the test that a stream is being read. The test then sends its signal to the server. */
export function reading() {
  console.log("reading");
}
