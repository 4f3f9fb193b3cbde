"""The Flower ServerApp. Simulation builds one with its own settings; a deployed one reads them from the run config."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.errors import Problem, UsageError
from common.plan import load_plan
from server.observer import Observer, Unobserved
from server.start import initial_parameters
from server.strategy import ConsiliumStrategy, RunSettings


def build_server_app(settings: RunSettings, observer: Observer) -> ServerApp:
    """A ServerApp that runs the study of `settings`."""
    server_app = ServerApp()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        ConsiliumStrategy(settings, observer).start(grid)

    return server_app


app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the study that the run config names; go on where its folder stands."""
    ConsiliumStrategy(_settings(context), Unobserved()).start(grid)


def _settings(context: Context) -> RunSettings:
    """From `plan` (a file) and `run-folder`. Raises UsageError."""
    values = {key: str(context.run_config.get(key, "")) for key in ("plan", "run-folder")}
    missing = [
        Problem("run config", f"{key!r} is missing", f'give {key}="..."') for key, value in values.items() if not value
    ]
    if missing:
        raise UsageError(missing)
    path = Path(values["plan"])
    plan = load_plan(path)
    initial = initial_parameters(plan, path.parent)
    return RunSettings(plan=plan, folder=Path(values["run-folder"]), initial=initial, resume=True)
