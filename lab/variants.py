"""What each choice in AdaptIS's head is worth on cells.

    python -m lab.variants [--seconds 60] [--seeds 3] [--only NAME ...]

A variant changes one thing. All variants train for the same seconds of one thread's computing time,
on the same sequence of images; a faster one sees more of them. AP is that of 50 images of val. The
difference is paired by seed. All variants and seeds take an hour of one core.
"""
import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

from adaptis import (AdaptIS, InstanceSelection, RelativeCoordConv, UNet, binary_cross_entropy,
                     conv, focal_loss, normalized_focal_loss)
from lab.ap import AveragePrecision
from lab.cells import OverlappingCells
from lab.demo_adaptis import ISTHING, build, fit, measure
from lab.intervals import paired_t
from lab.recipes import RECIPES
from lab.runs import World
from lab.worlds import SEEDS
from pq import PanopticQuality

SETTINGS = {**RECIPES["adaptis", "cells"]["model"], "proposals": 0.0}
HEAD = {k: SETTINGS[k] for k in ("width", "window", "radius")}


class OneAdaIN(InstanceSelection):
    """Released code's order: three layers, the only AdaIN, one layer."""

    def __init__(self, channels, stride, **settings):
        super().__init__(channels, stride, blocks=1, **settings)
        layers = conv(self.width, self.width), conv(self.width, self.width)
        self.before = nn.Sequential(nn.BatchNorm2d(self.width), *layers)

    def mask(self, x, scales, shifts):
        return super().mask(self.before(x), scales, shifts)


class Distance(RelativeCoordConv):
    """Released code's third map: the distance to the point."""

    def forward(self, points, corners, size):
        maps = super().forward(points, corners, size)
        return torch.cat([maps, maps.square().sum(1, keepdim=True).sqrt().clamp(max=1)], 1)


def with_distance(channels, stride, **settings):
    """A head that sees the distance, too."""
    head = InstanceSelection(channels, stride, **settings)
    head.relative = Distance(settings["radius"], stride)
    head.place = nn.Conv2d(3, head.width, 1, bias=False)
    return head


class Unscaled(InstanceSelection):
    """The controller's scales as they are, and the last layer's logit."""

    def mask(self, x, scales, shifts):
        return (super().mask(x, [s - 1 for s in scales], shifts) + 1.7) / 0.2


class Tail(InstanceSelection):
    """A tail of stride 1: `detail` channels a pixel come from the head, as many straight from the
    features, which hold the image; one more layer corrects the logit."""

    def __init__(self, channels, stride, *, detail=8, **settings):
        super().__init__(channels, stride, **settings)
        outputs = self.width + detail * stride ** 2
        self.share = nn.Conv2d(channels, outputs, 3, padding=1)
        self.place = nn.Conv2d(2, outputs, 1, bias=False)
        self.layers[-1] = nn.Conv2d(self.width, (1 + detail) * stride ** 2, 1)
        self.tail = nn.Sequential(nn.BatchNorm2d(detail), conv(detail, detail),
                                  nn.Conv2d(detail, 1, 1))

    def mask(self, x, scales, shifts):
        coarse = super().mask(x[:, :self.width], scales, shifts)
        fine = F.pixel_shuffle(x[:, self.width:], self.stride)
        return coarse[:, :1] + self.tail(coarse[:, 1:] + fine)


class WithImage(nn.Module):
    """A U-Net whose features end with the image's own pixels, folded to its stride."""

    def __init__(self):
        super().__init__()
        self.net = UNet()
        self.stride, self.channels = self.net.stride, self.net.channels + 3 * self.net.stride ** 2

    def forward(self, images):
        return torch.cat([self.net(images), F.pixel_unshuffle(images, self.stride)], 1)


def with_head(head, encoder=UNet):
    """The recipe's network with another head."""
    model = AdaptIS(ISTHING, encoder(), **SETTINGS)
    model.selection = head(model.encoder.channels, model.stride, **HEAD)
    return model


def changed(**settings):
    """The recipe's network with other settings."""
    return build(**{"proposals": 0.0, **settings})


def quarter(logits, masks, weight):
    """NFL with released code's weights on Cityscapes: 1/4 on the object, 3/4 elsewhere."""
    return normalized_focal_loss(logits, masks, weight * torch.where(masks, 0.25, 0.75))


def stride_1():
    """The U-Net with a level of 16 channels at full resolution, and a head of as many."""
    return AdaptIS(ISTHING, UNet((16, 48, 96, 160, 224), 16, stride=1), **{**SETTINGS, "width": 16})


VARIANTS = {
    "as in the file": changed,
    "one AdaIN, after three layers": lambda: with_head(OneAdaIN),
    "the distance as a third map": lambda: with_head(with_distance),
    "scales from 0, logit as it is": lambda: with_head(Unscaled),
    "weights 1/4 and 3/4 in NFL": lambda: changed(loss=quarter),
    "R = 42": lambda: changed(radius=42.0),
    "window of 64 pixels": lambda: changed(window=(64, 64)),
    "window of 96 pixels": lambda: changed(window=(96, 96)),
    "stride 1": stride_1,
    "a tail of stride 1": lambda: with_head(Tail, WithImage),
    "8 to 22 cells in training images": changed,
    "FL instead of NFL": lambda: changed(loss=focal_loss),
    "BCE instead of NFL": lambda: changed(loss=binary_cross_entropy),
    "no coordinates": lambda: changed(coordinates=False),
}
TRAINING = {"8 to 22 cells in training images": dict(count=(8, 22))}   # settings of `fit`


def measured(name, seconds, seed):
    """Trains a variant -> [AP@.5, AP@.9, images seen]."""
    world = World("cpu", threads=1)
    torch.manual_seed(seed)
    model = VARIANTS[name]()
    seen = fit(model.train(), seconds, world, clock=time.process_time, quiet=True,
               **TRAINING.get(name, {}))
    model.eval().random_points = True
    images = OverlappingCells(50, seed=SEEDS["val"])
    meters = AveragePrecision(2, (0.5, 0.9)), PanopticQuality(ISTHING)
    measure(model, (images[i] for i in range(50)), world, *meters)
    row = [*meters[0].compute()["per_threshold"].values(), seen]
    print(f"{name:32s} seed {seed}  AP@.5 {row[0]:5.1f}  AP@.9 {row[1]:5.1f}  {seen} images",
          flush=True)
    return row


def main(argv=None):
    """Prints a row for each seed, then the table."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="computing time of a run")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    args = parser.parse_args(argv)
    names = dict.fromkeys([next(iter(VARIANTS)), *args.only])
    found = {name: torch.zeros(args.seeds, 3) for name in names}
    for seed in range(args.seeds):                             # all of a seed, then the next
        for name in names:
            found[name][seed] = torch.tensor(measured(name, args.seconds, seed))
    first = next(iter(found.values()))
    print(f"\n{'mean of seeds':32s}  AP@.5  AP@.9   images  AP@.9 against the file, 95%")
    for name, rows in found.items():
        print(f"{name:32s}  {rows[:, 0].mean():5.1f}  {rows[:, 1].mean():5.1f}  "
              f"{rows[:, 2].mean():7.0f}  " + "{:+.1f} [{:+.1f}, {:+.1f}]".format(
                  *paired_t(rows[:, 1].tolist(), first[:, 1].tolist())))


if __name__ == "__main__":
    main()
