"""host:port, as people write it; IPv6 in brackets."""

from __future__ import annotations

import re

_ADDRESS = re.compile(r"(?:\[(?P<six>[0-9a-fA-F:.]+)\]|(?P<host>[A-Za-z0-9_.-]+)):(?P<port>[0-9]{1,5})\Z")


def parse_address(text: str) -> tuple[str, int]:
    """(host, port). Raises ValueError."""
    found = _ADDRESS.match(text)
    if not found or not 1 <= int(found["port"]) <= 65535:
        raise ValueError(f"{text!r} is no host:port (lab.example.org:9443, [2001:db8::1]:9443)")
    return found["six"] or found["host"], int(found["port"])
