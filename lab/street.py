"""StreetScenes: toy street scenes with exact panoptic labels, drawn in perspective.

Scene i depends on (seed, i) alone and is the same on every machine. `show` describes the data set.
"""
import time
from pathlib import Path

import numpy as np
import torch

from data import Sample, crop, new_numbers
from lab.baseline import ColourBaseline
from lab.draw import draw, figure_of
from lab.paint import (BODIES, BUILDING, CAR, FACADE, PAINT, PERSON, ROAD, SHADOW, SIDEWALK, SIGN,
                       SKY, STREET, TRUCK, VEGETATION, Dice, Painter)
from pq import PanopticQuality

f32 = np.float32


class Street(Painter):
    """The painter of one scene: its surroundings and its cast."""

    def surroundings(self):
        """All that is stuff: the sky, what stands at the end of the street, walls, the ground."""
        d, Y, X = self.dice, self.Y, self.X * self.h / self.w
        soft = .5 * d.clouds(6, Y, X) + .3 * d.clouds(20, Y, X) + .2 * d.clouds(70, Y, X)
        soft, fine = soft[..., None], d.clouds(110, Y, X)[..., None]   # [h, w, 1]: mottle all
        self.sky(soft, X)
        self.half, self.walk = d(3.6, 7.5), d(2.5, 6.)         # half the road's, a pavement's width
        self.centre = d(-.6, .6) * self.half
        wall = self.walls(soft, fine)
        self.ground(soft, fine, wall)

    def sky(self, soft, X):
        """The sky, and woods or a town at the end of the street."""
        d, rgb = self.dice, self.rgb
        up = np.clip(1 - self.Y / self.horizon, 0, 1).astype(f32)[:, None, None]
        rgb[:] = self.haze + (self.zenith - self.haze) * up
        rgb += np.clip(soft - .5, 0, 1) * f32(d(0, 1.6)) * (self.haze - rgb)
        self.ids[:] = SKY + 1
        woods = d() < .5
        round_tops, roofs = d.clouds(20, np.zeros(1), X)[0], d.field(42)[(X * 40).astype(int)]
        top = round_tops if woods else roofs
        end = self.Y[:, None] > self.horizon - .02 - .12 * top
        colour = f32([.30, .42, .22] if woods else [.42, .42, .43])
        rgb[end] = self.air(colour * (.6 + .8 * soft[end]), 130)
        self.ids[end] = (VEGETATION if woods else BUILDING) + 1

    def walls(self, soft, fine):
        """Houses and hedges beside the street -> bool [h, w]: where they are.

        Each column of the image meets the wall at one depth z."""
        d, n, rgb = self.dice, 25, self.rgb                    # n plots on each side
        reach, left = self.half + self.walk, self.X < self.cx
        away = np.where(left, reach - self.centre, reach + self.centre)          # metres sideways
        z = self.focal / np.maximum(np.abs(self.X - self.cx), 1e-6) * away       # ... and ahead [w]
        plots = np.cumsum(6 + 14 * d.field(2, n - 1).astype(float), 1)           # where plots end
        house = np.where(left, np.searchsorted(plots[0], z), n + np.searchsorted(plots[1], z))
        up = self.camera - (self.Y[:, None] - self.horizon) * z / self.focal     # metres [h, w]
        up, z = up.astype(f32), z.astype(f32)
        leafy = (d.field(2 * n) < d.pick([.1, .3, .6]))[house]
        share = d.field(3, 2 * n)[:, house]
        hedge = (2 + 7 * share[2]) * (.55 + .9 * soft[..., 0])
        tall = np.where(leafy, hedge, 5 + 14 * share[2])
        wall = (up >= 0) & (up < tall) & (z < 110)
        a, b = (up - .8) / (2.7 + share[0]), z / (1.8 + 2 * share[1])            # storeys, bays
        middle, level = (np.abs(v - np.floor(v) - f32(.5)) < .25 for v in (b, a))
        pane = middle & (z < 70) & ~leafy & level & wall & (a > 0)               # windows
        hue = f32([d.pick(FACADE) for _ in range(2 * n)])[house]
        hue = hue * np.where(left == (self.sun > 0), f32(1), f32(.72))[:, None]
        leaves = f32([.27, .40, .15]) * (.65 + .7 * fine)
        colour = np.where(leafy[:, None], leaves, hue) * (.65 + .5 * soft)
        b = np.broadcast_to(b + house, a.shape)
        room = d.field(64, 64)[a[pane].astype(int) % 64, b[pane].astype(int) % 64, None]
        dark = (.25 + .3 * room) * f32([.7, .9, 1.1])
        colour[pane] = np.where(room < .35 * self.lit, f32([1.3, 1.05, .6]), dark)
        np.copyto(rgb, self.air(colour, z[:, None]), where=wall[..., None])
        self.ids = np.where(wall, np.where(leafy, VEGETATION, BUILDING) + 1, self.ids)
        return wall

    def ground(self, soft, fine, wall):
        """The road with its marks, the kerbs and the pavements. wall: bool [h, w]."""
        d = self.dice
        below = slice(int(np.ceil(self.horizon * self.h + .5)), self.h)
        z = (self.focal * self.camera / (self.Y[below] - self.horizon)).astype(f32)[:, None]
        x = (self.X - self.cx).astype(f32) * (z / f32(self.focal)) - f32(self.centre)
        side, wall = np.abs(x), wall[below]                    # metres from the road's middle
        tar, stone = d(.28, .5), d(.34, .64)
        road, dash = side < self.half, 0 if self.half < 5 else self.half / 3
        cross = d(7., 22.) if d() < .45 else 99.               # where people cross
        dashes = (np.abs(side - dash) < .08) & (z % 6 < 3)
        line = (np.abs(side - self.half + .25) < .07) & (d() < .6)
        zebra = (np.abs(z - cross) < 1.6) & (x - np.floor(x) < .5)
        mark = (dashes | line | zebra) & road & (z < 45)
        # The kerb, then gaps between slabs.
        shade = np.where(~road & (side < self.half + .22), f32(1.15), f32(1))
        shade = np.where(~road & (z % 1.5 < .07) & (z < 16), f32(.82), shade)
        if self.reach > 290:                                   # a low sun: the houses' shadow
            shade = np.where(x * self.sun < -self.half * d(-.2, .9), f32(.68), f32(1)) * shade
        colour = np.where(road[..., None], f32([1, 1, 1.03]) * f32(tar),
                          f32([1, .97, .92]) * f32(stone))
        colour = colour * (.82 + .2 * soft[below] + .16 * fine[below])
        colour = np.where(mark[..., None], f32(.8), colour) * shade[..., None]
        np.copyto(self.rgb[below], self.air(colour, z[..., None]), where=~wall[..., None])
        ground = np.where(road, ROAD, SIDEWALK) + 1
        self.ids[below] = np.where(wall, self.ids[below], ground)

    def cast(self):
        """All objects, far to near: rows of (z, category, x, which way it faces)."""
        d, half, way, rows = self.dice, self.half, self.dice.pick([-1, 1]), []

        def people(count, z, x):
            rows.extend((z(), PERSON, x(), 0) for _ in range(count))

        for side in (-1, 1):
            kerb, z, face = self.centre + side * half, d(1.5, 9.), d.pick([-1, 1])
            gap, stop = d(.1, .6), d.pick([45, 45, 45, 0])
            while z < stop:                                    # a row of parked cars
                row = (z, TRUCK if d() < .03 else CAR, kerb - side * d(1.03, 1.3), face)
                if d() > gap:
                    rows.append(row)
                z += d(5., 6.) if d() < .8 else d(6., 14.)
            z = d(2.5, 12.)
            while z < 60:                                      # traffic in this lane
                category = TRUCK if d() < .22 else CAR
                rows.append((z, category, kerb - side * half * d(.58, .78), -side * way))
                z = z * d(1.2, 1.9) + d(9., 16.)
            z, step = d(4., 12.), d(7., 12.)
            for k in range(8 * (d() < .5)):
                rows.append((z + k * step, VEGETATION, kerb + side, 0))
            for _ in range(int(d(1, 4))):
                rows.append((2.5 / d(.07, .85), SIGN, kerb + side * d(.3, .7), 0))
            people(int(d(0, 6)), lambda: 2.2 / d(.08, .9),
                   lambda: kerb + side * d(.4, self.walk))
            z, x = d(3.5, 18.), kerb + side * d(.5, self.walk)                   # a crowd
            people(int(d(3, 9)) * (d() < .45), lambda: z + d(-1.2, 1.2),
                   lambda: x + d(-1.3, 1.3))
        z = d(3.5, 14.)                                        # people cross
        people(int(d(1, 6)) * (d() < .4), lambda: z + d(-1, 1),
               lambda: self.centre + d(-.9, .9) * half)
        return sorted(rows, key=lambda row: -row[0])


class StreetScenes:
    """`length` scenes of size (h, w); scene i depends on (seed, i) alone, the size only samples it
    more or less finely.

    Choice: a thing with fewer than 20 visible pixels (at 256 x 512, in proportion otherwise) is
    void, not a label.
    Choice: a sign owns its pole; a tree is vegetation from root to crown; our own bonnet, where it
    shows, is void."""

    def __init__(self, length, size=(256, 512), seed=0):
        self.length, self.size, self.seed, self.categories = length, tuple(size), seed, STREET

    def __len__(self):
        return self.length

    def labels(self, i):
        """segments, categories and crowd of scene i, which is drawn for them."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd

    def __getitem__(self, i):
        i, (h, w) = range(self.length)[i], self.size           # range: IndexError past the end
        dice = Dice(self.seed, i)
        street = Street(dice, h, w)
        street.surroundings()
        categories = list(range(SKY + 1))                      # segments 1..5 are stuff
        colours = [dice.pick(PAINT) for _ in range(int(dice(1, 5)))]   # few: cars look alike
        for z, category, x, way in street.cast():
            u, v = SHADOW[category]
            street.paint([(x - u, 0, z - .2), (x + u, 0, z - .2), (x + u, 0, z + v),
                          (x - u, 0, z + v)], None)
            if category != VEGETATION:
                categories.append(category)
            street.id = VEGETATION + 1 if category == VEGETATION else len(categories)
            if category in BODIES:
                colour = dice.pick(colours) if dice() < .7 else dice.pick(PAINT)
                street.vehicle(x, z, category, colour=colour, way=way)
            else:
                paint = {PERSON: street.person, SIGN: street.sign, VEGETATION: street.tree}
                paint[category](x, z)
        if dice() < .3:                                        # our bonnet
            y, x = street.Y[:, None], street.X * h / w
            bonnet = ((x - .5) / .62) ** 2 + ((y - 1.12) / .2) ** 2 <= 1
            street.rgb[bonnet], street.ids[bonnet] = street.haze * f32(dice(.05, .4)), 0
        categories = np.array(categories)
        area = np.bincount(street.ids.ravel(), minlength=len(categories) + 1)[1:]
        keep = area >= np.where(categories > SKY, 20 * h * w / (256 * 512), 1)
        image = torch.from_numpy(photograph(street.rgb, dice)).permute(2, 0, 1).contiguous()
        keep, categories = torch.from_numpy(keep), torch.from_numpy(categories)[keep]
        segments = new_numbers(keep)[torch.from_numpy(street.ids)]
        crowd = torch.zeros(len(categories)).bool()
        return Sample(image, segments, categories, crowd, f"street_{self.seed}_{i:05d}")


def photograph(rgb, dice):
    """A painted scene float32 [h, w, 3] with a slight blur and sensor noise, in whole grey levels
    as in a file."""
    p = np.pad(rgb, ((1, 1), (1, 1), (0, 0)), mode="edge")
    p = f32(.7) * p[1:-1] + f32(.15) * (p[:-2] + p[2:])
    p = f32(.7) * p[:, 1:-1] + f32(.15) * (p[:, :-2] + p[:, 2:])
    noise = dice.raw(rgb.size // 4 + 1).astype("<u8").view(np.uint8)             # 8 bytes each
    noise = noise[:2 * p.size].astype(np.int16)
    noise = (noise[:p.size] - noise[p.size:]).reshape(p.shape) * f32(.03)
    return np.rint(np.clip(p * 255 + noise, 0, 255)) / f32(255)


def show(scenes=100, out="figures"):
    """Prints what the street is like and what colour alone achieves there; draws data.png into
    `out`."""
    start, isthing = time.process_time(), torch.tensor([c.isthing for c in STREET])
    street = list(StreetScenes(scenes))
    rate = scenes / (time.process_time() - start)
    print(f"{rate:.0f} scenes of 256 x 512 pixels per second of processor time")
    area = [torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)[1:]
            for s in street]
    things = torch.cat([a[isthing[s.categories]] for a, s in zip(area, street)]).float()
    crops = [crop(s, 64, 128, (128, 256))[1] for s in street]
    cut = torch.cat([t.truncated[isthing[t.categories]].any(1) for t in crops]).float()
    small, large = (things < 32**2).float().mean(), (things > 128**2).float().mean()
    print(f"{len(things) / scenes:.1f} objects a scene, {small:.0%} below 32 x 32 pixels, "
          f"{large:.1%} above 128 x 128,\nthe largest {things.max() / 2**17:.0%} of an image; a "
          f"half-size crop in the middle cuts {cut.mean():.0%} of those it shows")
    for k, c in enumerate(STREET):
        n = torch.tensor([int((s.categories == k).sum()) for s in street]).float()
        pixels = sum(int(a[s.categories == k].sum()) for a, s in zip(area, street))
        print(f"{c.name:12}in {(n > 0).float().mean():4.0%} of scenes, {n.mean():4.1f} each, "
              f"{pixels / (scenes * 2**17):5.1%} of pixels")
    baseline, quality = ColourBaseline(StreetScenes(20, seed=1)), PanopticQuality(isthing)
    for s in street[:50]:
        quality.update(*baseline.predict(s.image), s.segments, s.categories, gt_crowd=s.crowd)
    print("colour baseline: PQ {PQ:.1f}, things {PQ_th:.1f}, stuff {PQ_st:.1f}".format(
        **quality.compute()))
    with figure_of(Path(out, "data.png"), 4, 4, height=4) as axes:
        for s, (left, right) in zip(street[1:], axes.reshape(-1, 2)):
            left.imshow(s.image.permute(1, 2, 0).numpy())
            left.axis("off")
            draw(s.image, s.segments, s.categories, STREET, ax=right)
