"""The lab's side: the federation's rounds, what is kept of them, and what is shown."""

from common import quiet_flower as _quiet_flower  # noqa: F401  (before any import of flwr)
