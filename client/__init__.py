"""The hospital's side: its data, its ledger, and what it answers."""

from common import quiet_flower as _quiet_flower  # noqa: F401  (before any import of flwr)
