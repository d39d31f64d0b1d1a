"""What becomes of an exception that a runner raises: what its client is told, and what a log is."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

from .runner import Failed, Invalid

log = logging.getLogger("tokenway_worker")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a sequence was refused or did not go on, or a question has no answer."""

    # Whether the request is at fault. Only then its client is told the message.
    is_invalid: bool
    message: str


def failure_of(error: BaseException) -> Failure:
    """The failure that an exception is. One that the seam does not know is logged."""
    if isinstance(error, Invalid):
        return Failure(True, str(error))
    if isinstance(error, Failed):
        return Failure(False, str(error))
    name = type(error).__name__
    # Not its message, which may hold what a client wrote: where it happened says enough.
    log.error("the runner raised %s:\n%s", name, "".join(traceback.format_tb(error.__traceback__)))
    return Failure(False, f"the runner raised {name}")
