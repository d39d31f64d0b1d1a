"""Plays the fault table on the gateways: `python -m scorecard --tokenway PROGRAM`."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from .client import Shape
from .gateways import Gateway, LiteLlm, Smg, Tokenway
from .judge import Verdict
from .play import play_all
from .report import Cell, progress, table
from .rows import FAULTS, Fault


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scorecard", description=__doc__)
    parser.add_argument("--tokenway", required=True, metavar="PROGRAM", help="program `tokenway`")
    names = ["Tokenway", "SMG", "LiteLLM"]
    parser.add_argument("--gateway", action="append", choices=names, help="only this gateway")
    parser.add_argument("--fault", default="", metavar="TEXT", help="only faults with this text")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the table here")
    return parser.parse_args()


async def main() -> None:
    options = arguments()
    gateways: list[Gateway] = [Tokenway(options.tokenway), Smg(), LiteLlm()]
    chosen = [gateway for gateway in gateways if gateway.name in (options.gateway or gateway.name)]
    faults = [fault for fault in FAULTS if options.fault in fault.name]
    # One after the other, because some grades depend on the time that a gateway takes.
    cells = [await _play(faults, gateway) for gateway in chosen]
    titles = [f"{gateway.name} {gateway.version()}" for gateway in chosen]
    text = table(faults, dict(zip(titles, cells, strict=True)))
    print(text, end="")
    if options.out:
        options.out.write_text(text)


async def _play(faults: Sequence[Fault], gateway: Gateway) -> dict[str, Cell]:
    """Plays the faults on one gateway. Reports each on standard error."""
    cells: dict[str, dict[Shape, Verdict]] = {}
    async for fault, shape, verdict in play_all(faults, gateway):
        cell = cells.setdefault(fault.name, {})
        cell[shape] = verdict
        if len(cell) == len(fault.shapes):
            print(progress(gateway.name, fault, cell), file=sys.stderr, flush=True)
    return dict(cells)


async def _until_terminated() -> None:
    """Runs `main`. SIGTERM cancels it, as Ctrl-C does, so that the gateways end with it."""
    running = asyncio.ensure_future(main())
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, running.cancel)
    await running


if __name__ == "__main__":
    try:
        asyncio.run(_until_terminated())
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit("interrupted")
