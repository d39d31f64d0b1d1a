"""The worker as a process: command line, signals and exit codes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import pytest
import trustme
from engine import TIMEOUT_S, Attachment, Engine

PACKAGE = Path(__file__).resolve().parents[1]


@contextmanager
def process(*args: str, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A worker with these arguments and environment variables."""
    started = subprocess.Popen(
        [sys.executable, "-m", "tokenway_worker", *args],
        cwd=PACKAGE,
        env={**os.environ, **variables},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield started
    finally:
        started.kill()
        started.communicate()


def welcome(engine: Engine) -> Attachment:
    attachment = engine.attached()
    attachment.welcome()
    return attachment


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_busy_worker_with_exit_code_0(
    engine: Engine, number: signal.Signals
) -> None:
    args = ["--engine", engine.target, "--runner", "echo", "--interval-ms", "3599999"]
    with process(*args) as worker:
        attachment = welcome(engine)
        attachment.receive("ready")
        attachment.say(submit={"sequence": 1, "prompt": [65], "max_tokens": 5, "credit": 5})
        attachment.receive("accepted")
        worker.send_signal(number)
        attachment.receive_end()
        assert worker.wait(TIMEOUT_S) == 0


def test_a_drained_worker_exits_with_0(engine: Engine) -> None:
    with process("--engine", engine.target, "--runner", "echo") as worker:
        attachment = welcome(engine)
        attachment.receive("ready")
        attachment.say(drain={})
        assert worker.wait(TIMEOUT_S) == 0


def test_options_and_the_child_token_reach_the_engine(engine: Engine) -> None:
    args = ["--engine", engine.target, "--runner", "echo", "--model-name", "m", "--name", "n"]
    more = ["--slots", "7", "--context-length", "99"]
    with process(*args, *more, TOKENWAY_CHILD_TOKEN="t0ken"):
        attachment = engine.attached()
        hello = attachment.welcome()
        assert (hello.model, hello.name, hello.child_token) == ("m", "n", "t0ken")
        ready = attachment.receive("ready")
        assert (ready.slots, ready.model.context_length) == (7, 99)


@pytest.mark.parametrize(
    ("args", "begins"), [([], "process"), (["--device", "3"], "device 3 of process")]
)
def test_the_default_name_is_the_process_and_host(
    engine: Engine, args: list[str], begins: str
) -> None:
    with process("--engine", engine.target, "--runner", "echo", *args) as worker:
        name = f"{begins} {worker.pid} on {socket.gethostname()}"
        assert engine.attached().welcome().name == name[:64]


@pytest.mark.parametrize(
    ("args", "milliseconds"),
    [([], 60_000), (["--heartbeat-timeout", "0"], 0), (["--heartbeat-timeout", "2.5"], 2_500)],
)
def test_the_heartbeat_timeout_reaches_the_engine(
    engine: Engine, args: list[str], milliseconds: int
) -> None:
    with process("--engine", engine.target, "--runner", "echo", *args):
        assert engine.attached().welcome().heartbeat_timeout_ms == milliseconds


def test_the_model_path_reaches_the_runner(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tokenway_worker import LoadError\n"
        "class Mine:\n"
        "    def __init__(self, options): raise LoadError(f'it is {options.model_path}')\n"
    )
    args = ["--engine", engine.target, "--runner", "mine:Mine", "--model-path", "m.gguf"]
    with process(*args, PYTHONPATH=str(tmp_path)) as worker:
        _, log = worker.communicate(timeout=TIMEOUT_S)
        assert "it is m.gguf" in log


def test_a_child_ends_with_the_engine_that_started_it(engine: Engine) -> None:
    parent = "import subprocess, sys; subprocess.Popen(sys.argv[1:]); sys.stdin.read()"
    args = ["--runner", "echo", "--engine", engine.target, "--child-token", "t0ken"]
    started = subprocess.Popen(
        [sys.executable, "-c", parent, sys.executable, "-m", "tokenway_worker", *args],
        cwd=PACKAGE,
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        welcome(engine).receive("ready")
        started.kill()
        engine.die()
        # Reads until the worker, the last writer, has exited.
        _, log = started.communicate(timeout=TIMEOUT_S)
        assert "the engine that started this worker is gone" in log
    finally:
        # Kills the parent and the worker, if they still run.
        with suppress(ProcessLookupError):
            os.killpg(started.pid, signal.SIGKILL)


def test_no_prompt_is_in_the_log(engine: Engine) -> None:
    args = ["--engine", engine.target, "--runner", "echo", "--interval-ms", "0"]
    with process(*args, TOKENWAY_CHILD_TOKEN="t0ken") as worker:
        attachment = welcome(engine)
        attachment.receive("ready")
        attachment.say(question={"question": 1, "tokenize": {"text": "canary"}})
        ids = list(attachment.receive("answer").ids.ids)
        asks = {"prompt": ids, "max_tokens": 50, "credit": 50, "user": "somebody"}
        attachment.say(submit={"sequence": 1, **asks})
        attachment.receive("accepted")
        assert attachment.receive_steps(1).data == b"canary"
        attachment.say(drain={})
        _, log = worker.communicate(timeout=TIMEOUT_S)
        assert "connecting" in log
        for secret in ["canary", "somebody", "t0ken"]:
            assert secret not in log


def test_a_custom_runner_is_named_by_its_class(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from tokenway_worker.echo import EchoRunner\nclass Mine(EchoRunner): ...\n"
    )
    args = ["--engine", engine.target, "--runner", "mine:Mine"]
    with process(*args, PYTHONPATH=str(tmp_path)):
        welcome(engine).receive("ready")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ("--runner echo", "--engine"),
        ("--engine unix: --runner echo", "must be unix:/path/to.sock or HOST:PORT"),
        ("--engine somewhere --runner echo", "must be unix:/path/to.sock or HOST:PORT"),
        ("--engine unix:/x --runner other", "must be echo, xllamacpp, or module:Class"),
        ("--engine unix:/x --runner echo --slots 0", "is not a whole number of at least 1"),
        ("--engine unix:/x --runner echo --slots 65537", "--slots must be at most 65,536"),
        ("--engine unix:/x --runner echo --interval-ms -1", "is not a number of milliseconds"),
        ("--engine unix:/x --runner echo --heartbeat-timeout 3601", "seconds, 0 or 0.1 to 3600"),
        ("--engine unix:/x --runner echo --heartbeat-timeout 0.05", "seconds, 0 or 0.1 to 3600"),
        ("--engine unix:/x --runner echo --heartbeat-timeout nan", "seconds, 0 or 0.1 to 3600"),
        ("--engine unix:/x --runner echo --device x", "is not a whole number of at least 0"),
        ("--engine unix:/x --runner echo --name é", "up to 64 printable ASCII characters"),
        ("--engine h:1 --runner echo --tls-ca ca.pem", "add --tls-cert and --tls-key"),
        (
            "--engine unix:/x --runner echo --tls-ca a --tls-cert b --tls-key c",
            "a Unix socket has no TLS",
        ),
        (
            "--engine h:1 --runner echo --tls-ca /no/ca --tls-cert b --tls-key c",
            "--tls-ca /no/ca cannot be read: No such file or directory",
        ),
    ],
)
def test_an_invalid_argument_is_reported_with_a_hint(args: str, says: str) -> None:
    with process(*args.split()) as worker:
        _, log = worker.communicate(timeout=TIMEOUT_S)
        assert worker.returncode == 2
        assert says in log


def test_a_missing_proto_file_is_reported_with_a_hint() -> None:
    args = ["--engine", "unix:/x", "--runner", "echo"]
    with process(*args, TOKENWAY_PROTO_FOLDER="/no") as worker:
        _, log = worker.communicate(timeout=TIMEOUT_S)
        assert worker.returncode == 2
        assert "set TOKENWAY_PROTO_FOLDER to Tokenway's folder `proto`" in log


@pytest.mark.parametrize("is_trusted", [True, False])
def test_tcp_requires_mutual_tls(tmp_path: Path, is_trusted: bool) -> None:
    ca, other = trustme.CA(), trustme.CA()
    engines = ca.issue_cert("localhost")
    workers = (ca if is_trusted else other).issue_cert("worker")
    files = {"ca": ca.cert_pem, "key": workers.private_key_pem, "cert": workers.cert_chain_pems[0]}
    args = []
    for name, pem in files.items():
        pem.write_to_path(str(tmp_path / name))
        args += [f"--tls-{name}", str(tmp_path / name)]
    credentials = grpc.ssl_server_credentials(
        [(engines.private_key_pem.bytes(), engines.cert_chain_pems[0].bytes())],
        ca.cert_pem.bytes(),
        require_client_auth=True,
    )
    engine = Engine("localhost:0", credentials)
    with process("--engine", engine.target, "--runner", "echo", *args) as worker:
        if is_trusted:
            welcome(engine).receive("ready")
        else:
            assert worker.stderr
            assert any(
                f"cannot connect to an engine at {engine.target}" in it for it in worker.stderr
            )
    engine.die()


def test_a_worker_keeps_retrying_an_unreachable_address() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        args = ["--engine", f"127.0.0.1:{port}", "--runner", "echo"]
        with process(*args) as worker:
            assert worker.stderr
            says = f"cannot connect to an engine at 127.0.0.1:{port}, reconnecting: UNAVAILABLE"
            attempts = (line for line in worker.stderr if says in line)
            assert next(attempts) and next(attempts)
            worker.terminate()
            assert worker.wait(TIMEOUT_S) == 0
