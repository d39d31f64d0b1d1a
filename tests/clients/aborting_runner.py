"""A runner of the Python worker that aborts its process on every sequence."""

import os

from tokenway_worker.echo import EchoRunner


class AbortingRunner(EchoRunner):
    def generate(self, request, emit, cancelled):
        os.abort()
