"""The `xllamacpp` runner: a real model, over a real stream, on one thread."""

from __future__ import annotations

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Running
from engine import Attachment, Engine, Tokens

from tokenway_worker import Ended, LoadError, Options, Request, Sampling
from tokenway_worker.worker import Engine as Address
from tokenway_worker.worker import Identity, Worker
from tokenway_worker.xllamacpp_runner import (
    STEP_TOKENS,
    XllamacppRunner,
    bias,
    draw_seed,
    sampling_fields,
)

STOPPED, LENGTH = 1, 2

# "The capital of France is", " Paris" and ".".
FRANCE, PARIS, DOT = [504, 3575, 282, 4649, 314], 7042, 30
# The first two bytes of "🦙".
PART_OF_A_CHARACTER = 10813
END_OF_SEQUENCE = 2


class Asking:
    """An engine's end of the worker's stream. Sequence and call numbers are unique."""

    def __init__(self, attachment: Attachment) -> None:
        self._attachment = attachment
        self._last = 0

    def ask(self, **operation: Any) -> Any:
        """Makes a tokenizer call and returns its answer."""
        self._last += 1
        self._attachment.say(question={"question": self._last, **operation})
        return self._attachment.receive("answer")

    def submit(self, **fields: Any) -> int:
        """Starts a sequence, greedy unless `fields` say otherwise."""
        self._last += 1
        said = {"prompt": FRANCE, "max_tokens": 8, "credit": 1000, **fields}
        sampling = {"top_p": 1.0, "repetition_penalty": 1.0, **said.pop("sampling", {})}
        self._attachment.say(submit={"sequence": self._last, **said, "sampling": sampling})
        assert self._attachment.receive("accepted").sequence == self._last
        return self._last

    def run(self, **fields: Any) -> Tokens:
        """Runs a sequence to its end."""
        return self._attachment.receive_steps(self.submit(**fields))

    def receive(self, kind: str) -> Any:
        """The next message."""
        return self._attachment.receive(kind)

    def await_ready(self) -> Any:
        """Waits for `ready` and returns it."""
        while True:
            kind, said = self._attachment.receive_any("loading", "ready")
            if kind == "ready":
                return said


@pytest.fixture(scope="module")
def runner() -> XllamacppRunner:
    path = os.environ.get("TOKENWAY_TEST_MODEL")
    if not path or not Path(path).is_file():
        pytest.skip("TOKENWAY_TEST_MODEL names no GGUF file: `scripts/model.sh` prints one")
    pytest.importorskip("xllamacpp")
    return XllamacppRunner(Options(model_path=Path(path), slots=2, threads=1, context_length=1024))


@pytest.fixture(scope="module")
def worker(runner: XllamacppRunner) -> Iterator[Asking]:
    """A worker that is shared by all tests."""
    with tempfile.TemporaryDirectory(prefix="tokenway-") as folder:
        engine = Engine(Path(folder) / "workers.sock")
        running = Running(Worker(runner, Address(engine.target), Identity()))
        attachment = engine.attached()
        attachment.welcome()
        worker = Asking(attachment)
        model = worker.await_ready().model
        assert (model.runner, model.context_length) == ("xllamacpp", 1024)
        assert (model.vocabulary_size, model.eos_token) == (49152, "<|im_end|>")
        assert (model.bos_token, model.resumption) == ("", 2)
        assert list(model.unsupported) == ["logprobs", "echo", "suffix"]
        yield worker
        running.stop()
        engine.die()


def test_the_capital_of_france_is_paris(worker: Asking) -> None:
    assert worker.ask(tokenize={"text": "The capital of France is"}).ids.ids == FRANCE
    tokens = worker.run(max_tokens=1)
    assert (tokens.ids, tokens.data, tokens.end) == ([PARIS], b" Paris", LENGTH)


def test_a_resumed_greedy_sequence_has_the_same_tokens(worker: Asking) -> None:
    whole = worker.run(max_tokens=12)
    assert len(whole.ids) == 12
    for place in (1, 5, 11):
        rest = worker.run(max_tokens=12, delivered=whole.ids[:place])
        assert rest.first_index == place
        assert rest.ids == whole.ids[place:]


def test_a_prompt_of_several_chunks_is_read_completely(worker: Asking) -> None:
    walk = " The weather was fine that day, and we went for a long walk by the river." * 10
    text = f"The password is swordfish.{walk} The password is"
    prompt = list(worker.ask(tokenize={"text": text}).ids.ids)
    assert len(prompt) > 2 * STEP_TOKENS
    assert worker.run(prompt=prompt, max_tokens=3).data.startswith(b" swordfish")
    # Prompts that end at a chunk boundary, one token before it and one after it.
    for length in (STEP_TOKENS - 1, STEP_TOKENS, STEP_TOKENS + 1):
        assert len(worker.run(prompt=prompt[:length], max_tokens=2).ids) == 2


def test_tokens_do_not_depend_on_other_sequences(worker: Asking) -> None:
    alone = worker.run(max_tokens=12).ids
    first, second = worker.submit(max_tokens=12), worker.submit(max_tokens=12)
    both = {first: Tokens(first), second: Tokens(second)}
    while not all(tokens.end for tokens in both.values()):
        for part in worker.receive("step").sequences:
            both[part.sequence].take_part(part)
    assert [tokens.ids for tokens in both.values()] == [alone, alone]


def test_a_partial_character_token_has_its_own_bytes(worker: Asking) -> None:
    tokens = worker.run(max_tokens=1, sampling={"logit_bias": {PART_OF_A_CHARACTER: 100.0}})
    assert (tokens.ids, tokens.data) == ([PART_OF_A_CHARACTER], b"\xf0\x9f")
    text = "🦙 naïve 漢字"
    ids = worker.ask(tokenize={"text": text}).ids.ids
    assert worker.ask(detokenize={"ids": ids}).pieces.bytes == text.encode()


def test_a_special_token_is_parsed_by_name_and_has_no_bytes(worker: Asking) -> None:
    ids = list(worker.ask(tokenize={"text": "<|im_end|>", "begins": True}).ids.ids)
    assert ids == [END_OF_SEQUENCE]
    assert list(worker.ask(detokenize={"ids": ids}).pieces.lengths) == [0]


def test_eos_ends_a_sequence_unless_ignored(worker: Asking) -> None:
    ending = {"logit_bias": {END_OF_SEQUENCE: 100.0}}
    ended = worker.run(sampling=ending)
    assert (ended.ids, ended.data, ended.end) == ([END_OF_SEQUENCE], b"", STOPPED)
    ignored = worker.run(sampling=ending, ignore_eos=True, max_tokens=3)
    assert (ignored.ids, ignored.end) == ([END_OF_SEQUENCE] * 3, LENGTH)


def test_a_stop_token_ends_a_sequence_with_its_bytes(worker: Asking) -> None:
    tokens = worker.run(stop_token_ids=[DOT])
    assert (tokens.ids, tokens.data, tokens.end) == ([PARIS, DOT], b" Paris.", STOPPED)


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({"sampling": {"logit_bias": {END_OF_SEQUENCE: 100.0}}}, END_OF_SEQUENCE),
        ({"stop_token_ids": [PARIS], "sampling": {"logit_bias": {PARIS: 100.0}}}, PARIS),
    ],
)
def test_nothing_ends_a_sequence_before_min_tokens(
    worker: Asking, fields: dict[str, Any], end: int
) -> None:
    tokens = worker.run(min_tokens=2, **fields)
    assert (len(tokens.ids), tokens.ids.index(end), tokens.end) == (3, 2, STOPPED)


def test_sampling_depends_only_on_seed_choice_and_position(worker: Asking) -> None:
    def drawn(seed: int, choice: int, delivered: list[int]) -> list[int]:
        sampling = {"temperature": 1.5, "seed": seed, "choice": choice}
        return worker.run(sampling=sampling, max_tokens=12, delivered=delivered).ids

    whole = drawn(7, 1, [])
    assert drawn(7, 1, []) == whole
    assert drawn(7, 1, whole[:5]) == whole[5:]
    assert drawn(8, 1, []) != whole
    assert drawn(7, 2, []) != whole
    # A seed must give the same tokens in every release.
    assert sampling_fields(Sampling(seed=7, choice=1), 3, 99)["seed"] == 385295639
    assert 0 <= draw_seed(2**64 - 1, 2**32 - 1, 2**32 - 1) < 2**31


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}])
def test_keeping_only_the_top_token_is_greedy(worker: Asking, narrow: dict[str, Any]) -> None:
    sampling = {"temperature": 2.0, "seed": 5, **narrow}
    assert worker.run(sampling=sampling).ids == worker.run().ids


def test_penalties_count_the_right_tokens(worker: Asking) -> None:
    filler = list(worker.ask(tokenize={"text": " and so on, one after the other," * 15}).ids.ids)
    prompt = [PARIS, *filler, *FRANCE]

    def first(**sampling: float) -> int:
        return worker.run(prompt=prompt, max_tokens=1, sampling=sampling).ids[0]

    assert first() == PARIS
    assert first(repetition_penalty=1.9) != PARIS, "the repetition penalty counts the prompt"
    assert first(presence_penalty=2.0, frequency_penalty=2.0) == PARIS, (
        "the other penalties count only the completion"
    )
    made = Counter({PARIS: 3})
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={PARIS: 2.0, 9: 1})
    request = Request(
        prompt=(1,), max_tokens=9, min_tokens=5, stop_token_ids=frozenset([8]), sampling=sampling
    )
    assert bias(request, made, 5) == [[PARIS, 0.75], [9, 1]]
    assert bias(request, made, 4) == [[PARIS, 0.75], [9, 1], [8, False]]


def test_a_chat_is_rendered_with_the_generation_prompt(worker: Asking) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi {{ 1 }} é"},
        {"role": "assistant", "content": "Hello"},
    ]
    assert worker.ask(render_chat={"messages": messages}).text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi {{ 1 }} é<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>assistant\n"
    )


def test_no_device_call_reads_more_than_a_chunk(
    runner: XllamacppRunner, worker: Asking, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, read = runner._server, []
    assert server
    post = server.post

    def noted(route: str, asked: dict[str, Any]) -> dict[str, Any]:
        asked["response_fields"].append("timings/prompt_n")
        said = post(route, asked)
        read.append(said["timings/prompt_n"])
        return said

    monkeypatch.setattr(server, "post", noted)
    assert len(worker.run(prompt=FRANCE * 30, max_tokens=3).ids) == 3
    assert len(worker.run(max_tokens=3).ids) == 3
    assert read == [STEP_TOKENS, STEP_TOKENS, 150 - 2 * STEP_TOKENS, 1, 1, len(FRANCE), 1, 1]


def test_a_cancel_stops_prefill(runner: XllamacppRunner, worker: Asking) -> None:
    class CancelledAfter:
        """Reports cancellation on the third call."""

        asked = 0

        def __call__(self) -> bool:
            self.asked += 1
            return self.asked > 2

        def wait(self, seconds: float) -> bool:
            return False

    request = Request(prompt=(5,) * 10 * STEP_TOKENS, max_tokens=1, slot=1)
    cancelled = CancelledAfter()
    with pytest.raises(Ended):
        runner.generate(request, lambda _: None, cancelled)
    assert cancelled.asked == 3


def test_a_killed_llama_cpp_is_a_crash_and_is_reloaded(
    runner: XllamacppRunner, worker: Asking
) -> None:
    worker.submit(max_tokens=900, credit=1)
    worker.receive("step")
    assert runner._server
    os.kill(runner._server.pid, signal.SIGKILL)
    worker.submit()
    assert "llama.cpp" in worker.receive("crashed").reason
    worker.await_ready()
    assert worker.run(max_tokens=1).ids == [PARIS]


def test_a_load_error_says_what_to_do(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    with pytest.raises(LoadError, match="--model-path must name a GGUF file"):
        XllamacppRunner(Options())
    with pytest.raises(LoadError, match=r"nothing\.gguf is not a file"):
        XllamacppRunner(Options(model_path=tmp_path / "nothing.gguf"))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but not really")
    runner = XllamacppRunner(Options(model_path=broken))
    with pytest.raises(LoadError, match=r"llama\.cpp exited with code 1"):
        runner.load(lambda _: None)
    runner.close()
