"""Runs llama.cpp's server from the package xllamacpp, with the flags that `tokenway-perf model` passes to it."""

import argparse
import importlib.metadata
import signal

import xllamacpp

parser = argparse.ArgumentParser()
package = f"xllamacpp {importlib.metadata.version('xllamacpp')}, not compiled for this processor"
parser.add_argument("--version", action="version", version=package)
parser.add_argument("--model", required=True)
parser.add_argument("--host", required=True)
for flag in ("--port", "--parallel", "--ctx-size", "--threads", "--threads-batch"):
    parser.add_argument(flag, type=int, required=True)
options = parser.parse_args()

params = xllamacpp.CommonParams()
params.hostnames = [options.host]
params.port = options.port
params.model.path = options.model
params.n_parallel = options.parallel
params.n_ctx = options.ctx_size
params.kv_unified = False
params.cpuparams.n_threads = options.threads
params.cpuparams_batch.n_threads = options.threads_batch
# The server stops when this object is deleted.
server = xllamacpp.Server(params)
signal.pause()
