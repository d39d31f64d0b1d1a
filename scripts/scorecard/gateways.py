"""The gateways under test, each started as a program in front of one or two engines."""

import asyncio
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

from .http1 import UncleanEnd, read_body, read_head

BIN = Path(sys.executable).parent
# LiteLLM's proxy imports for several seconds, on a busy machine for many.
START_LIMIT = 90.0


IMPATIENCE = 1


@dataclass(frozen=True)
class Setup:
    """A model that a gateway serves: the engines, best first where the gateway knows an order."""

    model: str
    urls: Sequence[str]
    is_impatient: bool = False
    """True if silence is limited to `IMPATIENCE` seconds where the gateway can limit it."""


class Gateway(Protocol):
    """A gateway that can be started."""

    name: str
    ready_path: str
    ready_status: int
    lists_models: bool
    """True if the gateway is ready for an engine only once it has asked for its models."""
    is_shared: bool
    """True if one process serves all setups, because it starts too slowly for one each."""
    key: str | None
    """The key that clients send."""

    def version(self) -> str:
        """The version, as the table shows it."""

    def command(self, setups: Sequence[Setup], port: int, folder: Path) -> list[str]:
        """Writes the settings into the folder, and returns the command. A gateway that is not
        shared gets one setup."""


class Tokenway:
    """Tokenway with one route: the first engine is its target, the second one its fallback."""

    name = "Tokenway"
    ready_path = "/readyz"
    ready_status = 200
    lists_models = True
    is_shared = False
    key: str | None = None

    def __init__(self, program: str) -> None:
        self.program = program

    def version(self) -> str:
        command = [self.program, "--version"]
        shown = subprocess.run(command, capture_output=True, check=True, text=True, timeout=10)
        return shown.stdout.split()[-1]

    def command(self, setups: Sequence[Setup], port: int, folder: Path) -> list[str]:
        (setup,) = setups
        lines = [f'http_listen = "127.0.0.1:{port}"', 'grpc_listen = "127.0.0.1:0"']
        for at, url in enumerate(setup.urls):
            address = f"openai+{url}/v1"
            lines += ["[[engine]]", f'name = "{"ab"[at]}"', f'address = "{address}"']
        lines += ["[[route]]", f'model = "{setup.model}"', 'targets = [{ engine = "a" }]']
        if len(setup.urls) > 1:
            lines.append('fallback = [{ engine = "b" }]')
        if setup.is_impatient:
            limits = f"first_token_timeout = {IMPATIENCE}, stall_timeout = {IMPATIENCE}"
            lines.append(f"policy = {{ {limits} }}")
        file = folder / "tokenway.toml"
        file.write_text("\n".join(lines) + "\n")
        return [self.program, "gateway", "--config", str(file)]


class Smg:
    """SMG, which balances. Its retries and its circuit breaker have their defaults."""

    name = "SMG"
    ready_path = "/readiness"
    ready_status = 200
    lists_models = True
    is_shared = False
    key: str | None = None

    def version(self) -> str:
        return version("smg")

    def command(self, setups: Sequence[Setup], port: int, folder: Path) -> list[str]:
        (setup,) = setups
        command = [str(BIN / "smg"), "launch", "--worker-urls", *setup.urls]
        command += ["--policy", "round_robin", "--host", "127.0.0.1", "--port", str(port)]
        command += ["--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port())]
        command += ["--disable-tokenizer-autoload", "--log-level", "warn"]
        if setup.is_impatient:
            # SMG has no limit on silence, only one on the whole request.
            command += ["--request-timeout-secs", str(2 * IMPATIENCE)]
        return command


class LiteLlm:
    """LiteLLM's proxy: two deployments of one name, and the second engine as fallback again."""

    name = "LiteLLM"
    ready_path = "/health/readiness"
    ready_status = 200
    lists_models = False
    # Each setup has a name, and so cooldowns and counts of failures, of its own.
    is_shared = True
    # The proxy does not start without a strong key.
    key: str | None = "sk-" + secrets.token_hex(32)

    def version(self) -> str:
        return version("litellm")

    def command(self, setups: Sequence[Setup], port: int, folder: Path) -> list[str]:
        models, fallbacks = [], []
        for setup in setups:
            models += [_deployment(setup, setup.model, url) for url in setup.urls]
            if len(setup.urls) > 1:
                backup = f"{setup.model}-backup"
                models.append(_deployment(setup, backup, setup.urls[1]))
                fallbacks.append({setup.model: [backup]})
        config = {
            "model_list": models,
            "router_settings": {"num_retries": 2, "fallbacks": fallbacks},
            "general_settings": {"master_key": self.key},
        }
        file = folder / "litellm.yaml"
        # JSON is YAML.
        file.write_text(json.dumps(config))
        command = [str(BIN / "litellm"), "--config", str(file), "--host", "127.0.0.1"]
        return [*command, "--port", str(port), "--telemetry", "False"]


def _deployment(setup: Setup, name: str, url: str) -> dict[str, object]:
    """One engine under one model name, in LiteLLM's form."""
    params: dict[str, object] = {"model": "openai/m", "api_base": f"{url}/v1"}
    params["api_key"] = "none"
    if setup.is_impatient:
        params |= {"timeout": IMPATIENCE, "stream_timeout": IMPATIENCE}
    return {"model_name": name, "litellm_params": params}


def free_port() -> int:
    """Returns a port that is free now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Running:
    """A gateway that runs in a process group of its own."""

    def __init__(self, process: asyncio.subprocess.Process, port: int, key: str | None) -> None:
        self.process = process
        self.port = port
        self.key = key

    @classmethod
    async def start(cls, gateway: Gateway, setups: Sequence[Setup], folder: Path) -> "Running":
        """Starts a gateway and waits until it is ready.

        Raises:
            RuntimeError: the gateway ended, or was not ready in time.
        """
        port = free_port()
        log_path = folder / "log"
        environment = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_PROXY": "*"}
        with log_path.open("wb") as log:
            process = await asyncio.create_subprocess_exec(
                *gateway.command(setups, port, folder),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        running = cls(process, port, gateway.key)
        try:
            async with asyncio.timeout(START_LIMIT):
                while await running._status(gateway.ready_path) != gateway.ready_status:
                    if process.returncode is not None:
                        break
                    await asyncio.sleep(0.05)
        except TimeoutError:
            await running.stop()
        if process.returncode is not None:
            tail = log_path.read_text(errors="replace")[-2000:]
            raise RuntimeError(f"{gateway.name} did not become ready; its log ends with:\n{tail}")
        return running

    async def _status(self, path: str) -> int | None:
        """Returns the status of a GET request. `None` if the gateway does not answer."""
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return None
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1:{self.port}\r\n\r\n".encode())
            head = await read_head(reader)
            async for _ in read_body(reader, head):
                pass
            return int(head.words[1])
        except UncleanEnd:
            return None
        finally:
            writer.close()

    async def stop(self) -> None:
        """Kills the gateway and its children, and waits for the end."""
        with suppress(ProcessLookupError):
            # The process leads a group of its own, so the group has its id.
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
