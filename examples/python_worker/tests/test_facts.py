"""Declaration of the parameters that a runner supports."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Running
from engine import Engine
from runners import ScriptedRunner

from tokenway_worker import ALL_PARAMETERS, ModelFacts, Options, Runner, wire
from tokenway_worker.echo import EchoRunner

IN_TREE = Path(__file__).resolve().parents[3] / "proto"


def test_a_runner_honours_nothing_by_default(
    start: Callable[[Runner], Running], engine: Engine
) -> None:
    runner = ScriptedRunner()
    runner.model = ModelFacts("bare", context_length=100, vocabulary_size=1000)
    start(runner)
    attachment = engine.attached()
    attachment.welcome()
    assert tuple(attachment.receive("ready").model.unsupported) == ALL_PARAMETERS


def test_honoured_parameters_are_not_unsupported() -> None:
    facts = ModelFacts("some", 100, 1000, honours=("top_p", "logprobs"))
    left = [name for name in ALL_PARAMETERS if name not in ("top_p", "logprobs")]
    assert list(facts.unsupported) == left


def test_an_unknown_parameter_is_named_in_the_error() -> None:
    with pytest.raises(ValueError, match=r"honours names 'logprob', which is none of temperature,"):
        ModelFacts("some", 100, 1000, honours=("top_p", "logprob"))


def test_all_parameters_match_the_proto_file() -> None:
    proto = Path(os.environ.get(wire.PROTO_FOLDER) or IN_TREE) / wire.PROTO
    before, _, _ = proto.read_text().partition("repeated string unsupported")
    comment = before[before.rindex(";") :].replace("//", " ")
    [listed] = re.findall(r"Allowed values:(.*?)\.", comment, re.DOTALL)
    names = re.sub(r"\(.*?\)", "", listed, flags=re.DOTALL).split(",")
    assert tuple(name.strip() for name in names) == ALL_PARAMETERS


def test_the_echo_runner_declares_what_it_ignores_as_unsupported() -> None:
    assert EchoRunner(Options()).model.unsupported == (
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "logprobs",
        "echo",
        "suffix",
    )
