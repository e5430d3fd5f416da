"""What the toy street is painted with: portable random numbers, flat shapes before a camera,
figures.

lab/street.py puts them together into scenes.
"""

import numpy as np

from data import Category

STREET = [
    Category(*c)
    for c in [
        ("road", False, (128, 64, 128)),
        ("sidewalk", False, (244, 35, 232)),
        ("building", False, (90, 90, 90)),
        ("vegetation", False, (107, 142, 35)),
        ("sky", False, (70, 130, 180)),
        ("car", True, (0, 60, 200)),
        ("truck", True, (0, 150, 150)),
        ("person", True, (220, 20, 60)),
        ("sign", True, (250, 200, 0)),
    ]
]
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, TRUCK, PERSON, SIGN = range(9)
# how often; zenith, horizon and haze, light; metres at which haze takes half; are lamps lit
WEATHER = [
    (3, [(0.30, 0.50, 0.82), (0.80, 0.87, 0.93), (1.0, 0.98, 0.94)], 400, 0),  # day
    (4, [(0.58, 0.62, 0.68), (0.78, 0.80, 0.82), (0.80, 0.83, 0.88)], 250, 0),  # overcast
    (2, [(0.42, 0.52, 0.72), (0.98, 0.82, 0.60), (1.05, 0.86, 0.66)], 300, 0),  # evening sun
    (2, [(0.13, 0.15, 0.32), (0.85, 0.52, 0.38), (0.52, 0.45, 0.52)], 290, 1),  # dusk
    (2, [(0.70, 0.72, 0.74), (0.76, 0.77, 0.78), (0.82, 0.84, 0.86)], 45, 1),
]  # fog
PAINT = [
    (0.82, 0.82, 0.84),
    (0.55, 0.57, 0.60),
    (0.33, 0.34, 0.37),
    (0.10, 0.10, 0.12),
    (0.70, 0.08, 0.08),
    (0.10, 0.22, 0.52),
    (0.78, 0.74, 0.64),
    (0.12, 0.34, 0.20),
    (0.85, 0.60, 0.10),
]  # silver and greys first: the road is grey as well
CLOTH = PAINT + [
    (0.95, 0.95, 0.95),
    (0.20, 0.45, 0.70),
    (0.75, 0.30, 0.50),
    (0.45, 0.30, 0.20),
    (0.30, 0.50, 0.25),
    (0.9, 0.4, 0.15),
]
SKIN = [(0.87, 0.68, 0.55), (0.75, 0.55, 0.42), (0.50, 0.34, 0.24), (0.35, 0.23, 0.16)]
FACADE = [
    (0.62, 0.50, 0.40),
    (0.70, 0.66, 0.58),
    (0.55, 0.30, 0.24),
    (0.50, 0.52, 0.55),
    (0.78, 0.72, 0.52),
    (0.35, 0.36, 0.37),
    (0.80, 0.84, 0.88),
]
RED, WHITE, BLACK, BLUE, GREEN = (
    (0.8, 0.06, 0.08),
    (0.93, 0.93, 0.9),
    (0.1, 0.1, 0.1),
    (0.08, 0.25, 0.65),
    (0.10, 0.42, 0.22),
)
YELLOW, GLASS, RUBBER, STEEL, LAMP = (
    (0.95, 0.78, 0.12),
    (0.16, 0.20, 0.25),
    (0.06, 0.06, 0.07),
    (0.55, 0.56, 0.58),
    (1.0, 0.95, 0.75),
)
# boxes in m, tail at 0: from, to, half width, y0, y1, slope, cab's paint?, windows?; length; wheels
# at; r
BODIES = {
    CAR: (
        [(0, 4.2, 0.88, 0.22, 0.88, 0.05, 0, 0), (0, 3.2, 0.8, 0.88, 1.48, 0.6, 0, 1)],
        4.2,
        (0.85, 3.4),
        0.34,
    ),
    TRUCK: (
        [
            (0, 6, 1.2, 0.6, 3.4, 0, 0, 0),
            (6.1, 8, 1.2, 0.45, 1.5, 0, 1, 0),
            (6.1, 8, 1.2, 1.5, 2.5, 0.15, 1, 1),
        ],
        8,
        (1.0, 2.2, 7.1),
        0.48,
    ),
}
SHADOW = {
    CAR: (1.1, 4.3),
    TRUCK: (1.5, 8.2),
    PERSON: (0.4, 0.4),
    SIGN: (0.3, 0.2),
    VEGETATION: (1.6, 1.5),
}  # half width, l


def cell_and_fraction(v):
    """Numbers [N] >= 0 -> their whole parts (int) and what is left (float32)."""
    return np.floor(v).astype(int), (v - np.floor(v)).astype(np.float32)


class Dice:
    """Uniform random numbers from PCG64's raw integers. numpy promises these bits for all versions,
    but not the results of Generator's methods."""

    def __init__(self, *key):
        self.raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw

    def __call__(self, low=0.0, high=1.0):
        return low + (high - low) * ((self.raw() >> 11) * 2.0**-53)

    def pick(self, items):
        return items[int(self() * len(items))]

    def field(self, *shape):
        """Random numbers float32 of this shape, 0..1."""
        bits = self.raw(int(np.prod(shape))).reshape(shape) >> np.uint64(40)
        return bits.astype(np.float32) * np.float32(2**-24)

    def clouds(self, n, y, x):
        """Smooth noise [len(y), len(x)]: a random grid of n by 2 n cells, bilinear in between; y
        and x in 0..1."""
        i, s = cell_and_fraction(y * n)
        j, t = cell_and_fraction(x * 2 * n)
        grid = self.field(n + 2, 2 * n + 2)
        grid = grid[i] + (grid[i + 1] - grid[i]) * s[:, None]
        return grid[:, j] + (grid[:, j + 1] - grid[:, j]) * t


class Painter:
    """One scene while it is painted. World: metres, x right of the camera, y up from the ground, z
    ahead. Image: y in 0..1 downwards, x in the same unit: the size in pixels decides only how
    finely the scene is sampled.

    Choice: only + - * / and comparisons make the image, which IEEE rounds alike everywhere; no
    sine, power or exp.
    """

    def __init__(self, dice, h, w):
        self.dice, self.h, self.w, self.id = dice, h, w, 0  # id: of what is being painted
        self.rgb, self.ids = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.int64)
        self.Y, self.X, self.focal = (np.arange(h) + 0.5) / h, (np.arange(w) + 0.5) / h, 0.9
        self.cx, self.horizon, self.camera = (
            w / h / 2 + dice(-0.3, 0.3),
            dice(0.34, 0.48),
            dice(1.4, 2.3),
        )
        _, sky, self.reach, self.lit = dice.pick([row for row in WEATHER for _ in range(row[0])])
        (self.zenith, self.haze, self.light), self.sun = np.float32(sky), dice.pick(
            [-1, 1]
        )  # sun: the bright side

    def air(self, colour, z):
        """A colour in this light, seen through z metres of haze."""
        return self.haze + (np.float32(colour) * self.light - self.haze) * (
            self.reach / (self.reach + z)
        )

    def paint(self, points, colour, disc=False):
        """Paint a flat convex polygon with corners (x, y, z) in metres, or the ellipse in its
        frame; None: a shadow."""
        p = [
            (self.cx + self.focal * x / z, self.horizon + self.focal * (self.camera - y) / z)
            for x, y, z in points
        ]
        (x0, y0), (x1, y1) = map(min, zip(*p)), map(max, zip(*p))
        j0, j1, i0, i1 = (
            min(max(int(np.ceil(v * self.h - 0.5)), 0), n)  # pixels whose centres lie between
            for v, n in ((x0, self.w), (x1, self.w), (y0, self.h), (y1, self.h))
        )
        if i0 >= i1 or j0 >= j1:
            return
        y, x, rgb, mask = self.Y[i0:i1, None], self.X[j0:j1], self.rgb[i0:i1, j0:j1], True
        if disc:
            mask = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
        edges = [] if disc else list(zip(p, p[1:] + p[:1]))
        turn = sum(
            ax * by - bx * ay for (ax, ay), (bx, by) in edges
        )  # the sign tells which way round they run
        for (ax, ay), (bx, by) in edges:
            mask = mask & (turn * (bx - ax) * (y - ay) >= turn * (by - ay) * (x - ax))
        if colour is None:
            rgb[mask] *= np.float32(0.62)
            return
        if not (self.lit and colour in (LAMP, RED)):  # lamps shine in dusk and fog
            colour = self.air(colour, min(z for _, _, z in points))
        light = 1.15 - 0.3 * (y - y0) / (y1 - y0)  # brighter above than below
        np.copyto(rgb, (light * colour).astype(np.float32)[:, None], where=mask[..., None])
        np.copyto(self.ids[i0:i1, j0:j1], self.id, where=mask)

    def figure(self, x, z, rows, s=1.0):
        """Paint rows of (colour, numbers) at (x, z): u v r is a disc, u v u v a rectangle, more a
        polygon."""
        for colour, *n in rows:
            corners = (
                [n[0] - n[2], n[1] - n[2], n[0] + n[2], n[1] + n[2]]
                if len(n) == 3
                else [n[0], n[1], n[2], n[1], n[2], n[3], n[0], n[3]] if len(n) == 4 else n
            )
            self.paint(
                [(x + s * u, s * v, z) for u, v in zip(corners[::2], corners[1::2])],
                colour,
                len(n) == 3,
            )

    def box(self, x0, x1, y0, y1, z0, z1, lean, colour, windows):
        """The faces of a box that a camera can see, with a roof `lean` metres smaller on each
        end."""
        a, b, c, d, m = x0 + lean / 3, x1 - lean / 3, z0 + lean, z1 - lean, y0 + 0.86 * (y1 - y0)
        if self.camera > y1:
            self.paint([(a, y1, c), (b, y1, c), (b, y1, d), (a, y1, d)], [1.1 * v for v in colour])
        if x0 > 0 or x1 < 0:
            s, t, light = (
                (x0, a, 0.66 + 0.34 * (self.sun < 0))
                if x0 > 0
                else (x1, b, 0.66 + 0.34 * (self.sun > 0))
            )
            self.paint(
                [(s, y0, z0), (s, y0, z1), (t, y1, d), (t, y1, c)], [v * light for v in colour]
            )
            for k in (0.1, 0.54) if windows else ():  # two of them with a pillar between
                u = [e + (f - e) * v for v in (k, k + 0.36) for e, f in ((z0, z1), (c, d))]
                x = s + 0.86 * (t - s)
                self.paint([(s, y0, u[0]), (s, y0, u[2]), (x, m, u[3]), (x, m, u[1])], GLASS)
        self.paint([(x0, y0, z0), (x1, y0, z0), (b, y1, c), (a, y1, c)], colour)
        if windows:
            self.paint(
                [(x0 + 0.12, y0, z0), (x1 - 0.12, y0, z0), (b - 0.1, m, c), (a + 0.1, m, c)], GLASS
            )

    def vehicle(self, x, z, kind, colour, way):
        """A car or truck that shows its front (way 1) or rear (-1), and a flank if it is not
        straight ahead."""
        (boxes, long, wheels, r), cab = BODIES[kind], self.dice.pick(PAINT)
        half, y, tip = boxes[0][2], boxes[0][3], lambda t: z + (long - t if way > 0 else t)
        self.figure(x, z + 0.4, [(RUBBER, k * half * 0.6, 0, k * half * 0.9, 0.6) for k in (-1, 1)])
        for a, b, w, y0, y1, lean, other, windows in sorted(
            boxes, key=lambda row: way * row[0]
        ):  # far to near
            near, far = sorted((tip(a), tip(b)))
            self.box(x - w, x + w, y0, y1, near, far, lean, cab if other else colour, windows)
        flank = x - half if x > 0 else x + half
        for d in (tip(t) for t in wheels if flank * x > 0):  # round wheels look narrow at a slant
            for k, c in ((r, RUBBER), (r / 2, STEEL)):
                n = k * abs(flank) / d
                self.paint([(flank - n, r - k, d), (flank + n, r + k, d)], c, disc=True)
        self.figure(
            x,
            z - 0.01,
            [(WHITE, -0.26, y + 0.12, 0.26, y + 0.24)]
            + [
                (LAMP if way > 0 else RED, k * (half - 0.4), y + 0.3, k * (half - 0.08), y + 0.5)
                for k in (-1, 1)
            ],
        )

    def person(self, x, z):
        d = self.dice
        s, step, arm, dark = (
            d(0.88, 1.06) if d() < 0.88 else d(0.6, 0.75),
            d(-0.22, 0.22),
            d(0.12, 0.4),
            d(0.7, 1.0),
        )
        hair, skin, shirt, legs = (
            d.pick(PAINT[2:4] + CLOTH[-3:]),
            d.pick(SKIN),
            d.pick(CLOTH),
            d.pick(CLOTH),
        )
        self.figure(
            x,
            z,
            [
                (legs, 0, 0.85, 0.18, 0.85, step + 0.07, 0.05, step - 0.06, 0.05),
                (RUBBER, step - 0.08, 0, step + 0.12, 0.08),
                (legs, -0.18, 0.85, 0, 0.85, 0.07 - step, 0.05, -0.06 - step, 0.05),
                (RUBBER, -0.08 - step, 0, 0.12 - step, 0.08),
                *[
                    (
                        [dark * c for c in shirt],
                        k * 0.16,
                        1.43,
                        k * 0.25,
                        1.4,
                        k * (arm + 0.06),
                        0.88,
                        k * (arm - 0.03),
                        0.86,
                    )
                    for k in (-1, 1)
                ],
                (skin, -arm, 0.84, 0.06),
                (skin, arm, 0.84, 0.06),
                (shirt, -0.2, 1.45, 0.2, 1.45, 0.18, 0.82, -0.18, 0.82),
                (hair, 0, 1.64, 0.15),
                (skin, 0, 1.58, 0.12),
            ],
            s,
        )

    def sign(self, x, z):
        d = self.dice
        y, kind, w = (
            d(4.6, 5.6),
            d.pick([0, 1, 2, 2]),
            d.pick([0.9, 0.9, 1.6]),
        )  # in radii of the plate
        a, b = d.pick(
            [
                [(RED, WHITE), (WHITE, BLUE), (WHITE, RED)],
                [(RED, WHITE), (RED, YELLOW)],
                [(WHITE, GREEN), (WHITE, BLUE), (BLACK, WHITE), (WHITE, YELLOW)],
            ][kind]
        )  # rim and face
        self.figure(
            x,
            z,
            [(STEEL, -0.14, 0, 0.14, y)]
            + [
                [(a, 0, y, 1.0), (b, 0, y, 0.72), (a, -0.45, y - 0.13, 0.45, y + 0.13)],
                [
                    (a, -1.15, y - 0.67, 1.15, y - 0.67, 0, y + 1.33),
                    (b, -0.68, y - 0.4, 0.68, y - 0.4, 0, y + 0.8),
                    (BLACK, -0.08, y - 0.3, 0.08, y + 0.35),
                ],
                [
                    (a, -w, y - 0.85, w, y + 0.85),
                    (b, -0.82 * w, y - 0.66, 0.82 * w, y + 0.66),
                    (a, -0.5 * w, y + 0.15, 0.4 * w, y + 0.35),
                    (a, -0.5 * w, y - 0.35, 0.5 * w, y - 0.15),
                ],
            ][kind],
            d(0.38, 0.5),
        )

    def tree(self, x, z):
        d = self.dice
        tall, green = d(4.5, 8.0), (d(0.16, 0.34), d(0.34, 0.50), d(0.10, 0.22))
        self.figure(
            x,
            z,
            [((0.30, 0.23, 0.17), -0.14, 0, 0.14, 0.6 * tall)]
            + [
                (
                    [(0.6 + 0.1 * k) * c for c in green],
                    d(-1.0, 1.0),
                    tall * d(0.55, 0.95),
                    d(0.8, 1.4),
                )
                for k in range(7)
            ],
        )
