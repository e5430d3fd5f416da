"""OverlappingCells: the toy problem of AdaptIS (section 6), rod-like cells on top of each other."""
import numpy as np
import torch

from data import Category, Sample, new_numbers

# Red with a blue rim, as in the authors' clear image, whose medians are (246, 3, 8), (64, 0, 155).
# Deviation: the paper's text says "blue with red boundary".
BODY, RIM = np.array([[252, 10, 50], [60, 8, 175]], np.float32)[:, :, None, None] / 255
REACH = 25          # pixels: half of the patch on which a cell is painted
SMALLEST = 30       # pixels that an object shows at least
RIM_WIDTH = 1.6     # pixels


class Rods:
    """n cells: centres [n, 2] in pixels, angles, lengths and widths [n]."""

    def __init__(self, centre, angle, length, width):
        self.centre, self.angle, self.length, self.width = centre, angle, length, width

    def half_box(self):
        """Half the width and height of each cell's box [n, 2], one pixel of margin included: the
        half length of the core along each axis and the radius of the round ends."""
        direction = np.abs(np.stack([np.cos(self.angle), np.sin(self.angle)], 1))
        return direction * (self.length - self.width)[:, None] / 2 + self.width[:, None] / 2 + 1

    def distance(self, origin):
        """Signed distance float32 [n, 50, 50] of each pixel of a patch at `origin` [n, 2] from the
        outline of its rod; negative inside."""
        pixel = np.arange(0.5, 2 * REACH, dtype=np.float32)[None]
        offset = (self.centre - origin).astype(np.float32)
        x, y = (pixel - offset[:, i:i + 1] for i in (0, 1))
        cos, sin, core, radius = (
            v.astype(np.float32)[:, None, None]
            for v in (np.cos(self.angle), np.sin(self.angle), (self.length - self.width) / 2,
                      self.width / 2))
        along = cos * x[:, None] + sin * y[:, :, None]
        across = cos * y[:, :, None] - sin * x[:, None]
        beyond = np.maximum(np.abs(along) - core, 0)
        return np.sqrt(beyond * beyond + across * across) - radius


class OverlappingCells:
    """Images of `size` (side, or height and width) with count[0] to count[1] cells of one colour.

    They are "many overlapping objects that have very similar bounding boxes". `augment` adds random
    blur and noise. Image i depends on (seed, i) alone. [i] -> Sample: segment 1 is the
    ground, which is stuff, then come the cells.

    Choice: a quarter of the cells is a twin of the one before: same size, nearly the same centre,
      and either mirrored, so that their boxes coincide, or turned by a few degrees. The paper draws
      position and orientation at random, which gives few such pairs.
    Choice: cells are 18 to 47 pixels long, 6 to 11 wide and lie wholly inside. The authors' lengths
      are alike, but their border cells are cut.
    Choice: a cell of which fewer than 30 pixels show is no object. Its pixels are void, which
      training ignores. The authors' smallest visible cell has 31.
    Choice: the noise is partly grey, partly coloured. The authors' is grey."""
    categories = [Category("ground", False, (235, 235, 235)), Category("cell", True, (220, 30, 60))]

    def __init__(self, length, size=96, count=(8, 22), seed=0, augment=True):
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 2 * REACH or not 0 <= count[0] <= count[1]:
            raise ValueError(f"size {size}, count {count}: a side must have {2 * REACH} pixels at "
                             "least, as cells are up to 47 long; count is (fewest, most)")
        self.length, self.count, self.seed, self.augment = length, count, seed, augment

    def __len__(self):
        return self.length

    def cells(self, random):
        """Draws the cells of an image -> Rods."""
        n = int(random.integers(self.count[0], self.count[1] + 1))
        length, width = random.uniform(18, 47, n), random.uniform(6, 11, n)
        angle = random.uniform(0, np.pi, n)
        twin, mirrored = random.random(n) < 0.25, random.random(n) < 0.5
        place, apart = random.random((n, 2)), random.normal(0, 1.5, (n, 2))
        turn = random.normal(0, 0.12, n)
        twins = np.flatnonzero(twin[1:]) + 1
        for k in twins:
            length[k], width[k] = length[k - 1], width[k - 1]
            angle[k] = -angle[k - 1] if mirrored[k] else angle[k - 1] + turn[k]
        rods = Rods(None, angle, length, width)
        half = rods.half_box()
        limit = np.array([self.width, self.height]) - half
        rods.centre = half + place * (limit - half)
        for k in twins:
            rods.centre[k] = np.clip(rods.centre[k - 1] + apart[k], half[k], limit[k])
        return rods

    def paint(self, rods):
        """Paints cells in their order -> image [3, H, W], owner int64 [H, W]: which cell shows,
        1..n, 0 for none. A pixel at distance d from an outline is covered by clip(1/2 - d, 0, 1).

        Two layers are painted, [all of the cell, its body]. They mix as colours do; the colours
        follow from them in the end. All distances are measured at once, each on its own patch."""
        origin = np.floor(rods.centre).astype(int) - REACH                     # [n, 2]
        d = rods.distance(origin)
        cover = np.minimum(np.maximum(0.5 - d, 0), 1)
        body = np.minimum(np.maximum(0.5 - RIM_WIDTH - d, 0), 1)
        ink = np.stack([np.ones_like(d), body], 1)                             # [n, 2, 50, 50]
        layers = np.zeros((2, self.height, self.width), np.float32)
        owner = np.zeros((self.height, self.width), np.int64)
        for k, (left, top) in enumerate(origin):
            rows = slice(max(top, 0), top + 2 * REACH)
            columns = slice(max(left, 0), left + 2 * REACH)
            under, shown = layers[:, rows, columns], owner[rows, columns]      # views
            part = (slice(rows.start - top, rows.start - top + shown.shape[0]),
                    slice(columns.start - left, columns.start - left + shown.shape[1]))
            under += cover[k][part] * (ink[(k, slice(None), *part)] - under)
            shown[cover[k][part] >= 0.5] = k + 1
        return 1 + layers[0] * (RIM - 1) + layers[1] * (BODY - RIM), owner

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"image {i}: there are {self.length}, counted from 0")
        random = np.random.default_rng([self.seed, i])
        image, owner = self.paint(self.cells(random))
        if self.augment:
            image = disturb(image, random)
        area = np.bincount(owner.ravel())
        keep = torch.from_numpy(area >= SMALLEST)
        keep[0] = bool(area[0] > 0)                            # the ground is segment 1, if any
        number = new_numbers(keep)[1:]
        categories = torch.ones(int(keep.sum()), dtype=torch.int64)
        categories[:int(keep[0])] = 0
        crowd = torch.zeros(len(categories), dtype=torch.bool)
        return Sample(torch.from_numpy(image), number[torch.from_numpy(owner)], categories, crowd,
                      f"cells-{self.seed}-{i}")

    def labels(self, i):
        """Segments, categories and crowd of image i, for samplers that read labels first."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd


def disturb(image, random):
    """Random blur, a Gaussian of up to one pixel, and noise; some images stay clean."""
    sigma = max(0, random.uniform(-0.3, 1))
    strength, grey = max(0, random.uniform(-0.1, 0.35)), random.random()
    if sigma > 0.2:
        kernel = np.exp(-0.5 * (np.arange(-3, 4) / sigma) ** 2).astype(np.float32)
        kernel /= kernel.sum()
        h, w = image.shape[1:]
        edge = np.pad(image, ((0, 0), (3, 3), (0, 0)), mode="edge")
        image = sum(k * edge[:, i:i + h] for i, k in enumerate(kernel))
        edge = np.pad(image, ((0, 0), (0, 0), (3, 3)), mode="edge")
        image = sum(k * edge[:, :, i:i + w] for i, k in enumerate(kernel))
    for share, channels in ((grey, 1), (1 - grey, 3)):
        size = (channels, *image.shape[1:])
        noise = random.standard_normal(size, dtype=np.float32)
        image = image + np.float32(strength * share) * noise
    return np.minimum(np.maximum(image, 0), 1)
