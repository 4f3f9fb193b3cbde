"""How both command lines end: the exit code says who can mend it.

0 done;  1 it failed;  2 the user can mend it (wrong usage, plan, files);  130 interrupted
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
from typing import NoReturn

import typer

from common.errors import ConsiliumError

_FULL = (errno.ENOSPC, errno.EDQUOT)


def command_group(help: str) -> typer.Typer:
    """Commands under one name. A traceback shows no variables: they may hold what no terminal or log should."""
    return typer.Typer(help=help, no_args_is_help=True, pretty_exceptions_show_locals=False)


def run(app: typer.Typer) -> NoReturn:
    """Run `app` on this process's arguments and exit; an error raised on purpose is told without a traceback."""
    code = 0

    def end_beside_threads() -> None:
        if any(thread.daemon for thread in threading.enumerate()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    # An interpreter that shuts down around a thread inside torch aborts. What is registered first is called last.
    atexit.register(end_beside_threads)
    try:
        _run(app)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        raise
    except BaseException:
        code = 1
        raise


def _run(app: typer.Typer) -> NoReturn:
    try:
        app()
    except ConsiliumError as error:
        _leave(str(error), error.exit_code)
    except KeyboardInterrupt:
        _leave("interrupted", 130)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        place = f" ({error.filename})" if error.filename else ""
        _leave(f"the disk is full{place}: nothing was left half-written; free some space and run it again", 1)
    raise SystemExit(0)


def _leave(text: str, code: int) -> NoReturn:
    typer.secho(text, fg=typer.colors.RED, err=True)  # click drops the colour where stderr is no terminal
    raise SystemExit(code)
