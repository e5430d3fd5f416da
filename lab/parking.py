"""Parking: toy images full of large things that look alike, on which crops confuse a network.

Three rows of parked cars, vans and buses, front towards the viewer: about 18 things an image.
Within a category they differ only in paint, size and in what hides them. ibs.py is tried on it.
"""
import colorsys

import numpy as np
import torch

from data import Category, Sample

GROUND, HEDGE, FIRST_THING = 0, 1, 2                           # categories


class Parking:
    """`length` images of size (h, w) with `rows` of vehicles; image i depends on (seed, i) alone.

    Segments 1 and 2 are ground and hedge (stuff). The vehicles follow, from the back to the front.
    Choice: a vehicle of which fewer than 40 pixels show is void.
    Choice: four of five vehicles of a row have one category, so that look-alikes are neighbours."""
    categories = [Category("ground", False, (128, 128, 128)),
                  Category("hedge", False, (107, 142, 35)), Category("car", True, (0, 0, 142)),
                  Category("van", True, (0, 60, 100)), Category("bus", True, (119, 11, 32))]
    # Of car, van, bus: width and height in pixels, which share of the height leans inwards, the
    # roof's width as a share of the body's, and at which share of the height the glass begins.
    SHAPES = ((38, 28, 0.45, 0.7, 0.55), (36, 36, 0.3, 0.85, 0.65), (44, 46, 0.08, 0.96, 0.5))
    SMALLEST = 40

    def __init__(self, length, size=(128, 256), rows=3, seed=0):
        self.length, self.size, self.rows, self.seed = length, size, rows, seed

    def __len__(self):
        return self.length

    def labels(self, i):
        """Segments [H, W], categories [N] and crowd [N] of image i."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd

    def __getitem__(self, i):
        i = range(self.length)[i]                              # raises IndexError past the end
        random = np.random.default_rng([self.seed, i])
        (h, w), horizon = self.size, int(0.2 * self.size[0])
        image, owner = np.empty((h, w, 3), np.float32), np.zeros((h, w), np.int64)
        image[:] = random.uniform(0.35, 0.55)
        image[:horizon] = np.array([0.25, 0.45, 0.2]) * random.uniform(0.7, 1.2)
        kinds = []                                             # 0 car, 1 van, 2 bus
        for row in range(1, self.rows + 1):                    # from the hedge to the viewer
            depth = row / self.rows
            bottom = horizon + (0.97 * h - horizon) * depth + random.uniform(-2, 2)
            scale = (0.75 + 0.35 * depth) * random.uniform(0.95, 1.05)
            usual, x = random.integers(3), random.uniform(-30, 10)
            while x < w:
                kind = usual if random.random() < 0.7 else random.integers(3)
                width, height = (n * scale * random.uniform(0.95, 1.05)
                                 for n in self.SHAPES[kind][:2])
                if random.random() > 0.12:                     # else the place is free
                    kinds.append(kind)
                    place = (x, bottom + random.uniform(-1.5, 1.5), width, height)
                    self.paint(image, owner, len(kinds), kind=kind, place=place, random=random)
                x += width * random.uniform(1.02, 1.15)
        image += random.normal(0, 0.03, (h, w, 1))
        shown = np.bincount(owner.ravel(), minlength=len(kinds) + 1) >= self.SMALLEST
        shown[0] = False
        segments = np.where(shown, shown.cumsum() + 2, 0)[owner]
        ground = np.repeat([HEDGE + 1, GROUND + 1], [horizon, h - horizon])[:, None]
        segments = np.where(owner == 0, ground, segments)
        categories = [GROUND, HEDGE] + [FIRST_THING + k for k, s in zip(kinds, shown[1:]) if s]
        image = torch.from_numpy(image.clip(0, 1).transpose(2, 0, 1).copy())
        return Sample(image, torch.from_numpy(segments), torch.tensor(categories),
                      torch.zeros(len(categories), dtype=torch.bool), f"parking-{self.seed}-{i}")

    def paint(self, image, owner, number, kind, place, random):
        """Paints one vehicle over image [h, w, 3] and writes its number into owner [h, w].

        place: left edge, lower edge, width, height in pixels."""
        left, bottom, width, height = place
        lean, roof, sill = self.SHAPES[kind][2:]
        y0, x0 = max(0, int(bottom - height)), max(0, int(left))
        y1, x1 = (min(n, int(v) + 1) for n, v in zip(owner.shape, (bottom, left + width)))
        u = np.abs((np.arange(x0, x1) + 0.5 - left) / width * 2 - 1)[None]     # 0 middle, 1 sides
        v = ((bottom - np.arange(y0, y1) - 0.5) / height)[:, None]             # 0 ground, 1 top
        side = 1 - (1 - roof) * ((v - 1 + lean) / lean).clip(0)                # half the width at v
        tyre = (v < 0.16) & (u > 0.5)
        hue, saturation, value = (random.random(), random.uniform(0.25, 0.75),
                                  random.uniform(0.45, 0.95))
        paint = np.array(colorsys.hsv_to_rgb(hue, saturation, value))
        colour = paint * (0.8 + 0.3 * v + 0 * u)[..., None]
        colour[(u > side - 0.07) | (v + 0 * u > 0.96)] *= 0.75                 # its rim
        colour[(u < 0.85 * side) & (v > sill) & (v < 0.94)] = 0.15, 0.2, 0.25  # the windscreen
        colour[(np.abs(u - 0.75) < 0.12) & (np.abs(v - 0.36) < 0.06)] = 0.95, 0.95, 0.8  # lamps
        colour[tyre] = 0.08
        body = (u < side) & (v > 0) & (v < 1) & (tyre | (v >= 0.16))
        image[y0:y1, x0:x1][body] = colour[body]
        owner[y0:y1, x0:x1][body] = number
