r"""Instance Scale-Uniform Sampling: which crop a network should see next (section 2.1 of Porzi, Rota Bulò,
Kontschieder, "Improving Panoptic Segmentation at All Scales", CVPR 2021).

What goes wrong without it.  A street picture of 2048 x 1024 pixels is trained on in crops.  Put the crop anywhere, and

    - rare classes hardly ever occur in it: most of a street is road, houses and sky;
    - objects are of very unequal size.  A feature pyramid hands small objects to its fine levels and large ones to its
      coarse levels; where nearly all objects are small, the coarse levels learn from a handful of examples.

The idea has two parts.  CUS, Class-Uniform Sampling, mends the first: it draws a CLASS first, every one with the same
probability, then a picture that has it, and puts the crop where it shows.  ISUS mends the second: if the class is a
thing, it also draws one INSTANCE and one LEVEL of the pyramid, and resizes the picture until that instance is served by
that level.

    1 class, uniform     2 picture with it,     3 instance and level k,     4 crop where it shows,
                           shorter side = s0      both uniform                boxes known uncut
      {car, sign, ...}     +------------+                                           +-----+
          |                |  o   __    |       level 1  2  3  4   resize by σ      |  __ |
          `--> car ------->|     /__\   |------>      |  |  #  |  --------------->  | /__\|
                           +------------+                          within r_th      +-----+

Stuff has no instances: there σ is drawn from a range r_st, as always.  The remedy is bounded on purpose: σ may not
leave r_th, so a tiny sign never becomes a giant one; and whatever else is in the crop is resized along with it.  The
level of the CHOSEN instance is uniform by construction and proves nothing: the demo counts all objects of the crops,
and there, on toy streets that show many objects at once, the gain is small.

What the paper claims: "more uniform supervision across all scales"; its whole system, with ISUS and the box loss of
`cabb_loss.py`, gains 4.5 PQ and 5.2 mask AP on Mapillary Vistas over the best before it.  Its Figure 2 shows the
troubles: crops that cut large objects, and sizes that are "markedly non-uniform".

    python isus.py            draws that figure, and the remedy, on toy streets -> figures/isus.png
    pytest tests/test_isus.py the claims of this file as an executable spec

A sample has `image` float32 [3, H, W] in 0..1, `segments` int64 [H, W] (0 is void, k > 0 is segment k), `categories`
int64 [N] (of segment k at k - 1) and `crowd` bool [N] (a group that nobody told apart).  A data set has len, [i] ->
sample, `.labels(i)` -> (segments, categories, crowd) and `.categories`, whose entries have `.name` and `.isthing`.
Boxes are x1 y1 x2 y2 in pixels, half open.
"""
import argparse
import hashlib
import math
import os
import sys
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info


# --- The heuristic "adopted by the network being trained": which level serves a box -----------------------------------

def pyramid_level(boxes, levels=4, canonical=224, k0=3):
    """k = max(1, min(levels, floor(k0 + log2(sqrt(w h) / canonical)))): boxes [N, 4] -> int64 [N] in 1..levels.

    An object as large as ImageNet's pictures (224) belongs to level k0; one of twice that size to the next level.  The
    network and its sampler must agree on this rule, or the sampler balances levels that nobody has."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).prod(1).sqrt()
    return (k0 + (size / canonical).log2()).floor().clamp(1, levels).long()


def scale_for_level(box, level, r_th, generator, levels=4, canonical=224, k0=3):
    """The factor sigma by which the picture must be resized so that `box` [4] lands on `level` (1..levels) -> float.

    Level k serves one octave of sizes, canonical 2^(k-k0) <= size < canonical 2^(k-k0+1), so with a size drawn there

        sigma = size / sqrt(w h),   clamped to r_th = (low, high): then it lands as near to the level as that allows.

    Choice: the paper says "such that the instance is assigned to the level", which a whole octave fulfils: the size is
    drawn log-uniformly in it, so that every size occurs and not one per level.  The first level has no lower end and
    the last no upper one; there too one octave.  A thousandth of it is left out, lest rounding flips the level."""
    if not 1 <= level <= levels:
        raise ValueError(f"level {level} is none of the pyramid's, which has the levels 1 to {levels}")
    octave = 0.001 + 0.998 * torch.rand((), generator=generator, dtype=torch.float64).item()
    x1, y1, x2, y2 = torch.as_tensor(box).tolist()
    sigma = canonical * 2 ** (level - k0 + octave) / math.sqrt(max(x2 - x1, 1e-6) * max(y2 - y1, 1e-6))
    return min(max(sigma, r_th[0]), r_th[1])


# --- What the sampler must know beforehand: which segments are where --------------------------------------------------

def mask_boxes(segments, count):
    """Boxes of segments 1..count of a map int64 [H, W] -> float32 [count, 4], half open; zeros for an absent one."""
    rows, cols = (torch.zeros(count + 1, n, dtype=torch.uint8) for n in segments.shape)   # is segment k in row y?
    rows[segments, torch.arange(segments.shape[0])[:, None]] = 1
    cols[segments, torch.arange(segments.shape[1])] = 1
    first = [t.argmax(1) for t in (cols, rows)]                           # argmax takes the first of equals
    last = [t.shape[1] - t.flip(1).argmax(1) for t in (cols, rows)]
    return (torch.stack(first + last, 1) * rows.amax(1)[:, None])[1:].float()


class Index:
    """One row per segment of a data set that has a pixel, in the order of pictures and segments; and what follows.

    Flat tensors, 41 bytes a row: COCO's 1.3 million segments take 53 MB, which forked workers share, for a tensor is
    one block that nobody writes to (Python objects would be copied page by page as their reference counts change)."""
    FIELDS = ("image", "segment", "category", "crowd", "box", "size")

    def __init__(self, image, segment, category, crowd, box, size):
        self.image, self.segment, self.category = image, segment, category    # int64 [M]: picture, k >= 1 in it, ...
        self.crowd, self.box, self.size = crowd, box, size                    # bool [M], float32 [M, 4], int64 [I, 2]
        pictures = len(size)                                                  # size: height, width of every picture
        self.first = torch.searchsorted(image, torch.arange(pictures + 1))    # picture i: rows first[i]:first[i + 1]
        # Every (category, picture) that occurs, once, sorted: a category's pictures stand together.
        pair = torch.unique(category[~crowd] * pictures + image[~crowd])
        self.present, counts = torch.unique_consecutive(pair // max(pictures, 1), return_counts=True)
        self.ends, self.pictures = counts.cumsum(0), pair % max(pictures, 1)

    def images_with(self, category):
        """The pictures with a segment of this category that is no crowd -> int64 [P], ascending, each once."""
        at = torch.searchsorted(self.present, category)
        if at == len(self.present) or self.present[at] != category:
            return self.pictures[:0]
        return self.pictures[self.ends[at - 1] if at else 0:self.ends[at]]

    def rows(self, image, category=None):
        """The rows of a picture; with a category, only its segments of that category that are no crowd -> int64 [R]."""
        rows = torch.arange(self.first[image], self.first[image + 1])
        return rows if category is None else rows[(self.category[rows] == category) & ~self.crowd[rows]]

    def boxes(self, image, count):
        """The native boxes of a picture's segments 1..count -> [count, 4], as `mask_boxes` gives them."""
        rows, out = self.rows(image), torch.zeros(count, 4)
        out[self.segment[rows] - 1] = self.box[rows]
        return out


class _Rows:
    """Label i as (i, height, width, int32 array [N, 7] of segment, category, crowd, box), for a DataLoader."""

    def __init__(self, dataset, mine):
        self.dataset, self.mine = dataset, mine

    def __len__(self):
        return len(self.mine)

    def __getitem__(self, j):
        segments, categories, crowd = self.dataset.labels(self.mine[j])
        box = mask_boxes(segments, len(categories))
        rows = torch.cat([torch.stack([torch.arange(1, len(box) + 1), categories, crowd.long()], 1), box.long()], 1)
        # numpy: a tensor would travel through a shared file that stays open as long as the tensor lives
        return self.mine[j], *segments.shape, rows[box[:, 2] > 0].int().numpy()


def _gather(value, world):
    values = [value]
    if world > 1:
        values = [None] * world
        dist.all_gather_object(values, value)
    return values


def _fingerprint(dataset):
    """A word that changes with the number of pictures, the categories, and the label files' names, sizes and times."""
    parts, source = [len(dataset), [(c.name, bool(c.isthing)) for c in dataset.categories]], dataset
    while source is not None:                                     # a wrapper is as good as what it wraps
        parts.append([getattr(source, name, None) for name in ("seed", "size")])  # pictures that are drawn, not read
        for name, _, label in getattr(source, "files", ()):
            found = label is not None and os.path.exists(label) and os.stat(label)
            parts.append((name, os.path.basename(label), found.st_size, found.st_mtime_ns) if found else name)
        source = getattr(source, "dataset", None)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _load_index(path, fingerprint, say):
    """The index in that file, or None and a line that says why not."""
    try:
        state = torch.load(path, weights_only=True)
        if state["fingerprint"] == fingerprint:
            return Index(*(state[name] for name in Index.FIELDS))
        why = "belongs to another data set, or to other files of this one"
    except FileNotFoundError:
        return None
    except Exception as e:                                        # a torn file can raise anything
        why = f"is damaged ({type(e).__name__})"
    say(f"{path} {why}: reading all labels again")
    return None


def build_index(dataset, cache=None, rank=0, world=1, workers=0):
    """Read every label of the data set once -> Index.

    `cache` names a file: an index that was kept there is used instead, if it fits the data set, else it is built and
    kept.  Of `world` processes each reads its share, with `workers` helpers, and all get the whole; then all must call
    and `torch.distributed` must be initialised.  Raises ValueError if there is nothing to sample from."""
    def say(text, end="\n"):
        if rank == 0:
            print(text, end=end, file=sys.stderr, flush=True)
    fingerprint = _fingerprint(dataset) if cache else None
    index = _load_index(cache, fingerprint, say) if cache else None
    if all(_gather(index is not None, world)):                    # all ranks or none: a disk may be one machine's own
        return index
    mine = range(rank, len(dataset), world)
    table, size, begun, shown = [], [], time.monotonic(), 0.
    # A generator of its own: else the loader would draw from the global one, and a resumed run would go on with other numbers.
    loader = DataLoader(_Rows(dataset, mine), batch_size=None, num_workers=workers, collate_fn=tuple, generator=torch.Generator())
    for n, (i, h, w, rows) in enumerate(loader, 1):
        rows = torch.from_numpy(rows).long()
        table.append(torch.cat([torch.full((len(rows), 1), i), rows], 1))     # [N, 8]
        size.append((i, h, w))
        now = time.monotonic()
        if now - begun > 2 and now - shown > (0.5 if sys.stderr.isatty() else 60):             # a log file wants few lines
            say(f"\rreading labels, once: {n} of {len(mine)}", end="")
            shown = now
    if shown:
        say(f"\rreading labels, once: {len(mine)} of {len(mine)}, {time.monotonic() - begun:.0f} s")
    parts = _gather((torch.cat([torch.zeros(0, 8).long(), *table]).int().numpy(), size), world)
    table = torch.cat([torch.from_numpy(t) for t, _ in parts]).long()
    table = table[table[:, 0].argsort(stable=True)]
    size = torch.tensor(sorted(s for _, part in parts for s in part)).reshape(-1, 3)[:, 1:].contiguous()
    image, segment, category = (table[:, k].contiguous() for k in range(3))
    index = Index(image, segment, category, table[:, 3] > 0, table[:, 4:].float(), size)
    if not len(index.present):
        raise ValueError(f"none of the {len(dataset)} labels has a segment of any category that is no crowd: there is "
                         "nothing to sample crops from; is this the data set's training part, with its labels?")
    if cache and rank == 0:                                       # beside it and moved into place: whole or not at all
        os.makedirs(os.path.dirname(os.path.abspath(cache)), exist_ok=True)
        temporary = f"{cache}.{os.getpid()}.tmp"
        torch.save({"fingerprint": fingerprint, **{name: getattr(index, name) for name in Index.FIELDS}}, temporary)
        os.replace(temporary, cache)
    return index


# --- A window of a resized picture, without the resized picture -------------------------------------------------------
# Four times as large, a picture of 1024 x 2048 takes 400 MB, and all but a window of it would be thrown away.

def _taps(old, new, start, length):
    """Of which old pixels, with which weights, the new pixels start..start+length-1 are made -> two [T, length].

    New pixel i looks at c = (i + .5) s with s = old / new.  A triangle around c weighs the old pixels' centres j + .5;
    it is 2 wide (linear interpolation), or 2 s where the picture shrinks (so that none is skipped: antialiasing)."""
    reach = max(old / new, 1.)
    centre = torch.arange(start, start + length, dtype=torch.float64) + .5
    centre = (centre * torch.tensor(old / new).double()).float()  # float32, rounded as PyTorch does: 2000 +- 1e-4
    pixel = (centre - reach + .5).floor().long() + torch.arange(math.ceil(2 * reach) + 1)[:, None]
    weight = (1 - (pixel - centre + .5).abs() / reach).clamp(min=0) * ((pixel >= 0) & (pixel < old))
    return pixel.clamp(0, old - 1), weight / weight.sum(0)


def _blend(image, pixel, weight):
    """Rows of an image [3, H, W] summed with weights [T, h] -> [3, h, W]."""
    out = image.new_zeros(image.shape[0], pixel.shape[1], image.shape[2])
    for p, w in zip(pixel, weight):                               # T taps: 3 to 5 for all useful factors
        out.addcmul_(image.index_select(1, p), w[:, None])
    return out


def resize_window(image, size, top, left, window):
    """What the picture [3, H, W], resized to `size` (h, w), shows in a window of (h, w) at (top, left); black outside.

    As F.interpolate(mode="bilinear", antialias=True) followed by slicing, from the native pixels in question only."""
    out = image.new_zeros(image.shape[0], *window)
    begin = [max(0, -o) for o in (top, left)]                     # the part of the window that lies in the picture
    end = [min(m, n - o) for m, n, o in zip(window, size, (top, left))]
    if begin[0] >= end[0] or begin[1] >= end[1]:
        return out
    taps, part = [], []
    for offset, first, last, old, new in zip((top, left), begin, end, image.shape[1:], size):
        pixel, weight = _taps(old, new, offset + first, last - first)
        low, high = int(pixel[weight > 0].min()), int(pixel[weight > 0].max()) + 1
        taps.append((pixel.clamp(low, high - 1) - low, weight, old != new))   # old == new: 1 and 0, a plain slice
        part.append(slice(low, high))
    image = image[:, part[0], part[1]]
    if taps[0][2]:
        image = _blend(image, *taps[0][:2])
    if taps[1][2]:                                                # columns are the rows of the transpose
        image = _blend(image.transpose(1, 2).contiguous(), *taps[1][:2]).transpose(1, 2)
    out[:, begin[0]:end[0], begin[1]:end[1]] = image
    return out


@dataclass
class Target:
    """What a model may learn from one crop."""
    segments: torch.Tensor    # int64 [h, w] of a crop
    categories: torch.Tensor  # int64 [N]
    crowd: torch.Tensor       # bool [N]
    boxes: torch.Tensor       # float32 [N, 4], of what shows; stuff has boxes too
    full_boxes: torch.Tensor  # float32 [N, 4], of the whole object in crop coordinates: may reach outside
    truncated: torch.Tensor   # bool [N, 4]: does the object go on beyond the crop's left, top, right, bottom edge?
    image_id: int = 0
    instance: int = 0         # the segment for whose sake the sampler chose this crop (0: none)
    scale: float = 1.0        # sigma

    def to(self, device):
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})


def _nearest(old, new):
    """Which old pixel each of the new pixels shows: the one under its centre -> int64 [new], ascending."""
    return ((torch.arange(new) + .5) * old / new).long()


def scaled_crop(sample, size, top, left, window, boxes=None, flip=False, image_id=0, instance=0, scale=1.0):
    """The sample resized to `size` (h, w), mirrored if `flip`, and of that the window (h, w) at (top, left)
    -> (image [3, h, w], Target).

    Segments are resized by the nearest pixel, for their numbers must not mix; invisible ones are dropped, the others
    renumbered 1..n; outside the picture all is black and void.  `boxes` [N, 4] are those of the native label, if they
    are known.  `full_boxes` follow from them: the native rows [y1, y2) show in the scaled rows

        ceil(y1 new / old - .5) <= y < ceil(y2 new / old - .5),

    those whose centres fall on them.  Choice: where shrinking loses thin tips of an object, this is the box that still
    has them; it encloses the visible box, and needs no resized label."""
    (height, width), (new_h, new_w), (h, w) = sample.segments.shape, size, window
    at = new_w - left - w if flip else left                       # the window in the picture that is not mirrored
    y, x = _nearest(height, new_h), _nearest(width, new_w)
    image = resize_window(sample.image, size, top, at, window).clamp_(0, 1)
    segments, count = sample.segments.new_zeros(h, w), len(sample.categories)
    y0, x0, y1, x1 = max(top, 0), max(at, 0), min(top + h, new_h), min(at + w, new_w)
    if y0 < y1 and x0 < x1:
        segments[y0 - top:y1 - top, x0 - at:x1 - at] = sample.segments[y[y0:y1, None], x[x0:x1]]
    if flip:
        image, segments = image.flip(-1), segments.flip(-1)
    boxes = mask_boxes(sample.segments, count) if boxes is None else boxes
    # How many scaled pixels come before native pixel b?  `_nearest` ascends: a binary search tells, with its rounding.
    bx, by = (torch.searchsorted(at, b.long().contiguous()) for at, b in ((x, boxes[:, ::2]), (y, boxes[:, 1::2])))
    bx = new_w - bx.flip(1) if flip else bx
    full = torch.stack([bx[:, 0] - left, by[:, 0] - top, bx[:, 1] - left, by[:, 1] - top], 1).float()   # [N, 4]
    keep = torch.bincount(segments.flatten(), minlength=count + 1)[1:] > 0                              # [N]
    number = F.pad(keep.cumsum(0) * keep, (1, 0))                 # old number -> new number, 0 -> 0
    segments, full = number[segments], full[keep]
    truncated = torch.cat([full[:, :2] < 0, full[:, 2:] > torch.tensor([w, h])], 1)
    return image, Target(segments, sample.categories[keep], sample.crowd[keep], mask_boxes(segments, int(keep.sum())),
                         full, truncated, image_id, int(number[instance]), scale)


# --- 2.1 Class-Uniform and Instance Scale-Uniform Sampling ------------------------------------------------------------

def class_uniform_choice(index, generator):
    """Steps 1 and 2: a category, uniform among those that occur, and a picture, uniform among those that contain it.

    Crowd regions do not count: neither loss nor level is defined for them."""
    category = int(index.present[torch.randint(len(index.present), (), generator=generator)])
    images = index.images_with(category)
    return category, int(images[torch.randint(len(images), (), generator=generator)])


def random_pixel(segments, box, chosen, size, generator):
    """A pixel (y, x) of the label resized to `size` that shows one of the segments `chosen` int64 [S], and which.

    `box` encloses them in the native label, where the pixel is drawn, uniformly among those that resizing keeps.  If it
    keeps none (a far sign at half the size), a pixel next to the place where one would be.

    Choice: "an area where the selected class is visible" is any pixel of it; so where all segments of a class may be
    meant (mode "cus") large ones are met more often, while isus draws its instance first, whatever its size."""
    x1, y1, x2, y2 = (int(v) for v in box)
    part = segments[y1:y2, x1:x2]
    if len(chosen) == 1:
        mask = part == chosen
    else:
        table = torch.zeros(int(segments.max()) + 1, dtype=torch.bool)
        mask = table.index_fill(0, chosen, True)[part]
    ends = [torch.searchsorted(_nearest(old, new), torch.arange(low, high + 1))     # native row v: scaled ends[v:v + 2]
            for old, new, low, high in zip(segments.shape, size, (y1, x1), (y2, x2))]
    shown = mask & (ends[0].diff() > 0)[:, None] & (ends[1].diff() > 0)
    rows = shown.sum(1)
    if not rows.any():
        shown, rows = mask, mask.sum(1)
    # nonzero() of two million pixels is slow: draw the row by its share of the pixels, then a pixel of that row.
    n = torch.randint(int(rows.sum()), (), generator=generator)
    i = int(torch.searchsorted(rows.cumsum(0), n, right=True))
    j = int(torch.nonzero(shown[i])[n - rows[:i].sum()])
    pixel = []
    for end, v, new in zip(ends, (i, j), size):
        low, high = int(end[v]), int(end[v + 1])
        pixel.append(min(low + int(torch.randint(max(high - low, 1), (), generator=generator)), new - 1))
    return *pixel, int(part[i, j])


MODES = ("isus", "cus", "uniform", "full")


class CropSampler(IterableDataset):
    """An endless supply of crops (image [3, h, w], Target).  Crop k depends on (seed, k) alone.

    mode "isus"     the paper's: uniform in classes, and for things in pyramid levels of a random instance
         "cus"      uniform in classes; sigma uniform in r_st whatever the class; the crop where the class shows
         "uniform"  any picture, sigma uniform in r_st, the crop anywhere
         "full"     the same without a window: whole pictures, for networks that are not trained on crops

    `s0` is the length of the shorter side before sigma (0: as it is); `levels`, `canonical`, `k0` are the network's
    rule for levels; `flip` is the probability of a mirror image, `augment(image, generator) -> image` any change of
    colours.  `index` is what `build_index` gave; without one the first two modes build it.

    Choice: sigma in r_st is uniform as the paper says, not log-uniform: in 0.5..2 two thirds of the pictures grow.
    Choice: the paper gives neither range; 0.5..2 is the one of Seamless Scene Segmentation (2019), by the same authors.
    Choice: where the resized picture is smaller than the crop it lies at the upper left and the rest is void."""

    def __init__(self, dataset, crop_size, mode="isus", s0=0, r_th=(0.5, 2.0), r_st=(0.5, 2.0), seed=0, start=0, rank=0,
                 world=1, levels=4, canonical=224, k0=3, flip=0.5, augment=None, index=None):
        if mode not in MODES:
            raise ValueError(f"mode {mode!r} is none of {', '.join(MODES)}")
        if mode != "full" and (len(crop_size) != 2 or min(crop_size) < 1):
            raise ValueError(f"crop_size {crop_size} must be a height and a width of at least one pixel")
        for name, (low, high) in (("r_th", r_th), ("r_st", r_st)):
            if not 0 < low <= high < math.inf:
                raise ValueError(f"{name} = ({low}, {high}) must be a range of positive factors, the smaller first")
        if not len(dataset):
            raise ValueError("the data set has no picture to take crops from")
        for fine, text in ((s0 >= 0, f"s0 = {s0} must be 0 or a number of pixels"),
                           (levels >= 1 and canonical > 0, "levels and canonical must be positive"),
                           (0 <= flip <= 1, f"flip = {flip} must be a probability"),
                           (start >= 0 and 0 <= rank < world, f"crop {start}, rank {rank} of {world}: there is none")):
            if not fine:
                raise ValueError(text)
        if index is None and mode in ("isus", "cus"):
            index = build_index(dataset)
        if index is not None and len(index.size) != len(dataset):
            raise ValueError(f"the index has {len(index.size)} pictures, the data set {len(dataset)}: build it anew")
        self.dataset, self.crop_size, self.mode, self.s0, self.index = dataset, crop_size, mode, s0, index
        self.r_th, self.r_st, self.levels, self.canonical, self.k0 = r_th, r_st, levels, canonical, k0
        self.seed, self.start, self.rank, self.world = seed, start, rank, world
        self.flip, self.augment = flip, augment

    def scale(self, row, generator):
        """Step 3: sigma for the chosen row of the index; None is for stuff, and for modes that look at no instance."""
        if row is None:
            low, high = self.r_st
            return low + (high - low) * torch.rand((), generator=generator).item()
        level = int(torch.randint(1, self.levels + 1, (), generator=generator))
        box = self.index.box[row] * self.rescale(self.index.size[self.index.image[row]].tolist())
        return scale_for_level(box, level, self.r_th, generator, self.levels, self.canonical, self.k0)

    def rescale(self, size):
        """Step 2: the factor that makes the shorter side s0 pixels long."""
        return self.s0 / min(size) if self.s0 else 1.

    def crop(self, k):
        """Crop number k -> (image [3, h, w], Target)."""
        # The generator keeps 32 bits of what it is given: (seed, k) must be mixed, not shifted.
        g = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(f"{self.seed} {k}".encode()).digest()[:4], "big"))
        def pick(n):
            return int(torch.randint(n, (), generator=g))
        rows = row = None
        if self.mode in ("isus", "cus"):
            category, i = class_uniform_choice(self.index, g)                             # 1, 2
            rows = self.index.rows(i, category)
            if self.mode == "isus" and self.dataset.categories[category].isthing:
                row = int(rows[pick(len(rows))])                                          # 3: a random instance
                rows = torch.tensor([row])
        else:
            i = pick(len(self.dataset))
        sample, sigma = self.dataset[i], self.scale(row, g)
        native = tuple(sample.segments.shape)
        size = tuple(max(1, round(n * self.rescale(native) * sigma)) for n in native)
        mirror = torch.rand((), generator=g).item() < self.flip
        window, instance, spans = self.crop_size, 0, [(0, n - 1) for n in size]
        if self.mode == "full":
            window = size
        elif rows is not None:                                                            # 4: where it is visible
            box = torch.cat([self.index.box[rows, :2].amin(0), self.index.box[rows, 2:].amax(0)])
            y, x, instance = random_pixel(sample.segments, box, self.index.segment[rows], size, g)
            spans = [(y, y)] + [(size[1] - 1 - x,) * 2 if mirror else (x, x)]
        # Uniform among the corners whose window lies in the picture and contains the pixel (in "uniform": any pixel).
        corner = []
        for (first, last), n, m in zip(spans, size, window):
            low, high = max(0, first - m + 1), max(0, min(last, n - m))
            corner.append(low + pick(high - low + 1) if high > low else high)
        boxes = None if self.index is None else self.index.boxes(i, len(sample.categories))
        image, target = scaled_crop(sample, size, *corner, tuple(window), boxes, mirror, i, instance, sigma)
        return (image if self.augment is None else self.augment(image, g)), target

    def __iter__(self):
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        k = self.start + self.rank + self.world * number
        while True:                          # the loader takes one crop of each worker in turn: they come in order of k
            yield self.crop(k)
            k += self.world * step


# --- Figure 2 and its remedy ------------------------------------------------------------------------------------------

class Kept(list):
    """Samples in a list, as a data set: drawn once and read often."""

    def __init__(self, dataset):
        super().__init__(dataset)
        self.categories = dataset.categories

    def labels(self, i):
        return self[i].segments, self[i].categories, self[i].crowd


def entropy(counts):
    """- sum p log2 p of a histogram, in bits: log2(number of bins) if all bins are equal, 0 if one has everything."""
    p = counts[counts > 0] / counts.sum()
    return -(p * p.log2()).sum().item() + 0.


def demo(full=False):
    """Figure 2 on toy streets, and what three ways to sample crops do to classes and levels.

    Choice: the paper's text does not name the left plot's axis; uneven bins 0-25-75-90-99-100 under an average can only
    be percentiles of object size (here: of the things that show in a crop, whole, as resized).
    Choice: levels are those of VISIBLE boxes of ALL things; sizes of the right plot are rounded to powers of two."""
    try:
        import data
    except ImportError:
        sys.exit("The demo draws its streets with data.py of this repository, which is not beside this file.")
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image                                         # matplotlib brings it along
    # Pictures of 256 x 512 are a quarter of the usual ones, and so are canonical size (56 for 224) and plotted sizes.
    scenes, count, rule = *((300, 3000) if full else (60, 600)), {"canonical": 56}
    streets = Kept(data.StreetScenes(scenes))
    index, isthing = build_index(streets), torch.tensor([c.isthing for c in streets.categories])
    names = [c.name for c in streets.categories if c.isthing]
    levels, shares, chosen, examples = {}, {}, {}, {}
    for name, mode, r_th in (("uniform", "uniform", (.5, 2.)), ("cus", "cus", (.5, 2.)), ("isus", "isus", (.5, 2.)),
                             ("isus, wide r_th", "isus", (.25, 4.))):
        sampler = CropSampler(streets, (128, 256), mode, r_th=r_th, index=index, **rule)
        crops = [sampler.crop(k) for k in range(count)]
        things = [isthing[t.categories] & ~t.crowd for _, t in crops]
        levels[name] = torch.stack([torch.bincount(pyramid_level(t.boxes[m], **rule), minlength=5)[1:]
                                    for (_, t), m in zip(crops, things)])                               # [count, 4]
        shares[name] = torch.stack([t.categories.bincount(minlength=len(isthing)) > 0 for _, t in crops])[:, isthing]
        own = [(image, t, int(pyramid_level(t.full_boxes[t.instance - 1:t.instance], **rule)))
               for (image, t), m in zip(crops, things) if t.instance and m[t.instance - 1]]
        chosen[name] = torch.tensor([k for *_, k in own], dtype=torch.long).bincount(minlength=5)[1:]
        if name == "isus":
            examples = {k: [(image, t) for image, t, level in own if level == k][:2] for k in range(1, 5)}
        if name == "uniform":                                     # what shows is part of the whole: IoU = area / area
            visible, whole = (torch.cat(list(b)) for b in zip(*((t.boxes[m], t.full_boxes[m])
                                                                for (_, t), m in zip(crops, things))))
            visible, whole = ((b[:, 2:] - b[:, :2]).prod(1) for b in (visible, whole))
            edges, order = [round(q * len(whole)) for q in (0, .25, .75, .9, .99, 1)], whole.argsort()
            iou = [(visible / whole)[order[a:b]].mean().item() for a, b in zip(edges, edges[1:])]
    box = index.box[isthing[index.category] & ~index.crowd]
    sizes = (box[:, 2:] - box[:, :2]).prod(1).sqrt().log2().round().clamp(2, 7).long().bincount(minlength=8)[2:]
    bits = {name: entropy(n.sum(0)) for name, n in levels.items()}

    def line(left, right=""):
        print(f"{left:62}| {right}")

    def percent(v, digits=1):
        return " ".join(f"{100 * x:5.{digits}f}" for x in v.tolist())
    print(f"{scenes} streets of 256x512; {count} crops of 128x256 from each sampler; canonical size 56, s0 0, "
          "r_st 0.5..2, r_th 0.5..2 (wide: 0.25..4)\n")
    line("what the paper shows (it gives plots and no numbers)", "here")
    line("Fig. 2 left: the larger an object, the more crops cut off it", "IoU " + " ".join(f"{v:.2f}" for v in iou))
    line("", "  at percentiles 0-25-75-90-99-100 of size")
    line("Fig. 2 right: sizes are markedly non-uniform, few are large", " ".join(map(str, sizes.tolist())) + " objects")
    line("", "  of <=4 8 16 32 64 >=128 pixels")
    line('"more uniform supervision across all scales"', "all things in the crops by level 1 to 4, %; entropy")
    for name, n in levels.items():                                # the spread of ten parts tells what is chance
        error = torch.tensor([entropy(part.sum(0)) for part in n.chunk(10)]).std().item() / 10 ** .5
        line("  " + name, f"{percent(n.sum(0) / n.sum())}   {bits[name]:.2f} ± {error:.2f} of 2 bits")
    line("a semantic class with uniform probability", f"crops that show a {', '.join(names)}, %")
    for name, n in shares.items():
        line("  " + name, percent(n.float().mean(0), 0))
    line("(proves nothing: uniform by construction, but for the clamp)", "level of the chosen instance, uncut, %")
    for name, n in chosen.items():
        if n.sum():
            line("  " + name, percent(n / n.sum()))
    rarest = min(len(index.images_with(c)) for c in torch.where(isthing)[0].tolist()) / scenes
    print(f"\nA crop shows {levels['isus'].sum() / count:.0f} things, of which isus chose one; the others are resized "
          "along, so the levels of all move little.\nEvery class is in many of these streets, the rarest thing in "
          f"{rarest:.0%}: classes cannot gain much either.")

    fig = plt.figure(figsize=(10, 6.6), dpi=100, layout="constrained")
    above, below = fig.subfigures(2, 1, height_ratios=(1, 1.05))
    a, b, c = above.subplots(1, 3, width_ratios=(1, 1, 1.35))
    a.bar(["0–25", "25–75", "75–90", "90–99", "99–100"], iou)
    a.set(title="(a) IoU, cropped with whole box", xlabel="size of the object, percentile", ylim=(0, 1))
    b.bar(["≤4", "8", "16", "32", "64", "≥128"], sizes.tolist())
    b.set(title="(b) number of objects by size", xlabel="sqrt(w h), pixels (the paper's / 4)")
    for k, (name, n) in enumerate(levels.items()):
        c.bar(torch.arange(1, 5) + .2 * (k - 1.5), 100 * n.sum(0) / n.sum(), .2, label=f"{name}: {bits[name]:.2f} bits",
              color=("tab:gray", "tab:orange", "limegreen", "darkgreen")[k])
    c.axhline(25, color="k", lw=.8, ls=":", label="all levels alike: 2 bits")
    c.set(title="(c) level of all things in the crops", xlabel="pyramid level", ylabel="%", xticks=[1, 2, 3, 4])
    c.legend(fontsize=9)
    for ax in (a, b, c):
        ax.spines[["top", "right"]].set_visible(False)
    a.tick_params(axis="x", labelsize=8.5)
    below.suptitle("(d) isus: the chosen instance, the level of its whole box, and σ")
    for n, ax in enumerate(below.subplots(2, 4).T.flat):          # a column per level
        ax.axis("off")
        for image, t in examples[n // 2 + 1][n % 2:n % 2 + 1]:
            ax.imshow(image.permute(1, 2, 0).numpy())
            edge = F.pad((t.segments == t.instance).float(), (1,) * 4)        # void around, or a cut side has no line
            ax.contour(*(torch.arange(n) - 1 for n in edge.T.shape), edge, [.5], colors="yellow")
            name = streets.categories[t.categories[t.instance - 1]].name
            ax.set_title(f"{name}, level {n // 2 + 1}, σ = {t.scale:.2f}", fontsize=9, pad=2)
    os.makedirs("figures", exist_ok=True)
    fig.canvas.draw()
    sheet = Image.frombytes("RGBA", fig.canvas.get_width_height(), bytes(fig.canvas.buffer_rgba())).convert("RGB")
    sheet.quantize(256).save("figures/isus.png", optimize=True)   # a palette: a third of the bytes
    print("figures/isus.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="five times as many streets and crops")
    demo(parser.parse_args().full)

# --- Exercises --------------------------------------------------------------------------------------------------------
# 1. Draw ONE size per level in `scale_for_level`: the middle of the octave, instead of anywhere in it.  Which rows of
#    the demo's table change, which do not, and which sizes does the network never see now?
# 2. The chosen instance is one of many in a crop.  Let `crop` try five corners and keep the one where the levels of all
#    visible things are spread most (`entropy`).  How many bits does the demo gain, and what do the crops look like?
# 3. In `_taps` set `reach` to 1 always, which is bilinear resizing WITHOUT antialiasing.  Which test fails, and on
#    which side of sigma = 1?  Look at distant signs in panel (d).
