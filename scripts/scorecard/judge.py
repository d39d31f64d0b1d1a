"""Grades what a client saw of a fault, and what the engines saw of the tries.

- pass: all that the table demands;
- partial: the client got the whole text, but something that the table forbids happened;
- safe: a clean error that the client can recognize;
- fail: a text that looks whole and is not, a hang, or an engine that works for a client that left.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

from .client import LIMIT, Seen, Shape
from .engine import Received
from .story import TEXT, WORDS, A, B

# Schedulers may shorten a measured gap by this much.
TOLERANCE = 0.02
MAX_TRIES = 6


class Grade(IntEnum):
    """The grades, worst first."""

    FAIL = 0
    SAFE = 1
    PARTIAL = 2
    PASS = 3

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Verdict:
    """A grade and, unless it is a pass, the observation behind it."""

    grade: Grade
    reason: str = ""


PASS = Verdict(Grade.PASS)


@dataclass(frozen=True)
class Played:
    """One request that was played: the client's view and the tries that the engines received."""

    shape: Shape
    seen: Seen
    a: Sequence[Received]
    b: Sequence[Received]


Rule = Callable[[Played], str | None]


@dataclass(frozen=True)
class Whole:
    """The client must get the whole text, and all rules must hold."""

    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class Rejected:
    """The client must get this status and, if given, this error code."""

    status: int
    code: str | None = None
    rules: tuple[Rule, ...] = ()


Demand = Whole | Rejected


def judge(demand: Demand, played: Played) -> Verdict:
    """Grades a request."""
    seen = played.seen
    if seen.ended is None:
        return Verdict(Grade.FAIL, f"no end within {LIMIT:.0f} s, with {_words(seen)}")
    broken = _first_broken((bounded, *demand.rules), played)
    if is_whole(played):
        if isinstance(demand, Rejected):
            return Verdict(Grade.PARTIAL, f"answered instead of rejected; {_tries(played)}")
        broken = broken or clean(played) or marked(played) or usage_of_whole(played)
        return Verdict(Grade.PARTIAL, broken) if broken else PASS
    looks_whole = _looks_whole(played)
    if looks_whole is not None:
        return Verdict(Grade.FAIL, looks_whole)
    failure = describe_failure(seen)
    if isinstance(demand, Rejected):
        code = (seen.error or {}).get("code")
        if seen.status == demand.status and demand.code in (None, code):
            return Verdict(Grade.SAFE, f"{failure}; {broken}") if broken else PASS
        return Verdict(Grade.SAFE, f"{failure}, code {code!r}, {_tries(played)}")
    return Verdict(Grade.SAFE, failure)


def is_whole(played: Played) -> bool:
    """True if the client got the whole text, its finish reason and an orderly end."""
    seen = played.seen
    has_end = seen.finish_reason == "stop" and seen.unclean is None
    return seen.status == 200 and has_end and seen.error is None and seen.text == TEXT


def _looks_whole(played: Played) -> str | None:
    """Describes a response that is not whole, but could be taken for it."""
    seen = played.seen
    if (seen.status or 0) >= 400 or seen.status is None:
        return None
    if seen.error is not None:
        if seen.has_done and seen.unclean is None:
            return f"{_words(seen)}, an error event, and then [DONE]"
        return None
    if seen.unclean is not None:
        return None
    ending = "[DONE]" if seen.has_done else "an orderly end"
    if played.shape.is_stream and not seen.has_done:
        ending += " without [DONE]"
    return f"{_words(seen)}, finish reason {seen.finish_reason!r}, and {ending}"


def describe_failure(seen: Seen) -> str:
    """Describes a clean error."""
    if seen.status is None:
        return f"no response: {seen.unclean}"
    if seen.status >= 400:
        return f"status {seen.status} after {seen.seconds:.1f} s"
    error = "an error event" if seen.error is not None else "no error event"
    ending = "an unclean end" if seen.unclean else "no end marker"
    return f"{_words(seen)}, {error} and {ending}"


def _words(seen: Seen) -> str:
    if not seen.text:
        return "no text"
    texts = {"".join(WORDS[:count]): count for count in range(1, len(WORDS) + 1)}
    if seen.text in texts:
        return f"{texts[seen.text]} of {len(WORDS)} words"
    return f"a wrong text ({seen.text!r})"


def _tries(played: Played) -> str:
    return f"tries: {len(played.a)} + {len(played.b)}"


def _first_broken(rules: Sequence[Rule], played: Played) -> str | None:
    return next((broken for rule in rules if (broken := rule(played))), None)


def bounded(played: Played) -> str | None:
    """At most `MAX_TRIES` on each engine."""
    most = max(len(played.a), len(played.b))
    return f"{most} tries on one engine" if most > MAX_TRIES else None


def clean(played: Played) -> str | None:
    """Nothing malformed reaches the client."""
    malformed = played.seen.malformed
    return f"the client got a malformed event: {malformed[0]!r}" if malformed else None


def marked(played: Played) -> str | None:
    """A stream ends with its marker."""
    has_marker = played.seen.has_done or not played.shape.is_stream
    return None if has_marker else "the whole text and an orderly end, but no [DONE]"


def usage_of_whole(played: Played) -> str | None:
    """The usage is that of an undisturbed run."""
    tokens = played.seen.usage.get("completion_tokens")
    return None if tokens == len(WORDS) else f"usage says {tokens} completion tokens, not 8"


def busy_pause(seconds: float) -> Rule:
    """The gateway pauses at least this long between two tries on a busy engine."""

    def rule(played: Played) -> str | None:
        tries = [pair for engine in (played.a, played.b) for pair in pairwise(engine)]
        shortest = min((later.at - earlier.at for earlier, later in tries), default=seconds)
        if shortest >= seconds - TOLERANCE:
            return None
        return f"a busy engine was tried again after {shortest:.2f} s, not {seconds:g} s"

    return rule


def at_most(a: int, b: int = MAX_TRIES) -> Rule:
    """At most so many tries on each engine."""

    def rule(played: Played) -> str | None:
        is_kept = len(played.a) <= a and len(played.b) <= b
        return None if is_kept else _tries(played)

    return rule


def with_retry_after(played: Played) -> str | None:
    """The rejection says when to come back."""
    has_it = "retry-after" in played.seen.headers
    return None if has_it else "the response has no Retry-After"


def from_b(played: Played) -> str | None:
    """Model and usage are those of the engine that answered."""
    seen = played.seen
    if A.model in seen.models:
        return "the model is that of the engine that failed"
    if seen.models != [B.model]:
        return "the model is the requested name, not that of the engine that answered"
    prompt = seen.usage.get("prompt_tokens")
    is_right = prompt == B.prompt_tokens
    return None if is_right else f"usage says {prompt} prompt tokens, B said {B.prompt_tokens}"


def no_unknown_event(played: Played) -> str | None:
    """An unknown event does not reach the client."""
    return None if played.seen.unknown == 0 else "the client got the unknown event"


def at_once(played: Played) -> str | None:
    """The end follows the last text within two seconds."""
    seen = played.seen
    delay = (seen.ended or time.monotonic()) - (seen.last_text or seen.sent)
    return f"the end came {delay:.1f} s after the finish reason" if delay > 2 else None


def within(seconds: float) -> Rule:
    """The whole response takes at most so long."""

    def rule(played: Played) -> str | None:
        took = played.seen.seconds
        return f"took {took:.1f} s" if took > seconds else None

    return rule


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """The verdict with the lowest grade."""
    return min(verdicts, key=lambda verdict: verdict.grade)
