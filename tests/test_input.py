"""The spec of how one GPU is fed: a batch in parts."""
import pytest
import torch

import train
from lab import runs
from test_train import SMALL


class Mean(torch.nn.Module):
    """The mean over the crops of (w x - 1)^2, x being a crop's first value."""

    def __init__(self):
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1))

    def losses(self, images, targets):
        return {"error": (self.w * images[:, 0, 0, 0] - 1).square().mean()}

    def stages(self, fit):
        return [("all", torch.optim.SGD(self.parameters(), fit["lr"], 0.9), fit["steps"])]


def test_a_batch_in_parts_is_the_batch(tmp_path):
    """Parts of a batch have its crops, give its gradient and log its loss."""
    weights, logs, shown = [], [], []
    for parts in (1, 2, 4):
        args = train.arguments(train.parse([*SMALL, "fit.batch=4", f"fit.accumulate={parts}"]))[0]
        args["workers"] = 0
        dataset = train.open_dataset(args, "train")
        sampler = iter(train.build_sampler(dataset, args, runs.World("cpu"), tmp_path / "r", 3))
        shown.append(torch.cat([next(sampler)[0] for _ in range(2 * parts)]))
        model = Mean()
        batches = ((x, []) for x in torch.arange(1., 13).view(-1, 1, 1, 1).split(4 // parts))
        train.fit(model, batches, runs.World("cpu"), tmp_path, lambda *a: None, steps=3, batch=4,
                  accumulate=parts, lr=0.001, interval=1)
        weights.append(model.w.item())
        logs.append((tmp_path / "log.csv").read_text().splitlines()[1].split(",")[1])
    assert weights == pytest.approx([weights[0]] * 3) and logs == [logs[0]] * 3
    assert all(torch.equal(shown[0], other) for other in shown[1:])
