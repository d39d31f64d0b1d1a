"""The command line: `python -m tokenway_worker --help`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from pathlib import Path

import grpc

from . import wire
from .runner import LoadError, Options, Runner
from .worker import HEARTBEAT_TIMEOUT_S, Engine, Identity, Worker

RUNNERS = {
    "echo": "tokenway_worker.echo:EchoRunner",
    "xllamacpp": "tokenway_worker.xllamacpp_runner:XllamacppRunner",
}
CHILD_TOKEN = "TOKENWAY_CHILD_TOKEN"

# Byte that wakes the main thread when the worker has ended without a signal.
NO_SIGNAL = b"\0"


class UsageError(Exception):
    """Invalid arguments. The message says what to do."""


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        wire.message_class("AttachRequest")
        engine = Engine(_target(args.engine), _credentials(args))
        identity = Identity(args.model_name, _name(args), args.child_token, args.heartbeat_timeout)
        worker = Worker(_runner(args), engine, identity)
    except (UsageError, LoadError, wire.ContractError) as error:
        parser.error(str(error))
    return _serve(worker)


def _serve(worker: Worker) -> int:
    """Runs the worker until it ends, or a signal ends it."""
    wakes, wake = socket.socketpair()
    wake.setblocking(False)
    # The system may deliver a signal to any thread. This socket wakes the main thread.
    signal.set_wakeup_fd(wake.fileno())
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    codes: list[int] = []

    def run() -> None:
        codes.append(_run(worker))
        wake.send(NO_SIGNAL)

    threading.Thread(target=run, name="worker", daemon=True).start()
    if wakes.recv(1) != NO_SIGNAL:
        worker.stop()
        # A second signal exits without waiting for the engine to end the stream.
        wakes.recv(1)
    worker.close()
    return codes[0] if codes else 0


def _run(worker: Worker) -> int:
    try:
        return worker.run()
    except Exception as error:
        # The message is not logged, because it may contain a client's text.
        where = "".join(traceback.format_tb(error.__traceback__))
        logging.error("the worker failed with %s:\n%s", type(error).__name__, where)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenway_worker",
        description="A device worker for Tokenway: offers one model to one engine.",
    )
    add = parser.add_argument
    add("--engine", required=True, help="the worker socket: unix:/path/to.sock or HOST:PORT")
    add("--runner", required=True, help="echo, xllamacpp, or your own as module:Class")
    add(
        "--model-name",
        default="",
        help="name of the model in the engine (default: its only model)",
    )
    add("--model-path", type=Path, help="path of the model file")
    add("--slots", type=_slots, default=4, help="number of sequences that run at once (default: 4)")
    cores = max((os.cpu_count() or 2) - 1, 1)
    add(
        "--threads",
        type=_positive,
        default=cores,
        help="threads of the device (default: cores - 1)",
    )
    add(
        "--context-length",
        type=_positive,
        default=2048,
        help="maximum number of tokens of a sequence, prompt and completion (default: 2048)",
    )
    add(
        "--interval-ms",
        type=_milliseconds,
        default=20.0,
        help="time between two tokens of the echo runner (default: 20)",
    )
    add("--device", type=_device, help="index of the accelerator, from 0")
    add("--name", help="name of this worker in logs (default: its process and host)")
    add(
        "--heartbeat-timeout",
        type=_silence,
        default=HEARTBEAT_TIMEOUT_S,
        metavar="SECONDS",
        help="time without heartbeats, for example while a device call holds the GIL, after which"
        " the engine counts this worker as lost: 0.1 to 3600, or 0 for the engine's own"
        " --heartbeat-timeout (default: 60)",
    )
    add(
        "--child-token",
        default=os.environ.get(CHILD_TOKEN, ""),
        help=f"token from the engine that started this worker (default: ${CHILD_TOKEN})",
    )
    add("--tls-ca", type=Path, help="CA certificates (PEM) used to verify the engine")
    add("--tls-cert", type=Path, help="this worker's certificate (PEM)")
    add("--tls-key", type=Path, help="key of this worker's certificate (PEM)")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 0 < value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return value


def _slots(text: str) -> int:
    slots = _positive(text)
    if slots > 65_536:
        raise argparse.ArgumentTypeError("--slots must be at most 65,536")
    return slots


def _device(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def _milliseconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 3_600_000:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds up to an hour")
    return value


def _silence(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if value != 0 and not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or 0.1 to 3600")
    return value


def _target(engine: str) -> str:
    if engine.startswith("unix:") and len(engine) > len("unix:"):
        return engine
    host, _, port = engine.rpartition(":")
    if not host or not port.isdecimal() or host.startswith("unix"):
        raise UsageError(
            f"--engine {engine!r} must be unix:/path/to.sock or HOST:PORT, such as 10.0.0.5:50052"
        )
    return engine


def _credentials(args: argparse.Namespace) -> grpc.ChannelCredentials | None:
    files = {"--tls-ca": args.tls_ca, "--tls-cert": args.tls_cert, "--tls-key": args.tls_key}
    missing = [name for name, path in files.items() if path is None]
    if len(missing) == len(files):
        return None
    if missing:
        raise UsageError(f"worker connections require mutual TLS: add {' and '.join(missing)}")
    if args.engine.startswith("unix:"):
        raise UsageError("a Unix socket has no TLS: remove --tls-ca, --tls-cert and --tls-key")
    contents = []
    for name, path in files.items():
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise UsageError(f"{name} {path} cannot be read: {error.strerror}") from error
    ca, certificate, key = contents
    return grpc.ssl_channel_credentials(ca, key, certificate)


def _name(args: argparse.Namespace) -> str:
    name: str | None = args.name
    if name is None:
        device = "" if args.device is None else f"device {args.device} of "
        own = f"{device}process {os.getpid()} on {socket.gethostname()}"
        # Host names can be 64 characters long, the limit of the whole name.
        return own.encode("ascii", "replace").decode()[:64]
    if len(name) > 64 or not (name.isascii() and name.isprintable()):
        raise UsageError("--name must be up to 64 printable ASCII characters")
    return name


def _runner(args: argparse.Namespace) -> Runner:
    path = RUNNERS.get(args.runner, args.runner)
    module, _, name = path.partition(":")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"--runner {args.runner!r} must be echo, xllamacpp, or module:Class: {error}"
        ) from error
    options = Options(
        model_path=args.model_path,
        slots=args.slots,
        threads=args.threads,
        context_length=args.context_length,
        interval_s=args.interval_ms / 1000,
        device=args.device,
    )
    runner: Runner = kind(options)
    return runner


if __name__ == "__main__":
    raise SystemExit(main())
