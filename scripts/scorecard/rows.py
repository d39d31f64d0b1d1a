"""The faults, in the order of the table."""

import json
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from . import scenarios
from .client import Shape
from .engine import Chunk, Do, Raw, Script, Step
from .judge import (
    Demand,
    Rejected,
    Verdict,
    Whole,
    at_most,
    at_once,
    busy_pause,
    from_b,
    no_unknown_event,
    with_retry_after,
    within,
)
from .story import (
    DONE,
    A,
    B,
    always,
    busy_until_date,
    cut,
    error,
    event,
    first,
    honest,
    refuses_started_answers,
    with_mark,
    with_noise,
    without_done,
)

ALL = tuple(Shape)
STREAMS = (Shape.COMPLETION, Shape.CHAT)
WHOLE = Whole()
HONEST_B = honest(B)

Scenario = Callable[[scenarios.Stage, Demand], Coroutine[Any, Any, Verdict]]


@dataclass(frozen=True)
class Fault:
    """A row of the table."""

    name: str
    a: Script
    """The faulty engine."""
    demand: Demand = WHOLE
    b: Script | None = HONEST_B
    """The second engine. `None` if there is none."""
    shapes: tuple[Shape, ...] = ALL
    is_impatient: bool = False
    scenario: Scenario = scenarios.one_request
    a_url: str | None = None
    """Address of the faulty engine, if it does not exist."""


RETRY_AFTER = "retry-after: 2"
BUSY = error(429, "rate_limit_exceeded")
BUSY_WITH_DELAY = error(429, "rate_limit_exceeded", RETRY_AFTER)
ROLE = event({"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]})
EMPTY = event({"id": "x-1", "object": "text_completion", "created": 1, "model": "m", "choices": []})
TORN = b'data: {"choices":[{"index":0,"te'
TORN_CHARACTER = b'data: {"choices":[{"index":0,"text":" f\xc3'
ERROR_EVENT = event({"error": {"message": "scripted", "type": "server_error", "code": 500}})
TORN_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/ev"
UNKNOWN: tuple[Step, ...] = (
    Chunk(b": a comment\n\n"),
    Chunk(b"event: ping\ndata: " + json.dumps({"type": "ping"}).encode() + b"\n\n"),
    EMPTY,
)


def _raw(data: bytes, *end: Step) -> Script:
    return lambda _: [Raw(data), *end]


BUSY_ROWS = (
    Fault("429 once, `Retry-After: 2`", first(1, BUSY_WITH_DELAY), Whole((busy_pause(2),))),
    Fault("429 once, no header", first(1, BUSY), Whole((busy_pause(1),))),
    Fault(
        "429 once, `Retry-After: 2`, no other engine",
        first(1, BUSY_WITH_DELAY),
        Whole((busy_pause(2),)),
        b=None,
    ),
    Fault(
        "429 once, `Retry-After` as a date, no other engine",
        busy_until_date,
        Whole((busy_pause(1.9),)),
        b=None,
    ),
    Fault("429 once, no header, no other engine", first(1, BUSY), Whole((busy_pause(1),)), b=None),
    Fault("429 always, `Retry-After: 2`", always(BUSY_WITH_DELAY), Whole((busy_pause(2),))),
    Fault("429 always, no header", always(BUSY), Whole((busy_pause(1),))),
    Fault(
        "429 always from both, `Retry-After: 2`",
        always(BUSY_WITH_DELAY),
        Rejected(429, rules=(with_retry_after, busy_pause(2))),
        b=always(BUSY_WITH_DELAY),
    ),
    Fault(
        "429 always from both, no header",
        always(BUSY),
        Rejected(429, rules=(with_retry_after, busy_pause(1))),
        b=always(BUSY),
    ),
)

FAILED_ROWS = (
    Fault("500 once", first(1, error(500)), Whole((at_most(2),))),
    Fault("500 once, no other engine", first(1, error(500)), Whole((at_most(2),)), b=None),
    Fault("503 always", always(error(503)), Whole((at_most(2),))),
    Fault("503 always from both", always(error(503)), Rejected(503), b=always(error(503))),
    Fault("connection reset before the head, once", first(1, Do.RST), Whole((at_most(2),))),
    Fault("connection reset before the head, always", always(Do.RST), Whole((at_most(2),))),
    Fault("connection closed inside the head, always", _raw(TORN_HEAD, Do.FIN), Whole()),
    Fault("connection refused", honest(A), scenario=scenarios.stopped_engine),
    Fault(
        "name does not resolve",
        honest(A),
        scenario=scenarios.four_requests,
        a_url="http://no-such-host.invalid:80",
    ),
    Fault("500 always: model and usage of the response", always(error(500)), Whole((from_b,))),
)

SILENT_ROWS = (
    Fault(
        "accepts and never answers",
        always(Do.WAIT_FOR_CLOSE),
        Whole((at_most(1), within(5))),
        is_impatient=True,
    ),
    Fault(
        "head at once, then silence",
        always(Do.STREAM_HEAD, Do.WAIT_FOR_CLOSE),
        Whole((at_most(1), within(5))),
        shapes=STREAMS,
        is_impatient=True,
    ),
    Fault(
        "head and role, then silence",
        always(Do.STREAM_HEAD, ROLE, Do.WAIT_FOR_CLOSE),
        Whole((at_most(1), within(5))),
        shapes=(Shape.CHAT,),
        is_impatient=True,
    ),
)

CUT_ROWS = (
    Fault("cut after 4 words by FIN", cut(4, Do.FIN)),
    Fault("cut after 4 words by RST", cut(4, Do.RST)),
    Fault("cut after 4 words by an orderly end", cut(4, Do.END), shapes=STREAMS),
    Fault("cut after 4 words by an early `[DONE]`", cut(4, DONE, Do.END), shapes=STREAMS),
    Fault("cut inside an event", cut(4, Chunk(TORN), Do.FIN), shapes=STREAMS),
    Fault("cut inside a character", cut(4, Chunk(TORN_CHARACTER), Do.FIN), shapes=STREAMS),
    Fault("cut inside an event by an orderly end", cut(4, Chunk(TORN), Do.END), shapes=STREAMS),
    Fault("cut by an error event", cut(4, ERROR_EVENT, Do.END), shapes=STREAMS),
    Fault("cut by an error event and `[DONE]`", cut(4, ERROR_EVENT, DONE, Do.END), shapes=STREAMS),
    Fault("cut after the last word, before the finish reason", cut(7, Do.FIN), shapes=STREAMS),
    Fault("cut, no other engine", cut(4, Do.FIN), b=None),
    Fault(
        "cut, and the next engine rejects a started answer",
        cut(4, Do.RST),
        b=refuses_started_answers,
        shapes=(Shape.CHAT,),
    ),
    Fault(
        "silence after 4 words", cut(4, Do.WAIT_FOR_CLOSE), Whole((within(5),)), is_impatient=True
    ),
)

NOISE_ROWS = (
    Fault("malformed event among good ones", with_noise(Chunk(TORN + b"\n\n")), shapes=STREAMS),
    Fault(
        "comments, unknown events, empty `choices`",
        with_noise(*UNKNOWN),
        Whole((no_unknown_event,)),
        shapes=STREAMS,
    ),
    Fault("a byte order mark before the first event", with_mark, shapes=STREAMS),
    Fault("whole, without `[DONE]`", without_done(Do.END), shapes=STREAMS),
    Fault(
        "whole, without `[DONE]`, connection left open",
        without_done(Do.WAIT_FOR_CLOSE),
        Whole((at_once,)),
        shapes=STREAMS,
    ),
)

REQUEST_ROWS = (
    Fault(
        "400 `context_length_exceeded`",
        always(error(400, "context_length_exceeded")),
        Rejected(400, "context_length_exceeded", (at_most(1, 0),)),
    ),
    Fault(
        "400 `content_filter`",
        always(error(400, "content_filter")),
        Rejected(400, "content_filter", (at_most(1, 0),)),
    ),
    Fault(
        "403 `content_policy_violation`",
        always(error(403, "content_policy_violation")),
        Rejected(403, "content_policy_violation", (at_most(1, 0),)),
    ),
    Fault(
        "413 `request_too_large`",
        always(error(413, "request_too_large")),
        Rejected(413, "request_too_large", (at_most(1, 0),)),
    ),
    Fault(
        "422 `invalid_value`",
        always(error(422, "invalid_value")),
        Rejected(422, "invalid_value", (at_most(1, 0),)),
    ),
    Fault(
        "twelve requests with 400, then good ones",
        always(error(400, "invalid_value")),
        Rejected(400),
        b=always(error(400, "invalid_value")),
        shapes=(Shape.UNARY,),
        scenario=scenarios.bad_then_good,
    ),
    Fault(
        "twelve requests with 403 `content_policy_violation`, then good ones",
        always(error(403, "content_policy_violation")),
        Rejected(403),
        b=always(error(403, "content_policy_violation")),
        shapes=(Shape.UNARY,),
        scenario=scenarios.bad_then_good,
    ),
)

TIME_ROWS = (
    Fault(
        "fails with 500 for 5 s, then works",
        always(error(500)),
        shapes=(Shape.UNARY,),
        scenario=scenarios.flapping,
    ),
    Fault(
        "refuses connections for 5 s, then works",
        honest(A),
        shapes=(Shape.UNARY,),
        scenario=scenarios.restarted,
    ),
    Fault(
        "client leaves before the head",
        always(Do.WAIT_FOR_CLOSE),
        scenario=scenarios.leaves_before_head,
    ),
    Fault(
        "client leaves after 3 words",
        cut(3, Do.WAIT_FOR_CLOSE),
        shapes=STREAMS,
        scenario=scenarios.leaves_after_text,
    ),
    Fault(
        "client leaves between two tries",
        always(BUSY_WITH_DELAY),
        b=None,
        shapes=(Shape.UNARY,),
        scenario=scenarios.leaves_between_tries,
    ),
)

FAULTS = (
    *BUSY_ROWS,
    *FAILED_ROWS,
    *SILENT_ROWS,
    *CUT_ROWS,
    *NOISE_ROWS,
    *REQUEST_ROWS,
    *TIME_ROWS,
)
