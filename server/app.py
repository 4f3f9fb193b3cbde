"""The Flower ServerApp. Simulation builds one with its own settings; a deployed one finds them in its run folder."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.checkpoint import load_checkpoint
from common.errors import ConsiliumError, Problem, UsageError
from common.keys import STUDY, read_signed
from common.plan import plan_from_json
from server.observer import Observer, Unobserved
from server.orders import SIGNED, START, ledgers_of, order_of, write_outcome
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
    """Run the study that was ordered in the run config's folder; go on where it stands, and leave word of the end."""
    folder = Path(str(context.run_config.get("run-folder", "")))
    if not folder.is_absolute():
        raise UsageError(Problem("run config", "'run-folder' is missing", 'give run-folder="/..."'))
    try:
        ConsiliumStrategy(_settings(folder), Unobserved()).start(grid)
    except ConsiliumError as error:
        write_outcome(folder, str(error))
        raise
    write_outcome(folder)


def _settings(folder: Path) -> RunSettings:
    """What the ServerApp runs. Raises UsageError, UntrustedDocument or CheckpointError."""
    order = order_of(folder)
    if order is None:
        raise UsageError(Problem(str(folder), "holds no ordered study", "`consilium-lab run` makes one"))
    signed = read_signed(folder / SIGNED)
    return RunSettings(
        plan=plan_from_json(signed.verified(STUDY)),
        folder=folder,
        initial=load_checkpoint(folder / START).tensors,
        resume=True,
        nodes=0,
        wait_s=order.wait_s,
        signed=signed,
        ledgers=ledgers_of(folder),
    )
