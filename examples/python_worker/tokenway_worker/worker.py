"""The worker: dials its engine, serves, and dials again unless that would end the same. The model
stays loaded meanwhile.
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

# How long to wait before dialling again: each time twice as long, up to this.
FIRST_DELAY_S = 0.1
LONGEST_DELAY_S = 5.0

# An engine that ends a stream so, before its welcome or after it, would do so again. These are the
# codes that `tokenway worker` goes by; with each, what to do about it where the engine's own words
# do not say.
FINAL = {
    grpc.StatusCode.FAILED_PRECONDITION: "",
    grpc.StatusCode.NOT_FOUND: "; --model must be a model that the engine serves",
    grpc.StatusCode.PERMISSION_DENIED: "; --child-token must be the one that the engine gave",
    grpc.StatusCode.INVALID_ARGUMENT: "",
    grpc.StatusCode.UNIMPLEMENTED: "; --engine must be its worker socket, not a public door",
}

CHANNEL_OPTIONS = [
    ("grpc.max_receive_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    # Connections that are shared between channels would share their back-off, too.
    ("grpc.use_local_subchannel_pool", 1),
    # An engine is never behind a proxy that is meant for the web.
    ("grpc.enable_http_proxy", 0),
    # An engine that vanished without a word is noticed by this.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.max_pings_without_data", 0),
]


@dataclass(frozen=True, slots=True)
class Engine:
    """Where an engine's worker socket is. No credentials: no TLS."""

    target: str
    credentials: grpc.ChannelCredentials | None = None

    def dial(self) -> grpc.Channel:
        """A new channel to it."""
        if self.credentials is None:
            # By itself grpcio names a Unix socket by its path, which is no authority that HTTP/2
            # allows.
            options = [*CHANNEL_OPTIONS, ("grpc.default_authority", "localhost")]
            return grpc.insecure_channel(self.target, options)
        return grpc.secure_channel(self.target, self.credentials, CHANNEL_OPTIONS)


# How long a worker may be silent unless it says otherwise: device code that holds the interpreter
# stops every thread of Python, heartbeats too. Compiling kernels takes most of a minute.
HEARTBEAT_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Identity:
    """As whom the worker introduces itself. The token is in no log.

    `heartbeat_timeout_s` is how long the engine waits for the next message before it counts the worker
    as lost: 0.1 to 3600 seconds, or 0 for the engine's own `--heartbeat-timeout`.
    """

    model: str = ""
    name: str = ""
    child_token: str = field(default="", repr=False)
    heartbeat_timeout_s: float = HEARTBEAT_TIMEOUT_S


class Worker:
    """One runner, offered to one engine."""

    def __init__(self, runner: Runner, engine: Engine, identity: Identity) -> None:
        self._engine = engine
        self._identity = identity
        self._device = Device(runner)
        self._answers = Answers(self._device)
        self._lock = threading.Lock()
        self._session: Session | None = None
        self._is_stopping = threading.Event()

    def run(self) -> int:
        """Serves until it is drained or stopped: then 0. 1 where it never can."""
        delay_s = FIRST_DELAY_S
        parent = os.getppid()
        while not self._is_stopping.is_set():
            began_s = time.monotonic()
            code = self._attach()
            if code is not None:
                return code
            if self._identity.child_token and os.getppid() != parent:
                log.error("the engine that started this worker is gone")
                return 1
            if time.monotonic() - began_s > LONGEST_DELAY_S:
                delay_s = FIRST_DELAY_S
            # Not all at the same moment: an engine that comes back has all its workers to greet.
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
        """Frees what the runner has taken."""
        self._device.runner.close()

    def _attach(self) -> int | None:
        """Serves on one stream. Returns the exit code where there is to be no other."""
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
        code, details = lost or (grpc.StatusCode.OK, "it ended the stream")
        if code in FINAL:
            log.error("the engine refuses this worker: %s%s", details, FINAL[code])
            return 1
        if session.is_draining:
            return 0
        where = self._engine.target
        how = "lost the engine" if session.is_welcome else "not attached to an engine"
        log.warning("%s at %s, dialling again: %s: %s", how, where, code.name, details)
        return None

    def _serve(self, session: Session) -> tuple[grpc.StatusCode, str] | None:
        """Serves on one stream. Returns the status that ended it, if one did."""
        log.info("dialling %s", self._engine.target)
        with self._engine.dial() as channel:
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
