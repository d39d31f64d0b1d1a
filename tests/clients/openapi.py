"""Runs schemathesis on a server and its OpenAPI description: `openapi.py URL`."""

import sys
from pathlib import Path

from schemathesis.cli import schemathesis

config = Path(__file__).with_suffix(".toml")
schemathesis(["--config-file", str(config), "run", f"{sys.argv[1]}/openapi.json"])
