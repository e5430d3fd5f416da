r"""Instance scale-uniform sampling (ISUS): which crop should a network see next?

The problem. Large images are trained on in crops. Where crops lie anywhere,
- rare categories hardly occur in them: most pixels of a street are road, buildings and sky;
- objects are of unequal size. A feature pyramid gives small objects to its fine levels and large
  ones to its coarse levels. Most objects are small, so coarse levels learn from few examples.

The idea. Class-uniform sampling (CUS) draws a category first. ISUS also draws one instance of it
and one level of the pyramid, and resizes the image until that level serves that instance.

    1 category, uniform   2 image with it,    3 instance and level,    4 crop where it is visible
                            shortest side s0    both uniform
      car  sign  road ...   +------------+                                   +-----+
       |                    |  o   __    |      level 1  2  3  4             |  __ |
       `------------------> |     /__\   | --->       .  .  x  .  ---------> | /__\|
                            +------------+      resize by sigma              +-----+
                                                within r_th

Stuff has no instances: its sigma is uniform in a range r_st, and so is every sigma of CUS.

The claim. ISUS "will have the effect of smoothing out the object scale distribution, providing
more uniform supervision across all scales". With the loss of cabb_loss.py and a new architecture
the paper reports +4.5 PQ and +5.2 mask mAP on Mapillary Vistas over the previous best.
It has no experiment on ISUS alone.

    python isus.py [--quick] [--full] [--device D] [--out DIR]    example, Figure 2, levels in crops
    pytest tests/test_isus.py                                     the spec of this file

Lorenzo Porzi, Samuel Rota Bulo, Peter Kontschieder, "Improving Panoptic Segmentation at All
Scales", CVPR 2021, section 2.1.
"""
import hashlib
import itertools
import math

import torch
from torch.utils.data import IterableDataset, get_worker_info

from data import (collate, colour_jitter, command_line, crop, mask_boxes, pyramid_level,
                  random_pixel)


def example():
    """A sign of 28x112 pixels, by hand. Its size is sqrt(28 * 112) = 56, which is level 1.

    Level 2 serves sizes of 112 to 224: sigma lies in 2..4. Level 4 serves 448 to 896: sigma lies in
    8..16, which r_th = (0.5, 4) clamps to 4. There the size is 224: level 3, one short of 4."""
    sign, generator = torch.tensor([0.0, 0, 28, 112]), torch.Generator().manual_seed(0)
    assert pyramid_level(sign[None]).item() == 1
    second = scale_for_level(sign, 2, (0.5, 4.0), generator=generator)
    fourth = scale_for_level(sign, 4, (0.5, 4.0), generator=generator)
    assert 2 < second < 4 and pyramid_level(second * sign[None]).item() == 2
    assert fourth == 4 and pyramid_level(fourth * sign[None]).item() == 3
    return second, fourth


# --- Step 3: the scale that brings an instance to a level -------------------------------------

def scale_for_level(box, level, r_th, generator, levels=4, canonical=224, k0=3):
    """The factor sigma that resizes an image so that `box` [4] lands on `level` -> float.

    Level k of data.pyramid_level serves the sizes canonical 2^(k - k0) to canonical 2^(k - k0 + 1),
    one octave. With a size drawn from it,

        sigma = size / sqrt(w h),    clamped to r_th = (low, high)

    A clamped sigma may miss the level. ValueError: the pyramid has no such level.

    Choice: the paper asks for "a scaling factor", but a whole octave of them fits. The size is drawn
    log-uniformly, without a thousandth of the octave, so that rounding cannot change the level.
    Choice: level 1 serves all smaller sizes too and the last level all larger ones. One octave of
    these is used. So a thing far below level 1 is enlarged even when level 1 is drawn."""
    if not 1 <= level <= levels:
        raise ValueError(f"level {level} does not exist: the pyramid has the levels 1 to {levels}")
    x1, y1, x2, y2 = torch.as_tensor(box).tolist()
    octave = 0.001 + 0.998 * torch.rand((), generator=generator, dtype=torch.float64).item()
    size = canonical * 2 ** (level - k0 + octave)
    sigma = size / math.sqrt(max(x2 - x1, 1e-6) * max(y2 - y1, 1e-6))
    return min(max(sigma, r_th[0]), r_th[1])


# --- What must be known before: which segments are where --------------------------------------

class Index:
    """A table of all segments of a data set that have a pixel, in the order of images and segments.

    One entry of these tensors describes one segment, and its place is called its row:
        image     int64 [M]         number of its image
        segment   int64 [M]         its number in that image, from 1
        category  int64 [M]
        crowd     bool [M]
        box       float32 [M, 4]    x1 y1 x2 y2 in pixels of the unresized image
    `categories` lists those that occur outside of crowds; `image_count` counts all images.

    Made by `build_index`, or from a table int64 [M, 8] with columns image, segment, category,
    crowd, x1, y1, x2, y2. Loading processes share its memory: a tensor is one block that is only
    read. ValueError: there is no segment outside of crowds."""

    def __init__(self, table, image_count):
        self.image, self.segment, self.category, crowd = table[:, :4].T.contiguous()
        self.crowd, self.box, self.image_count = crowd > 0, table[:, 4:].float(), image_count
        self.categories = self.category[~self.crowd].unique().tolist()
        self.images = {c: self.image[(self.category == c) & ~self.crowd].unique()
                       for c in self.categories}
        if not self.categories:
            raise ValueError(f"none of the {image_count} labels has a segment that is no crowd: "
                             "there is nothing to sample crops from; use the data set's training "
                             "part, with its labels")

    def images_with(self, category):
        """Images with a segment of this category that is no crowd -> int64 [I], ascending."""
        return self.images.get(category, self.image[:0])

    def rows(self, image, category=None):
        """Rows of an image; with a category: of its segments that are no crowd -> int64 [R]."""
        first, end = torch.searchsorted(self.image, torch.tensor([image, image + 1])).tolist()
        rows = torch.arange(first, end)
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

MODES = ("isus", "cus", "uniform", "full")


def class_uniform_choice(index, generator):
    """Steps 1 and 2: a category, uniform among those that occur, and an image, uniform among those
    that contain it -> (category, image). Crowds do not count: they have no level and no loss."""
    category = index.categories[torch.randint(len(index.categories), (), generator=generator)]
    images = index.images_with(category)
    return category, int(images[torch.randint(len(images), (), generator=generator)])


def window_start(pixel, length, window, generator):
    """Where a window of `window` pixels begins on an axis of `length` pixels -> int.

    Uniform among the places inside of the image where the window contains `pixel` (None: among
    all). A window longer than the image begins at 0."""
    low, high = 0, max(0, length - window)
    if pixel is not None:
        low, high = max(0, pixel - window + 1), min(pixel, high)
    if low == high:
        return low
    return low + int(torch.randint(high - low + 1, (), generator=generator))


class CropSampler(IterableDataset):
    """An endless supply of batches: images [batch, 3, h, w] and a list of Targets.

    mode "isus"     the paper's: uniform in categories, and in levels of a random instance
         "cus"      uniform in categories; sigma uniform; the crop where the category is visible
         "uniform"  any image, sigma uniform, the crop anywhere
         "full"     the same without a window: whole images, padded to the largest of the batch
    size            (height, width) of a crop
    short_side      s0, the length of the shorter side before sigma; 0: as it is
    scale           r_st: sigma of stuff, and of every image if the mode is not "isus"
    scale_things    r_th: the limits of sigma of things in mode "isus"
    levels, canonical   the network's rule, see data.pyramid_level
    flip, jitter, hue   probability of a mirror image; see data.colour_jitter
    batch           crops of each batch that this process receives, of batch * world in all
    start           number of the first batch; rank, world: which of how many processes this is

    Crop k depends on (seed, k) alone. Batch b consists of the crops b n to (b + 1) n - 1 with
    n = batch * world, and process `rank` receives every `world`-th of these. So a resumed run
    continues exactly, and n crops are the same crops for any number of processes.
    ValueError: a range, a size or a number that cannot be, or an index of another data set.

    Deviation: in step 4 of the paper the crop shows "the selected class", also in ISUS. Here ISUS
    crops at the chosen instance. Otherwise the instance for which sigma was computed is often
    outside of the crop. So "isus" and "cus" differ in scale and in place.
    Choice: sigma in r_st is uniform as in the paper, not log-uniform: in 0.5..2 two thirds of the
    images grow.
    Choice: the paper gives no ranges. 0.5..2 is the one of Porzi et al. 2019.
    Choice: any pixel of the category may be the one to show. So CUS meets large segments more
    often, and ISUS, which draws the instance first, does not.
    Choice: an image smaller than the crop lies at the upper left; the rest is void."""

    def __init__(self, dataset, index, *, size, mode="isus", short_side=0, scale=(0.5, 2.0),
                 scale_things=(0.5, 2.0), levels=4, canonical=224, flip=0.5, jitter=0.0, hue=0.0,
                 batch=1, seed=0, start=0, rank=0, world=1):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        for name, (low, high) in (("scale", scale), ("scale_things", scale_things)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} = ({low}, {high}) must be a range of positive factors, "
                                 "the smaller first")
        images = len(dataset) if index is None else index.image_count
        window = mode == "full" or len(size) == 2 and min(size) >= 1
        for fine, text in (
                (window, f"size = {size} must be a height and a width of at least one pixel"),
                (len(dataset), "the data set has no image to take crops from"),
                (images == len(dataset), f"the index has {images} images, the data set "
                                         f"{len(dataset)}: build it anew"),
                (index or mode in ("uniform", "full"), f"mode {mode} needs build_index(dataset)"),
                (short_side >= 0, f"short_side = {short_side} must be 0 or a number of pixels"),
                (levels >= 1 and canonical > 0, "levels and canonical must be positive"),
                (0 <= flip <= 1, f"flip = {flip} must be a probability"),
                (batch >= 1 and start >= 0 and 0 <= rank < world,
                 f"there is no batch {start} of {batch} crops for rank {rank} of {world}")):
            if not fine:
                raise ValueError(text)
        self.dataset, self.index, self.mode, self.size = dataset, index, mode, size
        self.short_side, self.scale, self.scale_things = short_side, scale, scale_things
        self.levels, self.canonical = levels, canonical
        self.flip, self.jitter, self.hue = flip, jitter, hue
        self.count, self.seed, self.start, self.rank, self.world = batch, seed, start, rank, world

    def crop(self, k):
        """Crop number k -> (image [3, h, w], Target)."""
        # A generator keeps 32 bits of its seed: hash seed and number, do not shift them together.
        digest = hashlib.sha256(f"{self.seed} {k}".encode()).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        category = rows = None
        if self.mode in ("isus", "cus"):
            category, i = class_uniform_choice(self.index, g)                        # 1, 2
            rows = self.index.rows(i, category)
        else:
            i = int(torch.randint(len(self.dataset), (), generator=g))
        isus = self.mode == "isus" and self.dataset.categories[category].isthing
        if isus:                                                                     # an instance
            rows = rows[torch.randint(len(rows), (), generator=g)][None]
        sample = self.dataset[i]
        native = sample.segments.shape
        rescale = self.short_side / min(native) if self.short_side else 1.0          # 2
        if isus:                                                                     # 3
            level = int(torch.randint(1, self.levels + 1, (), generator=g))
            sigma = scale_for_level(self.index.box[rows[0]] * rescale, level, self.scale_things,
                                    generator=g, levels=self.levels, canonical=self.canonical)
        else:
            low, high = self.scale
            sigma = low + (high - low) * torch.rand((), generator=g).item()
        size = tuple(max(1, round(n * rescale * sigma)) for n in native)
        mirror = torch.rand((), generator=g).item() < self.flip
        window, y, x, instance = self.size, None, None, 0
        if self.mode == "full":
            window = size
        elif rows is not None:                                                       # 4
            box = torch.cat([self.index.box[rows, :2].amin(0), self.index.box[rows, 2:].amax(0)])
            y, x, instance = random_pixel(sample.segments, box, self.index.segment[rows],
                                          size=size, generator=g)
            x = size[1] - 1 - x if mirror else x
        top = window_start(y, size[0], window[0], generator=g)
        left = window_start(x, size[1], window[1], generator=g)
        boxes = self.index.boxes(i, len(sample.categories)) if self.index else None
        image, target = crop(sample, top, left, tuple(window), size=size, flip=mirror, boxes=boxes,
                             image_id=i, instance=instance, scale=sigma)
        if self.jitter or self.hue:
            image = colour_jitter(image, g, self.jitter, hue=self.hue)
        return image, target

    def batch(self, b):
        """This process's share of batch number b -> (images [batch, 3, h, w], Targets)."""
        first = (b * self.count) * self.world + self.rank
        return collate([self.crop(first + self.world * n) for n in range(self.count)])

    def __iter__(self):
        worker = get_worker_info()                             # the loader asks its workers in turn
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for b in itertools.count(self.start + number, step):
            yield self.batch(b)


def demo(quick=False, full=False, device="cpu", out="figures"):
    """Figure 2 of the paper on toy streets, and the levels of all things in the crops of each mode.
    Nothing is trained, so `device` is not used."""
    print("sigma of a sign of 56 pixels for levels 2 and 4: {:.2f}, {:.2f}".format(*example()))
    from lab.demo_isus import compare_samplers
    scenes, crops = (12, 60) if quick else (300, 3000) if full else (60, 600)
    compare_samplers(scenes, crops, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="fewer scenes and crops", full="five times as many")

# Exercises
# 1. Draw one size for each level in `scale_for_level`: the middle of its octave. Which test
#    notices? Which sizes does the network never see now?
# 2. Crop ISUS at the category, as the paper says: draw the instance for sigma only and keep all
#    `rows` for step 4. How large is the chosen instance's share of crops now?
# 3. Let `crop` try five windows and keep the one whose visible things are spread over most levels.
#    How many bits does the demo's table gain?
