"""How much GPU memory a training step takes, counted without a GPU; and the learning rate by batch.

`peak` runs a step on the CPU and adds up the bytes of all tensors that are alive at once. Three
such steps give the line

    bytes = fixed + batch * (crop + pixels * pixel)

Weights and momentum are fixed, proposals belong to a crop, feature maps to its pixels. A GPU needs
more than tensors: its context, workspaces of cuDNN, gaps between blocks. `usable` leaves room.
"""
import weakref
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

CARDS = (12, 24, 40, 80)  # GiB


class Alive(TorchDispatchMode):
    """Follows the storage of each tensor that an operation returns. `.now`: bytes alive; `.peak`:
    the most of them so far. What an operation allocates and frees inside is not seen."""

    def __init__(self, tensors=()):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()
        for tensor in tensors:
            self.add(tensor)

    def add(self, x):
        """Counts the storage of x until it is freed; views share one."""
        if isinstance(x, torch.Tensor):
            storage = x.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, key, size)
        return x

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return tree_map(self.add, function(*args, **(kwargs or {})))


def peak(model, optimiser, images, targets):
    """Bytes of all tensors alive at once in the second training step, under bf16 autocast."""
    model.train()
    for step in range(2):                                      # momentum begins with the first
        with Alive([*model.parameters(), *model.buffers(), images]) as alive:
            state = [v for s in optimiser.state.values() for v in s.values()]
            for tensor in state:
                alive.add(tensor)
            optimiser.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16):
                losses = model.losses(images, targets)
            sum(losses.values()).backward()
            optimiser.step()
            del losses
        optimiser.zero_grad(set_to_none=True)
    return alive.peak


class Line(NamedTuple):
    """Bytes of a step: fixed + batch * (crop + pixels * pixel)."""
    fixed: float
    crop: float
    pixel: float

    def bytes(self, batch, pixels):
        return self.fixed + batch * (self.crop + pixels * self.pixel)

    def largest(self, card, pixels):
        """The largest batch that a card of so many GiB holds, 0 if not even one crop."""
        return max(0, int((usable(card) - self.fixed) / (self.crop + pixels * self.pixel)))

    def parts(self, card, pixels, batch):
        """The smallest fit.accumulate with which a batch fits, None if not even one crop does."""
        fits = self.largest(card, pixels)
        return next((n for n in range(1, batch + 1) if batch % n == 0 and batch // n <= fits), None)


def usable(card):
    """Bytes for tensors on a card of so many GiB. Choice: 1 GiB for context and workspaces, and a
    tenth for gaps between blocks."""
    return (0.9 * card - 1) * 2 ** 30


def line_through(one, two, small, *, pixels):
    """The Line through three peaks: of one crop of pixels[1], of two, of two of pixels[0]."""
    pixel = (two - small) / 2 / (pixels[1] - pixels[0])
    crop = two - one - pixels[1] * pixel
    return Line(2 * one - two, crop, pixel)


def rescaled(fit, batch, adam=False):
    """The settings of a recipe's `fit` for another batch -> {name: value}: as many images seen; the
    rate of SGD in proportion to the batch, that of Adam to its root.

    fit.accumulate keeps the batch, and all of these numbers. Goyal et al., "Accurate, Large
    Minibatch SGD", 2017. Malladi et al., "On the SDEs and Scaling Rules for Adaptive Gradient
    Algorithms", 2022."""
    factor = batch / fit["batch"]
    power = factor ** 0.5 if adam else factor
    rates = {k: fit[k] * power for k in ("lr", "lr_body") if fit.get(k)}
    steps = {k: round(fit[k] / factor) for k in ("steps", "warmup") if fit.get(k)}
    return {"batch": batch, **rates, **steps}
