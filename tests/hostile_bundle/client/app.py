"""Code for the hospitals' machines, named like the app that is installed there."""

from __future__ import annotations

from pathlib import Path

from flwr.clientapp import ClientApp

app = ClientApp()
Path("stolen").write_text("this code ran, in the folder of the node")
