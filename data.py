"""data.py - what a sample is, a street that needs no download, and readers of the real data sets.

A panoptic label says two things of every pixel: what it is, and of countable *things* which one. One map holds both:

    segments  int64 [H, W]           0 0 0 1 1      categories int64 [N]: segment k is of category categories[k - 1]
    0 is void, k > 0 is segment k    2 2 0 1 1      crowd bool [N]: segment k is a group that nobody told apart
                                     2 2 3 3 1      stuff (road, sky) has at most one segment, things any number

Data flows one way:  data set -> Sample (a whole picture) -> crop() -> (image, Target) -> a model's losses. A window
cuts objects, so a Target knows boxes twice: of the part that shows, and of the whole object (`full_boxes`), with
`truncated` for the edges beyond which it really goes on. What a box loss should ask for there is the question of Porzi
et al., "Improving Panoptic Segmentation at All Scales" (CVPR 2021). Sources have `.categories`, len, [i], `.labels(i)`:

- `StreetScenes`: streets in perspective, painted far to near, so that occlusion is real. Scene i of a seed is the same
  in every process, on every machine and at every resolution.
- `Cityscapes` (Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016), also for IDD
  (Varma et al., "... Exploring Problems of Autonomous Navigation in Unconstrained Environments", WACV 2019).
- `CocoPanoptic`: JSON + PNG of Kirillov et al., "Panoptic Segmentation" (CVPR 2019): COCO, Mapillary Vistas, your own.

`python data.py` prints what the street is like and writes figures/data.png; the spec is tests/test_data.py.
"""
import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image  # which torchvision brings along; its own io reads 16-bit PNG in late versions only
from torchvision.transforms.functional import adjust_hue


class DataError(ValueError):
    """A folder or file is not what it should be; the message is one sentence that names it and the remedy."""


@dataclass
class Category:
    """One of a data set's categories; its number is its place in `.categories`."""
    name: str
    isthing: bool
    colour: tuple  # RGB, 0..255


@dataclass
class Sample:
    """One whole picture and its label."""
    image: torch.Tensor       # float32 [3, H, W], 0..1
    segments: torch.Tensor    # int64 [H, W], 0 void, k > 0 segment k
    categories: torch.Tensor  # int64 [N], of segment k at k - 1
    crowd: torch.Tensor       # bool [N]
    name: str


@dataclass
class Target:
    """What a model may learn from one crop."""
    segments: torch.Tensor    # int64 [h, w] of a crop
    categories: torch.Tensor  # int64 [N]
    crowd: torch.Tensor       # bool [N]
    boxes: torch.Tensor       # float32 [N, 4], x1 y1 x2 y2 half open, of what shows; stuff has boxes too
    full_boxes: torch.Tensor  # float32 [N, 4], of the whole object in crop coordinates: may reach outside
    truncated: torch.Tensor   # bool [N, 4]: has the object pixels beyond the crop's left, top, right, bottom edge?
    image_id: int = 0
    instance: int = 0         # the segment for whose sake the sampler chose this crop (0: none)
    scale: float = 1.0        # by which the picture was resized before

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})


# --- From samples to crops -------------------------------------------------------------------------------------------

def mask_boxes(segments, count):
    """Boxes of segments 1..count of a map int64 [H, W] -> float32 [count, 4], half open; zeros for an absent one."""
    (h, w), device = segments.shape, segments.device
    rows, cols = (torch.zeros(count + 1, n, dtype=torch.uint8, device=device) for n in (h, w)) # k in row y?
    rows[segments, torch.arange(h, device=device)[:, None]] = 1
    cols[segments, torch.arange(w, device=device)] = 1
    first = [t.argmax(1) for t in (cols, rows)]                                  # argmax takes the first of equals
    last = [t.shape[1] - t.flip(1).argmax(1) for t in (cols, rows)]
    return (torch.stack(first + last, 1) * rows.amax(1)[:, None])[1:].float()


def resize(sample, size):
    """The sample at size (h, w): image bilinear with antialiasing, segments nearest, for ids must not mix.

    A segment that loses its last pixel keeps its number and its row in `categories`; `crop` drops it."""
    image = F.interpolate(sample.image[None], tuple(size), mode="bilinear", antialias=True)[0].clamp(0, 1)
    y, x = (((torch.arange(n) + .5) * old / n).long() for n, old in zip(size, sample.segments.shape))
    return replace(sample, image=image, segments=sample.segments[y[:, None], x])


def flip(sample):
    """The sample mirrored left to right; segments keep their numbers."""
    return replace(sample, image=sample.image.flip(-1), segments=sample.segments.flip(-1))


def colour_jitter(image, generator, strength, hue=0.0):
    """Brightness, contrast, saturation of an image [3, H, W], each times a factor in 1 - strength .. 1 + strength; then the hue
    turned by up to `hue` of the colour circle, either way."""
    brightness, contrast, saturation = (1 + strength * (2 * torch.rand(3, generator=generator) - 1)).tolist()
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(0, keepdim=True)
    image = (grey + (image - grey) * saturation).clamp(0, 1)
    return adjust_hue(image, hue * (2 * torch.rand((), generator=generator).item() - 1)) if hue else image


def crop(sample, top, left, size, image_id=0, instance=0, scale=1.0):
    """The window of size (h, w) with its upper left corner at pixel (top, left) -> (image [3, h, w], Target).

    All from masks: invisible segments are dropped, the others renumbered 1..n in their order. What lies outside the
    picture is black and void. `instance` is a segment of the sample; it gets its number in the crop, or 0."""
    (h, w), (height, width), count = size, sample.segments.shape, len(sample.categories)
    y0, x0, y1, x1 = max(top, 0), max(left, 0), min(top + h, height), min(left + w, width)
    image, segments = sample.image.new_zeros(3, h, w), sample.segments.new_zeros(h, w)
    if y0 < y1 and x0 < x1:
        image[:, y0 - top:y1 - top, x0 - left:x1 - left] = sample.image[:, y0:y1, x0:x1]
        segments[y0 - top:y1 - top, x0 - left:x1 - left] = sample.segments[y0:y1, x0:x1]
    keep = torch.bincount(segments.flatten(), minlength=count + 1)[1:] > 0       # [count]
    number = F.pad(keep.cumsum(0) * keep, (1, 0))                                # old id -> new id, 0 -> 0
    full = mask_boxes(sample.segments, count)[keep] - torch.tensor([left, top, left, top])
    truncated = torch.cat([full[:, :2] < 0, full[:, 2:] > torch.tensor([w, h])], 1)
    segments = number[segments]
    return image, Target(segments, sample.categories[keep], sample.crowd[keep], mask_boxes(segments, int(keep.sum())),
                         full, truncated, image_id, int(number[instance]), scale)


# --- StreetScenes: a street in metres before a camera ----------------------------------------------------------------

STREET = [Category(*c) for c in [
    ("road", False, (128, 64, 128)), ("sidewalk", False, (244, 35, 232)), ("building", False, (90, 90, 90)),
    ("vegetation", False, (107, 142, 35)), ("sky", False, (70, 130, 180)), ("car", True, (0, 60, 200)),
    ("truck", True, (0, 150, 150)), ("person", True, (220, 20, 60)), ("sign", True, (250, 200, 0))]]
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, TRUCK, PERSON, SIGN = range(9)
WEATHER = [  # how often; zenith, horizon and haze, light; metres at which haze takes half; are lamps lit
    (3, [(.30, .50, .82), (.80, .87, .93), (1.0, .98, .94)], 400, 0),   # day
    (4, [(.58, .62, .68), (.78, .80, .82), (.80, .83, .88)], 250, 0),   # overcast
    (2, [(.42, .52, .72), (.98, .82, .60), (1.05, .86, .66)], 300, 0),  # evening sun
    (2, [(.13, .15, .32), (.85, .52, .38), (.52, .45, .52)], 290, 1),   # dusk
    (2, [(.70, .72, .74), (.76, .77, .78), (.82, .84, .86)], 45, 1)]    # fog
PAINT = [(.82, .82, .84), (.55, .57, .60), (.33, .34, .37), (.10, .10, .12), (.70, .08, .08), (.10, .22, .52),
         (.78, .74, .64), (.12, .34, .20), (.85, .60, .10)]  # silver and greys first: the road is grey as well
CLOTH = PAINT + [(.95, .95, .95), (.20, .45, .70), (.75, .30, .50), (.45, .30, .20), (.30, .50, .25), (.9, .4, .15)]
SKIN = [(.87, .68, .55), (.75, .55, .42), (.50, .34, .24), (.35, .23, .16)]
FACADE = [(.62, .50, .40), (.70, .66, .58), (.55, .30, .24), (.50, .52, .55), (.78, .72, .52), (.35, .36, .37),
          (.80, .84, .88)]
RED, WHITE, BLACK, BLUE, GREEN = (.8, .06, .08), (.93, .93, .9), (.1, .1, .1), (.08, .25, .65), (.10, .42, .22)
YELLOW, GLASS, RUBBER, STEEL, LAMP = (.95, .78, .12), (.16, .20, .25), (.06, .06, .07), (.55, .56, .58), (1., .95, .75)
BODIES = {  # boxes in m, tail at 0: from, to, half width, y0, y1, slope, cab's paint?, windows?; length; wheels at; r
    CAR: ([(0, 4.2, .88, .22, .88, .05, 0, 0), (0, 3.2, .8, .88, 1.48, .6, 0, 1)], 4.2, (.85, 3.4), .34),
    TRUCK: ([(0, 6, 1.2, .6, 3.4, 0, 0, 0), (6.1, 8, 1.2, .45, 1.5, 0, 1, 0), (6.1, 8, 1.2, 1.5, 2.5, .15, 1, 1)],
            8, (1., 2.2, 7.1), .48)}
SHADOW = {CAR: (1.1, 4.3), TRUCK: (1.5, 8.2), PERSON: (.4, .4), SIGN: (.3, .2), VEGETATION: (1.6, 1.5)}  # half width, l


class Dice:
    """Uniform numbers from PCG64's raw integers: numpy keeps those bits for ever, not those of Generator's methods."""

    def __init__(self, *key):
        self.raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw

    def __call__(self, low=0., high=1.):
        return low + (high - low) * ((self.raw() >> 11) * 2. ** -53)

    def pick(self, items):
        return items[int(self() * len(items))]

    def field(self, *shape):  # float32, 0..1
        bits = self.raw(int(np.prod(shape))).reshape(shape) >> np.uint64(40)
        return bits.astype(np.float32) * np.float32(2 ** -24)

    def clouds(self, n, y, x):
        """Smooth noise [len(y), len(x)]: a random grid of n by 2 n cells, bilinear in between; y and x in 0..1."""
        (i, s), (j, t) = ((np.floor(v).astype(int), (v - np.floor(v)).astype(np.float32)) for v in (y * n, x * 2 * n))
        grid = self.field(n + 2, 2 * n + 2)
        grid = grid[i] + (grid[i + 1] - grid[i]) * s[:, None]
        return grid[:, j] + (grid[:, j + 1] - grid[:, j]) * t


class Street:
    """One scene while it is painted. World: metres, x right of the camera, y up from the ground, z ahead. Picture:
    y in 0..1 downwards, x in the same unit, so the size in pixels decides only how finely the same scene is sampled.

    Choice: only + - * / and comparisons make the picture, which IEEE rounds alike everywhere; no sine, power or exp."""

    def __init__(self, dice, h, w):
        self.dice, self.h, self.w, self.id = dice, h, w, 0                    # id: of what is being painted
        self.rgb, self.ids = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.int64)
        self.Y, self.X, self.focal = (np.arange(h) + .5) / h, (np.arange(w) + .5) / h, .9
        self.cx, self.horizon, self.camera = w / h / 2 + dice(-.3, .3), dice(.34, .48), dice(1.4, 2.3)
        _, sky, self.reach, self.lit = dice.pick([row for row in WEATHER for _ in range(row[0])])
        (self.zenith, self.haze, self.light), self.sun = np.float32(sky), dice.pick([-1, 1])  # sun: the bright side

    def air(self, colour, z):
        """A colour in this light, seen through z metres of haze."""
        return self.haze + (np.float32(colour) * self.light - self.haze) * (self.reach / (self.reach + z))

    def paint(self, points, colour, disc=False):
        """Paint a flat convex polygon with corners (x, y, z) in metres, or the ellipse in its frame; None: a shadow."""
        p = [(self.cx + self.focal * x / z, self.horizon + self.focal * (self.camera - y) / z) for x, y, z in points]
        (x0, y0), (x1, y1) = map(min, zip(*p)), map(max, zip(*p))
        j0, j1, i0, i1 = (min(max(int(np.ceil(v * self.h - .5)), 0), n)       # pixels whose centres lie between
                          for v, n in ((x0, self.w), (x1, self.w), (y0, self.h), (y1, self.h)))
        if i0 >= i1 or j0 >= j1:
            return
        y, x, rgb, mask = self.Y[i0:i1, None], self.X[j0:j1], self.rgb[i0:i1, j0:j1], True
        if disc:
            mask = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
        edges = [] if disc else list(zip(p, p[1:] + p[:1]))
        turn = sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges)         # the sign tells which way round they run
        for (ax, ay), (bx, by) in edges:
            mask = mask & (turn * (bx - ax) * (y - ay) >= turn * (by - ay) * (x - ax))
        if colour is None:
            rgb[mask] *= np.float32(.62)
            return
        if not (self.lit and colour in (LAMP, RED)):                          # lamps shine in dusk and fog
            colour = self.air(colour, min(z for _, _, z in points))
        light = 1.15 - .3 * (y - y0) / (y1 - y0)                              # brighter above than below
        np.copyto(rgb, (light * colour).astype(np.float32)[:, None], where=mask[..., None])
        np.copyto(self.ids[i0:i1, j0:j1], self.id, where=mask)

    def figure(self, x, z, rows, s=1.):
        """Paint rows of (colour, numbers) at (x, z): u v r is a disc, u v u v a rectangle, more a polygon."""
        for colour, *n in rows:
            corners = ([n[0] - n[2], n[1] - n[2], n[0] + n[2], n[1] + n[2]] if len(n) == 3 else
                       [n[0], n[1], n[2], n[1], n[2], n[3], n[0], n[3]] if len(n) == 4 else n)
            self.paint([(x + s * u, s * v, z) for u, v in zip(corners[::2], corners[1::2])], colour, len(n) == 3)

    def box(self, x0, x1, y0, y1, z0, z1, lean, colour, windows):
        """The faces of a box that a camera can see, with a roof `lean` metres smaller on each end."""
        a, b, c, d, m = x0 + lean / 3, x1 - lean / 3, z0 + lean, z1 - lean, y0 + .86 * (y1 - y0)
        if self.camera > y1:
            self.paint([(a, y1, c), (b, y1, c), (b, y1, d), (a, y1, d)], [1.1 * v for v in colour])
        if x0 > 0 or x1 < 0:
            s, t, light = (x0, a, .66 + .34 * (self.sun < 0)) if x0 > 0 else (x1, b, .66 + .34 * (self.sun > 0))
            self.paint([(s, y0, z0), (s, y0, z1), (t, y1, d), (t, y1, c)], [v * light for v in colour])
            for k in (.1, .54) if windows else ():                            # two of them with a pillar between
                u = [e + (f - e) * v for v in (k, k + .36) for e, f in ((z0, z1), (c, d))]
                x = s + .86 * (t - s)
                self.paint([(s, y0, u[0]), (s, y0, u[2]), (x, m, u[3]), (x, m, u[1])], GLASS)
        self.paint([(x0, y0, z0), (x1, y0, z0), (b, y1, c), (a, y1, c)], colour)
        if windows:
            self.paint([(x0 + .12, y0, z0), (x1 - .12, y0, z0), (b - .1, m, c), (a + .1, m, c)], GLASS)

    def vehicle(self, x, z, kind, colour, way):
        """A car or truck that shows its front (way 1) or rear (-1), and a flank if it is not straight ahead."""
        (boxes, long, wheels, r), cab = BODIES[kind], self.dice.pick(PAINT)
        half, y, tip = boxes[0][2], boxes[0][3], lambda t: z + (long - t if way > 0 else t)
        self.figure(x, z + .4, [(RUBBER, k * half * .6, 0, k * half * .9, .6) for k in (-1, 1)])
        for a, b, w, y0, y1, lean, other, windows in sorted(boxes, key=lambda row: way * row[0]):  # far to near
            near, far = sorted((tip(a), tip(b)))
            self.box(x - w, x + w, y0, y1, near, far, lean, cab if other else colour, windows)
        flank = x - half if x > 0 else x + half
        for d in (tip(t) for t in wheels if flank * x > 0):                   # round wheels look narrow at a slant
            for k, c in ((r, RUBBER), (r / 2, STEEL)):
                n = k * abs(flank) / d
                self.paint([(flank - n, r - k, d), (flank + n, r + k, d)], c, disc=True)
        self.figure(x, z - .01, [(WHITE, -.26, y + .12, .26, y + .24)] + [
            (LAMP if way > 0 else RED, k * (half - .4), y + .3, k * (half - .08), y + .5) for k in (-1, 1)])

    def person(self, x, z):
        d = self.dice
        s, step, arm, dark = d(.88, 1.06) if d() < .88 else d(.6, .75), d(-.22, .22), d(.12, .4), d(.7, 1.)
        hair, skin, shirt, legs = d.pick(PAINT[2:4] + CLOTH[-3:]), d.pick(SKIN), d.pick(CLOTH), d.pick(CLOTH)
        self.figure(x, z, [
            (legs, 0, .85, .18, .85, step + .07, .05, step - .06, .05), (RUBBER, step - .08, 0, step + .12, .08),
            (legs, -.18, .85, 0, .85, .07 - step, .05, -.06 - step, .05), (RUBBER, -.08 - step, 0, .12 - step, .08),
            *[([dark * c for c in shirt], k * .16, 1.43, k * .25, 1.4, k * (arm + .06), .88, k * (arm - .03), .86)
              for k in (-1, 1)],
            (skin, -arm, .84, .06), (skin, arm, .84, .06), (shirt, -.2, 1.45, .2, 1.45, .18, .82, -.18, .82),
            (hair, 0, 1.64, .15), (skin, 0, 1.58, .12)], s)

    def sign(self, x, z):
        d = self.dice
        y, kind, w = d(4.6, 5.6), d.pick([0, 1, 2, 2]), d.pick([.9, .9, 1.6])  # in radii of the plate
        a, b = d.pick([[(RED, WHITE), (WHITE, BLUE), (WHITE, RED)], [(RED, WHITE), (RED, YELLOW)],
                       [(WHITE, GREEN), (WHITE, BLUE), (BLACK, WHITE), (WHITE, YELLOW)]][kind])        # rim and face
        self.figure(x, z, [(STEEL, -.14, 0, .14, y)] + [
            [(a, 0, y, 1.), (b, 0, y, .72), (a, -.45, y - .13, .45, y + .13)],
            [(a, -1.15, y - .67, 1.15, y - .67, 0, y + 1.33), (b, -.68, y - .4, .68, y - .4, 0, y + .8),
             (BLACK, -.08, y - .3, .08, y + .35)],
            [(a, -w, y - .85, w, y + .85), (b, -.82 * w, y - .66, .82 * w, y + .66),
             (a, -.5 * w, y + .15, .4 * w, y + .35), (a, -.5 * w, y - .35, .5 * w, y - .15)]][kind], d(.38, .5))

    def tree(self, x, z):
        d = self.dice
        tall, green = d(4.5, 8.), (d(.16, .34), d(.34, .50), d(.10, .22))
        self.figure(x, z, [((.30, .23, .17), -.14, 0, .14, .6 * tall)] + [
            ([(.6 + .1 * k) * c for c in green], d(-1., 1.), tall * d(.55, .95), d(.8, 1.4)) for k in range(7)])

    def surroundings(self):
        """All that is stuff: sky, town or woods at the end of the street, houses and hedges beside it, the ground."""
        d, f32, Y, X, rgb = self.dice, np.float32, self.Y, self.X * self.h / self.w, self.rgb
        soft = (.5 * d.clouds(6, Y, X) + .3 * d.clouds(20, Y, X) + .2 * d.clouds(70, Y, X))[..., None]
        fine = d.clouds(110, Y, X)[..., None]                                 # [h, w, 1] both: they mottle everything
        up = np.clip(1 - Y / self.horizon, 0, 1).astype(f32)[:, None, None]
        rgb[:] = self.haze + (self.zenith - self.haze) * up
        rgb += np.clip(soft - .5, 0, 1) * f32(d(0, 1.6)) * (self.haze - rgb)
        self.ids[:] = SKY + 1
        woods, top = d() < .5, (d.clouds(20, np.zeros(1), X)[0], d.field(42)[(X * 40).astype(int)])
        end = Y[:, None] > self.horizon - .02 - .12 * top[not woods]
        rgb[end] = self.air(f32([.30, .42, .22] if woods else [.42, .42, .43]) * (.6 + .8 * soft[end]), 130)
        self.ids[end] = (VEGETATION if woods else BUILDING) + 1

        self.half, self.walk, n = d(3.6, 7.5), d(2.5, 6.), 25                # half the road's width, a pavement's width
        self.centre, reach, left = d(-.6, .6) * self.half, self.half + self.walk, self.X < self.cx
        away = np.where(left, reach - self.centre, reach + self.centre)     # [w] metres to the column's wall, sideways
        z = self.focal / np.maximum(np.abs(self.X - self.cx), 1e-6) * away    # ... and ahead
        plots = np.cumsum(6 + 14 * d.field(2, n - 1).astype(float), 1)        # where one house ends and the next begins
        house = np.where(left, np.searchsorted(plots[0], z), n + np.searchsorted(plots[1], z))
        up = (self.camera - (Y[:, None] - self.horizon) * z / self.focal).astype(f32)     # [h, w] metres up that wall
        z, leafy, share = z.astype(f32), (d.field(2 * n) < d.pick([.1, .3, .6]))[house], d.field(3, 2 * n)[:, house]
        tall = np.where(leafy, (2 + 7 * share[2]) * (.55 + .9 * soft[..., 0]), 5 + 14 * share[2])
        wall = (up >= 0) & (up < tall) & (z < 110)
        a, b = (up - .8) / (2.7 + share[0]), z / (1.8 + 2 * share[1])          # storeys up, bays along
        middle, level = (np.abs(v - np.floor(v) - f32(.5)) < .25 for v in (b, a))
        pane = middle & (z < 70) & ~leafy & level & wall & (a > 0)            # windows
        hue = f32([d.pick(FACADE) for _ in range(2 * n)])[house]
        hue = hue * np.where(left == (self.sun > 0), f32(1), f32(.72))[:, None]
        colour = np.where(leafy[:, None], f32([.27, .40, .15]) * (.65 + .7 * fine), hue) * (.65 + .5 * soft)
        b = np.broadcast_to(b + house, a.shape)
        room = d.field(64, 64)[a[pane].astype(int) % 64, b[pane].astype(int) % 64, None]
        colour[pane] = np.where(room < .35 * self.lit, f32([1.3, 1.05, .6]), (.25 + .3 * room) * f32([.7, .9, 1.1]))
        np.copyto(rgb, self.air(colour, z[:, None]), where=wall[..., None])
        self.ids = np.where(wall, np.where(leafy, VEGETATION, BUILDING) + 1, self.ids)

        below = slice(int(np.ceil(self.horizon * self.h + .5)), self.h)
        z = (self.focal * self.camera / (Y[below] - self.horizon)).astype(f32)[:, None]  # depth of the ground there
        x = (self.X - self.cx).astype(f32) * (z / f32(self.focal)) - f32(self.centre)    # metres from the road's middle
        side, wall, tar, stone = np.abs(x), wall[below], d(.28, .5), d(.34, .64)
        road, dash, cross = side < self.half, 0 if self.half < 5 else self.half / 3, d(7., 22.) if d() < .45 else 99.
        mark = (np.abs(side - dash) < .08) & (z % 6 < 3) | (np.abs(side - self.half + .25) < .07) & (d() < .6)
        mark = (mark | (np.abs(z - cross) < 1.6) & (x - np.floor(x) < .5)) & road & (z < 45)      # dashes or a zebra
        shade = np.where(~road & (side < self.half + .22), f32(1.15), f32(1))  # the kerb, then gaps between slabs
        shade = np.where(~road & (z % 1.5 < .07) & (z < 16), f32(.82), shade)
        if self.reach > 290:                                                  # a low sun: the shadow of the houses
            shade = np.where(x * self.sun < -self.half * d(-.2, .9), f32(.68), f32(1)) * shade
        colour = np.where(road[..., None], f32([1, 1, 1.03]) * f32(tar), f32([1, .97, .92]) * f32(stone))
        colour = colour * (.82 + .2 * soft[below] + .16 * fine[below])
        colour = np.where(mark[..., None], f32(.8), colour) * shade[..., None]
        np.copyto(rgb[below], self.air(colour, z[..., None]), where=~wall[..., None])
        self.ids[below] = np.where(wall, self.ids[below], np.where(road, ROAD, SIDEWALK) + 1)

    def cast(self):
        """Who is where, far to near: rows of (z, category, x, which way it faces)."""
        d, half, way, rows = self.dice, self.half, self.dice.pick([-1, 1]), []
        for side in (-1, 1):
            kerb, z, face = self.centre + side * half, d(1.5, 9.), d.pick([-1, 1])
            gap, stop = d(.1, .6), d.pick([45, 45, 45, 0])
            while z < stop:                                                   # a row of parked cars
                rows += [(z, TRUCK if d() < .03 else CAR, kerb - side * d(1.03, 1.3), face)] * (d() > gap)
                z += d(5., 6.) if d() < .8 else d(6., 14.)
            z = d(2.5, 12.)
            while z < 60:                                                     # traffic in this lane
                rows.append((z, TRUCK if d() < .22 else CAR, kerb - side * half * d(.58, .78), -side * way))
                z = z * d(1.2, 1.9) + d(9., 16.)
            z, step = d(4., 12.), d(7., 12.)
            rows += [(z + k * step, VEGETATION, kerb + side, 0) for k in range(8 * (d() < .5))]
            rows += [(2.5 / d(.07, .85), SIGN, kerb + side * d(.3, .7), 0) for _ in range(int(d(1, 4)))]
            rows += [(2.2 / d(.08, .9), PERSON, kerb + side * d(.4, self.walk), 0) for _ in range(int(d(0, 6)))]
            z, x = d(3.5, 18.), kerb + side * d(.5, self.walk)                # a crowd
            rows += [(z + d(-1.2, 1.2), PERSON, x + d(-1.3, 1.3), 0) for _ in range(int(d(3, 9)) * (d() < .45))]
        z = d(3.5, 14.)                                                       # people cross
        rows += [(z + d(-1, 1), PERSON, self.centre + d(-.9, .9) * half, 0) for _ in range(int(d(1, 6)) * (d() < .4))]
        return sorted(rows, key=lambda row: -row[0])


class StreetScenes:
    """`length` scenes of size (h, w); scene i depends on (seed, i) alone, the size only samples it more or less finely.

    Choice: a thing with fewer than 20 visible pixels (at 256 x 512, in proportion otherwise) is void, not a label.
    Choice: a sign owns its pole; a tree is vegetation from root to crown; our own bonnet, where it shows, is void."""

    def __init__(self, length, size=(256, 512), seed=0):
        self.length, self.size, self.seed, self.categories = length, tuple(size), seed, STREET

    def __len__(self):
        return self.length

    def labels(self, i):
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd

    def __getitem__(self, i):
        i, (h, w) = range(self.length)[i], self.size                          # range raises IndexError past the end
        dice = Dice(self.seed, i)
        street, kinds = Street(dice, h, w), list(range(SKY + 1))              # segments 1..5 are stuff, then the cast
        street.surroundings()
        colours = [dice.pick(PAINT) for _ in range(int(dice(1, 5)))]          # few paints: many cars that look alike
        for z, kind, x, way in street.cast():
            u, v = SHADOW[kind]
            street.paint([(x - u, 0, z - .2), (x + u, 0, z - .2), (x + u, 0, z + v), (x - u, 0, z + v)], None)
            kinds += [kind] * (kind != VEGETATION)
            street.id = VEGETATION + 1 if kind == VEGETATION else len(kinds)
            if kind in BODIES:
                street.vehicle(x, z, kind, dice.pick(colours) if dice() < .7 else dice.pick(PAINT), way)
            else:
                {PERSON: street.person, SIGN: street.sign, VEGETATION: street.tree}[kind](x, z)
        if dice() < .3:
            bonnet = ((street.X * h / w - .5) / .62) ** 2 + ((street.Y[:, None] - 1.12) / .2) ** 2 <= 1
            street.rgb[bonnet], street.ids[bonnet] = street.haze * np.float32(dice(.05, .4)), 0
        kinds, area = np.array(kinds), np.bincount(street.ids.ravel(), minlength=len(kinds) + 1)[1:]
        keep = area >= np.where(kinds > SKY, 20 * h * w / (256 * 512), 1)
        p = np.pad(street.rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")         # no lens is quite sharp, no chip quiet
        p = np.float32(.7) * p[1:-1] + np.float32(.15) * (p[:-2] + p[2:])
        p = np.float32(.7) * p[:, 1:-1] + np.float32(.15) * (p[:, :-2] + p[:, 2:])
        noise = dice.raw(h * w * 3 // 4 + 1).astype("<u8").view(np.uint8)[:2 * p.size].astype(np.int16)
        noise = (noise[:p.size] - noise[p.size:]).reshape(p.shape) * np.float32(.03)
        image = np.rint(np.clip(p * 255 + noise, 0, 255)) / np.float32(255)   # whole grey levels, as in a file
        numbers = np.concatenate([[0], keep.cumsum() * keep])
        return Sample(torch.from_numpy(image).permute(2, 0, 1).contiguous(), torch.from_numpy(numbers[street.ids]),
                      torch.from_numpy(kinds[keep]), torch.zeros(int(keep.sum())).bool(), f"street_{self.seed}_{i:05d}")


# --- Data sets on disk -----------------------------------------------------------------------------------------------

CITYSCAPES = """road 7 128 64 128, sidewalk 8 244 35 232, building 11 70 70 70, wall 12 102 102 156,
fence 13 190 153 153, pole 17 153 153 153, traffic light 19 250 170 30, traffic sign 20 220 220 0,
vegetation 21 107 142 35, terrain 22 152 251 152, sky 23 70 130 180, person 24 220 20 60, rider 25 255 0 0,
car 26 0 0 142, truck 27 0 0 70, bus 28 0 60 100, train 31 0 80 100, motorcycle 32 0 0 230, bicycle 33 119 11 32"""
IDD = """road 0 128 64 128, parking 1 250 170 160, sidewalk 2 244 35 232, non-drivable fallback 3 152 251 152,
person 4 220 20 60, rider 5 255 0 0, motorcycle 6 0 0 230, bicycle 7 119 11 32, autorickshaw 8 255 204 54,
car 9 0 0 142, truck 10 0 0 70, bus 11 0 60 100, vehicle fallback 12 136 143 153, curb 13 220 190 40,
wall 14 102 102 156, fence 15 190 153 153, guard rail 16 180 165 180, billboard 17 174 64 67, traffic sign 18 220 220 0,
traffic light 19 250 170 30, pole 20 153 153 153, obs-str-bar-fallback 21 169 187 214, building 22 70 70 70,
bridge 23 150 100 100, vegetation 24 107 142 35, sky 25 70 130 180"""
TABLES = {  # evaluated labels with id and colour; which ids are things; which may occur; how the label files' names end
    "cityscapes": (CITYSCAPES, range(24, 34), range(34), "_gtFine_instanceIds.png"),
    "idd": (IDD, range(4, 13), [*range(26), 255], "_gtFine_instancelevel3Ids.png")}


def _read(path, mode=None):
    """The pixels of a picture file, converted to a PIL mode if one is given, as an array."""
    try:
        with Image.open(path) as image:
            return np.array(image.convert(mode) if mode else image)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: unpack the data set again, or correct its root folder") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise DataError(f"{path} is no readable picture ({e}): copy it again from the data set's archive") from None


def read_picture(path):
    """Any picture file -> float32 [3, H, W] in 0..1, RGB; a DataError if it is none."""
    return torch.from_numpy(_read(path, "RGB")).permute(2, 0, 1).float() / 255


class _Folder:
    """A data set on disk: `.files` lists (name, picture, label or None), `.read(i)` returns a label's ids and rows."""

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, picture, label = self.files[i]
        image = read_picture(picture)
        segments, categories, crowd = self.labels(i)
        if segments.shape != image.shape[1:]:
            raise DataError(f"{label} has height and width {tuple(segments.shape)} but {picture} has "
                            f"{tuple(image.shape[1:])}: take label and picture from the same archive")
        return Sample(image, segments, categories, crowd, name)

    def labels(self, i):
        """(segments, categories, crowd) of picture i without decoding the picture; all void where there is no label."""
        if self.files[i][2] is None:
            with Image.open(self.files[i][1]) as image:                       # reads no more than its header
                return torch.zeros(image.size[::-1], dtype=torch.long), torch.zeros(0).long(), torch.zeros(0).bool()
        ids, rows = self.read(i)                                              # [H, W] and (id, category, crowd) each
        number, found, seen = np.zeros(2 ** 24, np.int64), [], {}             # the system hands out only pages we touch
        for id, category, crowd in rows:
            if self.categories[category].isthing or category not in seen:     # stuff: one segment of a category
                found.append((category, crowd))
            number[id] = len(found) if self.categories[category].isthing else seen.setdefault(category, len(found))
        found = torch.tensor(found, dtype=torch.long).reshape(-1, 2)
        return torch.from_numpy(number[ids]), found[:, 0].contiguous(), found[:, 1].bool()


class Cityscapes(_Folder):
    """root/leftImg8bit/<split>/<city>/*_leftImg8bit.png with root/gtFine/<split>/<city>/*_gtFine_instanceIds.png.

    A label pixel is 1000 c + n for instance n of class c, or c alone: stuff, or a group of things that nobody told
    apart, which becomes crowd. Classes that the benchmark does not evaluate are void. `table="idd"` reads the Indian
    Driving Dataset, level 3 labels (17 stuff, 9 things), as AutoNUE's public code writes them."""

    def __init__(self, root, split, table="cityscapes"):
        text, things, self.known, ending = TABLES[table]
        rows = [row.rsplit(" ", 4) for row in text.replace(",\n", ", ").split(", ")]
        self.category_ids = [int(row[1]) for row in rows]
        self.categories = [Category(name, int(id) in things, (int(r), int(g), int(b))) for name, id, r, g, b in rows]
        folder, self.files = Path(root, "leftImg8bit", split), []
        for picture in sorted(folder.glob("*/*_leftImg8bit.*")):
            name = picture.name.rsplit("_leftImg8bit", 1)[0]
            label = Path(root, "gtFine", split, picture.parent.name, name + ending)
            if not label.exists() and split != "test":
                how = " and run AutoNUE's createLabels.py --id-type level3Id --instance True" if table == "idd" else ""
                raise DataError(f"{picture} has no label {label}: unpack gtFine beside leftImg8bit{how}")
            name = name if table == "cityscapes" else f"{picture.parent.name}_{name}"         # IDD's names repeat
            self.files.append((name, picture, label if label.exists() else None))
        if not self.files:
            raise DataError(f"there are no pictures {folder}/*/*_leftImg8bit.*: the root holds leftImg8bit and gtFine")

    def read(self, i):
        label, rows = self.files[i][2], []
        ids = _read(label)
        for id in np.flatnonzero(np.bincount(ids.ravel())).tolist():  # np.unique would sort 2 million of them
            kind = id // 1000 if id >= 1000 else id
            if kind not in self.known:
                raise DataError(f"{label} has the id {id}, of no known class: take an instance map of this data set")
            if kind in self.category_ids:
                category = self.category_ids.index(kind)
                rows.append((id, category, id < 1000 and self.categories[category].isthing))
        return ids, rows


class CocoPanoptic(_Folder):
    """Panoptic JSON with PNGs whose colour is the segment's id = R + 256 G + 256^2 B.

    COCO and your own: root/annotations/panoptic_<split>.json, a folder of that name of PNGs, pictures in root/<split>.
    Mapillary Vistas: root/<split>/v2.0/panoptic/panoptic_2020.json (or v1.2, panoptic_2018.json), root/<split>/images.
    Categories are numbered in the JSON's order; `.category_ids` and `.image_ids` (by name) keep official numbers."""

    def __init__(self, root, split):
        root, self.files, self.infos, self.image_ids = Path(root), [], [], {}
        paths = [root / f"annotations/panoptic_{split}.json", root / split / "v2.0/panoptic/panoptic_2020.json",
                 root / split / "v1.2/panoptic/panoptic_2018.json", root / split / "panoptic/panoptic_2018.json"]
        path = next((p for p in paths if p.exists()), None)
        folder = next((f for f in (root / split / "images", root / split) if f.is_dir()), None)
        if folder is None:
            raise DataError(f"there is no folder {root / split} of pictures: the root must hold it, and {paths[0]}")
        if path is None and not split.startswith("test"):
            raise DataError(f"{folder} has pictures but there is no {paths[0]}: unpack the panoptic annotations there")
        source = path or next(iter(sorted(root.glob("annotations/panoptic_*.json"))), None)  # a test set's categories
        try:
            content = json.loads(source.read_text()) if source else {"categories": []}
        except ValueError as e:
            raise DataError(f"{source} is no readable JSON ({e}): copy it again from the data set's archive") from None
        self.category_ids = [c["id"] for c in content["categories"]]
        colours = [c.get("color", (91 * k % 256, 53 * k % 256, 99)) for k, c in enumerate(content["categories"], 1)]
        self.categories = [Category(c["name"], bool(c["isthing"]), tuple(colour))
                           for c, colour in zip(content["categories"], colours)]
        if path is None:
            self.files = [(p.stem, p, None) for p in sorted(folder.iterdir()) if p.suffix in (".jpg", ".png")]
            return
        pictures = {image["id"]: folder / image["file_name"] for image in content["images"]}
        labels = path.with_suffix("") if path.with_suffix("").is_dir() else path.parent      # COCO's place, Mapillary's
        for a in content["annotations"]:
            picture = pictures[a["image_id"]]
            picture = picture if picture.exists() else picture.with_suffix(".jpg")
            self.files.append((picture.stem, picture, labels / a["file_name"]))
            self.infos.append(a["segments_info"])
            self.image_ids[picture.stem] = a["image_id"]

    def read(self, i):
        label, official = self.files[i][2], {id: k for k, id in enumerate(self.category_ids)}
        ids = _read(label, "RGB").astype(np.int64) @ [1, 256, 256 ** 2]
        strange = set(np.unique(ids).tolist()) - {0, *(s["id"] for s in self.infos[i])}
        strange |= {s["category_id"] for s in self.infos[i]} - official.keys()
        if strange:
            raise DataError(f"{label} and its JSON disagree on id {min(strange)}: take both from the same release")
        return ids, [(s["id"], official[s["category_id"]], bool(s.get("iscrowd"))) for s in self.infos[i]]


def write_annotation(folder, name, segments, categories, crowd=None, category_ids=None, image_id=None):
    """Write folder/<name>.png and return its entry for the JSON, so that many processes can share the pictures."""
    segments, count = torch.as_tensor(segments).cpu().long(), len(categories)
    Path(folder).mkdir(parents=True, exist_ok=True)
    rgb = torch.stack([segments & 255, segments >> 8 & 255, segments >> 16], -1)
    Image.fromarray(rgb.to(torch.uint8).numpy()).save(Path(folder, f"{name}.png"))
    boxes, area = mask_boxes(segments, count).int(), torch.bincount(segments.flatten(), minlength=count + 1).tolist()
    infos = [{"id": k, "category_id": category_ids[int(c)] if category_ids else int(c), "area": area[k],
              "bbox": [x1, y1, x2 - x1, y2 - y1], "iscrowd": int(crowd is not None and crowd[k - 1])}
             for k, (c, (x1, y1, x2, y2)) in enumerate(zip(categories, boxes.tolist()), 1) if area[k]]
    return {"image_id": name if image_id is None else image_id, "file_name": f"{name}.png", "segments_info": infos,
            "height": segments.shape[0], "width": segments.shape[1]}


def write_panoptic_json(path, annotations, categories, category_ids=None):
    """Write <path>.json around the entries that `write_annotation` returned."""
    images = [{"id": a["image_id"], **{k: a[k] for k in ("file_name", "height", "width")}} for a in annotations]
    rows = [{"id": category_ids[k] if category_ids else k, "name": c.name, "isthing": int(c.isthing),
             "color": list(c.colour)} for k, c in enumerate(categories)]
    Path(f"{path}.json").write_text(json.dumps({"images": images, "annotations": annotations, "categories": rows}))


def write_coco_panoptic(path, predictions, categories, category_ids=None, image_ids=None):
    """Write predictions, rows of (name, segments, categories) or (..., crowd), as <path>.json and PNGs in <path>/.

    Evaluation servers want official numbers back: pass a data set's `.category_ids` and `.image_ids`."""
    Path(path).mkdir(parents=True, exist_ok=True)
    entries = [write_annotation(path, name, *rest, *[None] * (3 - len(rest)), category_ids, (image_ids or {}).get(name))
               for name, *rest in predictions]
    write_panoptic_json(path, entries, categories, category_ids)


# --- To look at, and to compare with ---------------------------------------------------------------------------------

def draw(image, segments, segment_categories, categories, ax=None, names=True):
    """Coloured segments over the picture -> uint8 [H, W, 3]; shown in `ax`, if given, with names on large segments."""
    segments, kinds = torch.as_tensor(segments).cpu(), torch.as_tensor(segment_categories).tolist()
    palette = [(0., 0., 0.)]
    for k, c in enumerate(kinds):                                             # the golden ratio spreads shades evenly
        shade = .6 + .8 * ((.618 * kinds[:k].count(c) + .4) % 1) if categories[c].isthing else 1.
        palette.append([v * min(shade, 1) + (255 - v) * max(shade - 1, 0) for v in categories[c].colour])
    edge = F.pad(segments[1:] != segments[:-1], (0, 0, 0, 1)) | F.pad(segments[:, 1:] != segments[:, :-1], (0, 1))
    out = .7 * torch.tensor(palette)[segments] + .3 * 255 * torch.as_tensor(image).cpu().float().mean(0)[..., None]
    out = torch.where(edge[..., None], torch.tensor(255.), out).clamp(0, 255).to(torch.uint8).numpy()
    if ax is not None:
        ax.imshow(out)
        ax.axis("off")
        for k, c in enumerate(kinds if names else [], 1):
            place = torch.nonzero(segments == k).float()
            if len(place) > .01 * segments.numel():
                y, x = place[(place - place.mean(0)).square().sum(1).argmin()].tolist()       # nearest to its centre
                ax.text(x, y, categories[c].name, color="w", size=7, ha="center", va="center", clip_on=True,
                        bbox={"facecolor": "k", "alpha": .4, "pad": 1, "lw": 0})
    return out


def components(labels):
    """4-connected components of equal labels [H, W] -> int64 [H, W], the smallest flat index of each component.

    Every pixel points at one of its component; roots of neighbours join and chains are cut short until all agree."""
    index = torch.arange(labels.numel()).view(labels.shape)
    down, right = labels[1:] == labels[:-1], labels[:, 1:] == labels[:, :-1]
    pairs = torch.cat([torch.stack([index[1:][down], index[:-1][down]]),
                       torch.stack([index[:, 1:][right], index[:, :-1][right]])], 1)                 # [2, E]
    root = index.flatten()
    while (root[pairs[0]] != root[pairs[1]]).any():
        low, high = root[pairs].amin(0), root[pairs].amax(0)
        root = root.scatter_reduce(0, high, low, "amin")
        while (root != root[root]).any():
            root = root[root]
    return root.view(labels.shape)


class ColourBaseline:
    """What colour alone tells: k-means on the colours of n pictures, each cluster the category of most of its pixels,
    each connected piece of a thing category with at least 20 pixels an instance. A network should be far above it."""

    def __init__(self, dataset, n=20, clusters=64):
        self.isthing, g = torch.tensor([c.isthing for c in dataset.categories]), torch.Generator().manual_seed(0)
        colours, kinds = [], []
        for sample in (dataset[i] for i in range(min(n, len(dataset)))):
            pick = torch.nonzero(sample.segments.flatten())[:, 0]
            pick = pick[torch.randint(len(pick), (2000,), generator=g)]
            colours.append(sample.image.flatten(1)[:, pick].T)
            kinds.append(sample.categories[sample.segments.flatten()[pick] - 1])
        colours, votes = torch.cat(colours), F.one_hot(torch.cat(kinds), len(self.isthing)).float()   # [M, 3], [M, C]
        self.centres = colours[torch.randperm(len(colours), generator=g)[:clusters]]
        for _ in range(15):
            near = F.one_hot(torch.cdist(colours, self.centres).argmin(1), clusters).float().T               # [K, M]
            self.centres = near @ colours / near.sum(1, keepdim=True).clamp(min=1)
        self.kinds = (near @ votes).argmax(1)

    def predict(self, image):
        """image [3, H, W] -> (segments [H, W], categories [N])"""
        kinds = self.kinds[torch.cdist(image.flatten(1).T, self.centres).argmin(1)].view(image.shape[1:])
        pieces = torch.where(self.isthing[kinds], len(self.isthing) + components(kinds), kinds)
        _, first, area = torch.unique(pieces, return_inverse=True, return_counts=True)
        segments = ((area >= 20).cumsum(0) * (area >= 20))[first]
        categories = torch.zeros(int(segments.max()) + 1, dtype=torch.long)
        categories[segments] = kinds
        return segments, categories[1:]


def demo(out="figures/data.png", scenes=100):
    """A table of what the street is like, what colour alone achieves there, and a sheet of scenes with labels."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    start, isthing = time.process_time(), torch.tensor([c.isthing for c in STREET])
    street = list(StreetScenes(scenes))
    print(f"{scenes / (time.process_time() - start):.0f} scenes of 256 x 512 pixels per second of processor time")
    area = [torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)[1:] for s in street]
    things = torch.cat([a[isthing[s.categories]] for a, s in zip(area, street)]).float()
    cut = [t.truncated[isthing[t.categories]].any(1) for t in (crop(s, 64, 128, (128, 256))[1] for s in street)]
    print(f"{len(things) / scenes:.1f} objects a scene, {(things < 32 ** 2).float().mean():.0%} below 32 x 32 pixels, "
          f"{(things > 128 ** 2).float().mean():.1%} above 128 x 128,\n"
          f"the largest {things.max() / 2 ** 17:.0%} of a picture; a half-size crop in the middle cuts "
          f"{torch.cat(cut).float().mean():.0%} of those it sees")
    for k, c in enumerate(STREET):
        n = torch.tensor([int((s.categories == k).sum()) for s in street]).float()
        share = sum(int(a[s.categories == k].sum()) for a, s in zip(area, street)) / (scenes * 2 ** 17)
        print(f"{c.name:12}in {(n > 0).float().mean():4.0%} of scenes, {n.mean():4.1f} each, {share:5.1%} of pixels")
    try:
        from pq import PanopticQuality
        baseline, quality = ColourBaseline(StreetScenes(20, seed=1)), PanopticQuality(isthing)
        for s in street[:50]:
            quality.update(*baseline.predict(s.image), s.segments, s.categories, s.crowd)
        print("colour baseline: PQ {PQ:.1f}, things {PQ_th:.1f}, stuff {PQ_st:.1f}".format(**quality.compute()))
    except ImportError:
        print("(pq.py is not beside this file: no PQ of the colour baseline)")
    fig, axes = plt.subplots(4, 4, figsize=(12, 6), dpi=120)
    for s, (left, right) in zip(street[1:], axes.reshape(-1, 2)):
        left.imshow(s.image.permute(1, 2, 0))
        left.axis("off")
        draw(s.image, s.segments, s.categories, STREET, right)
    fig.subplots_adjust(0, 0, 1, 1, .01, .01)
    fig.canvas.draw()
    Path(out).parent.mkdir(exist_ok=True)
    sheet = Image.fromarray(np.asarray(fig.canvas.buffer_rgba())[..., :3].copy())
    sheet.quantize(256).save(out, optimize=True)                              # a palette: a third of the bytes


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="figures/data.png", help="where the sheet of scenes goes")
    demo(parser.parse_args().out)

# Exercises
# 1. Let a shadow (`colour is None` in `Street.paint`) write `self.ids` too. What happens to the objects' boxes, and
#    which test notices?
# 2. Make `crop` mark an edge as truncated whenever the visible box touches it. Which objects are now said to go on that
#    do not, and which test tells you?
# 3. Give the street bicycles: a category, a recipe of a dozen rows for `figure`, a line in `cast`. How much of them
#    does the colour baseline find?
