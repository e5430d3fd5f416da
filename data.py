"""The shared vocabulary: records, boxes, segments, and one function that cuts crops.

A panoptic label gives each pixel a category. For *things* (a car, a person) it also says which
thing. *Stuff* (road, sky) has no instances. One map holds both answers:

    segments  int64 [H, W]           0 0 0 1 1      categories int64 [N]
    0 is void (no label)             2 2 0 1 1      segment k has category categories[k - 1]
    k > 0 is segment k               2 2 3 3 1      crowd bool [N]: segment k is a group of things
                                                    whose members have no separate labels

A crop cuts objects. A Target holds two boxes of each: `boxes` of the visible part, `full_boxes` of
the whole object. `truncated` marks the edges beyond which it goes on, which cabb_loss.py needs.

Boxes are float [N, 4], x1 y1 x2 y2 in pixels, half open (x2 = last pixel + 1). Pixel (i, j) has its
centre at (j + .5, i + .5), in row i. A data set is a sequence of Samples with a list `.categories`.
Its `.labels(i)` gives segments, categories and crowd of Sample i, and reads no image.
`Choice:` marks what a paper leaves open, `Deviation:` what a file does otherwise than its paper.

    python data.py [--quick] [--full] [--device D] [--out DIR]     the example below, then a figure
    pytest tests/test_data.py                                      the spec of this file
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
    image, crowd = torch.zeros(3, 3, 5), torch.zeros(3).bool()
    sample = Sample(image, segments, torch.tensor([7, 8, 7]), crowd, name="")
    _, target = crop(sample, 0, 2, (3, 2))                     # all rows, columns 2 and 3
    assert target.segments.tolist() == [[0, 1], [0, 1], [2, 2]]        # old 3 has become 2
    assert target.boxes.tolist() == [[1, 0, 2, 2], [0, 2, 2, 3]]       # of the visible part
    assert target.full_boxes.tolist() == [[1, 0, 3, 3], [0, 2, 2, 3]]  # segment 1 is 2 pixels wide
    assert target.truncated.tolist() == [[False, False, True, False], [False] * 4]
    return sample, target


# --- Records ----------------------------------------------------------------------------------

class DataError(ValueError):
    """A file or an argument is wrong. The message is one sentence: what was wrong, what to do."""


class Category(NamedTuple):
    """One category of a data set; its number is its place in `.categories`."""
    name: str
    isthing: bool
    colour: tuple  # RGB, 0..255


@dataclass
class Sample:
    """One whole image and its label."""
    image: torch.Tensor       # float32 [3, H, W], 0..1, not normalised
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
    scale: float = 1.0        # sigma of the sampler: the image was resized by it

    def each(self, f):
        """The Target with `f` applied to each of its tensors."""
        return replace(self, **{k: f(v) for k, v in vars(self).items() if torch.is_tensor(v)})

    def to(self, device):
        return self.each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):                                      # torch's DataLoader calls it
        return self.each(torch.Tensor.pin_memory)


class Prediction(NamedTuple):
    """What a model says about one image."""
    segments: torch.Tensor    # int64 [H, W], 0 is void
    categories: torch.Tensor  # int64 [N]
    scores: torch.Tensor      # float [N], 1 for stuff
    instances: dict           # unfused: boxes [D, 4], masks bool [D, H, W], scores, categories


# --- Boxes ------------------------------------------------------------------------------------

def encode(boxes, anchors):
    """Boxes against anchors, [N, 4] -> deltas [N, 4]: (c_G - c_A) / d_A and log(d_G / d_A) with
    centres c and sizes d, as torchvision's BoxCoder((1, 1, 1, 1))."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c_g, d_g = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([(c_g - c_a) / d_a, (d_g / d_a).log()], 1)


def decode(deltas, anchors, limit=math.log(1000 / 16)):
    """The inverse of `encode` -> boxes [N, 4]. Log-sizes above `limit` are clamped to it."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c, d = c_a + deltas[:, :2] * d_a, d_a * deltas[:, 2:].clamp(max=limit).exp()
    return torch.cat([c - d / 2, c + d / 2], 1)


def pyramid_level(boxes, levels=4, canonical=224, k0=3):
    """The pyramid level that serves a box: boxes [N, 4] -> int64 [N] in 1..levels.
        k = max(1, min(levels, floor(k0 + log2(sqrt(w h) / canonical))))
    An object of `canonical` pixels (224: ImageNet's image size) belongs to level k0. Network and
    sampler (isus.py) must use the same rule. Level k is FPN's P(k + 1). A NaN box gets level 1.
    Deviation: Porzi et al. 2019 print the root over all of the fraction, FPN (2017) as here."""
    size = (boxes[:, 2:] - boxes[:, :2]).nan_to_num().clamp(min=0).prod(1).sqrt()
    return (k0 + (size / canonical).log2()).floor().clamp(1, levels).long()


# --- Segments ---------------------------------------------------------------------------------

def mask_boxes(segments, count):
    """Boxes of segments 1..count of a map int64 [H, W] -> float32 [count, 4]; absent: zeros. Two
    tables say which rows and columns have a segment; no mask [H, W] is made for each.
    RuntimeError: an id that is not in 0..count."""
    (h, w), device = segments.shape, segments.device
    rows = torch.zeros(count + 1, h, dtype=torch.uint8, device=device).scatter_(0, segments.T, 1)
    columns = torch.zeros(count + 1, w, dtype=torch.uint8, device=device).scatter_(0, segments, 1)
    first = [t.argmax(1) for t in (columns, rows)]             # argmax takes the first of equals
    last = [t.shape[1] - t.flip(1).argmax(1) for t in (columns, rows)]
    return (torch.stack(first + last, 1) * rows.amax(1)[:, None])[1:].float()


def new_numbers(keep):
    """keep bool [N] -> int64 [N + 1]: new numbers of segments 0..N, 0 for those that are dropped.
    `new_numbers(keep)[segments]` is the map without them."""
    return F.pad(keep.cumsum(0) * keep, (1, 0))


def semantic_target(target):
    """The category of each pixel, int64 [H, W]; IGNORE where the segment is void or crowd."""
    category = torch.where(target.crowd, IGNORE, target.categories)
    return F.pad(category, (1, 0), value=IGNORE)[target.segments]


def thing_truth(target, isthing):
    """Things of a Target that are no crowd: number [G], boxes, truncated [G, 4], categories [G]."""
    keep = isthing[target.categories] & ~target.crowd
    return (torch.where(keep)[0] + 1, target.boxes[keep], target.truncated[keep],
            target.categories[keep])


# --- From images to crops ---------------------------------------------------------------------

def nearest(old, new):
    """Which of `old` pixels lies under the centre of each of `new` pixels -> int64 [new]."""
    return ((torch.arange(new) + .5) * old / new).long()


def colour_jitter(image, generator, strength, hue=0.0):
    """Multiplies brightness, contrast and saturation of an image [3, H, W] by factors in
    1 - strength .. 1 + strength, then turns the hue by up to `hue` of the colour circle."""
    shift = strength * (2 * torch.rand(3, generator=generator) - 1)
    brightness, contrast, saturation = (1 + shift).tolist()
    image = image * brightness
    image = image.mean() + (image - image.mean()) * contrast
    grey = image.mean(0, keepdim=True)
    image = (grey + (image - grey) * saturation).clamp(0, 1)
    if hue:
        image = adjust_hue(image, hue * (2 * torch.rand((), generator=generator).item() - 1))
    return image


def blend(old, new, start, length):
    """Bilinear resizing of `old` to `new` pixels: new pixels from `start` on -> their weights
    [length, n] of n old pixels, and the slice of these. New pixel i is centred at (i + .5) s with
    s = old / new. The weights are a triangle around it of half width max(1, s): antialiased."""
    centre, reach = (torch.arange(start, start + length) + .5) * (old / new), max(old / new, 1)
    low, high = max(int(centre[0] - reach), 0), min(int(centre[-1] + reach) + 1, old)
    weight = (1 - (torch.arange(low, high) + .5 - centre[:, None]).abs() / reach).clamp(min=0)
    return weight / weight.sum(1, keepdim=True), slice(low, high)


def resize_window(image, size, y, x):
    """Rows y[0] to y[1] - 1 and columns x[0] to x[1] - 1 of the image [3, H, W] resized to `size`.
    Plain version: F.interpolate(image, size, mode="bilinear", antialias=True), then a slice. This
    computes only the slice: all of an enlarged image may take 400 MB."""
    if image.shape[1:] == size:
        return image[:, slice(*y), slice(*x)]
    down, rows = blend(image.shape[1], size[0], y[0], length=y[1] - y[0])
    across, columns = blend(image.shape[2], size[1], x[0], length=x[1] - x[0])
    part = image[:, rows, columns].transpose(0, 1)             # the axis to resize stands first
    for weight in (down, across):
        part = torch.sparse.mm(weight.to_sparse(), part.flatten(1)).view(-1, *part.shape[1:])
        part = part.movedim(2, 0)                              # [H, 3, W] -> [W, h, 3] -> [3, w, h]
    return part.transpose(1, 2)


def crop(sample, top, left, window, *, size=None, flip=False, boxes=None, image_id=0, instance=0,
         scale=1.0):
    """Resizes the sample to `size` (h, w; None: no), mirrors it if `flip`, and cuts the window
    (h, w) at (top, left) -> (image [3, h, w], Target).
    Segments take the nearest pixel: numbers must not mix. Invisible ones are dropped, the others
    renumbered 1..n in their order. Outside of the image all is black and void. `boxes` [N, 4] are
    the native boxes, if known; `instance` is a segment of the sample.
    Choice: full boxes come from the native label: they include tips that shrinking loses.
    Choice: `truncated` compares full boxes with the window, not pixels."""
    (h, w), (new_h, new_w) = window, size or sample.segments.shape
    at = new_w - left - w if flip else left                    # the window before mirroring
    rows, columns = nearest(len(sample.segments), new_h), nearest(sample.segments.shape[1], new_w)
    image, segments = torch.zeros(3, h, w), torch.zeros(h, w, dtype=torch.long)
    y, x = (max(top, 0), min(top + h, new_h)), (max(at, 0), min(at + w, new_w))
    if y[0] < y[1] and x[0] < x[1]:
        inside = (slice(y[0] - top, y[1] - top), slice(x[0] - at, x[1] - at))
        image[(..., *inside)] = resize_window(sample.image, (new_h, new_w), y, x=x).clamp(0, 1)
        segments[inside] = sample.segments[rows[slice(*y), None], columns[slice(*x)]]
    boxes = mask_boxes(sample.segments, len(sample.categories)) if boxes is None else boxes
    # How many scaled pixels come before a native edge? `nearest` ascends: search for it.
    x1, x2 = (torch.searchsorted(columns, boxes[:, i].long()) for i in (0, 2))
    y1, y2 = (torch.searchsorted(rows, boxes[:, i].long()) for i in (1, 3))
    if flip:
        image, segments, x1, x2 = image.flip(-1), segments.flip(-1), new_w - x2, new_w - x1
    keep = torch.bincount(segments.flatten(), minlength=len(boxes) + 1)[1:] > 0
    full = torch.stack([x1 - left, y1 - top, x2 - left, y2 - top], 1)[keep].float()
    truncated = torch.cat([full[:, :2] < 0, full[:, 2:] > torch.tensor([w, h])], 1)
    number = new_numbers(keep)
    segments = number[segments]
    return image, Target(
        segments, sample.categories[keep], sample.crowd[keep],
        boxes=mask_boxes(segments, len(full)), full_boxes=full, truncated=truncated,
        image_id=image_id, instance=int(number[instance]), scale=scale)


def random_pixel(segments, box, chosen, size, generator):
    """A pixel of the label resized to `size` that shows a segment of `chosen` [S] -> y, x, segment.
    `box` encloses these natively. Drawn among the pixels that resizing keeps, if any, else all."""
    x1, y1, x2, y2 = map(int, box)
    part = segments[y1:y2, x1:x2]
    mask = torch.isin(part, chosen)
    # Native row v shows in the scaled rows ends[v] to ends[v + 1] - 1, perhaps in none.
    ends = [torch.searchsorted(nearest(old, new), torch.arange(low, high + 1))
            for old, new, low, high in zip(segments.shape, size, (y1, x1), (y2, x2))]
    shown = mask & (ends[0].diff() > 0)[:, None] & (ends[1].diff() > 0)
    shown = shown if shown.any() else mask
    i, j = torch.nonzero(shown)[torch.randint(int(shown.sum()), (), generator=generator)].tolist()
    pixel = []
    for end, v, new in zip(ends, (i, j), size):
        low, high = int(end[v]), int(end[v + 1])
        more = int(torch.randint(max(high - low, 1), (), generator=generator))
        pixel.append(min(low + more, new - 1))
    return *pixel, int(part[i, j])


def collate(crops):
    """Crops (image, Target) -> images [B, 3, H, W], targets; smaller ones are padded with void."""
    h, w = (max(image.shape[d] for image, _ in crops) for d in (1, 2))
    pads = [(0, w - image.shape[2], 0, h - image.shape[1]) for image, _ in crops]
    images = torch.stack([F.pad(image, pad) for (image, _), pad in zip(crops, pads)])
    return images, [replace(t, segments=F.pad(t.segments, p)) for (_, t), p in zip(crops, pads)]


def command_line(demo, text, *, quick, full):
    """Runs demo(quick, full, device, out) as the command line says; --help prints `text`."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=text, formatter_class=raw)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--out", help="folder of the figure; default: figures; --quick: runs/quick")
    flags = parser.parse_args()
    flags.out = flags.out or ("runs/quick" if flags.quick else "figures")
    try:
        demo(**vars(flags))
    except ModuleNotFoundError as e:
        parser.exit(2, f"{e}: the demo needs nanopanoptic's folder lab/ beside this file\n")


def demo(quick=False, full=False, device="cpu", out="figures"):
    """The toy street: a table, a figure of scenes with their labels."""
    print("segments of a crop of a 3x5 label:", example()[1].segments.tolist())
    from lab.street import show
    show(10 if quick else 400 if full else 100, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="fewer scenes", full="more scenes")

# Exercises
# 1. Let `crop` mark an edge as truncated whenever the visible box touches it. Which test notices?
# 2. Resize `segments` bilinearly. What is the category half way between segments 1 and 3?
# 3. Compute `full_boxes` from the resized mask. Which objects lose a pixel when the image shrinks?
