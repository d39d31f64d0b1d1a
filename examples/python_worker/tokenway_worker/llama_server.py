"""llama.cpp's server, in a process of its own.

xllamacpp holds Python's interpreter lock while it loads a model, takes SIGTERM for itself, and
ends its process on some faults. Here none of that reaches the worker: it keeps its heartbeat, its
signals and its stream, and a dead llama.cpp is a device that is loaded again.

Both ends hold one end of a socket, which is this process's standard input. When the model is
loaded, the path of the server's Unix socket comes through it; its end is the end of this process,
also where the worker was killed.
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
    """Serves until the worker is gone."""
    worker = socket.socket(fileno=sys.stdin.fileno())
    # Nobody else may enter this folder: the server asks for no key.
    with tempfile.TemporaryDirectory(prefix="tokenway-") as folder:
        path = f"{folder}/llama.sock"
        params = xllamacpp.CommonParams()
        params.hostnames = [path]
        params.model.path = options["model"]
        params.n_parallel = options["slots"]
        params.n_ctx = options["slots"] * options["context_length"]
        # Each slot has cells of its own, so what one sequence reads is the same alone and in a
        # batch.
        params.kv_unified = False
        params.cpuparams.n_threads = options["threads"]
        params.cpuparams_batch.n_threads = options["threads"]
        # A step is no longer than this, so that whoever decodes does not wait for who prefills.
        params.n_batch = params.n_ubatch = max(options["step_tokens"], options["slots"])
        # What a slot has read is dropped with its sequence, and no prompt is kept elsewhere.
        params.cache_ram_mib = 0
        # A conversation that ends with the model's turn gets a new one, as in every other runner.
        params.prefill_assistant = False
        params.endpoint_slots = params.ui = False
        # Errors only: they hold no prompt.
        params.verbosity = 1
        if options["device"] is not None and _gpus() > 1:
            params.split_mode = xllamacpp.llama_split_mode.LLAMA_SPLIT_MODE_NONE
            params.main_gpu = options["device"]
        try:
            # It serves for as long as it is held.
            _server = xllamacpp.Server(params)
        except RuntimeError as error:
            sys.exit(f"llama.cpp: {error}")
        # The worker may be gone by now, with a word of ours unread or without.
        with contextlib.suppress(OSError):
            worker.sendall(path.encode())
            worker.recv(1)
    # At once: what llama.cpp still computes is for nobody, and Python's own end would wait for it.
    os._exit(0)


def _gpus() -> int:
    kind = xllamacpp.ggml_backend_dev_type.GGML_BACKEND_DEVICE_TYPE_GPU
    return sum(device["type"] == kind for device in xllamacpp.get_device_info())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
