"""OverlappingCells: the toy problem of AdaptIS (section 6), rod-like cells on top of each other."""
import numpy as np
import torch

from data import Category, Sample

# Red with a blue rim, as in the authors' clear image. Deviation: the paper's text says "blue with
# red boundary". One rim and one spread for all cells: the best of 48 by the mean colours at 1, 2
# and 3 pixels from the outline, beside ground and beside cells; with JPEG's colour 3 of 255 remain.
BODY, RIM = np.array([[246, 3, 8], [0, 0, 255]], np.float32)[:, :, None, None] / 255
REACH = 25          # pixels: half of the patch on which a cell is painted
LONGEST = 47        # pixels: the longest cell
INSIDE = 11         # pixels: a cell's centre is so far inside the image
SMALLEST = 30       # pixels that a cell shows at least
RIM_WIDTH = 1.2     # pixels
SPREAD = 0.3        # pixels: ink reaches so far beyond the outline
THICK, THIN, THICK_SHARE = 2.0, 1.0, 0.2   # varied images: rims in pixels; share of the thick ones
LARGEST_SPREAD = 0.5                       # varied images: the spread is uniform between 0 and this


class Rods:
    """n cells: centres [n, 2] in pixels, angles, lengths and widths [n]."""

    def __init__(self, centre, angle, length, width):
        self.centre, self.angle, self.length, self.width = centre, angle, length, width

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

    They are "many overlapping objects that have very similar bounding boxes". `augment` blurs half
    of the images, adds grey noise to half and halves the resolution of colour in half. Image i
    depends on (seed, i) alone. [i] -> Sample: segment 1 is the ground, which is stuff, then come
    the cells. No pixel is void.

    Sizes and colours follow the authors' image of 700 cells, where the longest extents of visible
    cells are 14, 27, 41 and 48 pixels (5%, 50%, 95%, all; here 15, 27, 42 and 48), the smallest
    area is 31 pixels and centres lie 11 pixels inside. Strengths of blur and noise: see `disturb`.
    Choice: lengths are normal with mean 29 and deviation 8, within 16 and 47; widths 6.5 to 10.
    Choice: a cell of which fewer than 30 pixels would show is not painted. Half as many cells again
      are drawn to replace such cells; where these do not suffice, the image has fewer.
    Choice: `varied` is the share of images that are as uneven as the authors': a fifth of the cells
      has a rim of 2 pixels, the others of 1; ink spreads by 0 to 0.5 pixels, which differs from
      cell to cell; blur is released code's, of 2 to 4 pixels. Quantiles over the cells of their
      clear image: 3 of 255 remain, of one rim and one spread for all cells 13. A blur of an even
      number of pixels moves the image by half a pixel against its masks.
    Choice: with `twins` that share of the cells copies the cell in front of it: same size, nearly
      the same centre, either mirrored, so that their boxes coincide, or turned by a few degrees.
      Twins are what a box cannot tell apart. The paper draws places at random: the default is 0."""
    categories = [Category("ground", False, (235, 235, 235)), Category("cell", True, (220, 30, 60))]

    def __init__(self, length, size=96, count=(8, 22), seed=0, augment=True, *, twins=0.0,
                 varied=0.0):
        self.height, self.width = (size, size) if isinstance(size, int) else size
        if min(self.height, self.width) < 2 * REACH or not 0 <= count[0] <= count[1]:
            raise ValueError(f"size {size}, count {count}: a side must have {2 * REACH} pixels at "
                             f"least, as cells are up to {LONGEST} long; count is (fewest, most)")
        self.length, self.count, self.seed, self.augment = length, count, seed, augment
        self.twins, self.varied = twins, varied

    def __len__(self):
        return self.length

    def cells(self, random):
        """Draws half as many cells again as the image will have -> (Rods, front first, number of
        cells to paint)."""
        count = int(random.integers(self.count[0], self.count[1] + 1))
        n = count + count // 2 + 4
        length, width = random.normal(29, 8, n).clip(16, LONGEST), random.uniform(6.5, 10, n)
        angle, place = random.uniform(0, np.pi, n), random.random((n, 2))
        centre = INSIDE + place * (np.array([self.width, self.height]) - 2 * INSIDE)
        for k in 1 + np.flatnonzero(random.random(n - 1) < self.twins):
            length[k], width[k] = length[k - 1], width[k - 1]
            centre[k] = centre[k - 1] + random.normal(0, 1.5, 2)
            turned = angle[k - 1] + random.normal(0, 0.12)
            angle[k] = -angle[k - 1] if random.random() < 0.5 else turned
        return Rods(centre, angle, length, width), count

    def paint(self, rods, count, rim=RIM_WIDTH, spread=SPREAD):
        """Paints the first `count` cells that show enough, front first -> image [3, H, W], owner
        int64 [H, W]: which of them shows, 1..count, 0 for none. rim and spread: float or [n, 1, 1].

        A pixel at distance d from an outline is covered by clip(1/2 + spread - d, 0, 1). Two layers
        are painted, [all of the cell, its body], each below what is there already; `clear` is the
        share of a pixel that no cell covers yet. The colours follow from the layers in the end."""
        origin = np.floor(rods.centre).astype(int) - REACH                     # [n, 2]
        d = rods.distance(origin)
        cover = np.minimum(np.maximum(0.5 + spread - d, 0), 1)
        body = np.minimum(np.maximum(0.5 + spread - rim - d, 0), 1)
        clear = np.ones((self.height, self.width), np.float32)
        red = np.zeros_like(clear)
        owner = np.zeros((self.height, self.width), np.int64)
        painted = 0
        for k, (left, top) in enumerate(origin):
            rows = slice(max(top, 0), top + 2 * REACH)
            columns = slice(max(left, 0), left + 2 * REACH)
            shown, rest = owner[rows, columns], clear[rows, columns]           # views
            part = (k, slice(rows.start - top, rows.start - top + shown.shape[0]),
                    slice(columns.start - left, columns.start - left + shown.shape[1]))
            new = (d[part] <= 0) & (shown == 0)
            if painted < count and new.sum() >= SMALLEST:
                painted += 1
                shown[new] = painted
                red[rows, columns] += rest * cover[part] * body[part]
                rest *= 1 - cover[part]
        return 1 + (1 - clear) * (RIM - 1) + red * (BODY - RIM), owner

    def __getitem__(self, i):
        if not 0 <= i < self.length:
            raise IndexError(f"image {i}: there are {self.length}, counted from 0")
        random = np.random.default_rng([self.seed, i])
        varied = self.varied > 0 and random.random() < self.varied
        rods, count = self.cells(random)
        look = ()
        if varied:
            n = len(rods.angle)
            rim = np.where(random.random(n) < THICK_SHARE, THICK, THIN)
            look = [v.astype(np.float32)[:, None, None]
                    for v in (rim, random.uniform(0, LARGEST_SPREAD, n))]
        image, owner = self.paint(rods, count, *look)
        if self.augment:
            image = disturb(image, random, box=varied)
        categories = torch.ones(1 + int(owner.max()), dtype=torch.int64)
        categories[0] = 0
        return Sample(torch.from_numpy(image), torch.from_numpy(owner + 1), categories,
                      torch.zeros(len(categories), dtype=torch.bool), f"cells-{self.seed}-{i}")

    def labels(self, i):
        """Segments, categories and crowd of image i, for samplers that read labels first."""
        sample = self[i]
        return sample.segments, sample.categories, sample.crowd


def disturb(image, random, box=False):
    """Half of the images each: a Gaussian blur of 0.5 to 1.1 pixels, grey noise of deviation 10/255
    to 40/255, and colour in blocks of 2x2 pixels as JPEG keeps it. Released code has the noise, and
    a blur by the mean of 2 to 4 pixels, which is `box`; its sample images are JPEG files."""
    blurred, noisy, blocks = random.random(3) < 0.5
    sigma, strength = random.uniform(0.5, 1.1), random.uniform(10, 40) / 255
    h, w = image.shape[1:]
    if blurred:
        reach = np.arange(-3, 4)
        kernel = np.exp(-0.5 * (reach / sigma) ** 2).astype(np.float32)
        if box:                                                # of 2 or 4: half a pixel off
            side = random.integers(2, 5)
            kernel = ((-(side // 2) <= reach) & (reach < side - side // 2)).astype(np.float32)
        kernel /= kernel.sum()
        edge = np.pad(image, ((0, 0), (3, 3), (0, 0)), mode="edge")
        image = sum(k * edge[:, i:i + h] for i, k in enumerate(kernel))
        edge = np.pad(image, ((0, 0), (0, 0), (3, 3)), mode="edge")
        image = sum(k * edge[:, :, i:i + w] for i, k in enumerate(kernel))
    if noisy:
        noise = random.standard_normal(image.shape[1:], dtype=np.float32)
        image = np.minimum(np.maximum(image + np.float32(strength) * noise, 0), 1)
    if blocks:
        light = np.tensordot(np.float32([0.299, 0.587, 0.114]), image, 1)
        colour = np.pad(image - light, ((0, 0), (0, h % 2), (0, w % 2)), mode="edge")
        colour = (colour[:, ::2] + colour[:, 1::2]) / 2
        colour = (colour[:, :, ::2] + colour[:, :, 1::2]) / 2
        image = light + colour.repeat(2, 1).repeat(2, 2)[:, :h, :w]
    return np.minimum(np.maximum(image, 0), 1)
