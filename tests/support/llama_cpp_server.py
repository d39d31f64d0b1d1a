"""Serves a GGUF model with llama.cpp's own server on a free port. Prints the URL of the server, and serves until it is
killed. Its argument is the path of the model."""

import sys
import threading

import xllamacpp

params = xllamacpp.CommonParams()
params.model.path = sys.argv[1]
params.hostnames = ["127.0.0.1"]
params.port = 0
params.n_parallel = 2
params.n_ctx = 2048
# Each slot has its own KV cells, so a sequence computes the same alone and in a batch.
params.kv_unified = False
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
params.ui = False
params.verbosity = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
