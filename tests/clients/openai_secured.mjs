// OpenAI's official library for Node, with a key and over TLS. NODE_EXTRA_CA_CERTS names the certificate of the
// server's authority. Prints the text of a streamed completion.

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.argv[2]}/v1`,
  apiKey: process.env.TOKENWAY_API_KEY,
  maxRetries: 0,
});
const stream = await client.completions.create({
  model: "llm_test",
  prompt: "The capital of France is",
  max_tokens: 32,
  stream: true,
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0].text);
}
