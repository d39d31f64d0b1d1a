"""The ways in which a fault is played: one request, several, or a client that leaves."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from .client import Client, Seen, Shape
from .engine import Engine
from .gateways import Running
from .judge import PASS, Demand, Grade, Played, Verdict, Whole, judge, worst
from .story import A, honest

# Requests until the faulty engine has got one. A gateway that picks at random needs the most.
MAX_REQUESTS = 12
BAD_REQUESTS = 12
OUTAGE = 5.0
RECOVERY = 10.0
PAUSE = 0.1
# The table demands a cancellation within 50 ms. After this time, the engine works for nobody.
CANCEL_LIMIT = 0.05
ABANDONED = 3.0


@dataclass
class Stage:
    """A running gateway, its engines, and the model and shape of the client's requests."""

    gateway: Running
    a: Engine
    b: Engine | None
    model: str
    shape: Shape

    def client(self) -> Client:
        return Client(self.gateway.port, self.gateway.key, self.model, self.shape)

    async def play(self) -> Played:
        """Sends one request."""
        before_a, before_b = self.counts()
        seen = await self.client().run()
        received_b = self.b.received[before_b:] if self.b else []
        return Played(self.shape, seen, self.a.received[before_a:], received_b)

    def counts(self) -> tuple[int, int]:
        """The numbers of requests that the engines have received."""
        return len(self.a.received), len(self.b.received) if self.b else 0


async def one_request(stage: Stage, demand: Demand) -> Verdict:
    """Sends requests until the faulty engine has got one, and judges that one."""
    for _ in range(MAX_REQUESTS):
        played = await stage.play()
        if played.a:
            return judge(demand, played)
    return Verdict(Grade.SAFE, "the faulty engine never got a request")


async def four_requests(stage: Stage, demand: Demand) -> Verdict:
    """Sends four requests, because an engine that cannot be reached cannot count its tries."""
    return worst([judge(demand, await stage.play()) for _ in range(4)])


async def stopped_engine(stage: Stage, demand: Demand) -> Verdict:
    """Stops the first engine, and sends four requests."""
    await stage.a.stop()
    return await four_requests(stage, demand)


async def bad_then_good(stage: Stage, demand: Demand) -> Verdict:
    """Sends requests that are at fault themselves, and then good ones to the same engines."""
    assert stage.b is not None
    bad = [judge(demand, await stage.play()) for _ in range(BAD_REQUESTS)]
    before = len(stage.a.received)
    stage.a.script = stage.b.script = honest(A)
    good = worst([judge(Whole(), await stage.play()) for _ in range(4)])
    if good.grade is not Grade.PASS:
        good = Verdict(good.grade, f"a good request after them: {good.reason}")
    if len(stage.a.received) == before:
        good = worst([good, Verdict(Grade.PARTIAL, "the engine got no more requests")])
    return worst([good, *bad])


async def flapping(stage: Stage, _: Demand) -> Verdict:
    """Fails all requests for a while, and then works."""

    async def recover() -> None:
        stage.a.script = honest(A)

    return await _outage(stage, recover)


async def restarted(stage: Stage, _: Demand) -> Verdict:
    """Is stopped for a while, and then started again."""
    await stage.a.stop()
    return await _outage(stage, stage.a.start)


async def _outage(stage: Stage, recover: Callable[[], Awaitable[None]]) -> Verdict:
    verdicts = []
    down_until = time.monotonic() + OUTAGE
    sent = 0
    while time.monotonic() < down_until:
        verdicts.append(judge(Whole(), await stage.play()))
        sent += 1
        await asyncio.sleep(PAUSE)
    tries = len(stage.a.received)
    if tries > max(10, sent // 4):
        reason = f"{tries} tries on the failing engine for {sent} requests"
        verdicts.append(Verdict(Grade.PARTIAL, reason))
    await recover()
    recovered = time.monotonic()
    while time.monotonic() < recovered + RECOVERY:
        played = await stage.play()
        verdicts.append(judge(Whole(), played))
        if played.a:
            return worst(verdicts)
        await asyncio.sleep(PAUSE)
    reason = f"no request to the engine within {RECOVERY:.0f} s of its recovery"
    return worst([*verdicts, Verdict(Grade.PARTIAL, reason)])


async def leaves_before_head(stage: Stage, _: Demand) -> Verdict:
    """The client leaves while the engine is silent."""
    return await _leave(stage, wait_for_text=False)


async def leaves_after_text(stage: Stage, _: Demand) -> Verdict:
    """The client leaves while a response is running."""
    return await _leave(stage, wait_for_text=True)


async def _leave(stage: Stage, *, wait_for_text: bool) -> Verdict:
    for _ in range(MAX_REQUESTS):
        client = stage.client()
        running = asyncio.create_task(client.run())
        if not await _reaches(stage, running):
            continue
        if wait_for_text:
            async with asyncio.timeout(5):
                await client.has_text.wait()
        await asyncio.sleep(PAUSE)
        counts = stage.counts()
        left = client.leave()
        await running
        return await _after_leaving(stage, counts, left)
    return Verdict(Grade.SAFE, "the faulty engine never got a request")


async def _reaches(stage: Stage, running: "asyncio.Task[Seen]") -> bool:
    """Waits until the faulty engine gets the request. False if another engine answered it."""
    before = len(stage.a.received)
    while len(stage.a.received) == before and not running.done():
        await asyncio.sleep(0.002)
    return len(stage.a.received) > before


async def _after_leaving(stage: Stage, counts: tuple[int, int], left: float) -> Verdict:
    request = stage.a.received[-1]
    while request.closed_at is None and time.monotonic() < left + ABANDONED:
        await asyncio.sleep(0.002)
    if request.closed_at is None:
        return Verdict(Grade.FAIL, f"the engine still worked {ABANDONED:.0f} s later")
    delay = request.closed_at - left
    await asyncio.sleep(1.5)
    if stage.counts() != counts:
        return Verdict(Grade.FAIL, "the request was sent again for a client that had left")
    if delay > CANCEL_LIMIT:
        return Verdict(Grade.PARTIAL, f"the engine was cancelled after {delay * 1000:.0f} ms")
    return PASS


async def leaves_between_tries(stage: Stage, _: Demand) -> Verdict:
    """The client leaves while the gateway waits for its next try."""
    client = stage.client()
    running = asyncio.create_task(client.run())
    await _reaches(stage, running)
    await asyncio.sleep(0.02)
    counts = stage.counts()
    client.leave()
    await running
    await asyncio.sleep(ABANDONED)
    later = stage.counts()[0] - counts[0]
    if later:
        return Verdict(Grade.FAIL, f"{later} more tries for a client that had left")
    return PASS
