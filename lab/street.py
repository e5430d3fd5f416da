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
from lab.paint import (
    BODIES,
    BUILDING,
    CAR,
    FACADE,
    PAINT,
    PERSON,
    ROAD,
    SHADOW,
    SIDEWALK,
    SIGN,
    SKY,
    STREET,
    TRUCK,
    VEGETATION,
    Dice,
    Painter,
)
from pq import PanopticQuality


class Street(Painter):
    """The painter of one scene: its surroundings and its cast."""

    def surroundings(self):
        """All that is stuff: sky, town or woods at the end of the street, houses and hedges beside
        it, the ground."""
        d, f32, Y, X, rgb = self.dice, np.float32, self.Y, self.X * self.h / self.w, self.rgb
        soft = (0.5 * d.clouds(6, Y, X) + 0.3 * d.clouds(20, Y, X) + 0.2 * d.clouds(70, Y, X))[
            ..., None
        ]
        fine = d.clouds(110, Y, X)[..., None]  # [h, w, 1] both: they mottle everything
        up = np.clip(1 - Y / self.horizon, 0, 1).astype(f32)[:, None, None]
        rgb[:] = self.haze + (self.zenith - self.haze) * up
        rgb += np.clip(soft - 0.5, 0, 1) * f32(d(0, 1.6)) * (self.haze - rgb)
        self.ids[:] = SKY + 1
        woods, top = d() < 0.5, (d.clouds(20, np.zeros(1), X)[0], d.field(42)[(X * 40).astype(int)])
        end = Y[:, None] > self.horizon - 0.02 - 0.12 * top[not woods]
        rgb[end] = self.air(
            f32([0.30, 0.42, 0.22] if woods else [0.42, 0.42, 0.43]) * (0.6 + 0.8 * soft[end]), 130
        )
        self.ids[end] = (VEGETATION if woods else BUILDING) + 1

        self.half, self.walk, n = (
            d(3.6, 7.5),
            d(2.5, 6.0),
            25,
        )  # half the road's width, a pavement's width
        self.centre, reach, left = d(-0.6, 0.6) * self.half, self.half + self.walk, self.X < self.cx
        away = np.where(
            left, reach - self.centre, reach + self.centre
        )  # [w] metres to the column's wall, sideways
        z = self.focal / np.maximum(np.abs(self.X - self.cx), 1e-6) * away  # ... and ahead
        plots = np.cumsum(
            6 + 14 * d.field(2, n - 1).astype(float), 1
        )  # where one house ends and the next begins
        house = np.where(left, np.searchsorted(plots[0], z), n + np.searchsorted(plots[1], z))
        up = (self.camera - (Y[:, None] - self.horizon) * z / self.focal).astype(
            f32
        )  # [h, w] metres up that wall
        z, leafy, share = (
            z.astype(f32),
            (d.field(2 * n) < d.pick([0.1, 0.3, 0.6]))[house],
            d.field(3, 2 * n)[:, house],
        )
        tall = np.where(leafy, (2 + 7 * share[2]) * (0.55 + 0.9 * soft[..., 0]), 5 + 14 * share[2])
        wall = (up >= 0) & (up < tall) & (z < 110)
        a, b = (up - 0.8) / (2.7 + share[0]), z / (1.8 + 2 * share[1])  # storeys up, bays along
        middle, level = (np.abs(v - np.floor(v) - f32(0.5)) < 0.25 for v in (b, a))
        pane = middle & (z < 70) & ~leafy & level & wall & (a > 0)  # windows
        hue = f32([d.pick(FACADE) for _ in range(2 * n)])[house]
        hue = hue * np.where(left == (self.sun > 0), f32(1), f32(0.72))[:, None]
        colour = np.where(leafy[:, None], f32([0.27, 0.40, 0.15]) * (0.65 + 0.7 * fine), hue) * (
            0.65 + 0.5 * soft
        )
        b = np.broadcast_to(b + house, a.shape)
        room = d.field(64, 64)[a[pane].astype(int) % 64, b[pane].astype(int) % 64, None]
        colour[pane] = np.where(
            room < 0.35 * self.lit,
            f32([1.3, 1.05, 0.6]),
            (0.25 + 0.3 * room) * f32([0.7, 0.9, 1.1]),
        )
        np.copyto(rgb, self.air(colour, z[:, None]), where=wall[..., None])
        self.ids = np.where(wall, np.where(leafy, VEGETATION, BUILDING) + 1, self.ids)

        below = slice(int(np.ceil(self.horizon * self.h + 0.5)), self.h)
        z = (self.focal * self.camera / (Y[below] - self.horizon)).astype(f32)[
            :, None
        ]  # depth of the ground there
        x = (self.X - self.cx).astype(f32) * (z / f32(self.focal)) - f32(
            self.centre
        )  # metres from the road's middle
        side, wall, tar, stone = np.abs(x), wall[below], d(0.28, 0.5), d(0.34, 0.64)
        road, dash, cross = (
            side < self.half,
            0 if self.half < 5 else self.half / 3,
            d(7.0, 22.0) if d() < 0.45 else 99.0,
        )
        mark = (np.abs(side - dash) < 0.08) & (z % 6 < 3) | (
            np.abs(side - self.half + 0.25) < 0.07
        ) & (d() < 0.6)
        mark = (
            (mark | (np.abs(z - cross) < 1.6) & (x - np.floor(x) < 0.5)) & road & (z < 45)
        )  # dashes or a zebra
        shade = np.where(
            ~road & (side < self.half + 0.22), f32(1.15), f32(1)
        )  # the kerb, then gaps between slabs
        shade = np.where(~road & (z % 1.5 < 0.07) & (z < 16), f32(0.82), shade)
        if self.reach > 290:  # a low sun: the shadow of the houses
            shade = np.where(x * self.sun < -self.half * d(-0.2, 0.9), f32(0.68), f32(1)) * shade
        colour = np.where(
            road[..., None], f32([1, 1, 1.03]) * f32(tar), f32([1, 0.97, 0.92]) * f32(stone)
        )
        colour = colour * (0.82 + 0.2 * soft[below] + 0.16 * fine[below])
        colour = np.where(mark[..., None], f32(0.8), colour) * shade[..., None]
        np.copyto(rgb[below], self.air(colour, z[..., None]), where=~wall[..., None])
        self.ids[below] = np.where(wall, self.ids[below], np.where(road, ROAD, SIDEWALK) + 1)

    def cast(self):
        """All objects, far to near: rows of (z, category, x, which way it faces)."""
        d, half, way, rows = self.dice, self.half, self.dice.pick([-1, 1]), []
        for side in (-1, 1):
            kerb, z, face = self.centre + side * half, d(1.5, 9.0), d.pick([-1, 1])
            gap, stop = d(0.1, 0.6), d.pick([45, 45, 45, 0])
            while z < stop:  # a row of parked cars
                row = (z, TRUCK if d() < 0.03 else CAR, kerb - side * d(1.03, 1.3), face)
                if d() > gap:
                    rows.append(row)
                z += d(5.0, 6.0) if d() < 0.8 else d(6.0, 14.0)
            z = d(2.5, 12.0)
            while z < 60:  # traffic in this lane
                rows.append(
                    (
                        z,
                        TRUCK if d() < 0.22 else CAR,
                        kerb - side * half * d(0.58, 0.78),
                        -side * way,
                    )
                )
                z = z * d(1.2, 1.9) + d(9.0, 16.0)
            z, step = d(4.0, 12.0), d(7.0, 12.0)
            rows += [(z + k * step, VEGETATION, kerb + side, 0) for k in range(8 * (d() < 0.5))]
            rows += [
                (2.5 / d(0.07, 0.85), SIGN, kerb + side * d(0.3, 0.7), 0)
                for _ in range(int(d(1, 4)))
            ]
            rows += [
                (2.2 / d(0.08, 0.9), PERSON, kerb + side * d(0.4, self.walk), 0)
                for _ in range(int(d(0, 6)))
            ]
            z, x = d(3.5, 18.0), kerb + side * d(0.5, self.walk)  # a crowd
            rows += [
                (z + d(-1.2, 1.2), PERSON, x + d(-1.3, 1.3), 0)
                for _ in range(int(d(3, 9)) * (d() < 0.45))
            ]
        z = d(3.5, 14.0)  # people cross
        rows += [
            (z + d(-1, 1), PERSON, self.centre + d(-0.9, 0.9) * half, 0)
            for _ in range(int(d(1, 6)) * (d() < 0.4))
        ]
        return sorted(rows, key=lambda row: -row[0])


class StreetScenes:
    """`length` scenes of size (h, w); scene i depends on (seed, i) alone, the size only samples it
    more or less finely.

    Choice: a thing with fewer than 20 visible pixels (at 256 x 512, in proportion otherwise) is
    void, not a label.
    Choice: a sign owns its pole; a tree is vegetation from root to crown; our own bonnet, where it
    shows, is void.
    """

    def __init__(self, length, size=(256, 512), seed=0):
        self.length, self.size, self.seed, self.categories = length, tuple(size), seed, STREET

    def __len__(self):
        return self.length

    def labels(self, i):
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd

    def __getitem__(self, i):
        i, (h, w) = range(self.length)[i], self.size  # range raises IndexError past the end
        dice = Dice(self.seed, i)
        street, categories = Street(dice, h, w), list(
            range(SKY + 1)
        )  # segments 1..5 are stuff, then the cast
        street.surroundings()
        colours = [
            dice.pick(PAINT) for _ in range(int(dice(1, 5)))
        ]  # few paints: many cars that look alike
        for z, category, x, way in street.cast():
            u, v = SHADOW[category]
            street.paint(
                [(x - u, 0, z - 0.2), (x + u, 0, z - 0.2), (x + u, 0, z + v), (x - u, 0, z + v)],
                None,
            )
            categories += [category] * (category != VEGETATION)
            street.id = VEGETATION + 1 if category == VEGETATION else len(categories)
            if category in BODIES:
                street.vehicle(
                    x, z, category, dice.pick(colours) if dice() < 0.7 else dice.pick(PAINT), way
                )
            else:
                {PERSON: street.person, SIGN: street.sign, VEGETATION: street.tree}[category](x, z)
        if dice() < 0.3:
            bonnet = ((street.X * h / w - 0.5) / 0.62) ** 2 + (
                (street.Y[:, None] - 1.12) / 0.2
            ) ** 2 <= 1
            street.rgb[bonnet], street.ids[bonnet] = street.haze * np.float32(dice(0.05, 0.4)), 0
        categories, area = (
            np.array(categories),
            np.bincount(street.ids.ravel(), minlength=len(categories) + 1)[1:],
        )
        keep = area >= np.where(categories > SKY, 20 * h * w / (256 * 512), 1)
        p = np.pad(
            street.rgb, ((1, 1), (1, 1), (0, 0)), mode="edge"
        )  # a slight blur and sensor noise
        p = np.float32(0.7) * p[1:-1] + np.float32(0.15) * (p[:-2] + p[2:])
        p = np.float32(0.7) * p[:, 1:-1] + np.float32(0.15) * (p[:, :-2] + p[:, 2:])
        noise = (
            dice.raw(h * w * 3 // 4 + 1).astype("<u8").view(np.uint8)[: 2 * p.size].astype(np.int16)
        )
        noise = (noise[: p.size] - noise[p.size :]).reshape(p.shape) * np.float32(0.03)
        image = np.rint(np.clip(p * 255 + noise, 0, 255)) / np.float32(
            255
        )  # whole grey levels, as in a file
        keep, categories = torch.from_numpy(keep), torch.from_numpy(categories)
        segments = new_numbers(keep)[torch.from_numpy(street.ids)]
        image = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        return Sample(
            image,
            segments,
            categories[keep],
            torch.zeros(int(keep.sum())).bool(),
            f"street_{self.seed}_{i:05d}",
        )


def show(scenes=100, out="figures"):
    """Prints what the street is like and what colour alone achieves there; draws data.png into
    `out`."""
    start, isthing = time.process_time(), torch.tensor([c.isthing for c in STREET])
    street = list(StreetScenes(scenes))
    rate = scenes / (time.process_time() - start)
    print(f"{rate:.0f} scenes of 256 x 512 pixels per second of processor time")
    area = [
        torch.bincount(s.segments.flatten(), minlength=len(s.categories) + 1)[1:] for s in street
    ]
    things = torch.cat([a[isthing[s.categories]] for a, s in zip(area, street)]).float()
    crops = [crop(s, 64, 128, (128, 256))[1] for s in street]
    cut = torch.cat([t.truncated[isthing[t.categories]].any(1) for t in crops]).float()
    print(
        f"{len(things) / scenes:.1f} objects a scene, {(things < 32 ** 2).float().mean():.0%} below "
        f"32 x 32 pixels, {(things > 128 ** 2).float().mean():.1%} above 128 x 128,\n"
        f"the largest {things.max() / 2 ** 17:.0%} of an image; a half-size crop in the middle cuts "
        f"{cut.mean():.0%} of those it shows"
    )
    for k, c in enumerate(STREET):
        n = torch.tensor([int((s.categories == k).sum()) for s in street]).float()
        share = sum(int(a[s.categories == k].sum()) for a, s in zip(area, street)) / (
            scenes * 2**17
        )
        print(
            f"{c.name:12}in {(n > 0).float().mean():4.0%} of scenes, {n.mean():4.1f} each, "
            f"{share:5.1%} of pixels"
        )
    baseline, quality = ColourBaseline(StreetScenes(20, seed=1)), PanopticQuality(isthing)
    for s in street[:50]:
        quality.update(*baseline.predict(s.image), s.segments, s.categories, gt_crowd=s.crowd)
    print(
        "colour baseline: PQ {PQ:.1f}, things {PQ_th:.1f}, stuff {PQ_st:.1f}".format(
            **quality.compute()
        )
    )
    with figure_of(Path(out, "data.png"), 4, 4, size=(12, 6)) as axes:
        for s, (left, right) in zip(street[1:], axes.reshape(-1, 2)):
            left.imshow(s.image.permute(1, 2, 0))
            left.axis("off")
            draw(s.image, s.segments, s.categories, STREET, right)
