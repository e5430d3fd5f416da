"""A forward pass as boxes and arrows: `recorded` notes what each part of a network returns, a
`Sheet` draws it. The plans of our networks stand in lab/shapes.py.

A box has the name in the code, the shape for one image, and the numbers: a map as the mean over its
channels, a matrix or a vector as it is, some of N maps side by side. Dark is low, yellow high, on a
scale of each picture's own (the 2nd to the 98th percentile); probabilities have one scale, 0 to 1.
"""
import sys
from collections import defaultdict
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from lab.draw import COLOURS, WIDTH, new_figure, pyplot, save

INSIDE = 0.07                      # where a box begins in its column, as a share of the column


# --- Recording --------------------------------------------------------------------------------

@contextmanager
def recorded(model, *functions):
    """-> {name: [what it returned, call by call]}, filled while the context is open. Names are the
    paths of all submodules, and `functions`: "path.method", or a function of the model's file."""
    calls = defaultdict(list)

    def noting(name, function):
        def noted(*args, **kwargs):
            calls[name].append(function(*args, **kwargs))
            return calls[name][-1]
        return noted

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda _, __, out, k=name: calls[k].append(out))
            stack.callback(hook.remove)
        for name in functions:
            path, _, last = name.rpartition(".")
            owner = model.get_submodule(path)
            if not hasattr(owner, last):
                owner = sys.modules[type(model).__module__]
            function = noting(name, getattr(owner, last))
            stack.enter_context(mock.patch.object(owner, last, function))
        with torch.no_grad():
            yield calls


# --- Drawing ----------------------------------------------------------------------------------

class Box(NamedTuple):
    """A result and its place. The shape is that of `value`; `picture` [h, w] or [h, w, 3] is shown
    if it is given, else `value`."""
    name: str
    column: int
    row: int
    value: torch.Tensor
    picture: object = None


def side_by_side(maps, rows=3, columns=3):
    """The first maps of [N, h, w], with empty lines between -> [H, W]."""
    maps = F.pad(maps[:rows * columns].float(), (1, 1, 1, 1), value=torch.nan)
    maps = F.pad(maps, (0, 0, 0, 0, 0, rows * columns - len(maps)), value=torch.nan)
    return torch.cat([torch.cat(list(row), 1) for row in maps.split(columns)]).cpu().numpy()


def probabilities(p):
    """Numbers from 0 to 1, [h, w], in the colours of a scale from 0 to 1 -> [h, w, 3]."""
    return pyplot().get_cmap(COLOURS)(p.cpu().numpy())[..., :3]


def with_boxes(image, boxes, points=()):
    """image [3, H, W] with boxes [N, 4] and points [K, 2] -> uint8 [H', W', 3], enlarged."""
    pixels = (image.cpu().permute(1, 2, 0) * 255).byte().numpy()
    zoom = max(1, 400 // pixels.shape[1])
    sheet = Image.fromarray(pixels).resize([n * zoom for n in pixels.shape[1::-1]], 0)
    pen = ImageDraw.Draw(sheet)
    for corners in boxes.tolist():
        for colour, width in (("white", 7), ("black", 3)):
            pen.rectangle([v * zoom for v in corners], outline=colour, width=width)
    for x, y in points:
        pen.ellipse([zoom * x - 10, zoom * y - 10, zoom * x + 10, zoom * y + 10], fill="cyan")
    return np.asarray(sheet)


def picture_of(value):
    """The numbers of a result as a picture -> array, and whether it may be stretched."""
    value = value.detach().cpu().float()
    if value.ndim == 4:
        return side_by_side(value.mean(1), 2, 4), False
    if value.ndim == 3:
        return value.mean(0).numpy(), False
    return value.view(-1, value.shape[-1]).numpy(), True


class Sheet:
    """Boxes in a grid of `columns`, of pictures `ratio` times as high as wide, under two lines."""
    line, gap, margin = 0.15, 0.32, 0.1                        # inches

    def __init__(self, title, boxes, columns=5, ratio=0.5):
        self.boxes, self.pitch = boxes, (WIDTH - 2 * self.margin) / columns
        self.width = (1 - 2 * INSIDE) * self.pitch
        self.high = 2 * self.line + ratio * self.width + 0.08
        self.top = self.line * (title.count("\n") + 1) + 0.25
        rows = 1 + max(box.row for box in boxes)
        self.figure = new_figure(self.top + rows * (self.high + self.gap) - 0.2, layout="none")
        self.ax = self.figure.add_axes((0, 0, 1, 1))
        self.ax.axis("off")
        for box in boxes:
            self.draw(box)
        self.ax.set(xlim=(0, WIDTH), ylim=(self.figure.get_figheight(), 0), aspect="auto")
        self.ax.text(self.at(INSIDE, 0)[0], 0.08, title, va="top", linespacing=1.25)

    def at(self, column, row):
        """A place in the grid -> inches. Box (c, r) begins at row 2 r and ends at 2 r + 1; the gap
        below ends at 2 r + 2. Columns count pitches, box and gap together."""
        whole, part = divmod(row, 2)
        y = whole * (self.high + self.gap) + min(part, 1) * self.high
        return self.margin + column * self.pitch, self.top + y + max(part - 1, 0) * self.gap

    def draw(self, box):
        """The frame, the two lines and the picture of a box."""
        x, y = self.at(box.column + INSIDE, 2 * box.row)
        self.ax.add_patch(pyplot().Rectangle((x, y), self.width, self.high, fc="white", ec="0.6",
                                             lw=0.8, zorder=2))
        shape = " x ".join(map(str, box.value.shape))
        self.ax.text(x + 0.05, y + 0.04, f"{box.name}\n{shape}", va="top", zorder=3)
        picture, stretched = box.picture, False
        if picture is None:
            picture, stretched = picture_of(box.value)
        w, h = self.width - 0.1, self.high - 2 * self.line - 0.1
        if not stretched:
            scale = min(w / picture.shape[1], h / picture.shape[0])
            w, h = scale * picture.shape[1], scale * picture.shape[0]
        x, y = x + (self.width - w) / 2, y + self.high - 0.05
        low, high = np.nanpercentile(picture, [2, 98]) if picture.size else (0, 1)
        self.ax.imshow(picture, extent=(x, x + w, y, y - h), interpolation="nearest", zorder=3,
                       vmin=low, vmax=max(high, low + 1e-6))

    def arrow(self, *points):
        """An arrow through `points` (column, row) of the grid, see `at`."""
        points = [self.at(*p) for p in points]
        self.ax.plot(*zip(*points), color="0.35", lw=1.2, zorder=1, solid_joinstyle="miter")
        self.ax.annotate("", points[-1], points[-2], zorder=4, arrowprops=dict(
            arrowstyle="-|>", color="0.35", lw=1.2, shrinkA=0, shrinkB=0))

    def feed(self, *chain):
        """Arrows along a chain of names: sideways in a row, else through the gap at the end."""
        for a, b in zip(chain, chain[1:]):
            a, b = (next(box for box in self.boxes if box.name == name) for name in (a, b))
            side, down = a.column < b.column, a.row < b.row
            if a.row == b.row:
                ends = ((box.column + (1 - INSIDE if right else INSIDE), 2 * a.row + 0.5)
                        for box, right in ((a, side), (b, not side)))
                self.arrow(*ends)
            else:
                start, end = 2 * a.row + down, 2 * b.row + (not down)
                lane, x1, x2 = end - 0.5 if down else end + 0.5, a.column + 0.5, b.column + 0.5
                self.arrow((x1, start), (x1, lane), (x2, lane), (x2, end))

    def save(self, out, name):
        """Writes `name`_shapes.png into the folder `out`; returns {name of a box: its shape}."""
        save(self.figure, Path(out, f"{name}_shapes.png"))
        return {box.name: tuple(box.value.shape) for box in self.boxes}
