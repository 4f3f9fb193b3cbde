"""A plain Flower app, as a user would write one: FedAvg over Conv-4, trained with SGD on images drawn at random.

`deploy.benchmarks.rounds` bundles this file and measures its rounds beside Consilium's.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

client = ClientApp()
server = ServerApp()


def conv4(width: int = 32) -> nn.Module:
    """Four blocks of convolution, GroupNorm, ReLU and pooling, for images of 28 x 28."""
    blocks: list[nn.Module] = []
    for channels in (1, width, width, width):
        blocks += [nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(width, 2))


@client.train()
def train(message: Message, context: Context) -> Message:
    """A few steps of SGD; the reply tells how long they took."""
    began = time.perf_counter()
    model = conv4()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(int(context.run_config["steps"])):
        images, labels = torch.randn(16, 1, 28, 28), torch.randint(2, (16,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": 16, "seconds": time.perf_counter() - began})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@server.main()
def main(grid: Grid, context: Context) -> None:
    """FedAvg; the seconds of each round are written to the run config's file `out`."""
    ends: list[float] = []

    def note(round: int, arrays: ArrayRecord) -> MetricRecord:
        ends.append(time.time())
        return MetricRecord()

    sites = int(context.run_config["sites"])
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=sites, min_available_nodes=sites)
    rounds = int(context.run_config["rounds"])
    result = strategy.start(grid, ArrayRecord(conv4().state_dict()), num_rounds=rounds, evaluate_fn=note)
    training = [metrics["seconds"] for _, metrics in sorted(result.train_metrics_clientapp.items())]
    seconds = [end - start for start, end in itertools.pairwise(ends)]
    Path(str(context.run_config["out"])).write_text(json.dumps({"seconds": seconds, "training": training}))
