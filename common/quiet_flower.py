"""The environment in which Flower and Ray neither call home nor talk on the terminal.

Both read it when they are imported: so `server` and `client` import this file before anything else.
A value that the user has set stands.
"""

from __future__ import annotations

import logging
import os

for _name, _value in {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_LOG_LEVEL": "CRITICAL",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # else Ray warns of a default of its future versions
}.items():
    os.environ.setdefault(_name, _value)

logging.getLogger("flwr").propagate = False  # other libraries give the root logger a handler of their own
