"""The spec of how one GPU is fed: a batch in parts, decoded images on disk."""
import os

import pytest
import torch

import train
from lab import cache, runs
from lab.readers import Cityscapes
from test_readers import IDS, tree
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


def test_decoded_images_are_kept_until_their_files_change(tmp_path, monkeypatch, capsys):
    """A torn file is made anew. Where the disk is full, nothing is written and all goes on."""
    dataset = Cityscapes(tree(tmp_path, IDS), "val")
    kept, reads, read = cache.Decoded(dataset, tmp_path / "c"), [], Cityscapes.__getitem__
    monkeypatch.setattr(Cityscapes, "__getitem__", lambda d, i: reads.append(i) or read(d, i))

    def check(count):
        found, want = kept[0], read(dataset, 0)
        for key in ("image", "segments", "categories", "crowd"):
            a, b = getattr(found, key), getattr(want, key)
            assert torch.equal(a, b) and a.dtype == b.dtype
        assert found.name == want.name and len(reads) == count
        assert all(map(torch.equal, kept.labels(0), dataset.labels(0)))
    check(1)
    check(1)
    os.utime(dataset.files[0][2], (5, 5))
    check(2)
    kept.path(0).write_bytes(kept.path(0).read_bytes()[:99])
    check(3)
    check(3)
    monkeypatch.setattr(cache, "RESERVE", 2 ** 80)
    kept.path(0).unlink()
    check(4)
    check(5)
    assert not os.listdir(tmp_path / "c") and capsys.readouterr().err.count("decoded at each") == 1
