"""data.py - the shared vocabulary: records, boxes, segments, and one function that cuts crops.

A panoptic label gives each pixel a category. For countable *things* (a car, a person) it also says
which one. Uncountable *stuff* (road, sky) has no instances. One map holds both answers:

    segments  int64 [H, W]           0 0 0 1 1      categories int64 [N]
    0 is void (no label)             2 2 0 1 1      segment k has category categories[k - 1]
    k > 0 is segment k               2 2 3 3 1      crowd bool [N]: segment k is a group of things
                                                    whose members have no separate labels

Data flows one way:

    data set -> Sample (a whole image) -> crop() -> (image, Target) -> model.losses()

A crop cuts objects. A Target therefore holds two boxes of each object: `boxes` of the visible part
and `full_boxes` of the whole object. `truncated` marks the edges beyond which the object goes on.
What a box loss should do with these three is the subject of cabb_loss.py.

Conventions of all files: an image is float32 [3, H, W] in 0..1, RGB. Boxes are float [N, 4],
x1 y1 x2 y2 in pixels, half open (x2 = last pixel + 1). The centre of pixel (i, j) is the point
(x, y) = (j + .5, i + .5). A data set is a sequence of Samples with `.categories`, a list of
Category, and `.labels(i)`, which gives segments, categories and crowd without the image.

    python data.py [--quick] [--full] [--device D] [--out DIR]     the example below, then a figure
    pytest tests/test_data.py                                      the spec of this file

Notation of a panoptic label: Kirillov et al., "Panoptic Segmentation", CVPR 2019.
"""
import argparse
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torchvision.transforms.functional import adjust_hue

IGNORE = -1  # the semantic target of void and crowd pixels: no loss reads them


def example():
    """A crop of a label of 3x5 pixels, checked by hand: segment 1 is cut, segment 2 is gone."""
    segments = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 0, 1, 1], [2, 2, 3, 3, 1]])
    sample = Sample(torch.zeros(3, 3, 5), segments, torch.tensor([7, 8, 7]), torch.zeros(3).bool(), "")
    _, target = crop(sample, 0, 2, (3, 2))                     # all rows, columns 2 and 3
    assert target.segments.tolist() == [[0, 1], [0, 1], [2, 2]]        # old 3 has become 2
    assert target.categories.tolist() == [7, 7]
    assert target.boxes.tolist() == [[1, 0, 2, 2], [0, 2, 2, 3]]       # of the visible part
    assert target.full_boxes.tolist() == [[1, 0, 3, 3], [0, 2, 2, 3]]  # segment 1 is 2 pixels wide
    assert target.truncated.tolist() == [[False, False, True, False], [False] * 4]
    return sample, target


# --- Records ----------------------------------------------------------------------------------

class DataError(ValueError):
    """A file or argument is wrong. The message is one sentence: what was wrong, what to do."""


class Category(NamedTuple):
    """One category of a data set; its number is its place in `.categories`."""
    name: str
    isthing: bool
    colour: tuple  # RGB, 0..255


@dataclass
class Sample:
    """One whole image and its label."""
    image: torch.Tensor       # float32 [3, H, W], 0..1
    segments: torch.Tensor    # int64 [H, W], 0 is void
    categories: torch.Tensor  # int64 [N], of segment k at k - 1
    crowd: torch.Tensor       # bool [N]
    name: str


@dataclass
class Target:
    """What a model may learn from one crop."""
    segments: torch.Tensor    # int64 [h, w]
    categories: torch.Tensor  # int64 [N]
    crowd: torch.Tensor       # bool [N]
    boxes: torch.Tensor       # float32 [N, 4], of the visible part; stuff has boxes too
    full_boxes: torch.Tensor  # float32 [N, 4], of the whole object: may reach outside of the crop
    truncated: torch.Tensor   # bool [N, 4]: is the object cut at the left, top, right, bottom edge?
    image_id: int = 0         # which image of the data set
    instance: int = 0         # the segment for which the sampler chose this crop (0: none)
    scale: float = 1.0        # by which the image was resized before

    def to(self, device):
        tensors = {k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)}
        return replace(self, **tensors)


class Prediction(NamedTuple):
    """What a model says about one image."""
    segments: torch.Tensor    # int64 [H, W], 0 is void
    categories: torch.Tensor  # int64 [N]
    scores: torch.Tensor      # float [N], 1 for stuff
    instances: dict           # before fusion: boxes [D, 4], masks bool [D, H, W], scores, categories


# --- Boxes ------------------------------------------------------------------------------------

def encode(boxes, anchors):
    """Boxes against anchors, both [N, 4] -> deltas [N, 4]: (c_G - c_A) / d_A and log(d_G / d_A).

    c is a box's centre (x, y), d its width and height. As torchvision's BoxCoder((1, 1, 1, 1))."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c_g, d_g = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([(c_g - c_a) / d_a, (d_g / d_a).log()], 1)


def decode(deltas, anchors, limit=math.log(1000 / 16)):
    """The inverse of `encode`: deltas [N, 4] and anchors [N, 4] -> boxes [N, 4].

    `limit` is the largest log-size: without it the exp of an untrained network overflows."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c, d = c_a + deltas[:, :2] * d_a, d_a * deltas[:, 2:].clamp(max=limit).exp()
    return torch.cat([c - d / 2, c + d / 2], 1)


def pyramid_level(boxes, levels=4, canonical=224, k0=3):
    """The pyramid level that serves a box: boxes [N, 4] -> int64 [N] in 1..levels.

        k = max(1, min(levels, floor(k0 + log2(sqrt(w h) / canonical))))

    An object of `canonical` pixels (224: ImageNet's image size) belongs to level k0, one of twice
    that size to the next level. Network and sampler must use the same rule.
    Deviation: Porzi et al. 2019 print the root over the whole fraction; Mask R-CNN, which they
    cite, has it as here. Raises ValueError for a box with a coordinate that is no number."""
    if boxes.isnan().any():
        raise ValueError("pyramid_level: a box has a NaN coordinate; check the network's deltas")
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6).prod(1).sqrt()
    return (k0 + (size / canonical).log2()).floor().clamp(1, levels).long()


# --- Segments ---------------------------------------------------------------------------------

def mask_boxes(segments, count):
    """Boxes of segments 1..count of a map int64 [H, W] -> float32 [count, 4]; absent: zeros.

    No mask of H x W is made for a single segment: two tables say which rows and columns have it."""
    (h, w), device = segments.shape, segments.device
    rows = torch.zeros(count + 1, h, dtype=torch.uint8, device=device)
    columns = torch.zeros(count + 1, w, dtype=torch.uint8, device=device)
    rows[segments, torch.arange(h, device=device)[:, None]] = 1
    columns[segments, torch.arange(w, device=device)] = 1
    first = [t.argmax(1) for t in (columns, rows)]             # argmax takes the first of equals
    last = [t.shape[1] - t.flip(1).argmax(1) for t in (columns, rows)]
    return (torch.stack(first + last, 1) * rows.amax(1)[:, None])[1:].float()


def new_numbers(keep):
    """keep bool [N] -> int64 [N + 1]: the new number of old segment 0, 1, .., N; dropped ones get 0.

    `new_numbers(keep)[segments]` is the map without the dropped segments."""
    return F.pad(keep.cumsum(0) * keep, (1, 0))


def semantic_target(target):
    """The category of each pixel, int64 [H, W]; IGNORE where the segment is void or crowd."""
    category = torch.where(target.crowd, IGNORE, target.categories)
    return torch.cat([category.new_tensor([IGNORE]), category])[target.segments]


def thing_truth(target, isthing):
    """The things of a Target that are no crowd: segment numbers [G], boxes [G, 4],
    truncated [G, 4], categories [G]."""
    keep = isthing[target.categories] & ~target.crowd
    number = torch.where(keep)[0] + 1
    return number, target.boxes[keep], target.truncated[keep], target.categories[keep]


# --- From images to crops ---------------------------------------------------------------------

def nearest(old, new):
    """Which of `old` pixels lies under the centre of each of `new` pixels -> int64 [new]."""
    return ((torch.arange(new) + .5) * old / new).long()


def colour_jitter(image, generator, strength, hue=0.0):
    """Brightness, contrast and saturation of an image [3, H, W], each multiplied by a factor in
    1 - strength .. 1 + strength; then the hue is turned by up to `hue` of the colour circle."""
    factors = 1 + strength * (2 * torch.rand(3, generator=generator) - 1)
    brightness, contrast, saturation = factors.tolist()
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(0, keepdim=True)
    image = (grey + (image - grey) * saturation).clamp(0, 1)
    if hue:
        image = adjust_hue(image, hue * (2 * torch.rand((), generator=generator).item() - 1))
    return image


def taps(old, new, start, length):
    """Linear resampling from `old` to `new` pixels: which old pixels, with which weights, make the
    new pixels start..start + length - 1 -> two tensors [T, length].

    New pixel i is centred at c = (i + .5) s with s = old / new. A triangle around c weighs the old
    pixels' centres. Its half width is 1, or s where the image shrinks (antialiasing)."""
    reach = max(old / new, 1.)
    centre = torch.arange(start, start + length, dtype=torch.float64) + .5
    centre = (centre * torch.tensor(old / new).double()).float()       # rounded as PyTorch does
    pixel = (centre - reach + .5).floor().long() + torch.arange(math.ceil(2 * reach) + 1)[:, None]
    weight = (1 - (pixel - centre + .5).abs() / reach).clamp(min=0) * ((pixel >= 0) & (pixel < old))
    return pixel.clamp(0, old - 1), weight / weight.sum(0)


def resize_window(image, size, top, left, window):
    """What the image [3, H, W], resized to `size`, shows in a window (h, w) at (top, left).

    Plain version: F.interpolate(image, size, mode="bilinear", antialias=True), then a slice, black
    outside. This one reads only the native pixels that the window shows: an image of 1024x2048
    that grows four times would take 400 MB, of which a crop shows a hundredth."""
    out = image.new_zeros(image.shape[0], *window)
    begin = [max(0, -o) for o in (top, left)]                  # the part of the window with image
    end = [min(m, n - o) for m, n, o in zip(window, size, (top, left))]
    if begin[0] >= end[0] or begin[1] >= end[1]:
        return out
    found = [taps(image.shape[1 + d], size[d], (top, left)[d] + begin[d], end[d] - begin[d])
             for d in (0, 1)]
    low = [int(pixel[weight > 0].min()) for pixel, weight in found]
    high = [int(pixel[weight > 0].max()) for pixel, weight in found]
    part = image[:, low[0]:high[0] + 1, low[1]:high[1] + 1]
    for axis, (pixel, weight) in enumerate(found):             # bilinear is separable: rows, columns
        if image.shape[1 + axis] != size[axis]:
            pixel = pixel.clamp(low[axis], high[axis]) - low[axis]
            part = part.transpose(1, 2) if axis else part
            blended = 0
            for p, w in zip(pixel, weight):                    # 3 to 5 taps
                blended = blended + part[:, p] * w[:, None]
            part = blended.transpose(1, 2) if axis else blended
    out[:, begin[0]:end[0], begin[1]:end[1]] = part
    return out


def crop(sample, top, left, window, size=None, flip=False, boxes=None, image_id=0, instance=0,
         scale=1.0):
    """The sample resized to `size` (h, w; None: as it is), mirrored if `flip`, and of that the
    window (h, w) whose upper left pixel is (top, left) -> (image [3, h, w], Target).

    Segments are resized by the nearest pixel, for their numbers must not mix. Invisible ones are
    dropped, the others renumbered 1..n in their order. Outside of the image all is black and void.
    `boxes` [N, 4] are the native boxes, if they are known. `instance` is a segment of the sample.

    Native rows [y1, y2) show in the scaled rows whose centres fall on them; `full_boxes` are made
    of these. Choice: where shrinking loses the thin tips of an object, its full box has them still.
    Choice: `truncated` compares full boxes with the window; it does not ask which pixels are cut."""
    (height, width), (h, w) = sample.segments.shape, window
    new_h, new_w = size = tuple(size or (height, width))
    at = new_w - left - w if flip else left                    # the window before mirroring
    y, x = nearest(height, new_h), nearest(width, new_w)
    image = resize_window(sample.image, size, top, at, window).clamp_(0, 1)
    segments, count = sample.segments.new_zeros(h, w), len(sample.categories)
    y0, x0, y1, x1 = max(top, 0), max(at, 0), min(top + h, new_h), min(at + w, new_w)
    if y0 < y1 and x0 < x1:
        visible = sample.segments[y[y0:y1, None], x[x0:x1]]
        segments[y0 - top:y1 - top, x0 - at:x1 - at] = visible
    boxes = mask_boxes(sample.segments, count) if boxes is None else boxes
    # How many scaled pixels come before a native edge? `nearest` ascends: a binary search tells.
    full_x = torch.searchsorted(x, boxes[:, ::2].long().contiguous())
    full_y = torch.searchsorted(y, boxes[:, 1::2].long().contiguous())
    if flip:
        image, segments, full_x = image.flip(-1), segments.flip(-1), new_w - full_x.flip(1)
    full = torch.stack([full_x - left, full_y - top], 2).transpose(1, 2).flatten(1).float()
    full = full[:, [0, 2, 1, 3]]                               # x1 x2 y1 y2 -> x1 y1 x2 y2
    keep = torch.bincount(segments.flatten(), minlength=count + 1)[1:] > 0
    number = new_numbers(keep)
    segments, full = number[segments], full[keep]
    truncated = torch.cat([full[:, :2] < 0, full[:, 2:] > torch.tensor([w, h])], 1)
    return image, Target(segments, sample.categories[keep], sample.crowd[keep],
                         mask_boxes(segments, int(keep.sum())), full, truncated,
                         image_id, int(number[instance]), scale)


def random_pixel(segments, box, chosen, size, generator):
    """A pixel (y, x) of the label resized to `size` that shows one of the segments `chosen` int64
    [S], and the number of that segment.

    `box` encloses them in the native label. The pixel is drawn there, uniformly among those that
    resizing keeps. If it keeps none (a small object at half the size): among all of them."""
    x1, y1, x2, y2 = (int(v) for v in box)
    part = segments[y1:y2, x1:x2]
    mask = torch.isin(part, chosen)
    # Native row v shows in the scaled rows ends[v] to ends[v + 1] - 1, perhaps in none.
    ends = [torch.searchsorted(nearest(old, new), torch.arange(low, high + 1))
            for old, new, low, high in zip(segments.shape, size, (y1, x1), (y2, x2))]
    shown = mask & (ends[0].diff() > 0)[:, None] & (ends[1].diff() > 0)
    shown = shown if shown.any() else mask
    rows = shown.sum(1)                                        # first a row by its share of pixels
    n = torch.randint(int(rows.sum()), (), generator=generator)
    i = int(torch.searchsorted(rows.cumsum(0), n, right=True))
    j = int(torch.nonzero(shown[i])[n - rows[:i].sum()])
    pixel = []
    for end, v, new in zip(ends, (i, j), size):
        low, high = int(end[v]), int(end[v + 1])
        more = int(torch.randint(max(high - low, 1), (), generator=generator))
        pixel.append(min(low + more, new - 1))
    return *pixel, int(part[i, j])


def collate(crops):
    """Crops (image, Target) -> images [B, 3, H, W] and a list of targets. Images of different sizes
    are padded with void at the right and at the bottom."""
    h, w = (max(image.shape[d] for image, _ in crops) for d in (1, 2))
    images, targets = [], []
    for image, target in crops:
        padding = (0, w - image.shape[2], 0, h - image.shape[1])
        images.append(F.pad(image, padding))
        targets.append(replace(target, segments=F.pad(target.segments, padding)))
    return torch.stack(images), targets


def demo(quick=False, full=False, device="cpu", out="figures"):
    """What the toy street is like, in a table and a figure of scenes with their labels."""
    print("a crop of a 3x5 label:", example()[1])
    from lab.street import show
    show(scenes=10 if quick else 400 if full else 100, out=out)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer scenes")
    parser.add_argument("--full", action="store_true", help="more scenes")
    parser.add_argument("--device", default="cpu", help="unused: nothing here needs a GPU")
    parser.add_argument("--out", default="figures", help="folder of the figure")
    demo(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    main()

# Exercises
# 1. Let `crop` mark an edge as truncated whenever the visible box touches it. Which objects are
#    now marked although nothing of them is cut, and which test notices?
# 2. Resize `segments` bilinearly instead of by the nearest pixel. What is the category of a pixel
#    half way between segment 1 and segment 3?
# 3. Compute `full_boxes` from the resized mask. Which objects lose a pixel when the image shrinks?
