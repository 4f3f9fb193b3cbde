"""Names of sites, studies and labels' sets: safe in a path, a YAML key and a command line."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,40}\Z")


def well_named(value: str) -> str:
    """`value`, if it is a name. Raises ValueError."""
    if not _NAME.match(value):
        raise ValueError("use lower-case letters, digits, '-' and '_', at most 41")
    return value


Name = Annotated[str, AfterValidator(well_named)]
