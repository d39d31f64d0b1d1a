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

# What wakes the main thread when the worker has ended by itself.
NO_SIGNAL = b"\0"


class UsageError(Exception):
    """The arguments do not go together, and what to do about it."""


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr
    )
    try:
        wire.message_class("AttachRequest")
        engine = Engine(_target(args.engine), _credentials(args))
        identity = Identity(args.model, _name(args), args.child_token, args.heartbeat_timeout)
        worker = Worker(_runner(args), engine, identity)
    except (UsageError, LoadError, wire.ContractError) as error:
        parser.error(str(error))
    return _serve(worker)


def _serve(worker: Worker) -> int:
    """Runs the worker until it ends, or a signal ends it."""
    wakes, wake = socket.socketpair()
    wake.setblocking(False)
    # The system may hand a signal to any thread, which wakes no other. This socket wakes this one.
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
        # A second signal does not wait for the engine's farewell.
        wakes.recv(1)
    worker.close()
    return codes[0] if codes else 0


def _run(worker: Worker) -> int:
    try:
        return worker.run()
    except Exception as error:
        # Not its message, which may hold what a client wrote.
        where = "".join(traceback.format_tb(error.__traceback__))
        logging.error("the worker ends by a fault of its own, %s:\n%s", type(error).__name__, where)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokenway_worker",
        description="A device worker for Tokenway: offers one model to one engine.",
    )
    add = parser.add_argument
    add("--engine", required=True, help="the worker socket: unix:/path/to.sock or HOST:PORT")
    add("--runner", required=True, help="echo, xllamacpp, or your own as module:Class")
    add("--model", default="", help="the model, as the engine names it (default: its only one)")
    add("--model-path", type=Path, help="the model's file")
    add("--slots", type=_slots, default=4, help="how many sequences run at once (default: 4)")
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
        help="tokens of a sequence, prompt and completion together (default: 2048)",
    )
    add(
        "--interval-ms",
        type=_milliseconds,
        default=20.0,
        help="the time between two tokens of the echo runner (default: 20)",
    )
    add("--device", type=_device, help="which of several accelerators, from 0")
    add("--name", help="what this worker is called in logs (default: its process and host)")
    add(
        "--heartbeat-timeout",
        type=_silence,
        default=HEARTBEAT_TIMEOUT_S,
        metavar="SECONDS",
        help="how long a device call may hold the interpreter, and so stop the heartbeats, before"
        " the engine counts this worker as lost: 0.1 to 3600, or 0 for the engine's own"
        " --heartbeat-timeout (default: 60)",
    )
    add(
        "--child-token",
        default=os.environ.get(CHILD_TOKEN, ""),
        help=f"what the engine gave a worker that it started (default: ${CHILD_TOKEN})",
    )
    add("--tls-ca", type=Path, help="a file with the certificates that the engine's is checked by")
    add("--tls-cert", type=Path, help="a file with this worker's certificate")
    add("--tls-key", type=Path, help="a file with the key of this worker's certificate")
    return parser


def _positive(text: str) -> int:
    value = int(text) if text.isdecimal() else 0
    if not 0 < value < 2**32:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return value


def _slots(text: str) -> int:
    slots = _positive(text)
    if slots > 65_536:
        raise argparse.ArgumentTypeError("an engine takes at most 65,536 slots of one worker")
    return slots


def _device(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 on")
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
        raise UsageError(f"TLS goes both ways here: add {' and '.join(missing)}")
    if args.engine.startswith("unix:"):
        raise UsageError("a Unix socket has no TLS: leave out --tls-ca, --tls-cert and --tls-key")
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
        # A host's name alone may be as long as all of this may be.
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
