"""llama.cpp's server in its own process.

xllamacpp holds the GIL while it loads a model, handles SIGTERM itself, and aborts its process on
some errors. In a separate process none of this affects the worker's heartbeats, signals or stream.
If this process dies, the worker reports a crash and starts it again.

Standard input is one end of a socket pair with the worker. When the model is loaded, this process
sends the path of its Unix socket. It exits when the worker closes its end or is killed.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import tempfile
from typing import Any

import xllamacpp


def main(options: dict[str, Any]) -> None:
    """Serves until the worker closes its end of the socket."""
    worker = socket.socket(fileno=sys.stdin.fileno())
    # A private folder, because the server requires no key.
    with tempfile.TemporaryDirectory(prefix="tokenway-") as folder:
        path = f"{folder}/llama.sock"
        params = xllamacpp.CommonParams()
        params.hostnames = [path]
        params.model.path = options["model"]
        params.n_parallel = options["slots"]
        params.n_ctx = options["slots"] * options["context_length"]
        # Each slot has its own KV cells, so a sequence computes the same alone and in a batch.
        params.kv_unified = False
        params.cpuparams.n_threads = options["threads"]
        params.cpuparams_batch.n_threads = options["threads"]
        # Limits the batch, so that prefill does not delay sequences that decode.
        params.n_batch = params.n_ubatch = max(options["step_tokens"], options["slots"])
        # No prompt cache: a slot's state is dropped with its sequence.
        params.cache_ram_mib = 0
        # A chat that ends with an assistant message gets a new turn, as in every other runner.
        params.prefill_assistant = False
        params.endpoint_slots = params.ui = False
        # Errors only, because they contain no prompt.
        params.verbosity = 1
        if options["device"] is not None and _gpus() > 1:
            params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = options["device"]
        try:
            # The server runs while this variable exists.
            _server = xllamacpp.Server(params)
        except RuntimeError as error:
            sys.exit(f"llama.cpp: {error}")
        # The worker may have exited meanwhile.
        with contextlib.suppress(OSError):
            worker.sendall(path.encode())
            worker.recv(1)
    # Exits at once. A normal exit would wait for llama.cpp's running computation.
    os._exit(0)


def _gpus() -> int:
    kind = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_GPU
    return sum(device["type"] == kind for device in xllamacpp.get_device_info())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
