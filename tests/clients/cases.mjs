// Runs one case of a file of cases: `node FILE CASE ADDRESS`. A case that returns has passed.

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

/** Everything that a stream gives. */
export async function all(stream) {
  const received = [];
  for await (const item of stream) {
    received.push(item);
  }
  return received;
}

/** Tells the test that a stream is being read, whereupon it kills the server. */
export function reading() {
  console.log("reading");
}
