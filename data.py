"""data.py - what a sample is, a street that needs no download, and readers of the real data sets.

A panoptic label says two things of every pixel: what it is (road, car, ...) and, for countable *things*, which one. It is
kept as one integer map and one short list, so that an instance is a mask, a category and an index at once:

    segments  int64 [H, W]           0 0 0 1 1      categories int64 [N]: segment k is of category categories[k - 1]
    0 is void, k > 0 is segment k    2 2 0 1 1      crowd bool [N]: segment k stands for a group nobody told apart
                                     2 2 3 3 1      stuff (road, sky) has at most one segment, things as many as there are

Data flows one way:  data set -> Sample (a whole picture) -> crop() -> (image, Target) -> a model's losses.
A Target knows its boxes twice: of the visible part, and of the whole object before the window cut it (`full_boxes`), with
`truncated` telling on which edges it really goes on:

            full box . . . . . . . .            large objects are nearly always cut when a network trains on crops of a
            .   +---crop--------+  .            high-resolution picture; what a box loss should ask for on the cut side
            .   |  visible box  |  .            is the question of Porzi et al., "Improving Panoptic Segmentation at All
            . . |. . . . . . . .|. .            Scales" (CVPR 2021), and of cabb_loss.py

Three sources, all sequences of samples with `.categories`, `len()`, `[i]` and `.labels(i)`:
- `StreetScenes`: streets drawn with numpy in perspective, far to near, with true occlusion. No network, no licence, no two
  machines that disagree: scene i of a seed is the same in every process, and at every resolution.
- `Cityscapes` (Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016), and IDD (Varma et
  al., "IDD: A Dataset for Exploring Problems of Autonomous Navigation in Unconstrained Environments", WACV 2019).
- `CocoPanoptic`: the JSON + PNG format of Kirillov et al., "Panoptic Segmentation" (CVPR 2019), in which COCO and Mapillary
  Vistas come, and in which predictions are written for their evaluation servers (`write_coco_panoptic`).

Run `python data.py` for the table of what the street is like and figures/data.png; the spec is tests/test_data.py.
"""
import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image  # torchvision.io decodes 16-bit PNG only in late versions; PIL always does, and matplotlib brings it


class DataError(ValueError):
    """A folder or file is not what it should be; the message is one sentence that names it and the remedy."""


@dataclass
class Category:
    name: str
    isthing: bool
    colour: tuple  # RGB, 0..255


@dataclass
class Sample:
    """A whole picture with its labels."""
    image: torch.Tensor       # float32 [3, H, W], 0..1
    segments: torch.Tensor    # int64 [H, W], 0 void, k > 0 segment k
    categories: torch.Tensor  # int64 [N], of segment k at k - 1
    crowd: torch.Tensor       # bool [N]
    name: str


@dataclass
class Target:
    """The labels of one crop. Boxes are x1 y1 x2 y2 in pixels of the crop, half open; a row per segment, stuff included."""
    segments: torch.Tensor    # int64 [h, w]
    categories: torch.Tensor  # int64 [N]
    crowd: torch.Tensor       # bool [N]
    boxes: torch.Tensor       # float32 [N, 4], of the visible part
    full_boxes: torch.Tensor  # float32 [N, 4], of the whole object: may reach outside the crop
    truncated: torch.Tensor   # bool [N, 4]: has the object pixels beyond the left, top, right, bottom edge of the crop?
    image_id: int = 0
    instance: int = 0         # the segment for which the sampler chose this crop (0: none)
    scale: float = 1.0        # picture pixels were multiplied by this before cropping

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})


# --- From samples to crops -------------------------------------------------------------------------------------------

def mask_boxes(segments, count):
    """Bounding boxes of segments 1..count of a map int64 [H, W] -> float32 [count, 4], half open; zeros where absent."""
    h, w = segments.shape
    rows = torch.zeros(count + 1, h, dtype=torch.uint8, device=segments.device)  # does segment k occur in row y?
    cols = torch.zeros(count + 1, w, dtype=torch.uint8, device=segments.device)
    rows[segments, torch.arange(h, device=segments.device)[:, None]] = 1
    cols[segments, torch.arange(w, device=segments.device)] = 1
    first = [t.argmax(1) for t in (cols, rows)]                  # argmax takes the first of equal values
    last = [t.shape[1] - t.flip(1).argmax(1) for t in (cols, rows)]
    return (torch.stack(first + last, 1) * rows.amax(1)[:, None])[1:].float()


def resize(sample, size):
    """The sample at size (h, w): picture bilinear with antialiasing, segments nearest, so no new ids between two segments.

    A segment that has no pixel left keeps its number and its row in `categories`; `crop` drops it."""
    image = F.interpolate(sample.image[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)
    y, x = (((torch.arange(n) + .5) * (old / n)).long().clamp(max=old - 1)  # the old pixel under the new one's centre
            for n, old in zip(size, sample.segments.shape))
    return replace(sample, image=image, segments=sample.segments[y[:, None], x])


def flip(sample):
    """The sample mirrored left to right; numbering of segments stays."""
    return replace(sample, image=sample.image.flip(-1), segments=sample.segments.flip(-1))


def colour_jitter(image, generator, strength):
    """Brightness, contrast and saturation of an image [3, H, W], each times a factor drawn from 1 -+ strength."""
    brightness, contrast, saturation = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(0, keepdim=True)
    return (grey + (image - grey) * saturation).clamp(0, 1)


def crop(sample, top, left, size, image_id=0, instance=0, scale=1.0):
    """The window of size (h, w) whose upper left corner is pixel (top, left) -> (image [3, h, w], Target).

    Works on masks: boxes are of the pixels that remain, invisible segments are dropped and the others renumbered 1..n. What
    lies outside the picture is black and void. `instance` is a segment of the sample, and becomes its number in the crop."""
    (h, w), (height, width), count = size, sample.segments.shape, len(sample.categories)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
    image, segments = sample.image.new_zeros(3, h, w), sample.segments.new_zeros(h, w)
    if y0 < y1 and x0 < x1:
        inside = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
        image[(slice(None), *inside)] = sample.image[:, y0:y1, x0:x1]
        segments[inside] = sample.segments[y0:y1, x0:x1]
    keep = torch.bincount(segments.flatten(), minlength=count + 1)[1:] > 0               # [count]
    number = F.pad(keep.cumsum(0) * keep, (1, 0))                                        # old id -> new id, 0 -> 0
    full = mask_boxes(sample.segments, count)[keep] - torch.tensor([left, top, left, top])
    segments = number[segments]
    return image, Target(
        segments, sample.categories[keep], sample.crowd[keep], mask_boxes(segments, int(keep.sum())), full,
        torch.cat([full[:, :2] < 0, full[:, 2:] > torch.tensor([w, h])], 1), image_id, int(number[instance]), scale)


# --- StreetScenes: a street in metres, seen by a camera -------------------------------------------------------------

STREET = [Category(*c) for c in [
    ("road", False, (128, 64, 128)), ("sidewalk", False, (244, 35, 232)), ("building", False, (90, 90, 90)),
    ("vegetation", False, (107, 142, 35)), ("sky", False, (70, 130, 180)), ("car", True, (0, 60, 200)),
    ("truck", True, (0, 150, 150)), ("person", True, (220, 20, 60)), ("sign", True, (250, 200, 0))]]
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, TRUCK, PERSON, SIGN = range(9)
LIGHTS = [  # how often, zenith, horizon (also the haze), light on everything, metres at which haze takes half, lamps lit
    (5, (.30, .50, .82), (.80, .87, .93), (1.00, .98, .94), 400, False),   # day
    (3, (.60, .64, .70), (.82, .84, .86), (.80, .83, .88), 250, False),    # overcast
    (2, (.42, .52, .72), (.98, .82, .60), (1.05, .86, .66), 300, False),   # evening sun
    (2, (.13, .15, .32), (.85, .52, .38), (.52, .45, .52), 300, True),     # dusk
    (2, (.72, .74, .76), (.80, .81, .82), (.82, .84, .86), 45, True)]      # fog
PAINT = [(.82, .82, .84), (.55, .57, .60), (.33, .34, .37), (.10, .10, .12), (.70, .08, .08), (.10, .22, .52),
         (.78, .74, .64), (.12, .34, .20), (.85, .60, .10)]                # silver, greys, black, ... the road is grey too
CLOTH = PAINT + [(.95, .95, .95), (.20, .45, .70), (.75, .30, .50), (.45, .30, .20), (.30, .50, .25), (.9, .4, .15)]
GLASS, RUBBER, FOCAL = (.16, .20, .25), (.06, .06, .07), .9               # focal length in picture heights


class Dice:
    """Uniform numbers from PCG64's raw integers: numpy promises these bits for ever, not those of Generator's methods."""

    def __init__(self, *key):
        self.raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw

    def __call__(self, low=0., high=1.):
        return low + (high - low) * ((self.raw() >> 11) * 2. ** -53)

    def pick(self, items):
        return items[int(self() * len(items))]

    def whole(self, low, high):  # low..high, both included
        return low + int(self() * (high - low + 1))

    def field(self, *shape):     # float32 array in 0..1
        return ((self.raw(int(np.prod(shape))) >> np.uint64(40)).astype(np.float32) * np.float32(2. ** -24)).reshape(shape)

    def clouds(self, rows, cols, y, x):
        """Smooth noise [len(y), len(x)]: a random grid, bilinear between its points; y, x in 0..1."""
        grid = self.field(rows + 1, cols + 1)
        (i, s), (j, t) = ((np.floor(v * n).astype(int), (v * n - np.floor(v * n)).astype(np.float32))
                          for v, n in ((y, rows), (x, cols)))
        grid = grid[i] + (grid[i + 1] - grid[i]) * s[:, None]
        return grid[:, j] + (grid[:, j + 1] - grid[:, j]) * t


class Street:
    """One scene while it is painted. World: metres, x right of the camera, y up from the ground, z ahead of the camera.
    Picture: y in 0..1 downwards, x in the same unit, so that the size in pixels only decides how finely it is sampled."""

    def __init__(self, dice, h, w):
        self.dice, self.h, self.w = dice, h, w
        self.rgb, self.ids = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.int64)
        self.Y, self.X = (np.arange(h) + .5) / h, (np.arange(w) + .5) / h
        self.id = 0                                                        # what is painted now
        self.cx, self.horizon, self.camera = w / h / 2 + dice(-.3, .3), dice(.34, .48), dice(1.4, 2.3)
        lots = [light for light in LIGHTS for _ in range(light[0])]
        _, self.zenith, self.haze, self.light, self.reach, self.lit = dice.pick(lots)
        self.sun = dice.pick([-1, 1])                                      # which side faces of boxes are bright

    def tone(self, colour, z):
        """A colour under this light through z metres of air."""
        t = self.reach / (self.reach + z)
        return [h + (c * a - h) * t for c, a, h in zip(colour, self.light, self.haze)]

    def paint(self, x0, y0, x1, y1, inside, colour, shade=0.):
        """Paint inside(y [h], x [w]) -> bool [h, w] within a picture rectangle; `colour` None darkens, as a shadow does."""
        i0, i1 = max(int(np.ceil(y0 * self.h - .5)), 0), min(int(np.floor(y1 * self.h - .5)) + 1, self.h)
        j0, j1 = max(int(np.ceil(x0 * self.h - .5)), 0), min(int(np.floor(x1 * self.h - .5)) + 1, self.w)
        if i0 >= i1 or j0 >= j1:
            return
        y, rgb = self.Y[i0:i1], self.rgb[i0:i1, j0:j1]
        mask = inside(y[:, None], self.X[j0:j1])
        if colour is None:
            rgb[mask] *= np.float32(.62)
            return
        light = 1 + shade * (.5 - (y - y0) / (y1 - y0))                    # brighter above, darker below
        np.copyto(rgb, (light[:, None] * np.array(colour))[:, None].astype(np.float32), where=mask[..., None])
        np.copyto(self.ids[i0:i1, j0:j1], self.id, where=mask)

    def quad(self, points, colour, shade=0., glow=False):
        """A flat convex polygon with corners (x, y, z) in metres."""
        p = [(self.cx + FOCAL * x / z, self.horizon + FOCAL * (self.camera - y) / z) for x, y, z in points]
        edges = list(zip(p, p[1:] + p[:1]))
        turn = sum(a[0] * b[1] - b[0] * a[1] for a, b in edges)            # twice the signed area

        def inside(y, x):
            mask = True
            for (ax, ay), (bx, by) in edges:
                dx, dy = (bx - ax, by - ay) if turn > 0 else (ax - bx, ay - by)
                mask = mask & (dx * (y - ay) >= dy * (x - ax))
            return mask
        xs, ys = zip(*p)
        near = min(z for _, _, z in points)
        self.paint(min(xs), min(ys), max(xs), max(ys), inside,
                   colour if glow or colour is None else self.tone(colour, near), shade)

    def flat(self, x0, x1, y0, y1, z, colour, **options):
        self.quad([(x0, y0, z), (x1, y0, z), (x1, y1, z), (x0, y1, z)], colour, **options)

    def disc(self, x, y, z, rx, ry, colour, shade=0., glow=False):
        """An upright ellipse with radii in metres."""
        s = FOCAL / z
        cx, cy, rx, ry = self.cx + s * x, self.horizon + s * (self.camera - y), s * rx, s * ry
        self.paint(cx - rx, cy - ry, cx + rx, cy + ry,
                   lambda v, u: ((u - cx) / rx) ** 2 + ((v - cy) / ry) ** 2 <= 1,
                   colour if glow or colour is None else self.tone(colour, z), shade)

    def box(self, x0, x1, y0, y1, z0, z1, colour, lean=0.):
        """The three faces of a box that a camera can see; `lean` metres of slope make a cabin of it."""
        a, b, c, d = x0 + lean / 3, x1 - lean / 3, z0 + lean, z1 - lean     # the roof
        if self.camera > y1:
            self.quad([(a, y1, c), (b, y1, c), (b, y1, d), (a, y1, d)], [1.12 * v for v in colour])
        dark = [v * (1.05 if (x0 > 0) == (self.sun < 0) else .68) for v in colour]
        if x0 > 0:
            self.quad([(x0, y0, z0), (x0, y0, z1), (a, y1, d), (a, y1, c)], dark, shade=.25)
        elif x1 < 0:
            self.quad([(x1, y0, z0), (x1, y0, z1), (b, y1, d), (b, y1, c)], dark, shade=.25)
        self.quad([(x0, y0, z0), (x1, y0, z0), (b, y1, c), (a, y1, c)], colour, shade=.25)

    def wheels(self, x0, x1, z, places, r=.33):
        """Seen from the end of a vehicle: two treads below, and discs along the side that shows."""
        side = x0 if x0 > 0 else x1
        if x0 > 0 or x1 < 0:
            for dz in places:
                d = z + dz                                                  # a wheel seen at a slant is a narrow ellipse
                self.disc(side * d / d, r, d, max(abs(side) * r / d, .02), r, RUBBER)
                self.disc(side, r, d, max(abs(side) * r / d, .02) * .5, r * .5, (.45, .45, .47))
        for x in (x0 + .12, x1 - .34):
            self.flat(x, x + .22, 0, .4, z + .05, RUBBER)

    def car(self, x, z, colour, front):
        d = self.dice
        w, tall, long = d(1.65, 1.85), d(1.38, 1.62), d(3.8, 4.5)
        x0, x1, belt = x - w / 2, x + w / 2, .62 * tall
        self.quad([(x0 - .2, 0, z - .25), (x1 + .2, 0, z - .25), (x1 + .2, 0, z + long), (x0 - .2, 0, z + long)], None)
        self.wheels(x0, x1, z, (.75, long - .8))
        self.box(x0, x1, .24, belt, z, z + long, colour)
        far, near = (z + long - .9, z + .9) if front else (z + long - 1.0, z + .15)
        self.box(x0 + .08, x1 - .08, belt, tall, near, far, colour, lean=.55)
        side = x0 + .08 if x0 > 0 else x1 - .08
        if x0 > 0 or x1 < 0:                                                # side windows, a pillar between them
            tip = side + (.15 if x0 > 0 else -.15)
            mid = (near + far) / 2
            for a, b, s, t in ((near + .25, mid - .06, .3, 0), (mid + .06, far - .25, 0, .3)):
                self.quad([(side, belt + .04, a), (side, belt + .04, b), (tip, tall - .1, b - t), (tip, tall - .1, a + s)],
                          GLASS)
        self.quad([(x0 + .18, belt + .04, near + .02), (x1 - .18, belt + .04, near + .02), (x1 - .32, tall - .08, near + .45),
                   (x0 + .32, tall - .08, near + .45)], GLASS, shade=.6)    # windscreen or rear window
        self.flat(x0, x1, .24, .38, z - .01, [.5 * c for c in colour])      # bumper
        lamp = (1., .95, .75) if front else (.85, .06, .05)
        for a in (x0 + .06, x1 - .36):
            self.flat(a, a + .3, belt - .3, belt - .12, z - .01, lamp, glow=self.lit)
        self.flat(x - .26, x + .26, .42, .54, z - .01, (.92, .92, .88))     # number plate
        if front:
            self.flat(x - .45, x + .45, .56, .66, z - .01, (.1, .1, .1))    # grille

    def car_side(self, x, z, colour, way):
        """A car that crosses the street, driving to the right (way 1) or left (-1)."""
        w, tall = self.dice(3.9, 4.5), self.dice(1.4, 1.6)
        belt, X = .6 * tall, lambda t: x + way * w * t                      # t from -.5 (tail) to .5 (nose)
        self.quad([(x - w / 2, 0, z - .2), (x + w / 2, 0, z - .2), (x + w / 2, 0, z + 1.7), (x - w / 2, 0, z + 1.7)], None)
        self.quad([(X(-.38), belt, z), (X(.27), belt, z), (X(.12), tall, z), (X(-.28), tall, z)], colour, shade=.2)
        self.quad([(X(-.5), .25, z), (X(.5), .25, z), (X(.48), .8 * belt, z), (X(.27), belt, z), (X(-.47), belt, z)], colour,
                  shade=.35)
        self.quad([(X(-.33), belt, z), (X(-.08), belt, z), (X(-.08), tall - .1, z), (X(-.26), tall - .1, z)], GLASS, shade=.5)
        self.quad([(X(-.05), belt, z), (X(.21), belt, z), (X(.10), tall - .1, z), (X(-.05), tall - .1, z)], GLASS, shade=.5)
        for t in (-.31, .31):
            self.disc(X(t), .33, z, .34, .34, RUBBER)
            self.disc(X(t), .33, z, .18, .18, (.6, .6, .62))
        for t, c in ((-.485, (.85, .06, .05)), (.475, (1., .95, .75))):
            self.flat(X(t) - .08, X(t) + .08, .75 * belt, .9 * belt, z, c, glow=self.lit)

    def truck(self, x, z, colour, front):
        d = self.dice
        x0, x1, tall, long, cab = x - 1.2, x + 1.2, d(3., 3.7), d(5.5, 8.), d.pick(PAINT)
        self.quad([(x0 - .3, 0, z - .3), (x1 + .3, 0, z - .3), (x1 + .3, 0, z + long + 2), (x0 - .3, 0, z + long + 2)], None)
        self.wheels(x0, x1, z, (long + 1, long - .5, 1.) if not front else (1., 3.5, long + 1), r=.48)
        boxes = [(z, z + long, .75, tall, colour), (z + long + .1, z + long + 2, .45, 2.5, cab)]
        if front:
            boxes = [(z, z + 1.9, .45, 2.5, cab), (z + 2, z + 2 + long, .75, tall, colour)]
        for z0, z1, y0, y1, c in boxes[::-1]:                               # the nearer one last
            self.box(x0, x1, y0, y1, z0, z1, c)
        if front:
            self.flat(x0 + .15, x1 - .15, 1.5, 2.3, z - .01, GLASS, shade=.6)
            self.flat(x - .7, x + .7, .8, 1.2, z - .01, (.12, .12, .12))
        else:
            self.flat(x - .03, x + .03, .8, tall - .05, z - .01, [.55 * c for c in colour])   # the doors' gap
            self.flat(x0, x1, .55, .75, z - .01, (.15, .15, .15))
        lamp = (1., .95, .75) if front else (.85, .06, .05)
        for a in (x0 + .1, x1 - .5):
            self.flat(a, a + .4, .55, .78, z - .02, lamp, glow=self.lit)

    def truck_side(self, x, z, colour, way):
        long, tall, X = self.dice(5., 7.), self.dice(3., 3.6), lambda t: x + way * t
        cab, r = self.dice.pick(PAINT), .48
        a, b = -long / 2 - 1, long / 2 - 1                                  # the box; the cab is before it
        self.quad([(X(a), 0, z - .2), (X(b + 2), 0, z - .2), (X(b + 2), 0, z + 2.2), (X(a), 0, z + 2.2)], None)
        self.flat(X(a), X(b + 1.9), .5, .8, z, (.15, .15, .16))
        self.flat(X(a), X(b), .8, tall, z, colour, shade=.2)
        self.flat(X(a), X(b), 1.6, 1.9, z, self.dice.pick(PAINT))           # a stripe of the firm's colour
        self.quad([(X(b + .1), .5, z), (X(b + 2), .5, z), (X(b + 2), 1.5, z), (X(b + 1.7), 2.5, z), (X(b + .1), 2.5, z)],
                  cab, shade=.3)
        self.quad([(X(b + .6), 1.5, z), (X(b + 1.8), 1.5, z), (X(b + 1.6), 2.3, z), (X(b + .6), 2.3, z)], GLASS, shade=.5)
        for t in (a + .8, a + 1.9, b + 1.):
            self.disc(X(t), r, z, r, r, RUBBER)
            self.disc(X(t), r, z, r / 2, r / 2, (.6, .6, .62))
        self.flat(X(b + 1.85), X(b + 2), .8, 1., z, (1., .95, .75), glow=self.lit)

    def person(self, x, z):
        d = self.dice
        s = d(.88, 1.06) if d() < .88 else d(.6, .75)                       # grown up or child
        skin, hair = d.pick([(.87, .68, .55), (.75, .55, .42), (.50, .34, .24), (.35, .23, .16)]), d.pick(PAINT[2:4] + CLOTH[-3:])
        shirt, legs, step, swing = d.pick(CLOTH), d.pick(CLOTH), d(-.22, .22), d(-.15, .15)
        skirt = d() < .2

        def part(points, colour, shade=.2):
            self.quad([(x + s * u, s * v, z) for u, v in points], colour, shade)
        self.disc(x, 0, z, .38 * s, .05 * s, None)
        for foot, hip in ((step, .09), (-step, -.09)):                      # two legs with shoes
            part([(hip - .09, .85), (hip + .09, .85), (foot + .06, .05), (foot - .06, .05)], legs)
            part([(foot - .08, .0), (foot + .12, .0), (foot + .08, .08), (foot - .07, .08)], RUBBER, 0.)
        if skirt:
            part([(-.17, .95), (.17, .95), (.26, .55), (-.26, .55)], legs)
        for side, turn in ((-1, swing), (1, -swing)):                       # two arms with hands
            part([(side * .16, 1.43), (side * .25, 1.40), (side * .29 + turn, .88), (side * .21 + turn, .86)],
                 [.85 * c for c in shirt])
            self.disc(x + s * (side * .25 + turn), s * .84, z, .05 * s, .06 * s, skin)
        part([(-.2, 1.45), (.2, 1.45), (.18, .82), (-.18, .82)], shirt, .3)
        self.disc(x, s * 1.60, z, .115 * s, .155 * s, skin)
        self.disc(x, s * 1.69, z, .12 * s, .09 * s, hair)

    def sign(self, x, z):
        d = self.dice
        tall, r, kind = d(2.1, 2.7), d(.36, .5), d.whole(0, 3)
        self.flat(x - .06, x + .06, 0, tall, z, (.55, .56, .58))
        if kind == 0:                                                       # a disc: forbidden, or blue
            rim, face = d.pick([((.80, .06, .08), (.94, .94, .92)), ((.92, .92, .92), (.08, .25, .65))])
            self.disc(x, tall, z, r, r, rim)
            self.disc(x, tall, z, .7 * r, .7 * r, face)
            self.flat(x - .45 * r, x + .45 * r, tall - .12 * r, tall + .12 * r, z, d.pick([rim, (.1, .1, .1)]))
        elif kind == 1:                                                     # a triangle: look out
            for k, c in ((1.15, (.82, .08, .08)), (.68, d.pick([(.95, .95, .92), (.95, .80, .15)]))):
                self.quad([(x - k * r, tall - .58 * k * r, z), (x + k * r, tall - .58 * k * r, z), (x, tall + 1.16 * k * r, z)], c)
            self.flat(x - .08 * r, x + .08 * r, tall - .3 * r, tall + .35 * r, z, (.1, .1, .1))
        else:                                                               # a board: green, blue, white or yellow
            wide = r * d.pick([.9, .9, 1.6])
            rim, face = d.pick([((.92, .92, .92), (.10, .42, .22)), ((.92, .92, .92), (.10, .28, .62)),
                                ((.15, .15, .15), (.92, .92, .88)), ((.95, .95, .9), (.92, .72, .10))])
            self.flat(x - wide, x + wide, tall - .85 * r, tall + .85 * r, z, rim)
            self.flat(x - .82 * wide, x + .82 * wide, tall - .66 * r, tall + .66 * r, z, face, shade=.2)
            for k in (-.25, .25):
                self.flat(x - .5 * wide, x + .4 * wide, tall + (k - .1) * r, tall + (k + .1) * r, z, rim)

    def tree(self, x, z):
        d = self.dice
        tall, green = d(4.5, 8.), (d(.16, .34), d(.34, .50), d(.10, .22))
        self.disc(x, 0, z, 1.6, .25, None)
        self.flat(x - .14, x + .14, 0, tall * .6, z, (.30, .23, .17), shade=.3)
        for k in range(6):
            bright = .6 + .14 * k
            self.disc(x + d(-1., 1.), tall * d(.55, .95), z, d(.8, 1.5), d(.8, 1.4), [bright * c for c in green], shade=.5)


    def surroundings(self):
        """Sky, skyline, the houses and hedges along both sides, road and pavements: everything that is stuff."""
        d, h, w, Y, X = self.dice, self.h, self.w, self.Y, self.X
        f32, light, haze = np.float32, np.array(self.light, np.float32), np.array(self.haze, np.float32)
        soft = (.5 * d.clouds(6, 12, Y, X / X[-1] * .999) + .3 * d.clouds(20, 40, Y, X / X[-1] * .999)
                + .2 * d.clouds(70, 140, Y, X / X[-1] * .999))[..., None]                     # [h, w, 1] mottles everything
        fine = d.clouds(110, 220, Y, X / X[-1] * .999)[..., None]

        def air(colour, z):                                                # as tone(), on whole arrays; z [...]
            t = (self.reach / (self.reach + np.asarray(z))).astype(f32)[..., None]
            return haze + (colour * light - haze) * t

        up = np.clip(1 - Y / self.horizon, 0, 1).astype(f32)[:, None, None]
        self.rgb[:] = haze + (np.array(self.zenith, f32) - haze) * up
        self.rgb += np.clip(soft - .5, 0, 1) * f32(d(0, 1.4)) * (haze - self.rgb)
        self.ids[:] = SKY + 1
        top = d.clouds(1, 40, np.zeros(1), X / X[-1] * .999)[0]            # the end of the street: woods or the town
        if d() < .5:
            mask = Y[:, None] > self.horizon - .02 - .10 * top
            self.rgb[mask] = air(np.array((.30, .42, .22), f32) * (.6 + .8 * soft), 120.)[mask]
            self.ids[mask] = VEGETATION + 1
        else:
            top = d.field(64)[(X / X[-1] * 40).astype(int)]
            mask = Y[:, None] > self.horizon - .02 - .14 * top
            tall = np.broadcast_to((.35 + .3 * d.field(64)[(X / X[-1] * 40).astype(int)])[None, :, None], (h, w, 1))
            self.rgb[mask] = air(tall * np.ones(3, f32), 150.)[mask]
            self.ids[mask] = BUILDING + 1

        self.half, self.centre = d(3.6, 7.5), 0.                            # half the road's width; its middle seen from here
        self.centre = d(-.6, .6) * self.half
        self.walk = d(2.2, 4.5)                                             # the pavements' width
        walls = self.half + self.walk
        ahead = FOCAL / np.maximum(np.abs(X - self.cx), 1e-6)
        z = ahead * np.where(X > self.cx, walls + self.centre, walls - self.centre)    # [w] depth of the wall in this column
        up = self.camera - (Y[:, None] - self.horizon) * z / FOCAL          # [h, w] metres above ground on the wall
        n = 24
        plots = np.cumsum(6 + 14 * d.field(2, n).astype(float), 1)          # where one house ends and the next begins
        left = X < self.cx
        house = np.where(left, np.searchsorted(plots[0], z), n + 1 + np.searchsorted(plots[1], z))
        green = d.field(2 * n + 2) < d.pick([.1, .3, .6])
        hue = np.array([d.pick([(.62, .50, .40), (.70, .66, .58), (.55, .30, .24), (.50, .52, .55), (.78, .72, .52), (.42, .40, .42),
                                (.66, .45, .36), (.58, .62, .52)]) for _ in green], f32)
        tall = np.where(green, 2 + 7 * d.field(len(green)), 5 + 14 * d.field(len(green)))
        storey, bay = 2.7 + d.field(len(green)), 1.8 + 2.2 * d.field(len(green))
        leafy = green[house]
        wall = (up >= 0) & (up < tall[house] * np.where(leafy, .55 + .9 * soft[..., 0], 1)) & (z < 110)
        a, b = (up - .8) / storey[house], z / bay[house]                    # counts storeys, counts bays
        window = (a % 1 > .25) & (a % 1 < .75) & (b % 1 > .25) & (b % 1 < .75) & (up > .8) & (z < 70)
        lamp = d.field(64, 64)[(a.astype(int) % 64), (b.astype(int) + house) % 64]
        pane = np.where((lamp < (.35 if self.lit else 0))[..., None], f32([1.3, 1.05, .6]), (.25 + .3 * lamp)[..., None] * f32([.7, .9, 1.1]))
        side = np.where(left == (self.sun > 0), 1., .72).astype(f32)[:, None]
        colour = np.where(leafy[:, None], hue * 0 + 1 if False else f32([.27, .40, .15]), hue[house]) * side * (.65 + .35 * soft + .35 * fine * leafy[:, None])
        colour = np.where((window & ~leafy)[..., None], pane, colour)
        cornice = (tall[house] - up < .35) & ~leafy
        colour = np.where(cornice[..., None], colour * .75, colour)
        colour = air(colour, z)
        np.copyto(self.rgb, colour, where=wall[..., None])
        self.ids = np.where(wall, np.where(leafy, VEGETATION + 1, BUILDING + 1), self.ids)

        rows = slice(int(np.ceil(self.horizon * h + .5)), h)               # below the horizon
        z = FOCAL * self.camera / (Y[rows] - self.horizon)                 # [rows] depth of the ground
        u = (X - self.cx) * (z / FOCAL)[:, None] - self.centre              # [rows, w] metres from the road's middle
        z, au, wall = np.broadcast_to(z[:, None], u.shape), np.abs(u), wall[rows]
        road = au < self.half
        tar, stone = d(.28, .44), d(.48, .64)
        grain = .82 + .2 * soft[rows] + .16 * fine[rows]
        colour = np.where(road[..., None], f32([tar, tar, tar * 1.03]), f32([stone, stone * .97, stone * .92])) * grain
        near = z < 45
        lanes = 1 if self.half < 5 else 2
        mark = (np.abs(au - (lanes - 1) * self.half / 3) < .08) & (z % 6 < 3) & near   # dashes between lanes
        mark |= (np.abs(au - self.half + .25) < .07) & near & (d() < .6)     # a line along the edge
        cross = d(7., 22.)
        mark |= (np.abs(z - cross) < 1.6) & (u % 1. < .5) & (d() < .45)      # a zebra crossing
        colour = np.where((mark & road)[..., None], f32([.80, .80, .78]), colour)
        joint = ~road & ((z % 1.5 < .07) | ((au - self.half) % 1.2 < .06)) & (z < 16)
        curb = ~road & (au < self.half + .22)
        colour = np.where(joint[..., None], colour * .82, np.where(curb[..., None], colour * 1.15, colour))
        if self.reach > 280 and not self.lit:                               # low sun: the houses throw their shadow
            colour = np.where((u * self.sun < -self.half * d(-.2, .9))[..., None], colour * .68, colour)
        np.copyto(self.rgb[rows], air(colour, z), where=~wall[..., None])
        self.ids[rows] = np.where(wall, self.ids[rows], np.where(road, ROAD + 1, SIDEWALK + 1))

    def cast(self):
        """Who is where: a list of (z, what, x, how), in metres."""
        d, half, c, actors = self.dice, self.half, self.centre, []
        colours = [d.pick(PAINT) for _ in range(d.whole(1, 4))]             # few colours: many look-alikes
        way = d.pick([-1, 1])
        for side in (-1, 1):
            if d() < .75:                                                   # a row of parked cars
                z, front, gap = d(1.8, 14.), d() < .5, d(.1, .6)
                while z < 55:
                    if d() > gap:
                        actors.append((z, "truck" if d() < .05 else "car", c + side * (half - 1.15) + d(-.12, .12), front))
                    z += d(5.4, 6.2) if d() < .8 else d(6.2, 14)
            z = d(3., 30.)
            while z < 70:                                                   # traffic in this lane
                actors.append((z, "truck" if d() < .18 else "car", c + side * half * d(.22, .42), side != way))
                z += d(10, 45)
            for _ in range(d.whole(1, 3)):
                actors.append((2.5 / d(.055, .7), "sign", c + side * (half + d(.3, .7)), 0))
            if d() < .5:                                                    # an alley of trees
                z, step = d(4., 12.), d(7., 12.)
                while z < 70:
                    actors.append((z, "tree", c + side * (half + 1.), 0))
                    z += step
            for _ in range(d.whole(0, 5)):
                actors.append((2.2 / d(.07, .75), "person", c + side * (half + d(.4, self.walk - .3)), 0))
            if d() < .45:                                                   # a crowd waits or walks together
                z, x = d(4.5, 22.), c + side * (half + d(.5, self.walk - .5))
                for _ in range(d.whole(3, 9)):
                    actors.append((z + d(-1.2, 1.2), "person", x + d(-1.3, 1.3), 0))
        if d() < .4:                                                        # somebody crosses
            z = d(4., 20.)
            for _ in range(d.whole(1, 5)):
                actors.append((z + d(-1, 1), "person", c + d(-.9, .9) * half, 0))
        if d() < .35:                                                       # the end of the street is a crossing
            z = d(8., 26.)
            for k in range(d.whole(1, 4)):
                actors.append((z, "truck_side" if d() < .25 else "car_side", c - 12 + 7.5 * k + d(-1, 1), way))
        return sorted(actors, reverse=True, key=lambda a: a[0]), colours


class StreetScenes:
    def __init__(self, length, size=(256, 512), seed=0):
        self.length, self.size, self.seed, self.categories = length, tuple(size), seed, STREET

    def __len__(self):
        return self.length

    def labels(self, i):
        s = self[i]
        return s.segments, s.categories, s.crowd

    def __getitem__(self, i):
        i = _index(i, len(self))
        h, w = self.size
        dice = Dice(self.seed, i)
        s = Street(dice, h, w)
        s.surroundings()
        actors, colours = s.cast()
        kinds = []
        base = len(STREET)
        for z, what, x, how in actors:
            if what == "tree":
                s.id = VEGETATION + 1
                s.tree(x, z)
                continue
            kinds.append({"car": CAR, "truck": TRUCK, "person": PERSON, "sign": SIGN}[what.split("_")[0]])
            s.id = base + len(kinds)
            if what in ("person", "sign"):
                getattr(s, what)(x, z)
            else:
                colour = dice.pick(colours) if dice() < .7 else dice.pick(PAINT)
                getattr(s, what)(x, z, colour, how)
        if dice() < .3:                                                     # our own bonnet: void, as in Cityscapes
            s.id = 0
            c = .3 * dice() 
            s.paint(0, 1 - .09, w / h, 1.2, lambda y, x: ((x - w / h / 2) / (.62 * w / h)) ** 2 + ((y - 1.12) / .2) ** 2 <= 1, (c, c, c * 1.1), shade=.6)
        kinds = np.array([*range(base)] + kinds)
        area = np.bincount(s.ids.ravel(), minlength=len(kinds) + 1)[1:]
        keep = area >= np.where(np.arange(len(kinds)) < base, 1, 20 * h * w / (256 * 512))
        number = np.concatenate([[0], np.cumsum(keep) * keep])
        image = s.rgb
        image = soften(image)
        noise = dice.raw(h * w * 3 // 4 + 1).astype("<u8").view(np.uint8)[:h * w * 6].reshape(2, h, w, 3).astype(np.float32).sum(0) / 255 - 1
        image = np.rint(np.clip(image * 255 + noise * np.float32(7), 0, 255)).astype(np.uint8)
        return Sample(torch.from_numpy(image).permute(2, 0, 1).float() / 255, torch.from_numpy(number[s.ids]),
                      torch.from_numpy(kinds[keep]), torch.zeros(int(keep.sum()), dtype=torch.bool), f"street_{self.seed}_{i:05d}")


def soften(image):
    p = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    p = .7 * p[1:-1] + .15 * (p[:-2] + p[2:])
    return .7 * p[:, 1:-1] + .15 * (p[:, :-2] + p[:, 2:])

def _index(i, n):
    if not -n <= i < n:
        raise IndexError(i)
    return i % n

# --- Data sets on disk -----------------------------------------------------------------------------------------------

CITYSCAPES = """road 7 128 64 128, sidewalk 8 244 35 232, building 11 70 70 70, wall 12 102 102 156, fence 13 190 153 153,
pole 17 153 153 153, traffic light 19 250 170 30, traffic sign 20 220 220 0, vegetation 21 107 142 35,
terrain 22 152 251 152, sky 23 70 130 180, person 24 220 20 60, rider 25 255 0 0, car 26 0 0 142, truck 27 0 0 70,
bus 28 0 60 100, train 31 0 80 100, motorcycle 32 0 0 230, bicycle 33 119 11 32"""
IDD = """road 0 128 64 128, parking 1 250 170 160, sidewalk 2 244 35 232, non-drivable fallback 3 152 251 152,
person 4 220 20 60, rider 5 255 0 0, motorcycle 6 0 0 230, bicycle 7 119 11 32, autorickshaw 8 255 204 54, car 9 0 0 142,
truck 10 0 0 70, bus 11 0 60 100, vehicle fallback 12 136 143 153, curb 13 220 190 40, wall 14 102 102 156,
fence 15 190 153 153, guard rail 16 180 165 180, billboard 17 174 64 67, traffic sign 18 220 220 0,
traffic light 19 250 170 30, pole 20 153 153 153, obs-str-bar-fallback 21 169 187 214, building 22 70 70 70,
bridge 23 150 100 100, vegetation 24 107 142 35, sky 25 70 130 180"""
TABLES = {  # name: label names with id and colour, which ids are things, which ids may occur, end of the label files' names
    "cityscapes": (CITYSCAPES, range(24, 34), range(34), "_gtFine_instanceIds.png"),
    "idd": (IDD, range(4, 13), [*range(26), 255], "_gtFine_instancelevel3Ids.png")}


def _pixels(path, mode=None):
    """The pixels of a picture file as an array, converted to a PIL mode if one is given."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: unpack the data set again, or correct its root folder") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise DataError(f"{path} is no readable picture ({e}): copy it again from the data set's archive") from None


class _Folder:
    """A data set on disk. `.files` lists (name, picture, label file or None); `.segments_of(i)` reads a label file's ids."""

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, picture, label = self.files[_index(i, len(self))]
        image = torch.from_numpy(_pixels(picture, "RGB")).permute(2, 0, 1).float() / 255
        segments, categories, crowd = self.labels(i)
        if segments.shape != image.shape[1:]:
            raise DataError(f"{label} is {segments.shape[1]} x {segments.shape[0]} pixels but {picture} is {image.shape[2]} x "
                            f"{image.shape[1]}: label and picture must have one size, so take both from the same archive")
        return Sample(image, segments, categories, crowd, name)

    def labels(self, i):
        """(segments, categories, crowd) of picture i, without decoding the picture. Nothing but void without a label."""
        name, picture, label = self.files[_index(i, len(self))]
        if label is None:
            with Image.open(picture) as image:                              # reads the header only
                return torch.zeros(image.size[::-1], dtype=torch.long), torch.zeros(0).long(), torch.zeros(0).bool()
        ids, rows = self.segments_of(_index(i, len(self)))                  # ids [H, W]; rows of (id, category, crowd)
        number, kinds, stuff = np.zeros(2 ** 24, np.int64), [], {}          # as large as ids can be; untouched pages are free
        for id, category, crowd in rows:
            if self.categories[category].isthing or category not in stuff:
                kinds.append((category, crowd))
            number[id] = len(kinds) if self.categories[category].isthing else stuff.setdefault(category, len(kinds))
        kinds = torch.tensor(kinds, dtype=torch.long).reshape(-1, 2)
        return torch.from_numpy(number[ids]), kinds[:, 0].contiguous(), kinds[:, 1].bool()


class Cityscapes(_Folder):
    """root/leftImg8bit/<split>/<city>/*_leftImg8bit.png with root/gtFine/<split>/<city>/*_gtFine_instanceIds.png.

    A label pixel is 1000 c + n for instance n of class c, or c alone: a stuff class, or a group of things that nobody told
    apart, which becomes `crowd`. Classes outside the table's evaluated ones are void. `table="idd"` reads the Indian Driving
    Dataset with its level 3 labels (17 stuff, 9 things), as its public code writes them."""

    def __init__(self, root, split, table="cityscapes"):
        text, things, self.known, suffix = TABLES[table]
        rows = [row.strip().rsplit(" ", 4) for row in text.replace("\n", " ").split(",")]
        self.category_ids = [int(id) for _, id, *_ in rows]
        self.categories = [Category(name, int(id) in things, tuple(map(int, rgb))) for name, id, *rgb in rows]
        folder = Path(root) / "leftImg8bit" / split
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: the root must hold leftImg8bit/ and gtFine/, each with {split}/")
        self.files = []
        for picture in sorted(folder.glob("*/*_leftImg8bit.*")):
            name = picture.name.rsplit("_leftImg8bit", 1)[0]
            label = Path(root) / "gtFine" / split / picture.parent.name / (name + suffix)
            if not label.exists():
                if split != "test":
                    raise DataError(f"{picture} has no label {label}: unpack gtFine beside leftImg8bit" + (
                        ", and run AutoNUE's createLabels.py --id-type level3Id --instance True" if table == "idd" else ""))
                label = None
            self.files.append((name if table == "cityscapes" else f"{picture.parent.name}_{name}", picture, label))
        if not self.files:
            raise DataError(f"{folder} holds no <city>/*_leftImg8bit pictures: unpack leftImg8bit into the root folder")

    def segments_of(self, i):
        label, rows = self.files[i][2], []
        ids = _pixels(label)
        for id in np.flatnonzero(np.bincount(ids.ravel())).tolist():
            kind = id if id < 1000 else id // 1000
            if kind not in self.known:
                raise DataError(f"{label} has the id {id}, of no class in the table: is it an instance map of this data set?")
            if kind in self.category_ids:
                category = self.category_ids.index(kind)
                rows.append((id, category, self.categories[category].isthing and id < 1000))
        return ids, rows


class CocoPanoptic(_Folder):
    """Panoptic JSON with PNGs whose colour is the segment's id = R + 256 G + 65536 B.

    COCO and your own: root/annotations/panoptic_<split>.json, its folder of PNGs, pictures in root/<split>. Mapillary Vistas:
    root/<split>/images, root/<split>/v2.0/panoptic/panoptic_2020.json (or v1.2, panoptic_2018.json). Category ids are made
    contiguous in the order of the JSON; `.category_ids` and `.image_ids` (by name) remember the official ones."""

    def __init__(self, root, split):
        root = Path(root)
        places = [root / f"annotations/panoptic_{split}.json", root / split / "v2.0/panoptic/panoptic_2020.json",
                  root / split / "v1.2/panoptic/panoptic_2018.json", root / split / "panoptic/panoptic_2018.json"]
        path = next((p for p in places if p.exists()), None)
        folder = root / split / "images" if (root / split / "images").is_dir() else root / split
        if not folder.is_dir():
            raise DataError(f"there is no folder {folder}: the root must hold the pictures of {split} there")
        others = sorted([*root.glob("annotations/panoptic_*.json"), *root.glob("*/v*/panoptic/panoptic_*.json")])
        if path is None and not split.startswith("test"):
            raise DataError(f"{folder} has pictures but there is no {places[0]}: unpack the panoptic annotations there")
        try:
            content = json.loads((path or others[0]).read_text()) if path or others else {"categories": []}
        except ValueError as e:
            raise DataError(f"{path or others[0]} is no readable JSON ({e}): copy it again") from None
        self.category_ids = [c["id"] for c in content["categories"]]
        self.categories = [Category(c["name"], bool(c["isthing"]), tuple(c.get("color", (37 * k % 256, 101 * k % 256, 173 * k % 256))))
                           for k, c in enumerate(content["categories"], 1)]
        self.files, self.infos, self.image_ids = [], [], {}
        if path is None:
            self.files = [(p.stem, p, None) for p in sorted(folder.iterdir()) if p.suffix.lower() in (".jpg", ".jpeg", ".png")]
            return
        pictures = {image["id"]: image["file_name"] for image in content["images"]}
        for a in content["annotations"]:
            picture = folder / pictures[a["image_id"]]
            others = [p for p in (picture, picture.with_suffix(".jpg"), picture.with_suffix(".png")) if p.exists()]
            self.files.append((picture.stem, others[0] if others else picture, path.with_suffix("") / a["file_name"]
                               if path.with_suffix("").is_dir() else path.parent / a["file_name"]))
            self.infos.append(a["segments_info"])
            self.image_ids[picture.stem] = a["image_id"]

    def segments_of(self, i):
        label, infos = self.files[i][2], self.infos[i]
        rgb = _pixels(label, "RGB").astype(np.int64)
        ids, official = rgb @ np.array([1, 256, 65536]), {id: k for k, id in enumerate(self.category_ids)}
        listed = np.zeros(2 ** 24, bool)
        listed[[0] + [s["id"] for s in infos]] = True
        if not listed[ids].all():
            raise DataError(f"{label} has the id {ids[~listed[ids]][0]}, of no segment in the JSON: take both from the same release")
        unknown = [s["category_id"] for s in infos if s["category_id"] not in official]
        if unknown:
            raise DataError(f"a segment of {label} has the category id {unknown[0]}, which the JSON's categories do not list")
        return ids, [(s["id"], official[s["category_id"]], bool(s.get("iscrowd", 0))) for s in infos]


def write_annotation(folder, name, segments, categories, crowd=None, category_ids=None, image_id=None):
    """Write folder/<name>.png and return its entry for the JSON, so that several processes can share the pictures."""
    ids, count = torch.as_tensor(segments).cpu().long(), len(categories)
    rgb = torch.stack([ids & 255, ids >> 8 & 255, ids >> 16 & 255], -1).to(torch.uint8)
    Path(folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(rgb.numpy()).save(Path(folder) / f"{name}.png")
    boxes, area = mask_boxes(ids, count).long(), torch.bincount(ids.flatten(), minlength=count + 1)[1:]
    infos = []
    for k, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        if area[k]:
            category = int(categories[k])
            infos.append({"id": k + 1, "category_id": category_ids[category] if category_ids else category, "area": int(area[k]),
                          "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(crowd is not None and crowd[k])})
    return {"image_id": name if image_id is None else image_id, "file_name": f"{name}.png", "segments_info": infos,
            "height": ids.shape[0], "width": ids.shape[1]}


def write_panoptic_json(path, annotations, categories, category_ids=None):
    """Write <path>.json from what `write_annotation` returned for each picture."""
    path = Path(path)
    content = {
        "images": [{"id": a["image_id"], **{k: a[k] for k in ("file_name", "height", "width")}} for a in annotations],
        "annotations": [{k: a[k] for k in ("image_id", "file_name", "segments_info")} for a in annotations],
        "categories": [{"id": category_ids[k] if category_ids else k, "name": c.name, "isthing": int(c.isthing),
                        "color": list(c.colour)} for k, c in enumerate(categories)]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_name(path.name + ".json").write_text(json.dumps(content))


def write_coco_panoptic(path, predictions, categories, category_ids=None, image_ids=None):
    """Write predictions, an iterable of (name, segments, categories) or (..., crowd), as <path>.json and PNGs in <path>/.

    `category_ids` and `image_ids` are a data set's attributes of that name; evaluation servers want the official ids back."""
    write_panoptic_json(path, [write_annotation(path, name, *rest[:3], category_ids=category_ids, image_id=(image_ids or {}).get(name))
                               for name, *rest in predictions], categories, category_ids)


# --- To look at ------------------------------------------------------------------------------------------------------

def draw(image, segments, segment_categories, categories, ax=None, names=True):
    """Coloured segments over the picture -> uint8 [H, W, 3]; shown in `ax`, if given, with names on the larger segments."""
    image, segments = torch.as_tensor(image).cpu().float(), torch.as_tensor(segments).cpu()
    kinds = torch.as_tensor(segment_categories).cpu().tolist()
    palette = [(0, 0, 0)]
    for k, c in enumerate(kinds):
        shade = .55 + .75 * (.618034 * kinds[:k].count(c) + .5) % 1 if categories[c].isthing else 1  # the golden ratio spreads
        palette.append([min(255, v * shade + 60 * max(shade - .9, 0)) for v in categories[c].colour])
    edge = F.pad((segments[1:] != segments[:-1]), (0, 0, 0, 1)) | F.pad((segments[:, 1:] != segments[:, :-1]), (0, 1))
    grey = image.mean(0)[..., None] * 255
    out = torch.tensor(palette, dtype=torch.float)[segments] * .72 + grey * .28
    out = torch.where(edge[..., None], torch.tensor(255.), out).clamp(0, 255).to(torch.uint8).numpy()
    if ax is not None:
        ax.imshow(out)
        ax.axis("off")
        for k, c in enumerate(kinds, 1):
            y, x = torch.nonzero(segments == k, as_tuple=True)
            if names and len(y) > .004 * segments.numel():
                nearest = ((y - y.float().mean()) ** 2 + (x - x.float().mean()) ** 2).argmin()      # a pixel of the segment
                ax.text(int(x[nearest]), int(y[nearest]), categories[c].name, color="white", ha="center", va="center", size=6,
                        bbox={"facecolor": "black", "alpha": .45, "pad": .8, "linewidth": 0})
    return out


# --- The baseline ----------------------------------------------------------------------------------------------------

def components(labels):
    """4-connected components of equal labels [H, W] -> int64 [H, W], the smallest flat index in each component.

    Every pixel points to a smaller one of its component; neighbours share the smaller root, then chains are halved."""
    h, w = labels.shape
    index = torch.arange(h * w).view(h, w)
    pairs = torch.cat([torch.stack([index[:, 1:], index[:, :-1]])[:, labels[:, 1:] == labels[:, :-1]],
                       torch.stack([index[1:], index[:-1]])[:, labels[1:] == labels[:-1]]], 1)     # [2, E]
    root = index.flatten()
    while True:
        a, b = root[pairs]
        if torch.equal(a, b):
            return root.view(h, w)
        root = root.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin")
        while not torch.equal(root, root[root]):
            root = root[root]


class ColourBaseline:
    """What colour alone can tell: k-means over pixel colours, each cluster the category most of its pixels have, and each
    connected piece of a thing category one instance. Whoever trains a network should be far above it."""

    def __init__(self, dataset, n=20, clusters=64):
        self.isthing = torch.tensor([c.isthing for c in dataset.categories])
        g, colours, kinds = torch.Generator().manual_seed(0), [], []
        for i in range(min(n, len(dataset))):
            s = dataset[i]
            pick = torch.randint(s.segments.numel(), (2000,), generator=g)
            colours.append(s.image.flatten(1)[:, pick].T)
            kinds.append(F.pad(s.categories + 1, (1, 0))[s.segments.flatten()[pick]] - 1)
        colours, kinds = torch.cat(colours), torch.cat(kinds)
        self.centres = colours[torch.randperm(len(colours), generator=g)[:clusters]]
        for _ in range(15):
            near = torch.cdist(colours, self.centres).argmin(1)
            total = torch.zeros_like(self.centres).index_add_(0, near, colours)
            self.centres = total / torch.bincount(near, minlength=len(total)).clamp(min=1)[:, None]
        near, seen = torch.cdist(colours, self.centres).argmin(1), kinds >= 0
        votes = torch.zeros(len(self.centres), len(self.isthing)).index_put_((near[seen], kinds[seen]), torch.ones(()), True)
        self.kinds = votes.argmax(1)

    def predict(self, image):
        kinds = self.kinds[torch.cdist(image.flatten(1).T, self.centres).argmin(1)].view(image.shape[1:])
        key = torch.where(self.isthing[kinds], len(self.isthing) + components(kinds), kinds)
        _, segments, area = torch.unique(key, return_inverse=True, return_counts=True)
        keep = area >= 20
        segments = F.pad(keep.cumsum(0) * keep, (0, 0))[segments]
        categories = torch.zeros(int(keep.sum()) + 1, dtype=torch.long).index_put_((segments.flatten(),), kinds.flatten())[1:]
        return segments, categories


def demo(seed=0):
    """The table of what the street is like, and a sheet of scenes."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import time
    start = time.time()
    scenes = [StreetScenes(100, seed=seed)[i] for i in range(100)]
    speed = 100 / (time.time() - start)
    isthing = torch.tensor([c.isthing for c in STREET])
    areas, cut = [], []
    for s in scenes:
        things = isthing[s.categories]
        areas.append(torch.bincount(s.segments.flatten(), minlength=len(things) + 1)[1:][things])
        cut.append(crop(s, 64, 128, (128, 256))[1])
    area = torch.cat(areas).float()
    cut = torch.cat([t.truncated.any(1)[isthing[t.categories]] for t in cut]).float()
    print(f"scenes per second {speed:.1f}")
    print(f"things per scene {len(area) / 100:.1f}")
    print(f"things below 32 x 32 pixels {100 * (area < 1024).float().mean():.0f}%")
    print(f"things above 128 x 128 pixels {100 * (area > 128 ** 2).float().mean():.1f}%, largest {area.max() / 1310.72:.0f}% of the picture")
    print(f"cut by crop half {100 * cut.mean():.0f}%")
    for k, c in enumerate(STREET):
        n = [int((s.categories == k).sum()) for s in scenes]
        px = sum(int((F.pad(s.categories + 1, (1, 0))[s.segments] == k + 1).sum()) for s in scenes) / 1310.72 / 100
        print(f"{c.name:12s} in {100 * np.mean(np.array(n) > 0):3.0f}% of scenes, {np.mean(n):5.1f} each, {px:5.1f}% of pixels")
    try:
        from pq import PanopticQuality
        base, pq = ColourBaseline(StreetScenes(20, seed=seed + 1)), PanopticQuality(isthing)
        for s in scenes[:20]:
            pq.update(*base.predict(s.image), s.segments, s.categories, s.crowd)
        print("colour baseline PQ", {k: round(float(v), 1) for k, v in pq.compute().items() if k in ("PQ", "PQ_th", "PQ_st")})
    except ImportError:
        pass
    fig, axes = plt.subplots(3, 4, figsize=(16, 6.1))
    for s, (a, b) in zip(scenes, axes.reshape(-1, 2)):
        a.imshow(s.image.permute(1, 2, 0)); a.axis("off")
        draw(s.image, s.segments, s.categories, STREET, b)
    fig.subplots_adjust(0, 0, 1, 1, .01, .01)
    fig.savefig("figures/data.png", dpi=100)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    demo()
