// OpenAI's official library for Node, with a key and over TLS. Prints the text of a streamed completion. Run it with
//
//   NODE_EXTRA_CA_CERTS=tls/ca.pem TOKENWAY_API_KEY=tw_… node tests/clients/openai_secured.mjs https://localhost:8000

import OpenAI from "openai";

const client = new OpenAI({
  baseURL: `${process.argv[2]}/v1`,
  apiKey: process.env.TOKENWAY_API_KEY,
  maxRetries: 0,
});
const models = await client.models.list();
const stream = await client.completions.create({
  model: models.data[0].id,
  prompt: "The capital of France is",
  max_tokens: 32,
  stream: true,
});
for await (const chunk of stream) {
  process.stdout.write(chunk.choices[0].text);
}
