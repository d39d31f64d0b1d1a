"""Conversion of a runner's exceptions into failures for the client and log lines."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass

from .runner import Failed, Invalid

log = logging.getLogger("tokenway_worker")


@dataclass(frozen=True, slots=True)
class Failure:
    """Reason why a sequence was rejected or failed, or why a tokenizer call failed."""

    # True if the request is at fault. Only then does the client get the message.
    is_invalid: bool
    message: str


def failure_of(error: BaseException, request_id: str = "") -> Failure:
    """Converts an exception. Logs it, with the id of its request, if it is not one of the runner
    interface's exceptions."""
    if isinstance(error, Invalid):
        return Failure(True, str(error))
    if isinstance(error, Failed):
        return Failure(False, str(error))
    name = type(error).__name__
    # The message is not logged, because it may contain a client's text.
    about = f" in request {request_id}" if request_id else ""
    where = "".join(traceback.format_tb(error.__traceback__))
    log.error("the runner raised %s%s:\n%s", name, about, where)
    return Failure(False, f"the runner raised {name}")
