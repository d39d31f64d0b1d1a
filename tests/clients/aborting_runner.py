"""A runner of the Python worker whose process ends by a fault of its own with every sequence."""

import os

from tokenway_worker.echo import EchoRunner


class AbortingRunner(EchoRunner):
    def generate(self, request, emit, cancelled):
        os.abort()
