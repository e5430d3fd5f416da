r"""AdaptIS: point at an object, get its mask (K. Sofiiuk, O. Barinova, A. Konushin, "AdaptIS: Adaptive Instance Selection
Network", ICCV 2019).

What goes wrong without it.  A detector finds a box first and a mask in it afterwards.  Two cells that lie across each
other share one box, and a box cannot say WHICH of the two is meant:

        +---------+        A point can.  The network below is asked "which pixels belong to the object
        |\\     //|        at (x, y)?", and any point of the upper cell gives the upper cell.
        |  \\ //  |
        |   //\   |        There are no boxes, no anchors, no classes and no clustering in it, and one
        | //   \\ |        loss: that between the answer and the mask of the object at (x, y).
        +---------+

How the same network gives another mask for each point: the point picks a vector from the feature map, a few linear
layers (the controller) turn it into scales and shifts, and those set a small convolutional head to "this object":

    image --> backbone --> features F [C, h, w] ----------------------.               once per picture
                               |                                      |
    (x, y) --------> Q(x, y), bilinear --> controller           window of F around (x, y)
       |                                       | scale, shift         |
       '--> coordinates relative to (x, y) ----|------------> conv --> AdaIN --> conv ... --> mask    once per point

All objects of a picture: ask at points where nobody is known yet, keep the surest answer, mark it, go on (section 4).

What the paper claims: on 96x96 pictures of overlapping cells AP at an IoU of .5 is 99.6 where Mask R-CNN has 74.6, and
at .9 it is 97.5 against 5.8 (Table 1); trained on those it segments larger pictures, 234 of 250 cells with 3 false ones;
with a semantic branch and learned point proposals it reaches PQ 62.0 on Cityscapes (Table 2).

    python adaptis.py                trains for five minutes on cells, prints Table 1, writes figures/adaptis.png
    python adaptis.py --click 7      click on cells of picture 7 (or of a file) and see their masks
    pytest tests/test_adaptis.py     the claims of this file as an executable spec

An image is float32 [3, H, W] in 0..1.  A point is (x, y) in pixels; the centre of pixel (row i, column j) is
(j + .5, i + .5).  Segments are int64 [H, W]: 0 is void, k > 0 is segment k, of category `categories[k - 1]`.
"""
import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

VOID = -1                                                     # a pixel's category where there is none


class Category(NamedTuple):
    """One of a data set's categories; its number is its place in `.categories`."""
    name: str
    isthing: bool
    colour: tuple                                             # RGB, 0..255


@dataclass
class Sample:
    """One picture and its label."""
    image: torch.Tensor                                       # float32 [3, H, W], 0..1
    segments: torch.Tensor                                    # int64 [H, W], 0 void, k > 0 segment k
    categories: torch.Tensor                                  # int64 [N], of segment k at k - 1
    crowd: torch.Tensor                                       # bool [N]: a group that nobody told apart
    name: str


class Prediction(NamedTuple):
    """What the model says about one image; `instances` holds the things (boxes, masks, scores, categories) alone."""
    segments: torch.Tensor                                    # int64 [H, W], 0 is void
    categories: torch.Tensor                                  # int64 [N], of segment k at k - 1
    scores: torch.Tensor                                      # float [N]; 1 for stuff
    instances: dict


# --- 6 The toy problem: cells that lie on each other --------------------------------------------------------------------

class OverlappingCells:
    """Pictures of `size` (side, or height and width) with count[0]..count[1] rod-like cells of one colour with a darker
    rim, painted over each other: the paper's problem "extremely challenging for detection-first methods".

    A quarter of the cells is a twin of another one: same size, nearly the same centre, and either mirrored (then their
    boxes coincide) or turned by a few degrees.  `augment` adds random blur and high-frequency noise.  Picture i depends
    on (seed, i) alone, so that nothing needs to be stored.  [i] -> Sample: segment 1 is the ground (stuff), then the cells.

    Choice: a cell of which fewer than 30 pixels show is no object; its pixels are void, for they are not ground either.
    Choice: cells are 18 to 47 pixels long, 6 to 11 wide and lie wholly inside, as those of the authors' pictures."""
    categories = [Category("ground", False, (235, 235, 235)), Category("cell", True, (220, 30, 60))]
    BODY, RIM = np.array([[252, 10, 50], [60, 8, 175]], np.float32)[..., None, None] / 255      # colours of the authors' pictures
    REACH, SMALLEST = 25, 30                              # pixels from a cell's centre to its end, at most; to be an object

    def __init__(self, length, size=96, count=(8, 22), seed=0, augment=True):
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 2 * self.REACH or not 0 <= count[0] <= count[1]:
            raise ValueError(f"size {size}, count {count}: cells are up to 47 pixels long, so a side of at least {2 * self.REACH} "
                             "pixels is needed, and count is (fewest, most)")
        self.length, self.count, self.seed, self.augment = length, count, seed, augment

    def __len__(self):
        return self.length

    def cells(self, random):
        """Draw them -> centres [n, 2], angles, lengths and widths [n]."""
        n = int(random.integers(self.count[0], self.count[1] + 1))
        length, width, angle = random.uniform(18, 47, n), random.uniform(6, 11, n), random.uniform(0, np.pi, n)
        twin, mirrored = random.random(n) < 0.25, random.random(n) < 0.5
        place, apart, turn = random.random((n, 2)), random.normal(0, 1.5, (n, 2)), random.normal(0, 0.12, n)
        for k in np.flatnonzero(twin[1:]) + 1:
            length[k], width[k] = length[k - 1], width[k - 1]
            angle[k] = -angle[k - 1] if mirrored[k] else angle[k - 1] + turn[k]
        # Half the box of a rod: its core's half length along each axis, and the radius of its round ends.
        half = np.abs(np.stack([np.cos(angle), np.sin(angle)], 1)) * (length - width)[:, None] / 2 + width[:, None] / 2 + 1
        limit = np.array([self.width, self.height]) - half
        centre = half + place * (limit - half)
        for k in np.flatnonzero(twin[1:]) + 1:
            centre[k] = np.clip(centre[k - 1] + apart[k], half[k], limit[k])
        return centre, angle, length, width

    def paint(self, centre, angle, length, width):
        """Paint cells in their order -> image [3, H, W], owner [H, W]: which cell shows, 0 for none.

        With d the signed distance of a pixel from a rod's outline, its coverage is clip(1/2 - d, 0, 1); the rim is 1.6
        wide.  All cells are measured at once, each on its own 50x50 pixels; only the painting has an order."""
        origin = np.floor(centre).astype(int) - self.REACH                                                # [n, 2]
        x, y = (np.arange(.5, 2 * self.REACH, dtype=np.float32)[None] - (centre - origin)[:, i:i + 1].astype(np.float32) for i in (0, 1))
        cos, sin, core, radius = (v.astype(np.float32)[:, None, None] for v in (np.cos(angle), np.sin(angle), (length - width) / 2, width / 2))
        along, across = cos * x[:, None] + sin * y[:, :, None], cos * y[:, :, None] - sin * x[:, None]    # [n, 50, 50]
        beyond = np.maximum(np.abs(along) - core, 0)
        d = np.sqrt(beyond * beyond + across * across) - radius
        # What is painted: [cover, body], which mix like colours do; the colours themselves follow from the two in the end.
        cover = np.minimum(np.maximum(.5 - d, 0), 1)
        ink = np.stack([np.ones_like(d), np.minimum(np.maximum(.5 - 1.6 - d, 0), 1)], 1)                  # [n, 2, 50, 50]
        mix, owner = np.zeros((2, self.height, self.width), np.float32), np.zeros((self.height, self.width), np.int64)
        for k, (left, top) in enumerate(origin):
            rows, cols = slice(max(top, 0), top + 2 * self.REACH), slice(max(left, 0), left + 2 * self.REACH)
            under, own = mix[:, rows, cols], owner[rows, cols]                    # views: painting them paints the picture
            part = slice(rows.start - top, rows.start - top + len(own)), slice(cols.start - left, cols.start - left + own.shape[1])
            under += cover[k][part] * (ink[(k, slice(None), *part)] - under)
            own[cover[k][part] >= .5] = k + 1
        return 1 + mix[0] * (self.RIM - 1) + mix[1] * (self.BODY - self.RIM), owner

    def disturb(self, image, random):
        """Random blur (a Gaussian of up to one pixel) and noise, partly grey, partly coloured; some pictures stay clean."""
        sigma, strength, grey = max(0, random.uniform(-.3, 1)), max(0, random.uniform(-.1, .35)), random.random()
        if sigma > .2:
            kernel = np.exp(-.5 * (np.arange(-3, 4) / sigma) ** 2).astype(np.float32)
            kernel /= kernel.sum()
            h, w = image.shape[1:]
            edge = np.pad(image, ((0, 0), (3, 3), (0, 0)), mode="edge")
            image = sum(k * edge[:, i:i + h] for i, k in enumerate(kernel))
            edge = np.pad(image, ((0, 0), (0, 0), (3, 3)), mode="edge")
            image = sum(k * edge[:, :, i:i + w] for i, k in enumerate(kernel))
        for share, channels in ((grey, 1), (1 - grey, 3)):
            image = image + np.float32(strength * share) * random.standard_normal((channels, *image.shape[1:]), dtype=np.float32)
        return np.minimum(np.maximum(image, 0), 1)

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"picture {i}: there are {self.length}, counted from 0")
        random = np.random.default_rng([self.seed, i])
        image, owner = self.paint(*self.cells(random))
        if self.augment:
            image = self.disturb(image, random)
        area = np.bincount(owner.ravel())
        number = np.where(area >= self.SMALLEST, 1, 0)
        number[0] = area[0] > 0
        number = number.cumsum() * number                     # ground and objects are counted 1, 2, ...; what is too small is 0
        categories = torch.ones(int(number.max()), dtype=torch.int64)
        categories[:int(area[0] > 0)] = 0
        return Sample(torch.from_numpy(image), torch.from_numpy(number[owner]), categories,
                      torch.zeros(len(categories), dtype=torch.bool), f"cells-{self.seed}-{i}")

    def labels(self, i):
        """Segments, categories and crowd of picture i, for samplers that look at labels first."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd


# --- 3 The network's parts, smallest first ------------------------------------------------------------------------------

def bilinear(features, points, stride):
    """Q(x, y): features [B, C, h, w] at points [B, K, 2] in pixels -> [B, K, C].  The centre of cell (i, j) of the map is
    pixel place ((j + .5) stride, (i + .5) stride); beyond the outermost centres the map goes on unchanged."""
    h, w = features.shape[-2:]
    grid = points / points.new_tensor([w * stride, h * stride]) * 2 - 1                    # grid_sample counts -1..1
    found = F.grid_sample(features.float(), grid[:, None].float(), align_corners=False, padding_mode="border")
    return found[:, :, 0].transpose(1, 2)


class AdaIN(nn.Module):
    """Adaptive instance normalisation: x [N, C, h, w], scale and shift [N, C] -> scale (x - mean) / std + shift, mean and
    standard deviation over the h w places of each channel of each x.  (Batch norm learns scale and shift; here they are
    an INPUT, and carry what the point knows about its object.)

    Mind the mean: it is over the map that the head sees.  See `InstanceSelection`."""

    def __init__(self, eps=1e-5):
        super().__init__()
        self.eps = eps

    def forward(self, x, scale, shift):
        pixels = x.permute(0, 2, 3, 1).flatten(1, 2)                                      # [N, h w, C]
        with torch.autocast(x.device.type, enabled=False):    # statistics want float32
            full = pixels.float() if x.dtype != torch.float64 else pixels
            average = full.new_full((1, full.shape[1]), 1 / full.shape[1])                # a mean as a product is fastest
            mean = average @ full                                                         # [N, 1, C]
            var = (average @ full.square() - mean.square()).clamp(min=0)
            factor = scale[:, None] * (var + self.eps).rsqrt()
            offset = shift[:, None] - mean * factor          # one multiplication and one addition per pixel, not four
        return (pixels * factor.to(x.dtype) + offset.to(x.dtype)).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)


class RelativeCoordConv(nn.Module):
    """Where is each cell of a window, seen from the point?  points [N, 2] in pixels, the window's upper left corners
    [N, 2] in pixels, its (height, width) in cells -> [N, 2, height, width], x first:

        clip((x - x_point) / R, -1, 1),    clip((y - y_point) / R, -1, 1)

    The radius R, in pixels, "roughly sets the maximum size of an object": beyond it all places look alike."""

    def __init__(self, radius, stride):
        super().__init__()
        self.radius, self.stride = radius, stride

    def forward(self, points, corners, size):
        axes = []
        for axis, cells in ((0, size[1]), (1, size[0])):
            places = corners[:, axis, None] + (torch.arange(cells, device=points.device) + .5) * self.stride      # [N, cells]
            axes.append(((places - points[:, axis, None]) / self.radius).clamp(-1, 1))
        x, y = axes
        return torch.stack([x[:, None].expand(-1, *size), y[:, :, None].expand(-1, *size)], 1)


def window_places(corners, size, K):
    """Which picture, row and column is each place of the windows of `size` with upper left `corners` [B K, 2], K a picture?
    -> int64 [B K, 1, 1], [B K, height, 1], [B K, 1, width]: together the index of all windows at once."""
    x, y = (corners[:, i, None] + torch.arange(n, device=corners.device) for i, n in ((0, size[1]), (1, size[0])))
    return (torch.arange(len(corners), device=corners.device) // K)[:, None, None], y[:, :, None], x[:, None]


class Controller(nn.Module):
    """Q [..., channels] -> the "characteristic vector": scale and shift [..., outputs] of an AdaIN, by "a few fully
    connected layers".  Choice: three of them, the hidden ones `hidden` wide."""

    def __init__(self, channels, outputs, hidden=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                                    nn.Linear(hidden, 2 * outputs))

    def forward(self, q):
        return self.layers(q).chunk(2, -1)


def conv(inputs, outputs, kernel=3):
    """Convolution, then ReLU, then batch norm: the paper's order (Figure 8)."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True), nn.BatchNorm2d(outputs))


class InstanceSelection(nn.Module):
    """The head that runs once per point: features [B, C, h, w] and points [B, K, 2] -> logits [B K, H', W'] in pixels, of a
    window around each point, and the windows' upper left corners [B K, 2] (x, y, in pixels).

    THE LESSON OF THE WINDOW.  AdaIN subtracts the mean and divides by the deviation over all that the head sees.  In a
    96x96 picture the asked cell is 3% of that, in a 384x384 one 0.2%: the statistics shift, and a head that has learned
    on small pictures finds next to nothing on large ones.  So the head never sees more than a `window` (height, width, in
    pixels) of the size it was trained on.  A window that would reach beyond the picture is moved inside.  The cost of a
    point then does not depend on the picture either.  `window=None` is the paper's own head, which sees the whole map.

    The convolution of a concatenation is the sum of two convolutions.  So the first layer's part that looks at the
    features is done once per picture (`share`); only the part that looks at the coordinates is done for each point.
    It has a 1x1 kernel: the coordinates are linear, and a 3x3 kernel would say nothing new but at the clipped ends.

    Choice: the last layer gives stride^2 values for each cell, one per pixel (a pixel shuffle), so that masks are sharp
    although all work is done at the stride of the features.
    Choice: `blocks` layers of `width` channels after the first, and AdaIN after the first `adains` layers of all: the text
    has no numbers.  Such a layer needs no batch norm: what a batch norm multiplies and
    adds, AdaIN takes out again (but for a sign, which `scale` can carry)."""

    def __init__(self, channels, stride, width=32, blocks=3, window=None, radius=48, coordinates=True, adains=3):
        super().__init__()
        if not 1 <= adains <= blocks + 1:
            raise ValueError(f"adains = {adains}: of {blocks + 1} layers at least one and at most all can be followed by AdaIN")
        self.stride, self.window = stride, window and (window if isinstance(window, (tuple, list)) else (window, window))
        self.width, self.adains, self.adain = width, adains, AdaIN()
        self.controller = Controller(channels, width * adains)
        self.share = nn.Conv2d(channels, width, 3, padding=1)
        self.relative = RelativeCoordConv(radius, stride)
        self.place = nn.Conv2d(2, width, 1, bias=False) if coordinates else None                  # None: the ablation
        self.adapted = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1) for _ in range(adains - 1)])
        self.layers = nn.Sequential(*[conv(width, width) for _ in range(blocks + 1 - adains)], nn.Conv2d(width, stride * stride, 1))

    def corners(self, points, size):
        """Upper left cells [N, 2] of the windows around points [N, 2] on a map of `size`, and the window's size in cells."""
        window = size if self.window is None else tuple(min(math.ceil(a / self.stride), b) for a, b in zip(self.window, size))
        middle = points / self.stride - points.new_tensor([window[1] / 2, window[0] / 2])
        most = points.new_tensor([size[1] - window[1], size[0] - window[0]])
        return torch.minimum(middle.round().clamp(min=0), most).long(), window

    def forward(self, features, points, shared=None, corners=None):
        """`shared` is `self.share(features)` where that is known already, `corners` (in cells) other windows than its own."""
        K, (h, w) = points.shape[1], features.shape[-2:]
        shared = self.share(features) if shared is None else shared
        scales, shifts = self.controller(bilinear(features, points, self.stride).flatten(0, 1))   # [B K, adains width]
        scales, shifts = scales.split(self.width, 1), shifts.split(self.width, 1)
        points = points.flatten(0, 1)
        first, window = self.corners(points, (h, w))
        first = first if corners is None else corners
        # All windows by one look-up: the number of each of their cells among the B h w cells of the maps.
        picture, rows, cols = window_places(first, window, K)
        cells = (picture * h + rows) * w + cols                                                   # [B K, height, width]
        x = shared.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, cells.flatten()).unflatten(0, cells.shape).permute(0, 3, 1, 2)
        if self.place is not None:
            x = x + self.place(self.relative(points, first * self.stride, window).to(x.dtype).contiguous(memory_format=torch.channels_last))
        x = self.adain(F.relu(x), scales[0], shifts[0])
        for layer, scale, shift in zip(self.adapted, scales[1:], shifts[1:]):
            x = self.adain(F.relu(layer(x)), scale, shift)
        return F.pixel_shuffle(self.layers(x), self.stride)[:, 0], first * self.stride


class Branch(nn.Module):
    """Features [B, C, h, w] -> logits [B, outputs, h, w]: the semantic branch, and "exactly the same structure" again for
    the point proposals.  Choice: two layers; the paper takes DeepLab's, which is a network's worth of its own."""

    def __init__(self, channels, outputs, width=32):
        super().__init__()
        self.layers = nn.Sequential(conv(channels, width), conv(width, width), nn.Conv2d(width, outputs, 1))

    def forward(self, features):
        return self.layers(features)


class UNet(nn.Module):
    """The toy problem's backbone: images [B, 3, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)].

    Choice: the text says no more than "U-Net".  This one starts by folding 2x2 pixels into channels, which keeps every
    bit of detail and saves three quarters of the work; `widths` are the channels at strides 2, 4, 8, 16."""

    def __init__(self, widths=(32, 64, 96, 128), channels=32, stride=2):
        super().__init__()
        self.stride, self.channels, self.multiple = stride, channels, stride * 2 ** (len(widths) - 1)
        pairs = list(zip(widths, widths[1:]))
        self.first = nn.Sequential(conv(3 * stride * stride, widths[0]), conv(widths[0], widths[0]))
        self.down = nn.ModuleList([nn.Sequential(nn.MaxPool2d(2), conv(a, b), conv(b, b)) for a, b in pairs])
        self.up = nn.ModuleList([conv(a + b, a) for a, b in pairs])
        self.last = conv(widths[0], channels)

    def forward(self, images):
        h, w = images.shape[-2:]
        x = F.pad(images, (0, -w % self.multiple, 0, -h % self.multiple), mode="replicate")      # so that every level divides
        x = self.first(F.pixel_unshuffle(x, self.stride).contiguous(memory_format=torch.channels_last))
        finer = []
        for down in self.down:
            finer.append(x)
            x = down(x)
        for up in reversed(self.up):
            x = up(torch.cat([finer.pop(), F.interpolate(x, scale_factor=2)], 1))
        return self.last(x)[..., :math.ceil(h / self.stride), :math.ceil(w / self.stride)]


# --- 3 Training: which points, and how wrong is an answer ---------------------------------------------------------------

def sample_points(segments, objects, count, generator=None):
    """Object-level stratification: `count` times "a random object and then a random point at that object", whatever the
    objects' sizes.  segments int64 [H, W], objects int64 [n] (their numbers) -> points [count, 2], ids [count]."""
    area = torch.bincount(segments.flatten())
    if len(objects) == 0 or int(objects.max()) >= len(area) or (area[objects] == 0).any():
        raise ValueError("points are sampled on objects: give the numbers of at least one, each with a pixel in `segments`")
    by_segment, first = segments.flatten().argsort(stable=True), area.cumsum(0) - area           # pixels, those of segment 0 first
    ids = objects[torch.randint(len(objects), (count,), generator=generator, device=segments.device)]
    u = torch.rand(count, generator=generator, device=segments.device)
    pixel = by_segment[first[ids] + (u * area[ids]).long()]
    return torch.stack([pixel % segments.shape[1], pixel // segments.shape[1]], 1) + .5, ids


def binary_cross_entropy(logits, masks, weight=None):
    """-log p, averaged over the pixels of each mask: logits and masks [N, h, w] -> [N].  p is the probability that the
    network gives to what is true of a pixel; `weight` [N, h, w] of 0 leaves pixels out."""
    loss = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
    return (weight * loss).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def focal_loss(logits, masks, weight=None, gamma=2):
    """FL = -(1 - p)^gamma log p, averaged over the pixels of each mask -> [N] (appendix A)."""
    loss = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
    return (weight * (-torch.expm1(-loss)) ** gamma * loss).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)


def normalized_focal_loss(logits, masks, weight=None, gamma=2):
    """NFL = -1/P sum over pixels of (1 - p)^gamma log p,    P = sum over pixels of (1 - p)^gamma -> [N] (appendix A).

    The focal loss looks at the pixels that are still wrong, but its weights (1 - p)^gamma, and with them its gradient,
    fade as the network improves.  P gives back what fades.  The gradient of P is stopped: it is a number by which the
    loss is divided, not something to be made large.  The gradient of (1 - p)^gamma is not stopped.

    "The total gradient of the NFL is equal to the total gradient of BCE" (the paper).  In which sense?  In that of the
    weights: the weights (1 - p)^gamma / P of the pixels' losses -log p sum to 1, as the 1 / hw of the mean BCE do, so
    the derivatives by the -log p, weights held fixed, have the same sum.  It does NOT hold for the gradient by the logits.
    There a pixel of BCE pulls with (1 - p) / hw, one of NFL with (1 - p)^gamma [(1 - p) - gamma p log p] / P, which is
    never less in sum (weights that grow with 1 - p, and a term more), and far more once most pixels are right."""
    loss = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    focus = (-torch.expm1(-loss)) ** gamma                                                       # 1 - p = 1 - exp(log p)
    focus = focus if weight is None else focus * weight
    # Choice: P of no less than a thousandth of a pixel, so that a mask that is right everywhere gives 0, not 0 / 0.
    return (focus * loss).sum((1, 2)) / focus.detach().sum((1, 2)).clamp(min=1e-3)


# --- 4 All objects of a picture: the greedy algorithm -------------------------------------------------------------------

@torch.no_grad()
def segment_instances(propose, unknown, threshold=.5, overlap=.5, per_round=7, patience=20, points=None, min_area=1,
                      generator=None, trace=None):
    """Section 4.  `propose(points [N, 2]) -> (C [N, h, w], corners [N, 2])` are the confidences in a window around each
    point and its upper left pixel, in the picture (outside of the window C = 0); `unknown` bool [H, W] is where the map S
    starts as "unknown": all, or all but the stuff -> labels int64 [H, W] (0: nobody), scores [n], the mean confidence over each final mask.

        repeat: take points on unknown pixels; M = [C > threshold]; of the round's masks keep the one that is surest
                (highest mean of C over M); if |M and S| / |M| < overlap: it is an object, and S grows by M
        at last each pixel goes to the object with the highest C there, where some C > threshold

    Points: `per_round` random ones a round, each pixel at most once; or, with `points` [n, 2], these in their order,
    without those that became known meanwhile, every one being its own round (they are run per_round at a time all the same).
    It ends when nothing is unknown, when the points run out, or after `patience` rounds without a new object.

    Choice: S is pixels that somebody claims OR that were known from the start: stuff counts as segmented (section 5).
    Choice: objects with fewer than `min_area` pixels after the last step are dropped.
    `trace`, a list, gets for each round: points, which was kept, its mask (rows, columns, bool), was it added."""
    H, W = unknown.shape
    unknown, device = unknown.clone(), unknown.device
    fresh = unknown.clone()                                   # not asked yet
    best, labels = torch.full((H, W), float(threshold), device=device), torch.zeros(H, W, dtype=torch.int64, device=device)
    count = fails = 0
    queue = None if points is None else points.to(device)

    def take(c, m, area, corner):
        """Add mask m (with confidences c, on the window at `corner`) if most of it is new."""
        nonlocal count
        rows, cols = slice(corner[1], corner[1] + c.shape[0]), slice(corner[0], corner[0] + c.shape[1])
        c, m = c[:H - rows.start, :W - cols.start], m[:H - rows.start, :W - cols.start]
        taken = (m & ~unknown[rows, cols]).sum()
        if area == 0 or taken >= overlap * area:
            return False
        count += 1
        here = c > best[rows, cols]                           # argmax over the objects so far, kept up to date
        best[rows, cols] = torch.where(here, c, best[rows, cols])
        labels[rows, cols] = torch.where(here, count, labels[rows, cols])
        unknown[rows, cols] &= ~m
        return True

    while fails < patience:
        if queue is None:
            places = (unknown & fresh).flatten().nonzero()[:, 0]
            if len(places) > per_round:
                places = places[torch.randperm(len(places), generator=generator)[:per_round].to(device)]
            fresh.view(-1)[places] = False
            asked = torch.stack([places % W, places // W], 1) + .5
        else:
            still = unknown[queue[:, 1].long(), queue[:, 0].long()]
            queue = queue[still]
            asked, queue = queue[:per_round], queue[per_round:]
        if len(asked) == 0:
            break
        C, corners = propose(asked)
        C = C.float()
        # A window may reach over the right and lower edge by less than a cell of the feature map; nothing is there.
        inside = (torch.arange(C.shape[1], device=device) < H - corners[:, 1, None])[:, :, None] & \
                 (torch.arange(C.shape[2], device=device) < W - corners[:, 0, None])[:, None]
        M = (C > threshold) & inside                                                             # [N, h, w]
        area = M.sum((1, 2))
        sure = (C * M).sum((1, 2)) / area.clamp(min=1)
        corners = corners.tolist()
        for k in [int(sure.argmax())] if queue is None else range(len(asked)):
            if queue is not None and not unknown[int(asked[k, 1]), int(asked[k, 0])]:
                continue                                      # a mask of this very batch has covered the point
            added = take(C[k], M[k], area[k], corners[k])
            fails = 0 if added else fails + 1
            if trace is not None:
                trace.append(dict(points=asked.cpu(), kept=k, mask=M[k].cpu(), corner=corners[k], added=added))
            if fails >= patience:
                break
    # Count what is left of each object, drop the crumbs, number the rest 1, 2, ...
    area = torch.bincount(labels.flatten(), minlength=count + 1)
    score = torch.bincount(labels.flatten(), weights=best.flatten(), minlength=count + 1) / area.clamp(min=1)
    keep = area >= max(min_area, 1)
    keep[0] = False
    number = keep.cumsum(0) * keep
    return number[labels], score[keep]


# --- 5 Panoptic segmentation --------------------------------------------------------------------------------------------

def local_maxima(score):
    """Where to point: score [H, W] -> points [n, 2] in pixels, the highest first, and their scores [n].

    A local maximum is an 8-connected plateau of equal values without a higher neighbour; its point is the pixel of it
    that is nearest to its centre of mass (of several the first).  The paper searches plateaus breadth first; here all
    are found at once.  A pixel that no neighbour exceeds is a candidate; candidates that touch have equal values, so
    plateaus are components of the candidates' mask.  One that touches an equal pixel which is no candidate is no maximum."""
    H, W = score.shape
    score = score.double()[None, None]                        # doubles also count pixels exactly, below
    candidate = score == F.max_pool2d(score, 3, 1, 1)
    beside = F.max_pool2d(score.masked_fill(candidate, -math.inf), 3, 1, 1)           # the highest neighbour that is no candidate
    higher = candidate & (beside == score)
    number = torch.arange(H * W, device=score.device)
    label = torch.where(candidate.flatten(), number, H * W)
    while True:                                               # the smallest number of a plateau spreads over it
        least = -F.max_pool2d(-label.view(1, 1, H, W).double(), 3, 1, 1).long().flatten()
        new = torch.where(candidate.flatten(), least, H * W)
        new = torch.where(candidate.flatten(), torch.cat([new, new.new_tensor([H * W])])[new], new)   # jump: my label's label
        if torch.equal(new, label):
            break
        label = new
    label[~candidate.flatten()] = 0
    spoilt = torch.zeros(H * W, dtype=torch.bool, device=score.device)
    spoilt[label[higher.flatten()]] = True
    alive = candidate.flatten() & ~spoilt[label]
    pixel, name = number[alive], label[alive]                 # raster order
    roots, group = name.unique(return_inverse=True)
    x, y = (pixel % W).double(), (pixel // W).double()
    size = torch.bincount(group).double()
    centre = [torch.bincount(group, weights=v) / size for v in (x, y)]
    far = (x - centre[0][group]) ** 2 + (y - centre[1][group]) ** 2
    near = torch.full((len(roots),), math.inf, dtype=torch.float64, device=score.device).scatter_reduce(0, group, far, "amin")
    chosen = torch.full((len(roots),), H * W, device=score.device).scatter_reduce(0, group[far == near[group]], pixel[far == near[group]], "amin")
    value = score.flatten()[chosen]
    order = value.argsort(descending=True, stable=True)
    chosen = chosen[order]
    return torch.stack([chosen % W, chosen // W], 1).float() + .5, value[order].float()


@torch.no_grad()
def segment_panoptic(model, image, flip=False, generator=None, trace=None):
    """Section 5: image [3, H, W] -> Prediction, by a model that is in eval mode.

    The semantic branch says what is stuff, which is marked as segmented; the greedy algorithm finds the things on the
    rest, at the local maxima of the proposal branch, or at random points (the toy problem) where a model has none.  An
    instance's category is that of the highest semantic probability, summed over its mask (Choice: among the things).
    `flip` averages all probabilities with those of the mirrored picture, the paper's only augmentation at test time.

    Choice: a pixel that looks like a thing but belongs to no instance becomes void, as does stuff of fewer than
    `model.stuff_area` pixels; these count at 1024x2048 and are scaled with the picture's area.  Random points come from a generator with seed 0 unless one is given: results repeat."""
    H, W = image.shape[1:]
    s, isthing = model.stride, model.isthing
    image = F.pad(image[None], (0, -W % s, 0, -H % s), mode="replicate")             # whole cells, also after mirroring
    views = []
    for picture in [image, image.flip(-1)][:1 + flip]:
        features = model.encoder(picture)
        logits = [model.semantic(features)] + ([model.proposal(features)] if model.proposal else [])
        # [1, C, h, w], [1, width, h, w], [1, classes, H, W] and, with the branch, [1, 1, H, W]; the last two enlarged to pixels
        views.append((features, model.selection.share(features), *(F.interpolate(v.float(), scale_factor=s, mode="bilinear") for v in logits)))
    probability, wanted = views[0][2].softmax(1), views[0][3].sigmoid() if model.proposal else None
    if flip:
        probability = (probability + views[1][2].softmax(1).flip(-1)) / 2
        wanted = wanted if wanted is None else (wanted + views[1][3].sigmoid().flip(-1)) / 2
    probability = probability[0, :, :H, :W]                                                      # [classes, H, W]
    width = views[0][0].shape[-1]                                                                # of the map, in cells

    def propose(points):
        features, shared = views[0][:2]
        logits, corners = model.selection(features, points[None], shared)
        C = torch.sigmoid(logits.float())
        if flip:                                              # the same windows, mirrored
            mirrored = points.new_tensor([width * s, 0]) + points * points.new_tensor([-1, 1])
            there = torch.stack([width - corners[:, 0] // s - C.shape[2] // s, corners[:, 1] // s], 1)
            logits, _ = model.selection(views[1][0], mirrored[None], views[1][1], there)
            C = (C + torch.sigmoid(logits.float()).flip(-1)) / 2
        return C, corners

    semantic = probability.argmax(0)
    points = local_maxima(wanted[0, 0, :H, :W])[0] if model.proposal else None
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    labels, scores = segment_instances(propose, isthing[semantic], model.threshold, .5, model.per_round, model.patience, points,
                                       model.min_area, generator, trace)
    n = len(scores)
    sums = probability.new_zeros(n + 1, len(isthing)).index_add_(0, labels.flatten(), probability.flatten(1).t())
    categories = sums[1:].masked_fill(~isthing, -1).argmax(1)                                    # [n]
    stuff = torch.where((labels == 0) & ~isthing[semantic], semantic + 1, 0)                     # 0: none
    area = torch.bincount(stuff.flatten(), minlength=len(isthing) + 1)
    shown = area >= max(model.stuff_area * H * W / (1024 * 2048), 1)
    shown[0] = False
    number = (n + shown.cumsum(0)) * shown
    segments = torch.where(labels > 0, labels, number[stuff])
    rows, cols = (torch.zeros(n + 1, m, dtype=torch.uint8, device=labels.device) for m in (H, W))     # is instance k in row y?
    rows[labels, torch.arange(H, device=labels.device)[:, None]] = 1
    cols[labels, torch.arange(W, device=labels.device)] = 1
    boxes = torch.stack([cols.argmax(1), rows.argmax(1), W - cols.flip(1).argmax(1), H - rows.flip(1).argmax(1)], 1)[1:].float()
    masks = labels == torch.arange(1, n + 1, device=labels.device)[:, None, None]
    every = torch.cat([categories, shown.nonzero()[:, 0] - 1])
    return Prediction(segments, every, torch.cat([scores.float(), scores.new_ones(len(every) - n).float()]),
                      dict(boxes=boxes, masks=masks, scores=scores.float(), categories=categories))


class AdaptIS(nn.Module):
    """The whole.  `isthing` bool [C]; `encoder`: images -> one feature map, with `.channels` and `.stride`.

    window, radius: of the head, in pixels.  points: K, a picture in training.  loss: of masks, see above.  proposals: with
    the point proposal branch.  threshold: T.  rates: Adam's, of the encoder and of everything else."""

    def __init__(self, isthing, encoder, width=32, blocks=3, window=None, radius=280, points=6, loss=normalized_focal_loss,
                 proposals=True, threshold=.5, per_round=7, patience=20, min_area=1, stuff_area=0, flip=False, rates=(5e-4, 5e-4),
                 proposal_share=.1, coordinates=True, adains=3):
        super().__init__()
        isthing = torch.as_tensor(isthing, dtype=torch.bool)
        if not isthing.any():
            raise ValueError("no category is a thing: there is nothing to point at")
        self.register_buffer("isthing", isthing, persistent=False)
        self.encoder, self.stride, c = encoder, encoder.stride, encoder.channels
        self.selection = InstanceSelection(c, encoder.stride, width, blocks, window, radius, coordinates, adains)
        self.semantic = Branch(c, len(isthing), width)
        self.proposal = Branch(c, 1, width) if proposals else None
        self.points, self.loss, self.threshold, self.per_round, self.patience = points, loss, threshold, per_round, patience
        self.min_area, self.stuff_area, self.flip, self.rates, self.proposal_share = min_area, stuff_area, flip, rates, proposal_share

    def objects(self, target):
        """Numbers [n] of the things of a target that show: what can be pointed at."""
        known = self.isthing[target.categories] & ~target.crowd
        shows = torch.bincount(target.segments.flatten(), minlength=len(known) + 1)[1:] > 0
        return (known & shows).nonzero()[:, 0] + 1

    def truth(self, segments, ids, corners, size):
        """Masks bool [N, h, w] of objects `ids` [B, K] on windows of `size` at `corners`, and where truth is known at all."""
        window = segments[window_places(corners, size, ids.shape[1])]                            # [N, h, w]
        return window == ids.flatten()[:, None, None], window > 0

    def losses(self, images, targets):
        """images [B, 3, H, W], a target (segments, categories, crowd) an image -> {"mask", "semantic"}, or {"proposal"} while
        that branch alone learns.  Void and crowds teach nothing.  A picture without objects adds 0, gradients attached."""
        B, H, W, s = len(images), *images.shape[-2:], self.stride
        segments = torch.stack([torch.where(F.pad(t.crowd, (1, 0))[t.segments], 0, t.segments) for t in targets])
        objects = [self.objects(t) for t in targets]
        alone = self.proposal is not None and not any(p.requires_grad for p in self.encoder.parameters()) \
            and any(p.requires_grad for p in self.proposal.parameters())
        padded = F.pad(segments, (0, -W % s, 0, -H % s))                                         # whole cells; the rest is void
        if alone:
            return {"proposal": self.proposal_loss(images, padded, objects)}
        features = self.encoder(images)
        some = torch.tensor([len(o) > 0 for o in objects], device=images.device)
        points, ids = images.new_full((B, self.points, 2), .5), segments.new_zeros(B, self.points)
        for b in some.nonzero()[:, 0].tolist():
            points[b], ids[b] = sample_points(segments[b], objects[b], self.points)
        logits, corners = self.selection(features, points)
        masks, known = self.truth(padded, ids, corners, logits.shape[-2:])
        each = self.loss(logits.float(), masks, known).view(B, -1) * some[:, None]
        category = torch.stack([F.pad(t.categories, (1, 0), value=VOID)[g] for t, g in zip(targets, segments)])
        category[segments == 0] = VOID
        semantic = F.interpolate(self.semantic(features).float(), scale_factor=s, mode="bilinear")[..., :H, :W]
        pixels = F.cross_entropy(semantic, category, ignore_index=VOID, reduction="sum") / (category != VOID).sum().clamp(min=1)
        losses = {"mask": each.sum() / (some.sum() * self.points).clamp(min=1), "semantic": pixels}
        if self.proposal is not None:                         # untouched for now, but nobody waits for its gradients
            losses["mask"] = losses["mask"] + 0 * sum(p.sum() for p in self.proposal.parameters())
        return losses

    def proposal_loss(self, images, segments, objects, count=48, best=.2):
        """Which points make good masks?  A random object of each picture, 48 random points on it, their masks' IoU with the
        truth; the best fifth are positive, the others negative; binary cross entropy.  All else stands still."""
        frozen = [m for name, m in self.named_children() if name != "proposal"]
        for m in frozen:
            m.eval()                                          # batch norm's running statistics, too
        with torch.no_grad():
            features = self.encoder(images)
            chosen = [b for b, o in enumerate(objects) if len(o)]
            if chosen:
                drawn = [sample_points(segments[b], objects[b][torch.randint(len(objects[b]), (1,), device=images.device)], count) for b in chosen]
                points, ids = (torch.stack(v) for v in zip(*drawn))                              # [b, 48, 2], [b, 48]
                logits, corners = self.selection(features[chosen], points)
                masks, known = self.truth(segments[chosen], ids, corners, logits.shape[-2:])
                found = (torch.sigmoid(logits.float()) > self.threshold) & known
                area = (segments[chosen] == ids[:, :1, None]).sum((1, 2)).repeat_interleave(count)   # of the object, also beyond the window
                shared = (found & masks).sum((1, 2))
                iou = (shared / (found.sum((1, 2)) + area - shared)).view(-1, count)
                rank = iou.argsort(1, descending=True).argsort(1)
                good = rank < round(best * count)
        logits = self.proposal(features)
        if not chosen:
            return 0 * logits.sum()
        return F.binary_cross_entropy_with_logits(bilinear(logits[chosen], points, self.stride)[..., 0], good.float())

    def stages(self):
        """Everything but the proposal branch, then that branch alone, by Adam with beta 0.9 and 0.999."""
        encoder, branch = list(self.encoder.parameters()), list(self.proposal.parameters()) if self.proposal else []
        rest = [p for name, m in self.named_children() if name not in ("encoder", "proposal") for p in m.parameters()]
        groups = [{"params": [p for p in encoder if p.requires_grad], "lr": self.rates[0]}, {"params": rest, "lr": self.rates[1]}]
        if not branch:
            return [("masks", groups, torch.optim.Adam, 1.0)]
        return [("masks", groups, torch.optim.Adam, 1 - self.proposal_share),
                ("proposals", [{"params": branch, "lr": self.rates[1]}], torch.optim.Adam, self.proposal_share)]

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size` (its own by default), by `segment_panoptic`."""
        p = segment_panoptic(self, image, self.flip)
        own = tuple(image.shape[1:])
        if size is None or tuple(size) == own:
            return p
        # Nearest pixels, for ids must not mix; what shrinks to nothing is dropped.
        y, x = (((torch.arange(n, device=image.device) + .5) * old / n).long() for n, old in zip(size, own))
        segments, n = p.segments[y[:, None], x], len(p.instances["scores"])
        keep = torch.bincount(segments.flatten(), minlength=len(p.categories) + 1)[1:] > 0
        boxes = p.instances["boxes"] * p.scores.new_tensor([size[1] / own[1], size[0] / own[0]] * 2)
        instances = {**p.instances, "boxes": boxes, "masks": p.instances["masks"][:, y[:, None], x]}
        return Prediction(F.pad(keep.cumsum(0) * keep, (1, 0))[segments], p.categories[keep], p.scores[keep],
                          {k: v[keep[:n]] for k, v in instances.items()})


# --- 6 The toy problem as a whole ---------------------------------------------------------------------------------------

def toy_model(**changes):
    """The network for cells: ground and cell, a U-Net, random points, a head that sees 64x64 pixels."""
    return AdaptIS([False, True], UNet(), **{**dict(window=64, radius=48, proposals=False, min_area=OverlappingCells.SMALLEST), **changes})


def load(path):
    """The toy model from a file that this demo (runs/adaptis.pt) or `train.py --dataset cells` (last.pt) has written."""
    if not os.path.exists(path):
        raise ValueError(f"{path}: no such file; train a model first: python adaptis.py")
    try:
        model = toy_model()
        model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["model"])
    except Exception as e:
        raise ValueError(f"{path} holds no weights of the cells' network; python adaptis.py writes runs/adaptis.pt") from e
    return model.eval()


def instance_map(prediction):
    """The instances of a prediction as a map int64 [H, W], 0: nobody.  They are its first segments."""
    return prediction.segments * (prediction.segments <= len(prediction.instances["scores"]))


def found_and_false(labels, segments, categories):
    """Instances [H, W] (0: nobody) against a label -> (found, objects, false): objects of which an instance has an IoU above
    one half, which no two instances can have; instances that found nothing.  One that lies mostly on void is neither."""
    n, m = int(labels.max()), len(categories)
    pairs = torch.bincount((labels * (m + 1) + segments).flatten(), minlength=(n + 1) * (m + 1)).view(n + 1, m + 1)
    union = pairs.sum(1, keepdim=True) + pairs.sum(0) - pairs
    thing = F.pad(categories == 1, (1, 0))                    # of segment k; 0 is void
    hit = (2 * pairs > union) & thing
    hit[0] = False
    lost = (~hit.any(1) & (2 * pairs[:, 0] <= pairs.sum(1)))[1:] & (pairs[1:].sum(1) > 0)
    return int(hit.sum()), int((thing & (pairs.sum(0) > 0)).sum()), int(lost.sum())


def click_window(model, image):
    """A matplotlib figure of image [3, H, W] in which a click paints the object under the cursor.  The backbone has run before
    the window opens; a click costs one run of the head."""
    import matplotlib.pyplot as plt
    H, W = image.shape[1:]
    features = model.encoder(image[None])
    shared, paint = model.selection.share(features), np.zeros((H, W, 4), np.float32)
    fig, ax = plt.subplots(figsize=(7, 7 * H / W + .5), layout="constrained")
    ax.imshow(image.permute(1, 2, 0).numpy(), extent=(0, W, H, 0))               # x, y of a click are those of a point
    overlay = ax.imshow(paint, extent=(0, W, H, 0))
    ax.set_title("click on a cell")
    ax.axis("off")
    clicks = []

    @torch.no_grad()
    def on_click(event):
        if event.inaxes is not ax or not (0 <= event.xdata < W and 0 <= event.ydata < H):
            return
        point = torch.tensor([[[event.xdata, event.ydata]]], dtype=torch.float32)
        logits, corners = model.selection(features, point, shared)
        (x, y), C = corners[0].tolist(), torch.sigmoid(logits[0].float())[:H - corners[0, 1], :W - corners[0, 0]]
        mask = (C > model.threshold).numpy()
        paint[y:y + mask.shape[0], x:x + mask.shape[1]][mask] = (*plt.cm.tab10(len(clicks) % 10)[:3], .75)
        clicks.append(point)
        overlay.set_data(paint)
        ax.set_title(f"({event.xdata:.0f}, {event.ydata:.0f}): {mask.sum()} pixels, mean confidence {C.numpy()[mask].mean() if mask.any() else 0:.2f}")
        fig.canvas.draw_idle()

    fig.canvas.mpl_connect("button_press_event", on_click)
    return fig


def draw_instances(image, labels, n=None, seed=1):
    """The picture [H, W, 3] with every instance in a colour of its own; the same colours for the same `n`."""
    import matplotlib
    n, random = n or int(labels.max()), np.random.default_rng(seed)
    hues = matplotlib.colormaps["hsv"](random.permutation(np.linspace(0, 1, n, endpoint=False)))[:, :3] if n else np.zeros((0, 3))
    colours = np.concatenate([[[1, 1, 1]], hues * random.uniform(.65, 1, (n, 1))])
    shade = image.mean(0).numpy()[..., None] * .35 + .65
    return np.clip(colours[labels.numpy()] * shade, 0, 1)


def draw(path, model, sample, more, large):
    """The figure: results; what single points say; the steps of the greedy algorithm; a larger picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    H, W = sample.image.shape[1:]
    trace = []
    p = segment_panoptic(model, sample.image, trace=trace)
    fig = plt.figure(figsize=(14, 16.5), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=(3, 2))
    axes = upper.subplots(4, 6)
    extent = (0, W, H, 0)
    for i, s in enumerate([sample, *more]):
        q = p if i == 0 else segment_panoptic(model, s.image)
        found, n, false = found_and_false(instance_map(q), s.segments, s.categories)
        axes[i // 3, i % 3 * 2].imshow(s.image.permute(1, 2, 0).numpy())
        axes[i // 3, i % 3 * 2].set_title(f"picture {'ABCDEF'[i]}", fontsize=11)
        axes[i // 3, i % 3 * 2 + 1].imshow(draw_instances(s.image, instance_map(q)))
        axes[i // 3, i % 3 * 2 + 1].set_title(f"{found} of {n} found, {false} false", fontsize=11)
    # Six points: two on the same cell, and others.
    features = model.encoder(sample.image[None])
    things = (sample.categories == 1).nonzero()[:, 0] + 1
    generator = torch.Generator().manual_seed(3)
    areas = torch.bincount(sample.segments.flatten(), minlength=len(sample.categories) + 1)[things]
    big = things[areas.argsort(descending=True)]
    chosen = [sample_points(sample.segments, big[k:k + 1], 1, generator)[0][0] for k in (0, 0, 1, 2, len(big) // 2, -2)]
    logits, corners = model.selection(features, torch.stack(chosen)[None])
    for ax, point, C, (x, y) in zip(axes[2], chosen, logits.sigmoid(), corners.tolist()):
        full = torch.zeros(H + 64, W + 64)
        full[y:y + C.shape[0], x:x + C.shape[1]] = C
        grey = sample.image.mean(0)[..., None].expand(-1, -1, 3) * .5 + .4
        heat = torch.tensor(matplotlib.colormaps["inferno"](full[:H, :W].numpy())[..., :3])
        ax.imshow((grey + (heat - grey) * full[:H, :W, None].clamp(max=.9)).clamp(0, 1), extent=extent)
        ax.plot(*point.tolist(), "o", ms=7, mfc="cyan", mec="black")
        ax.add_patch(plt.Rectangle((x, y), C.shape[1], C.shape[0], fill=False, ec="grey", ls=":"))
    axes[2, 0].set_title("picture A: two points on one cell ...", fontsize=11, loc="left")
    axes[2, 2].set_title("... others, and what they say (dotted: the head's window)", fontsize=11, loc="left")
    # The greedy algorithm, step by step.
    good = [i for i, t in enumerate(trace) if t["added"]]
    steps = [good[round(f * (len(good) - 1))] for f in (0, .15, .4, .7, 1)]
    semantic = model.semantic(features).float()
    stuff = F.interpolate(semantic, scale_factor=model.stride, mode="bilinear")[0, :, :H, :W].argmax(0) == 0
    for ax, stop in zip(axes[3], [*steps, len(trace) - 1]):
        known = torch.zeros(H, W, dtype=torch.int64)
        for k, t in enumerate([t for t in trace[:stop + 1] if t["added"]]):
            (x, y), m = t["corner"], t["mask"]
            m = m[:H - y, :W - x]
            known[y:y + m.shape[0], x:x + m.shape[1]][m & (known[y:y + m.shape[0], x:x + m.shape[1]] == 0)] = k + 1
        show = draw_instances(sample.image, known, len(good))
        show[(known == 0) & ~stuff] = .6
        ax.imshow(show, extent=extent)
        points, kept = trace[stop]["points"], trace[stop]["kept"]
        ax.plot(*points.T, "o", ms=4, mfc="white", mec="black")
        ax.plot(*points[kept], "o", ms=8, mfc="lime" if trace[stop]["added"] else "red", mec="black")
        ax.set_title(f"round {stop + 1}: {int(known.max())} cells", fontsize=11)
    axes[3, 0].set_ylabel("grey: unknown; the surest of the\nseven: green, added; red, refused", fontsize=9)
    for ax in axes.flat:
        ax.set_xticks([]), ax.set_yticks([])
    fig.get_layout_engine().set(h_pad=.08)
    wide = lower.subplots(1, 2)
    model.patience = 20 * large.image[0].numel() // (H * W)
    q = segment_panoptic(model, large.image)
    found, n, false = found_and_false(instance_map(q), large.segments, large.categories)
    wide[0].imshow(large.image.permute(1, 2, 0).numpy())
    wide[0].set_title(f"{large.image.shape[2]} x {large.image.shape[1]} pixels, trained on {W} x {H}")
    wide[1].imshow(draw_instances(large.image, instance_map(q)))
    wide[1].set_title(f"{found} of {n} found, {false} false")
    for ax in wide:
        ax.axis("off")
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    fig.savefig(path, dpi=75)
    plt.close(fig)


def demo(full=False, seconds=None, weights=None, authors=None, out="figures/adaptis.png", pictures=200):
    """Train for `seconds` (300, or 3000 with `full`) or take `weights`; print Table 1, the larger pictures, and draw.

    The schedule follows the clock: Adam, a rate that rises to 2e-3 in the first 3% and falls to 0 as a cosine does, steps of 8
    pictures with 6 points.  The pictures are new ones at every step."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fast = device.type == "cuda" or (hasattr(torch.cpu, "_is_avx512_bf16_supported") and torch.cpu._is_avx512_bf16_supported())
    train, test = OverlappingCells(10**9, seed=1), OverlappingCells(2000, seed=0)

    def fit(model, seconds, batch=8, top=2e-3):
        optimiser, begin, taken, said = torch.optim.Adam(model.parameters(), top), time.time(), 0, -1
        while (share := (time.time() - begin) / seconds) < 1:
            optimiser.param_groups[0]["lr"] = top * min(1, share / .03 + .02) * (1 + math.cos(math.pi * share)) / 2
            samples = [train[i] for i in range(taken, taken + batch)]
            targets = [Sample(None, *(v.to(device) for v in (s.segments, s.categories, s.crowd)), "") for s in samples]
            images = torch.stack([s.image for s in samples]).to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=fast):
                losses = model.losses(images, targets)
            optimiser.zero_grad()
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.)
            optimiser.step()
            taken += batch
            if int(share * 10) > said:
                said = int(share * 10)
                print(f"{time.time() - begin:5.0f} s  {taken:6d} pictures  " + "  ".join(f"{k} {v.item():.3f}" for k, v in losses.items()), flush=True)
        print(f"trained on {taken} pictures in {seconds} s: {taken / seconds:.0f} a second")
        return model

    def recall(model, dataset, count, metric=None):
        """Found, objects and false over pictures 0..count - 1, and the seconds they took."""
        total, begin = [0, 0, 0], time.time()
        for i in range(count):
            s = dataset[i]
            p = predict(model, s.image)
            total = [a + b for a, b in zip(total, found_and_false(instance_map(p).cpu(), s.segments, s.categories))]
            if metric is not None:
                metric.update(p.instances["masks"].cpu(), p.instances["scores"].cpu(), p.instances["categories"].cpu(), s.segments, s.categories, isthing=[False, True])
        return *total, time.time() - begin

    def predict(model, image):
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=fast):
            return model.predict(image.to(device))

    torch.manual_seed(0)
    if weights is None:
        seconds = seconds or (3000 if full else 300)
        print(f"training on {device.type} for {seconds} s, {sum(p.numel() for p in toy_model().parameters()) / 1e6:.2f}M weights", flush=True)
        model = fit(toy_model().to(device, memory_format=torch.channels_last).train(), seconds).eval()
        os.makedirs("runs", exist_ok=True)
        torch.save({"model": model.state_dict()}, "runs/adaptis.pt")
    else:
        model = load(weights).to(device)
    try:
        from pq import AveragePrecision
        metric = AveragePrecision(2, (.5, .7, .8, .9))
    except ImportError:
        metric = None
        print("no AP: pq.py is not beside this file")
    found, objects, false, spent = recall(model, test, pictures, metric)
    if metric is not None:
        print(f"\nTable 1, {pictures} test pictures    AP@.5  AP@.7  AP@.8  AP@.9\n"
              "paper: Mask R-CNN              74.6   59.4   43.8    5.8\n"
              "paper: AdaptIS, 140 epochs     99.6   99.2   98.8   97.5\n"
              "here:  AdaptIS              " + "".join(f"{v:7.1f}" for v in metric.compute()["per_threshold"].values()))
    base = found / objects
    print(f"\n{'pictures':34s}   found of cells   recall  false   a picture\n"
          f"{pictures:3d} of 96x96 {'':23s}{found:8d} {objects:8d}   {base:6.1%} {false:6d}   {spent / pictures:5.2f} s", flush=True)
    whole, cut = toy_model(window=None), toy_model(window=None, threshold=.75)
    for other in (whole, cut):
        other.load_state_dict(model.state_dict()), other.eval().to(device)
    forward = cut.selection.forward

    def around(features, points, shared=None, corners=None, half=48):
        """The authors' remedy: statistics of the whole map, but no mask beyond a square around its point."""
        logits, corners = forward(features, points, shared, corners)
        y, x = (torch.arange(n, device=logits.device) + .5 for n in logits.shape[1:])
        at = points.flatten(0, 1)
        inside = ((x - at[:, :1]).abs() < half)[:, None] & ((y - at[:, 1:]).abs() < half)[:, :, None]
        return logits.masked_fill(~inside, -20), corners
    cut.selection.forward = around
    for name, other, size, count in (("window", model, 192, 8), ("whole map", whole, 192, 8), ("whole map, cut, T .75", cut, 192, 8),
                                     ("window", model, 384, 12), ("whole map", whole, 384, 1), ("whole map, cut, T .75", cut, 384, 1))[:None if full else 4]:
        times = (size // 96) ** 2
        other.patience = 20 * times          # the last missing cell of a larger picture is met by fewer of its random points
        found, objects, false, spent = recall(other, OverlappingCells(count, size, (8 * times, 22 * times), seed=2), count)
        print(f"{f'{count} of {size}x{size}, {name}':34s}{found:8d} {objects:8d}   {found / objects:6.1%} {false:6d}   {spent / count:5.2f} s"
              f"   {found / objects / base:.3f} of 96x96", flush=True)
    if authors:
        from PIL import Image
        model.patience = 20 * 16
        found, objects, false, _ = recall(model, OverlappingCells(1, 384, (900, 900), seed=5, augment=False), 1)
        print(f"{'as dense, our own, clear':34s}{found:8d} {objects:8d}   {found / objects:6.1%} {false:6d}")
        truth = torch.from_numpy(np.array(Image.open(os.path.join(authors, "700_sample_gt.png"))).astype(np.int64))
        for kind in ("clear", "noisy"):
            image = torch.from_numpy(np.array(Image.open(os.path.join(authors, f"700_sample_{kind}.jpg")))).permute(2, 0, 1).float() / 255
            p = predict(model, image)
            found, objects, false = found_and_false(instance_map(p).cpu(), truth + 1, torch.cat([torch.zeros(1), torch.ones(int(truth.max()))]).long())
            print(f"{f'the authors 700 cells, {kind}':34s}{found:8d} {objects:8d}   {found / objects:6.1%} {false:6d}")
    if out:
        with torch.no_grad():
            draw(out, model.cpu(), test[0], [test[i] for i in (3, 5, 8, 11, 14)], OverlappingCells(1, 384, (128, 352), seed=2)[0])
        print(f"wrote {out}")


def main(argv=None):
    """The command line: exit code 2 and one sentence for what the user can mend."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train ten times as long, and the whole table of larger pictures")
    parser.add_argument("--seconds", type=float, help="of training (default 300)")
    parser.add_argument("--weights", metavar="FILE", help="do not train, take these: runs/adaptis.pt, or last.pt of train.py --dataset cells")
    parser.add_argument("--authors", metavar="FOLDER", help="also try 700_sample_clear.jpg, _noisy.jpg, _gt.png of the authors' repository")
    parser.add_argument("--click", metavar="FILE", help="open a window on a picture file, or on that picture of OverlappingCells if it is a number")
    args = parser.parse_args(argv)
    try:
        if args.click is None:
            return demo(args.full, args.seconds, args.weights, args.authors)
        if args.click.isdigit():
            image = OverlappingCells(10**9)[int(args.click)].image
        else:
            from PIL import Image
            try:
                image = torch.from_numpy(np.array(Image.open(args.click).convert("RGB"))).permute(2, 0, 1).float() / 255
            except OSError as e:
                raise ValueError(f"{args.click} cannot be read as a picture ({e}); give a PNG or JPEG file, or a number") from e
        with torch.no_grad():
            click_window(load(args.weights or "runs/adaptis.pt"), image)
        import matplotlib.pyplot as plt
        plt.show()
    except ValueError as e:
        print("adaptis.py:", e, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

# Exercises
# 1. Give `toy_model` window=None, train again (--seconds 300) and read the table: does it learn 96x96 pictures as well, and
#    what becomes of 192x192 and 384x384?  Print mean and variance in `AdaIN.forward` for both sizes to see why.
# 2. In `normalized_focal_loss` let the gradient flow through P (delete `.detach()`).  Which test notices, and what does the
#    network learn now?  (What makes a fraction small?  A large denominator.)
# 3. In `segment_instances` keep the first of the seven points instead of the surest: which tests fail, how many rounds does a
#    picture take now, and how many cells are false?  Then take a point's distance to the edge of the unknown area as its
#    priority: better than chance?
