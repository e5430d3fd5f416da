r"""Instance scale-uniform sampling (ISUS): which crop should a network see next?

The problem. In random crops of large images rare categories hardly occur, and most objects are
small. A feature pyramid gives small objects to its fine levels and large ones to its coarse levels.
So the coarse levels learn from few examples.

The idea. Class-uniform sampling (CUS) draws a category first. ISUS also draws one instance of it
and one level of the pyramid, and resizes the image until that level serves that instance. Stuff
has no instances: its scale sigma is uniform in a range r_st, and so is every sigma of CUS.

    1 category, uniform   2 image with it,    3 instance and level,    4 crop where it is visible
                            shortest side s0    both uniform
      car  sign  road ...   +------------+                                   +-----+
       |                    |  o   __    |      level 1  2  3  4             |  __ |
       `------------------> |     /__\   | --->       .  .  x  .  ---------> | /__\|
                            +------------+      resize by sigma              +-----+
                                                within r_th

The claim. ISUS "will have the effect of smoothing out the object scale distribution, providing
more uniform supervision across all scales". The paper has +4.5 PQ on Mapillary Vistas, with
cabb_loss.py and a new architecture. In lab/octaves.py, where images show one to three things and
few are large, 15% of the things in ISUS's crops are of level 4 (CUS, same range of sigma: 5%). On
test images with as many things of each level, box AP of those of 32 pixels and more is 3.8 [2.9,
4.6] higher; AP of all is best in crops of the test images' scale. On toy streets a crop shows eight
things, one of them chosen: AP of 56 pixels and more is not shown to rise (+2.3 [-2.3, +6.8]).

    python isus.py [--quick] [--full] [--device D] [--out DIR]    example, Figure 2, levels in crops
    pytest tests/test_isus.py                                     the spec of this file

Porzi, Rota Bulo, Kontschieder, "Improving Panoptic Segmentation at All Scales", CVPR 2021.
"""
import hashlib
import itertools
import math

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data import (collate, colour_jitter, command_line, crop, mask_boxes, pyramid_level,
                  random_pixel)

MODES = ("isus", "cus", "uniform", "full")


def example():
    """A sign of 28x112 pixels, by hand. Its size is sqrt(28 * 112) = 56, which is level 1.

    Level 2 serves sizes of 112 to 224: sigma lies in 2..4. Level 4 serves 448 to 896: sigma lies in
    8..16, which r_th = (0.5, 4) clamps to 4. There the size is 224: level 3, one short of 4."""
    sign, r_th, generator = torch.tensor([0.0, 0, 28, 112]), (0.5, 4.0), torch.Generator()
    second = scale_for_level(sign, 2, r_th, generator=generator)
    fourth = scale_for_level(sign, 4, r_th, generator=generator)
    assert 2 < second < 4 and fourth == 4
    levels = pyramid_level(torch.stack([sign, second * sign, fourth * sign])).tolist()
    assert levels == [1, 2, 3]
    return second, fourth


# --- Step 3: the scale that brings an instance to a level -------------------------------------

def scale_for_level(box, level, r_th, generator, levels=4, canonical=224, k0=3):
    """The factor sigma that resizes an image so that `box` [4] lands on `level` -> float.

    Level k of data.pyramid_level serves the sizes canonical 2^(k - k0) to canonical 2^(k - k0 + 1),
    one octave. So sigma must fulfil, with r_th = (low, high),

        sigma sqrt(w h) in the octave of `level`,    low <= sigma <= high

    Of those that fulfil both, one is drawn log-uniformly. If there is none, sigma is the limit of
    r_th that comes nearest, and the level is missed: r_th = (0.5, 2) reaches one octave at most.

    Choice: the paper asks for one factor, but many fit. A thousandth of the octave is left out at
    each end (rounding). The first level serves all smaller sizes too, the last all larger ones:
    things there may keep their size, sigma = 1."""
    if not 1 <= level <= levels:
        raise ValueError(f"level {level} does not exist: the pyramid has the levels 1 to {levels}")
    x1, y1, x2, y2 = torch.as_tensor(box).tolist()
    size = math.sqrt(max(x2 - x1, 1e-6) * max(y2 - y1, 1e-6))
    low, high = (canonical * 2 ** (level - k0 + end) / size for end in (0.001, 0.999))
    low, high = min(low, 1) if level == 1 else low, max(high, 1) if level == levels else high
    low, high = (min(max(end, r_th[0]), r_th[1]) for end in (low, high))
    return low * (high / low) ** torch.rand((), generator=generator, dtype=torch.float64).item()


# --- What must be known before: which segments are where --------------------------------------

class Index:
    """A table of all segments with at least one pixel, in the order of images and segments.

    A row is the place of one segment in these tensors:
        image, segment   int64 [M], number of the image; number of the segment in it, from 1
        category, crowd  int64 [M], bool [M]
        box              float32 [M, 4], x1 y1 x2 y2 in pixels of the image as it is
    `categories` lists those that occur outside of crowds; `image_count` counts all images.

    table int64 [M, 8]: image, segment, category, crowd, x1, y1, x2, y2. ValueError: only crowds."""

    def __init__(self, table, image_count):
        self.image, self.segment, self.category, crowd = table[:, :4].T.contiguous()
        self.crowd, self.box, self.image_count = crowd > 0, table[:, 4:].float(), image_count
        self.categories = self.category[~self.crowd].unique().tolist()
        self.images = {c: self.image[(self.category == c) & ~self.crowd].unique()
                       for c in self.categories}
        if not self.categories:
            raise ValueError(f"none of the {image_count} labels has a segment that is no crowd: "
                             "take the data set's training part, with its labels")

    def images_with(self, category):
        """Images with a segment of this category that is no crowd -> int64 [I], ascending."""
        return self.images.get(category, self.image[:0])

    def rows(self, image, category=None):
        """Rows of an image; with a category: of its segments that are no crowd -> int64 [R]."""
        ends = torch.searchsorted(self.image, torch.tensor([image, image + 1]))
        rows = torch.arange(*ends.tolist())
        if category is None:
            return rows
        return rows[(self.category[rows] == category) & ~self.crowd[rows]]

    def boxes(self, image, count):
        """Boxes of segments 1..count of an image -> [count, 4], as data.mask_boxes gives them."""
        rows, boxes = self.rows(image), torch.zeros(count, 4)
        boxes[self.segment[rows] - 1] = self.box[rows]
        return boxes


def segment_rows(dataset, i):
    """The rows of image i in the table of an Index -> int64 [N, 8]."""
    segments, categories, crowd = dataset.labels(i)
    boxes = mask_boxes(segments, len(categories)).long()
    number = torch.arange(1, len(boxes) + 1)
    left = torch.stack([torch.full_like(number, i), number, categories, crowd.long()], 1)
    return torch.cat([left, boxes], 1)[boxes[:, 2] > 0]


def build_index(dataset):
    """The Index of a data set. Reads each label once; lab/index.py keeps the result on disk."""
    parts = [segment_rows(dataset, i) for i in range(len(dataset))]
    return Index(torch.cat([torch.zeros(0, 8).long(), *parts]), len(dataset))


# --- Steps 1 to 4 -----------------------------------------------------------------------------

def class_uniform_choice(index, generator):
    """Steps 1 and 2: a random category, and a random image that contains it -> (category, image).
    Choice: both uniform; crowds do not count, for they have no level and no loss."""
    category = index.categories[torch.randint(len(index.categories), (), generator=generator)]
    images = index.images_with(category)
    return category, int(images[torch.randint(len(images), (), generator=generator)])


def window_start(pixel, length, window, generator):
    """Where a window of `window` pixels begins on an axis of `length` pixels -> int.

    Uniform among the places inside of the image where the window contains `pixel` (None: all of
    them). A window longer than the image begins at 0."""
    low, high = 0, max(0, length - window)
    if pixel is not None:
        low, high = max(0, pixel - window + 1), min(pixel, high)
    return low + int(torch.randint(high - low + 1, (), generator=generator)) if low < high else low


class CropSampler(IterableDataset):
    """Endless batches (images [batch, 3, h, w], Targets): DataLoader(sampler, batch_size=None).

    mode "isus"     section 2.1: uniform in categories, and in levels of a random instance
         "cus"      uniform in categories; sigma uniform; the crop where the category is visible
         "uniform"  any image, sigma uniform, the crop anywhere
         "full"     the same without a window: whole images, padded to the largest of the batch
    size            (height, width) of a crop
    short_side      s0, the length of the shorter side before sigma; 0: as it is
    scale           r_st: sigma of stuff, and in other modes than "isus" of all
    scale_things    r_th: the limits of sigma of things in mode "isus"
    place           step 4 in mode "isus": where the "category" or the chosen "instance" is visible
    levels, canonical   the rule of data.pyramid_level, k0 = 3: level k is the map of stride 2^(k+1)
    flip, jitter, hue   probability of a mirror image; the arguments of data.colour_jitter
    batch           crops that this process receives; the whole batch has n = batch * world
    start           the first batch; rank, world: which of how many processes this is

    Crop k depends on (seed, k) alone. Batch b has the crops b n to (b + 1) n - 1, of which process
    `rank` receives every `world`-th. So a resumed run continues exactly, and a batch of n is the
    same for any number of processes. ValueError: a setting that cannot be.

    As in the paper ISUS differs from CUS in scale alone: the crop may show another instance.
    Choice: 0.5..2 is the range of Porzi et al. 2019; our text of the 2021 paper has none. Every
    pixel of the category is equally likely: CUS shows large segments more often. An image smaller
    than the crop lies at the upper left; the rest is void."""

    def __init__(self, dataset, index, *, size, mode="isus", short_side=0, scale=(0.5, 2.0),
                 scale_things=(0.5, 2.0), place="category", levels=4, canonical=224, flip=0.5,
                 jitter=0.0, hue=0.0, batch=1, seed=0, start=0, rank=0, world=1):
        for name, value, fine, rule in (
                ("mode", mode, mode in MODES, f"one of {', '.join(MODES)}"),
                ("size", size, mode == "full" or len(size) == 2 and min(size) >= 1,
                 "a height and a width of at least one pixel"),
                *((name, v, 0 < v[0] <= v[1] < math.inf, "(low, high), both positive")
                  for name, v in (("scale", scale), ("scale_things", scale_things))),
                ("place", place, place in ("category", "instance"), "category or instance"),
                ("short_side", short_side, short_side >= 0, "0 or a number of pixels"),
                ("batch", batch, batch >= 1, "at least 1"),
                ("index", index, index or mode in MODES[2:], "given: isus.build_index(dataset)")):
            if not fine:
                raise ValueError(f"{name} = {value} must be {rule}")
        if not 0 < len(dataset) == (index.image_count if index else len(dataset)):
            raise ValueError(f"the data set has {len(dataset)} images: there must be at least one, "
                             "and as many in the index")
        self.dataset, self.index, self.mode, self.size = dataset, index, mode, size
        self.short_side, self.scale, self.scale_things = short_side, scale, scale_things
        self.place, self.levels, self.canonical = place, levels, canonical
        self.flip, self.jitter, self.hue = flip, jitter, hue
        self.count, self.seed, self.start, self.rank, self.world = batch, seed, start, rank, world

    def crop(self, k):
        """Crop number k -> (image [3, h, w], Target)."""
        # A generator keeps 32 bits of its seed. So seed and number are hashed, not added.
        digest = hashlib.sha256(f"{self.seed} {k}".encode()).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        rows = level = None
        if self.mode in ("isus", "cus"):
            category, i = class_uniform_choice(self.index, g)                    # steps 1 and 2
            rows = self.index.rows(i, category)
            if self.mode == "isus" and self.dataset.categories[category].isthing:
                one = rows[torch.randint(len(rows), (), generator=g)]            # an instance
                level = int(torch.randint(1, self.levels + 1, (), generator=g))  # and a level
                rows = one[None] if self.place == "instance" else rows
        else:
            i = int(torch.randint(len(self.dataset), (), generator=g))
        sample = self.dataset[i]
        native, (low, high) = sample.segments.shape, self.scale
        rescale = self.short_side / min(native) if self.short_side else 1.0      # step 2: s0
        if level is None:                                                        # step 3
            sigma = low + (high - low) * torch.rand((), generator=g).item()
        else:
            sigma = scale_for_level(self.index.box[one] * rescale, level, self.scale_things,
                                    generator=g, levels=self.levels, canonical=self.canonical)
        size = tuple(max(1, round(n * rescale * sigma)) for n in native)
        mirror = torch.rand((), generator=g).item() < self.flip
        y, x, instance = None, None, 0
        if rows is not None:                                                     # step 4
            box = torch.cat([self.index.box[rows, :2].amin(0), self.index.box[rows, 2:].amax(0)])
            y, x, instance = random_pixel(sample.segments, box, self.index.segment[rows],
                                          size=size, generator=g)
            x = size[1] - 1 - x if mirror else x
        window = size if self.mode == "full" else tuple(self.size)
        top = window_start(y, size[0], window[0], generator=g)
        left = window_start(x, size[1], window[1], generator=g)
        boxes = self.index.boxes(i, len(sample.categories)) if self.index else None
        image, target = crop(sample, top, left, window, size=size, flip=mirror, boxes=boxes,
                             image_id=i, instance=instance, scale=sigma)
        if self.jitter or self.hue:
            image = colour_jitter(image, g, self.jitter, hue=self.hue)
        return image, target

    def batch(self, b):
        """This process's share of batch number b -> (images [batch, 3, h, w], Targets)."""
        first = b * self.count * self.world + self.rank
        return collate([self.crop(first + self.world * n) for n in range(self.count)])

    def __iter__(self):
        worker = get_worker_info()                             # the loader asks its workers in turn
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for b in itertools.count(self.start + number, step):
            yield self.batch(b)


def demo(quick=False, full=False, device="cpu", out="figures"):
    """Figure 2 on toy streets, and the levels of all things in the crops of each mode."""
    print("sigma of a sign of 56 pixels for levels 2 and 4: {:.2f}, {:.2f}".format(*example()))
    from lab.demo_isus import compare_samplers
    scenes, crops = (12, 60) if quick else (300, 3000) if full else (60, 600)
    compare_samplers(scenes, crops, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="fewer scenes and crops", full="five times as many")

# Exercises
# 1. Let `scale_for_level` take the middle of each octave. Which sizes are never seen now?
# 2. Let crops be placed at the instance that decides on sigma. How many show a size of its level?
# 3. Raise the entropy of all levels in the demo's table by 0.15 bits, at the scales 0.25 to 4.
