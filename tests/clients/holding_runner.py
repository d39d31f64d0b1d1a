"""A runner whose device call holds the GIL, like native code that never releases it. No other thread of the process
runs meanwhile, so no heartbeats are sent."""

import ctypes
import os

from tokenway_worker.echo import EchoRunner

MILLISECONDS = int(os.environ["HOLDS_MS"])


class HoldingRunner(EchoRunner):
    def generate(self, request, emit, cancelled):
        def emit_and_hold(token):
            emit(token)
            print("holding", flush=True)
            # `PyDLL` calls hold the GIL; `CDLL` calls would release it.
            ctypes.PyDLL(None).usleep(MILLISECONDS * 1_000)

        return super().generate(request, emit_and_hold, cancelled)
