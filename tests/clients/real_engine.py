"""Asks a model behind the gateway through OpenAI's SDK, LiteLLM and LangChain. Its arguments are the base URL of the
gateway's API and the name of the model. Prints the answers, and fails unless each names Paris."""

import sys

import litellm
import openai
from langchain_openai import ChatOpenAI

base_url, model = sys.argv[1:]
question = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]


def check(client: str, text: str) -> None:
    print(f"{client}: {text.strip()}")
    assert "Paris" in text, f"{client} got {text!r}"


sdk = openai.OpenAI(base_url=base_url, api_key="unused")
completion = sdk.completions.create(
    model=model, prompt="The capital of France is", max_tokens=8, temperature=0
)
check("openai completion", completion.choices[0].text)

stream = sdk.chat.completions.create(
    model=model, messages=question, max_tokens=24, temperature=0, stream=True
)
pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
check("openai chat stream", "".join(pieces))

answer = litellm.completion(
    model=f"openai/{model}",
    api_base=base_url,
    api_key="unused",
    messages=question,
    max_tokens=24,
    temperature=0,
)
check("litellm", answer.choices[0].message.content)

chat = ChatOpenAI(
    model=model, base_url=base_url, api_key="unused", max_tokens=24, temperature=0
)
check("langchain", chat.invoke(question[0]["content"]).content)
