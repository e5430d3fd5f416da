"""What the toy street is painted with: portable random numbers, and flat shapes before a camera.

lab/street.py puts them together into scenes.
"""
import numpy as np

from data import Category

STREET = [
    Category("road", False, (128, 64, 128)),
    Category("sidewalk", False, (244, 35, 232)),
    Category("building", False, (90, 90, 90)),
    Category("vegetation", False, (107, 142, 35)),
    Category("sky", False, (70, 130, 180)),
    Category("car", True, (0, 60, 200)),
    Category("truck", True, (0, 150, 150)),
    Category("person", True, (220, 20, 60)),
    Category("sign", True, (250, 200, 0)),
]
ROAD, SIDEWALK, BUILDING, VEGETATION, SKY, CAR, TRUCK, PERSON, SIGN = range(9)

# How often; zenith, horizon and haze, light; metres at which haze takes half; are lamps lit?
WEATHER = [
    (3, [(.30, .50, .82), (.80, .87, .93), (1.0, .98, .94)], 400, 0),    # day
    (4, [(.58, .62, .68), (.78, .80, .82), (.80, .83, .88)], 250, 0),    # overcast
    (2, [(.42, .52, .72), (.98, .82, .60), (1.05, .86, .66)], 300, 0),   # evening sun
    (2, [(.13, .15, .32), (.85, .52, .38), (.52, .45, .52)], 290, 1),    # dusk
    (2, [(.70, .72, .74), (.76, .77, .78), (.82, .84, .86)], 45, 1),     # fog
]
# Silver and greys first: the road is grey as well.
PAINT = [(.82, .82, .84), (.55, .57, .60), (.33, .34, .37), (.10, .10, .12), (.70, .08, .08),
         (.10, .22, .52), (.78, .74, .64), (.12, .34, .20), (.85, .60, .10)]
CLOTH = PAINT + [(.95, .95, .95), (.20, .45, .70), (.75, .30, .50), (.45, .30, .20),
                 (.30, .50, .25), (.9, .4, .15)]
SKIN = [(.87, .68, .55), (.75, .55, .42), (.50, .34, .24), (.35, .23, .16)]
FACADE = [(.62, .50, .40), (.70, .66, .58), (.55, .30, .24), (.50, .52, .55), (.78, .72, .52),
          (.35, .36, .37), (.80, .84, .88)]
RED, WHITE, BLACK = (.8, .06, .08), (.93, .93, .9), (.1, .1, .1)
BLUE, GREEN, YELLOW = (.08, .25, .65), (.10, .42, .22), (.95, .78, .12)
GLASS, RUBBER, STEEL, LAMP = (.16, .20, .25), (.06, .06, .07), (.55, .56, .58), (1., .95, .75)
# Boxes in metres, the tail at 0: from, to, half width, y0, y1, slope, is it painted like the cab,
# has it windows? Then the length, where the wheels are, their radius.
BODIES = {
    CAR: ([(0, 4.2, .88, .22, .88, .05, 0, 0), (0, 3.2, .8, .88, 1.48, .6, 0, 1)],
          4.2, (.85, 3.4), .34),
    TRUCK: ([(0, 6, 1.2, .6, 3.4, 0, 0, 0), (6.1, 8, 1.2, .45, 1.5, 0, 1, 0),
             (6.1, 8, 1.2, 1.5, 2.5, .15, 1, 1)],
            8, (1., 2.2, 7.1), .48),
}
# Half width and length of an object's shadow.
SHADOW = {CAR: (1.1, 4.3), TRUCK: (1.5, 8.2), PERSON: (.4, .4), SIGN: (.3, .2),
          VEGETATION: (1.6, 1.5)}


def cell_and_fraction(v):
    """Numbers [N] >= 0 -> their whole parts (int) and what is left (float32)."""
    return np.floor(v).astype(int), (v - np.floor(v)).astype(np.float32)


class Dice:
    """Uniform random numbers from PCG64's raw integers. numpy promises these bits for all versions,
    but not the results of Generator's methods."""

    def __init__(self, *key):
        self.raw = np.random.PCG64(np.random.SeedSequence(key)).random_raw

    def __call__(self, low=0., high=1.):
        return low + (high - low) * ((self.raw() >> 11) * 2.**-53)

    def pick(self, items):
        """One of the items."""
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
    sine, power or exp."""

    def __init__(self, dice, h, w):
        self.dice, self.h, self.w = dice, h, w
        self.id = 0                                            # of what is being painted
        self.rgb, self.ids = np.zeros((h, w, 3), np.float32), np.zeros((h, w), np.int64)
        self.Y, self.X, self.focal = (np.arange(h) + .5) / h, (np.arange(w) + .5) / h, .9
        self.cx, self.horizon = w / h / 2 + dice(-.3, .3), dice(.34, .48)
        self.camera = dice(1.4, 2.3)                           # its height in metres
        _, sky, self.reach, self.lit = dice.pick([row for row in WEATHER for _ in range(row[0])])
        self.zenith, self.haze, self.light = np.float32(sky)
        self.sun = dice.pick([-1, 1])                          # which side is bright

    def air(self, colour, z):
        """A colour in this light, seen through z metres of haze."""
        light = np.float32(colour) * self.light
        return self.haze + (light - self.haze) * (self.reach / (self.reach + z))

    def pixels(self, low, high, count):
        """The pixels, of `count`, whose centres lie between two image coordinates -> (first, last
        + 1)."""
        return (min(max(int(np.ceil(v * self.h - .5)), 0), count) for v in (low, high))

    def paint(self, points, colour, disc=False):
        """Paints a flat convex polygon with corners (x, y, z) in metres, or the ellipse in its
        frame. Colour None: a shadow."""
        corners = [(self.cx + self.focal * x / z,
                    self.horizon + self.focal * (self.camera - y) / z) for x, y, z in points]
        (x0, y0), (x1, y1) = map(min, zip(*corners)), map(max, zip(*corners))
        (j0, j1), (i0, i1) = self.pixels(x0, x1, self.w), self.pixels(y0, y1, self.h)
        if i0 >= i1 or j0 >= j1:
            return
        y, x, rgb, mask = self.Y[i0:i1, None], self.X[j0:j1], self.rgb[i0:i1, j0:j1], True
        if disc:
            mask = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
        edges = [] if disc else list(zip(corners, corners[1:] + corners[:1]))
        # The sign of the area tells which way round the corners run.
        turn = sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges)
        for (ax, ay), (bx, by) in edges:
            mask = mask & (turn * (bx - ax) * (y - ay) >= turn * (by - ay) * (x - ax))
        if colour is None:
            rgb[mask] *= np.float32(.62)
            return
        if not (self.lit and colour in (LAMP, RED)):           # lamps shine in dusk and fog
            colour = self.air(colour, min(z for _, _, z in points))
        light = 1.15 - .3 * (y - y0) / (y1 - y0)               # brighter above than below
        np.copyto(rgb, (light * colour).astype(np.float32)[:, None], where=mask[..., None])
        np.copyto(self.ids[i0:i1, j0:j1], self.id, where=mask)

    def figure(self, x, z, rows, s=1.):
        """Paints rows of (colour, numbers) at (x, z), s times as large: u v r is a disc, u v u v a
        rectangle, more numbers a polygon."""
        for colour, *n in rows:
            corners = n
            if len(n) == 3:
                corners = [n[0] - n[2], n[1] - n[2], n[0] + n[2], n[1] + n[2]]
            elif len(n) == 4:
                corners = [n[0], n[1], n[2], n[1], n[2], n[3], n[0], n[3]]
            points = [(x + s * u, s * v, z) for u, v in zip(corners[::2], corners[1::2])]
            self.paint(points, colour, len(n) == 3)

    def box(self, x, y, z, *, lean, colour, windows):
        """The faces of a box that a camera can see. x, y, z: from, to; the roof is `lean` metres
        smaller at each end."""
        (x0, x1), (y0, y1), (z0, z1) = x, y, z
        a, b, c, d = x0 + lean / 3, x1 - lean / 3, z0 + lean, z1 - lean          # the roof
        m = y0 + .86 * (y1 - y0)                               # where windows end
        if self.camera > y1:
            roof = [(a, y1, c), (b, y1, c), (b, y1, d), (a, y1, d)]
            self.paint(roof, [1.1 * v for v in colour])
        if x0 > 0 or x1 < 0:                                   # a flank: foot at s, top at t
            if x0 > 0:
                s, t, light = x0, a, .66 + .34 * (self.sun < 0)
            else:
                s, t, light = x1, b, .66 + .34 * (self.sun > 0)
            flank = [(s, y0, z0), (s, y0, z1), (t, y1, d), (t, y1, c)]
            self.paint(flank, [v * light for v in colour])
            for k in (.1, .54) if windows else ():             # two, with a pillar between them
                u = [e + (f - e) * v for v in (k, k + .36) for e, f in ((z0, z1), (c, d))]
                x = s + .86 * (t - s)
                self.paint([(s, y0, u[0]), (s, y0, u[2]), (x, m, u[3]), (x, m, u[1])], GLASS)
        self.paint([(x0, y0, z0), (x1, y0, z0), (b, y1, c), (a, y1, c)], colour)
        if windows:
            self.paint([(x0 + .12, y0, z0), (x1 - .12, y0, z0), (b - .1, m, c), (a + .1, m, c)],
                       GLASS)

    def vehicle(self, x, z, category, *, colour, way):
        """A car or truck that shows its front (way 1) or rear (-1), and a flank if it is not
        straight ahead."""
        (boxes, long, wheels, r), cab = BODIES[category], self.dice.pick(PAINT)
        half, y = boxes[0][2], boxes[0][3]

        def place(metres):
            return z + (long - metres if way > 0 else metres)

        self.figure(x, z + .4, [(RUBBER, k * half * .6, 0, k * half * .9, .6) for k in (-1, 1)])
        for a, b, w, y0, y1, lean, other, windows in sorted(boxes, key=lambda row: way * row[0]):
            self.box((x - w, x + w), (y0, y1), sorted((place(a), place(b))), lean=lean,
                     colour=cab if other else colour, windows=windows)           # far to near
        flank = x - half if x > 0 else x + half
        for d in (place(t) for t in wheels if flank * x > 0):
            for k, paint in ((r, RUBBER), (r / 2, STEEL)):
                n = k * abs(flank) / d                         # round wheels look narrow at a slant
                self.paint([(flank - n, r - k, d), (flank + n, r + k, d)], paint, disc=True)
        plate = [(WHITE, -.26, y + .12, .26, y + .24)]
        lamp = LAMP if way > 0 else RED
        lamps = [(lamp, k * (half - .4), y + .3, k * (half - .08), y + .5) for k in (-1, 1)]
        self.figure(x, z - .01, plate + lamps)

    def person(self, x, z):
        """An adult or, one in eight, a child, in the middle of a step."""
        d = self.dice
        s = d(.88, 1.06) if d() < .88 else d(.6, .75)
        step, arm, dark = d(-.22, .22), d(.12, .4), d(.7, 1.)
        hair, skin = d.pick(PAINT[2:4] + CLOTH[-3:]), d.pick(SKIN)
        shirt, legs = d.pick(CLOTH), d.pick(CLOTH)
        sleeve = [dark * c for c in shirt]
        arms = [(sleeve, k * .16, 1.43, k * .25, 1.4, k * (arm + .06), .88, k * (arm - .03), .86)
                for k in (-1, 1)]
        self.figure(x, z, [
            (legs, 0, .85, .18, .85, step + .07, .05, step - .06, .05),
            (RUBBER, step - .08, 0, step + .12, .08),
            (legs, -.18, .85, 0, .85, .07 - step, .05, -.06 - step, .05),
            (RUBBER, -.08 - step, 0, .12 - step, .08),
            *arms,
            (skin, -arm, .84, .06),
            (skin, arm, .84, .06),
            (shirt, -.2, 1.45, .2, 1.45, .18, .82, -.18, .82),
            (hair, 0, 1.64, .15),
            (skin, 0, 1.58, .12)], s=s)

    def sign(self, x, z):
        """A round, triangular or rectangular traffic sign on its pole; lengths in radii of it."""
        d = self.dice
        y, shape, w = d(4.6, 5.6), d.pick([0, 1, 2, 2]), d.pick([.9, .9, 1.6])
        pairs = [[(RED, WHITE), (WHITE, BLUE), (WHITE, RED)],
                 [(RED, WHITE), (RED, YELLOW)],
                 [(WHITE, GREEN), (WHITE, BLUE), (BLACK, WHITE), (WHITE, YELLOW)]]
        rim, face = d.pick(pairs[shape])
        plates = [
            [(rim, 0, y, 1.), (face, 0, y, .72), (rim, -.45, y - .13, .45, y + .13)],
            [(rim, -1.15, y - .67, 1.15, y - .67, 0, y + 1.33),
             (face, -.68, y - .4, .68, y - .4, 0, y + .8), (BLACK, -.08, y - .3, .08, y + .35)],
            [(rim, -w, y - .85, w, y + .85), (face, -.82 * w, y - .66, .82 * w, y + .66),
             (rim, -.5 * w, y + .15, .4 * w, y + .35), (rim, -.5 * w, y - .35, .5 * w, y - .15)]]
        pole = [(STEEL, -.14, 0, .14, y)]
        self.figure(x, z, pole + plates[shape], s=d(.38, .5))

    def tree(self, x, z):
        """A trunk and seven discs of leaves, brighter and brighter."""
        d = self.dice
        tall, green = d(4.5, 8.), (d(.16, .34), d(.34, .50), d(.10, .22))
        trunk = [((.30, .23, .17), -.14, 0, .14, .6 * tall)]
        leaves = [([(.6 + .1 * k) * c for c in green], d(-1., 1.), tall * d(.55, .95), d(.8, 1.4))
                  for k in range(7)]
        self.figure(x, z, trunk + leaves)
