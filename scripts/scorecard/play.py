"""Plays faults on one gateway.

Each fault and shape of request has engines of its own, and a gateway or at least a model name of
its own: a breaker that the last fault opened would hide the next fault.
"""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from .client import Shape
from .engine import Engine
from .gateways import Gateway, Running, Setup
from .judge import Grade, Verdict
from .rows import Fault
from .scenarios import Stage

# All that one case can take, with a gateway that is slow in each of its requests.
LIMIT = 300.0
LISTED_LIMIT = 10.0


@dataclass
class Case:
    """A fault in one shape of requests, with its engines."""

    fault: Fault
    shape: Shape
    model: str
    a: Engine
    b: Engine | None

    @property
    def engines(self) -> list[Engine]:
        return [self.a] if self.b is None else [self.a, self.b]

    def setup(self) -> Setup:
        """The setup of the gateway. The engines must have been started."""
        urls = [engine.url for engine in self.engines]
        urls[0] = self.fault.a_url or urls[0]
        return Setup(self.model, urls, self.fault.is_impatient)


async def play_all(
    faults: Sequence[Fault], gateway: Gateway
) -> AsyncIterator[tuple[Fault, Shape, Verdict]]:
    """Plays the faults in their order, in all of their shapes."""
    cases = list(_cases(faults, gateway))
    groups = [cases] if gateway.is_shared else [[case] for case in cases]
    for group in groups:
        async with AsyncExitStack() as stack:
            try:
                running = await _start(group, gateway, stack)
            except RuntimeError as error:
                for case in group:
                    yield case.fault, case.shape, Verdict(Grade.FAIL, str(error))
                continue
            for case in group:
                yield case.fault, case.shape, await _play(case, running)


def _cases(faults: Sequence[Fault], gateway: Gateway) -> Iterator[Case]:
    for fault in faults:
        for shape in fault.shapes:
            model = f"m-{faults.index(fault)}-{shape.name}" if gateway.is_shared else "m"
            b = Engine(fault.b) if fault.b else None
            yield Case(fault, shape, model, Engine(fault.a), b)


async def _start(group: Sequence[Case], gateway: Gateway, stack: AsyncExitStack) -> Running:
    """Starts the engines and the gateway. `stack` stops them."""
    for case in group:
        for engine in case.engines:
            await engine.start()
            stack.push_async_callback(engine.stop)
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="scorecard-")))
    running = await Running.start(gateway, [case.setup() for case in group], folder)
    stack.push_async_callback(running.stop)
    if gateway.lists_models:
        for case in group:
            for engine in case.engines[1 if case.fault.a_url else 0 :]:
                await _wait_until_listed(engine, gateway)
    return running


async def _wait_until_listed(engine: Engine, gateway: Gateway) -> None:
    try:
        async with asyncio.timeout(LISTED_LIMIT):
            await engine.listed.wait()
    except TimeoutError:
        raise RuntimeError(f"{gateway.name} did not ask an engine for its models") from None


async def _play(case: Case, running: Running) -> Verdict:
    stage = Stage(running, case.a, case.b, case.model, case.shape)
    try:
        async with asyncio.timeout(LIMIT):
            return await case.fault.scenario(stage, case.fault.demand)
    except TimeoutError:
        return Verdict(Grade.FAIL, f"the fault did not end within {LIMIT:.0f} s")
