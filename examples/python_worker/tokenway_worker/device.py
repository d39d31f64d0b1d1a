"""The device: a runner, loaded once, and one thread for each of its slots. It outlives streams and
must not know them.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from .failures import failure_of
from .runner import DeviceLost, Ended, LoadError, Runner
from .sequence import Sequence

log = logging.getLogger("tokenway_worker")


class Device:
    """Runs sequences, each on the thread of its slot."""

    def __init__(self, runner: Runner) -> None:
        self.runner = runner
        self.is_loaded = False
        self._loading = threading.Lock()
        self._tell: Callable[[float], None] = lambda _: None
        self._changed = threading.Condition()
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence | None] = [None] * runner.slots
        self._has_threads = False

    def prepare(self, tell: Callable[[float], None]) -> None:
        """Returns when the model is loaded and every slot is free. Raises `LoadError`. `tell` gets
        the loading progress; the last caller's `tell` replaces earlier ones."""
        self._tell = tell
        with self._loading:
            # A cancelled sequence may still be in a device call.
            with self._changed:
                self._changed.wait_for(lambda: not any(self._running))
            if not self.is_loaded:
                self._load()

    def submit(self, sequence: Sequence) -> None:
        """Runs a sequence in the next slot that is free."""
        with self._changed:
            self._waiting.append(sequence)
            self._changed.notify_all()

    def withdraw(self, sequence: Sequence) -> None:
        """Removes a cancelled sequence if it still waits for a slot."""
        with self._changed:
            if sequence in self._waiting:
                self._waiting.remove(sequence)

    def step_ms(self) -> int:
        """Duration of the longest device call that is running, in milliseconds."""
        running = [sequence for sequence in self._running if sequence]
        since_s = [since for it in running if (since := it.computes_since_s()) is not None]
        return int((time.monotonic() - min(since_s)) * 1000) if since_s else 0

    def _load(self) -> None:
        started_s = time.monotonic()
        try:
            # Reads `self._tell` on each call, because a new stream may have replaced it.
            self.runner.load(lambda fraction: self._tell(fraction))
        except LoadError:
            raise
        except Exception as error:
            raise LoadError(f"{type(error).__name__}: {error}") from error
        self.is_loaded = True
        log.info("the model is loaded, in %.1f s", time.monotonic() - started_s)
        if not self._has_threads:
            self._has_threads = True
            for slot in range(self.runner.slots):
                # A daemon, so that a device call that never returns cannot keep the process alive.
                name = f"slot-{slot}"
                threading.Thread(target=self._serve, args=(slot,), name=name, daemon=True).start()

    def _serve(self, slot: int) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self._waiting) > 0)
                sequence = self._waiting.popleft()
                self._running[slot] = sequence
            self._run(sequence, slot)
            with self._changed:
                self._running[slot] = None
                self._changed.notify_all()

    def _run(self, sequence: Sequence, slot: int) -> None:
        request = replace(sequence.request, slot=slot)
        try:
            self.runner.check(request)
        except Exception as error:
            sequence.refuse(failure_of(error, request.request_id))
            return
        if not sequence.accept():
            return
        try:
            last = self.runner.generate(request, sequence.emit, sequence)
            if last is not None:
                sequence.stop(last)
        except Ended:
            pass
        except DeviceLost as error:
            self.is_loaded = False
            sequence.on_lost(str(error))
        # Catches everything: if this thread ended, its slot would be lost and the sequence would
        # not end.
        except BaseException as error:
            sequence.fail(failure_of(error, request.request_id))
        # Has no effect if the sequence has ended.
        sequence.fault("left the sequence without an end")
