"""The worker: connects to its engine, serves, and reconnects unless the engine would reject it
again. The model stays loaded meanwhile.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from dataclasses import dataclass, field

import grpc
from google.protobuf.message import Message

from . import wire
from .answers import Answers
from .device import Device
from .runner import Runner
from .session import Session

log = logging.getLogger("tokenway_worker")

# Back-off before reconnecting, in seconds: starts at the first value and doubles up to the second.
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0

# Status codes after which reconnecting would fail again, the same as in `tokenway worker`. Each has
# a hint that is added to the engine's message.
FINAL = {
    grpc.StatusCode.FAILED_PRECONDITION: "",
    grpc.StatusCode.NOT_FOUND: "; --model-name must be a model that the engine serves",
    grpc.StatusCode.PERMISSION_DENIED: "; --child-token must be the one that the engine gave",
    grpc.StatusCode.INVALID_ARGUMENT: "",
    grpc.StatusCode.UNIMPLEMENTED: "; --engine must be its worker socket, not its HTTP or gRPC API",
}

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    # Shared connections would share their back-off.
    ("grpc.use_local_subchannel_pool", 1),
    # Connect directly, not through a web proxy.
    ("grpc.enable_http_proxy", 0),
    # Detects an engine that vanished without closing the connection.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True)
class Engine:
    """Address of an engine's worker socket. Without credentials, no TLS is used."""

    target: str
    credentials: grpc.ChannelCredentials | None = None

    def connect(self) -> grpc.Channel:
        """Opens a new channel."""
        if self.credentials is None:
            # grpcio's default authority for a Unix socket is its path, which is invalid in HTTP/2.
            options = [*CHANNEL_OPTIONS, ("grpc.default_authority", "localhost")]
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)


# How long a worker may be silent unless it says otherwise: device code that holds the interpreter
# stops every thread of Python, heartbeats too. Compiling kernels takes most of a minute.
HEARTBEAT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Identity:
    """The worker's identity in `hello`. `repr` hides the child token, so that it is not logged.

    `heartbeat_timeout_s` is how long the engine waits for the next message before it counts the
    worker as lost: 0.1 to 3600 seconds, or 0 for the engine's own `--heartbeat-timeout`.
    """

    model: str = ""
    name: str = ""
    child_token: str = field(default="", repr=False)
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S


class Worker:
    """One runner that serves one engine."""

    def __init__(self, runner: Runner, engine: Engine, identity: Identity) -> None:
        self._engine = engine
        self._identity = identity
        self._device = Device(runner)
        self._answers = Answers(self._device)
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._is_stopping = threading.Event()

    def run(self) -> int:
        """Serves until drained or stopped. Returns the exit code: 0, or 1 if the worker cannot
        serve."""
        delay_s = FIRST_DELAY_S
        parent = os.getppid()
        while not self._is_stopping.is_set():
            started_s = time.monotonic()
            code = self._attach()
            if code is not None:
                return code
            if self._identity.child_token and os.getppid() != parent:
                log.error("the engine that started this worker is gone")
                return 1
            if time.monotonic() - started_s > LONGEST_DELAY_S:
                delay_s = FIRST_DELAY_S
            # Jitter, so that the workers of a restarted engine do not all reconnect at once.
            self._is_stopping.wait(delay_s * random.uniform(0.5, 1.0))
            delay_s = min(2 * delay_s, LONGEST_DELAY_S)
        return 0

    def stop(self) -> None:
        """Ends the stream. `run` returns soon after."""
        with self._lock:
            self._is_stopping.set()
            if self._session:
                self._session.finish()

    def close(self) -> None:
        """Releases the runner's resources."""
        self._device.runner.close()

    def _attach(self) -> int | None:
        """Serves on one stream. Returns the exit code, or None to reconnect."""
        who = self._identity
        hello = wire.hello(who.model, who.name, who.child_token, who.heartbeat_timeout_s)
        session = Session(self._device, self._answers, hello)
        with self._lock:
            if self._is_stopping.is_set():
                return 0
            self._session = session
        lost = self._serve(session)
        with self._lock:
            self._session = None
        if session.load_error is not None:
            log.error("the model cannot be loaded: %s", session.load_error)
            return 1
        if self._is_stopping.is_set():
            return 0
        code, details = lost or (grpc.StatusCode.OK, "the engine ended the stream")
        if code in FINAL:
            log.error("the engine rejects this worker: %s%s", details, FINAL[code])
            return 1
        if session.is_draining:
            return 0
        where = self._engine.target
        how = "lost the engine" if session.is_welcome else "cannot connect to an engine"
        log.warning("%s at %s, reconnecting: %s: %s", how, where, code.name, details)
        return None

    def _serve(self, session: Session) -> tuple[grpc.StatusCode, str] | None:
        """Serves on one stream. Returns the error status that ended it, if any."""
        log.info("connecting to %s", self._engine.target)
        with self._engine.connect() as channel:
            attach: grpc.StreamStreamMultiCallable[Message, Message] = channel.stream_stream(
                wire.METHOD,
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=wire.message_class("AttachResponse").FromString,
            )
            try:
                session.run(attach)
            except grpc.RpcError as error:
                return error.code(), error.details() or "no details"
        return None
