"""A runner whose device call holds Python's interpreter, as native code does that never releases it: no other thread of
the process runs meanwhile, nor any heartbeat."""

import ctypes
import os

from tokenway_worker.echo import EchoRunner

MILLISECONDS = int(os.environ["HOLDS_MS"])


class HoldingRunner(EchoRunner):
    def generate(self, request, emit, cancelled):
        def emit_and_hold(token):
            emit(token)
            print("holding", flush=True)
            # `PyDLL` calls keep the interpreter; those of `CDLL` would release it.
            ctypes.PyDLL(None).usleep(MILLISECONDS * 1_000)

        return super().generate(request, emit_and_hold, cancelled)
