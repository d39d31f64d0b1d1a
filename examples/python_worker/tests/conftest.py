"""Fixtures that start engines and workers, and stop them after the test."""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from engine import TIMEOUT_S, Attachment, Engine

from tokenway_worker import Runner
from tokenway_worker import worker as workers
from tokenway_worker.worker import Identity, Worker


class Running:
    """A worker on a thread of this process."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._codes: list[int] = []
        self._thread = threading.Thread(target=lambda: self._codes.append(worker.run()))
        self._thread.start()

    def code(self) -> int:
        """Waits until the worker has ended and returns its exit code."""
        self._thread.join(TIMEOUT_S)
        assert self._codes, "the worker has not ended"
        return self._codes[0]

    def stop(self) -> None:
        self.worker.stop()
        self._thread.join(TIMEOUT_S)
        self.worker.close()


Attach = Callable[[Runner], Attachment]


@pytest.fixture
def path() -> Iterator[Path]:
    # pytest's own temporary path may be too long for a socket.
    with tempfile.TemporaryDirectory(prefix="tokenway-") as folder:
        yield Path(folder) / "workers.sock"


@pytest.fixture
def engine(path: Path) -> Iterator[Engine]:
    engine = Engine(path)
    yield engine
    engine.die()


@pytest.fixture
def start(engine: Engine) -> Iterator[Callable[[Runner], Running]]:
    """Starts a worker that connects to the engine."""
    started = []

    def start(runner: Runner) -> Running:
        identity = Identity("model", "worker-7", "secret")
        started.append(Running(Worker(runner, workers.Engine(engine.target), identity)))
        return started[-1]

    yield start
    for running in started:
        running.stop()


@pytest.fixture
def attach(start: Callable[[Runner], Running], engine: Engine) -> Attach:
    """Connects a worker and waits until it is ready."""

    def attach(runner: Runner) -> Attachment:
        start(runner)
        attachment = engine.attached()
        attachment.welcome()
        attachment.receive("ready")
        return attachment

    return attach
