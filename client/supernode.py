"""Flower's SuperNode, as a process that ends when it no longer hears the lab.

Its main thread gives up on some errors, as on a certificate that has expired, but the server in its other thread keeps
the process alive; so nobody would start it again.
"""

from __future__ import annotations

import os
import sys
import traceback

from flwr.supernode.cli import flower_supernode


def main() -> None:
    """`flower-supernode` with this program's arguments, until it ends in whatever way."""
    code: object = 1
    try:
        flower_supernode()
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
