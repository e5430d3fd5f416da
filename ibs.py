r"""Intra-batch supervision (IBS): a thing of one crop must have an empty mask in another crop.

The problem. A unified network computes one vector for each segment (its embedding, a row of E) and
one for each pixel (the features F). The mask of a segment is the sigmoid of their product. Training
on crops of large images has PQ 59.5, on whole images 57.2 (Table 1). But a crop shows few cars,
so the network learns to tell few cars apart. On a whole image the mask of one car covers parts of
others: it is confused. This happens mainly to large things of one category.

The idea. The batch holds crops of other images. A car of crop 1 is not in crop 2, so its mask there
must be empty:

    crop 1 --> E_1 [N, C] ------.
                                 x --> logits [N, H, W] --> focal loss towards 0, things only (4.1)
    crop 2 --> F_2 [C, H, W] ---'

No new data or weights, no change at test. A mask that is empty already teaches nothing. So section
4.2 draws pairs of crops that show one category at a similar size: there confusion is likely.

The claim. Confusion "drops significantly" (Figure 5; here: 39% to 16%). On Cityscapes (Table 2)
Prec_th rises from 86.8 to 92.6 (here too); not seen here: PQ_th 52.2 to 54.7, Acc_th 81.3 to 87.1.

The rest. pq.py: Eq. 1-3, and the measure of Figure 5 (`confusion_ratio`). lab/kernels.py and
lab/queries.py: Panoptic FCN, Mask2Former. lab/outside.py: section 5.2. lab/confusion.py: Table 3.

    python ibs.py [--quick] [--full] [--device D] [--out DIR]    example, five trainings, Figure 5
    pytest tests/test_ibs.py                                     the spec of this file

Daan de Geus, Gijs Dubbelman, "Intra-Batch Supervision for Panoptic Segmentation on High-Resolution
Images", WACV 2023.
"""
import hashlib
import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import IterableDataset, get_worker_info
from torchvision.ops import sigmoid_focal_loss

from data import (IGNORE, collate, colour_jitter, command_line, crop, random_pixel,
                  semantic_target, thing_truth)


def example():
    """Two crops of one pixel with one car each, by hand. Car 1 is confused with car 2.

    Let a = log 3, so that sigmoid(a) = 3/4. The products of embeddings and features are

                          F_1 = (1, -1)    F_2 = (1, 1)
        E_1 = (a, 0)            a               a          car 1 covers car 2, p = 3/4
        E_2 = (0, a)           -a               a          car 2 hardly covers car 1, p = 1/4

    The diagonal holds each car's own mask, which the usual loss supervises. IBS supervises the two
    other logits. The focal loss is (1 - alpha) p^gamma log(1 / (1 - p)) where the truth is 0:
    3/4 (3/4)^2 log(4) and 3/4 (1/4)^2 log(4/3)."""
    a = torch.tensor(3.0).log()
    embeddings = [a * torch.tensor([[1.0, 0.0]]), a * torch.tensor([[0.0, 1.0]])]
    features = torch.tensor([[1.0, -1.0], [1.0, 1.0]])[:, :, None, None]         # [2, C, 1, 1]
    products = torch.stack([mask_logits(e, f) for e in embeddings for f in features]).flatten()
    assert torch.equal(products, a * torch.tensor([1, 1, -1, 1]))
    targets = pick_targets(torch.tensor([7, 8]))               # crops of images 7 and 8
    assert targets.tolist() == [1, 0]
    loss = ibs_loss(embeddings, features, [torch.tensor([True])] * 2, targets=targets).item()
    by_hand = (27 / 64 * math.log(4) + 3 / 64 * math.log(4 / 3)) / 2             # mean of two masks
    assert abs(loss - by_hand) < 1e-6
    return loss


# --- 3.1 Unified panoptic segmentation --------------------------------------------------------

def mask_logits(embeddings, features):
    """E [N, C] times F [C, H, W] -> logits [N, H, W]. The masks are M = sigmoid(E F)."""
    return (embeddings @ features.flatten(1)).unflatten(1, features.shape[1:])


# --- 4.1 Additional supervision ---------------------------------------------------------------

def pick_targets(image_ids, generator=None, paired=False):
    """Draws for each crop i another crop tgt_i, whose features its embeddings meet -> int64 [B].

    image_ids int64 [B]: the image that each crop comes from. tgt_i is drawn uniformly among the
    crops of OTHER images; -1 where there is none. All ids alike: IBS is off. paired: 2k and 2k + 1
    come as a pair (section 4.2), and each is the target of the other, if their images differ.
    Deviation: the paper and the released code take any other crop. Two crops of one image may share
    an object, whose mask is not empty then. The paper expects this to be rare with many images.
    Choice: each process of a training uses its own crops, as in the released code."""
    allowed = image_ids[:, None] != image_ids                  # [B, B]: may j be the target of i?
    if paired:
        pair = torch.arange(len(image_ids), device=image_ids.device) // 2
        allowed = allowed & (pair[:, None] == pair)
    # Each allowed j draws a number in 0..1 and the largest wins: all are equally likely. The others
    # get -2. A column with -1 in front means "none": it wins where no j is allowed.
    draw = torch.rand(allowed.shape, generator=generator).to(allowed.device)
    draw = F.pad(draw.masked_fill(~allowed, -2), (1, 0), value=-1)
    return draw.argmax(1) - 1


def plain_ibs_loss(embeddings, features, is_thing, targets, alpha=0.25, gamma=2.0):
    """The plain version of `ibs_loss`: mask by mask, torchvision's focal loss towards S^th = 0."""
    losses = []
    for e, thing, target in zip(embeddings, is_thing, targets.tolist()):
        for row in e[thing] if target >= 0 else []:
            logits = (row[:, None, None] * features[target]).sum(0)                  # [H, W]
            losses.append(sigmoid_focal_loss(logits, torch.zeros_like(logits), alpha, gamma=gamma,
                                             reduction="mean"))
    return sum(losses) / max(len(losses), 1)


def ibs_loss(embeddings, features, is_thing, targets, alpha=0.25, gamma=2.0, *, weights=None,
             pixels=lambda logits: logits):
    """Focal loss of the masks M^th of things on the features of other crops, towards 0 -> scalar.

    embeddings: a list of B tensors E_i [N_i, C], only those that have a true segment.
    features: F [B, C, H, W]. is_thing: a list of B tensors bool [N_i].
    targets: int64 [B] from `pick_targets`; -1: this crop has none.
    weights: a list of B tensors [N_i], what each mask counts in the mean; None: all alike. In
    Panoptic FCN a thing has up to seven embeddings, which share a weight of 1.
    pixels: a function that picks those that count, [N, H W] -> [N, p]; by default all do.
    Both sides get gradients. Without a target or a thing the loss is 0 and gradients are zeros.
    Choice, as released: alpha = 0.25, gamma = 2 (Lin 2017): confused pixels weigh most; the mean
    over pixels, then over things; the weight of this loss: for Panoptic FCN 4 on Cityscapes, 15 on
    Vistas; for Mask2Former 50 and 100 on each layer, at 12,544 pixels (lab/queries.py). Deviation:
    there each layer draws a new random crop, even with pairs."""
    losses, counts, weights = [], [], weights or [thing.float() for thing in is_thing]
    for e, thing, weight, target in zip(embeddings, is_thing, weights, targets.tolist()):
        if target >= 0 and thing.any():
            x = pixels(mask_logits(e[thing], features[target]).float().flatten(1))   # [N_th, p]
            # With p = sigmoid(x) and truth 0 the focal loss is (1 - alpha) p^gamma log(1 + e^x).
            # exp(gamma log p) has a finite gradient even where p is 0.
            focal = (1 - alpha) * (gamma * F.logsigmoid(x)).exp() * F.softplus(x)
            losses.append(weight[thing] * focal.mean(1))
            counts.append(weight[thing].sum())
    if not losses:                                             # sums of nothing: 0 with gradients
        return sum(v[:0].sum() for v in (features, *embeddings))
    return torch.cat(losses).sum() / sum(counts)


# --- 4.2 Crop sampling ------------------------------------------------------------------------

def pick(count, generator):
    """A random int from 0 to count - 1."""
    return int(torch.randint(count, (), generator=generator))


def common_size(first, second, limits, generator):
    """Step 4: scales (sigma_1, sigma_2) that bring two segments to one size.

    first, second: their sizes, roots of areas in pixels. limits (low, high): of both scales.
    Choice: the common size is uniform among all that both can reach. If there is none, the larger
    segment shrinks and the smaller one grows as far as the limits allow."""
    low, high = max(first, second) * limits[0], min(first, second) * limits[1]
    if low <= high:
        size = low + (high - low) * torch.rand((), generator=generator).item()
        return size / first, size / second
    return (limits[1], limits[0]) if first < second else (limits[0], limits[1])


def window_start(pixel, segment, length, window, generator):
    """Step 5 along one axis: where a window of `window` pixels begins -> int.

    The window contains `pixel`, and the whole segment (low, high), if that fits. Uniform among such
    places in an image of `length` pixels; 0 if the window is longer than the image."""
    low, high = segment
    first, last = max(0, pixel - window + 1), max(0, min(pixel, length - window))
    if high - low <= window - 1:                               # it fits, also after rounding
        first, last = max(first, math.ceil(high) - window), min(last, math.floor(low))
    first = min(first, last)
    return first + pick(last - first + 1, generator)


class PairedCropSampler(IterableDataset):
    """Section 4.2: an endless supply of batches that are made of pairs of crops.

    Yields images [batch, 3, h, w] and a list of Targets. Crops 2k and 2k + 1 are a pair: they show
    segments of one category at a similar size, from two images. `target.instance` is the sampled
    segment, 0 where shrinking lost its last pixel.

    dataset, index      see isus.build_index(dataset)
    size                (height, width) of a crop
    short_side          the length of an image's shorter side before sigma; 0: as it is
    scale               limits of sigma, the factor by which step 4 resizes
    flip, jitter, hue   probability of a mirror image; see data.colour_jitter
    stuff               draw segments of stuff, too, as the released code does
    measure             the size of a segment: the root of the area of its "mask", or of its "box"
    batch               crops of each batch that this process receives, an even number
    start, rank, world  number of the first batch; which of how many processes this is

    Pair p depends on (seed, p) alone. Batch b consists of the pairs b n to (b + 1) n - 1 with
    n = batch * world / 2; process `rank` receives every `world`-th of them.
    ValueError: an odd batch, no range of scales, or no category that occurs in two images.

    Choice: no crowds; things only, as only these are supervised, and the size of their masks.
    Released code: stuff, crowds and boxes; it may draw one image twice, limits the sides of resized
    images, and draws the common size from 32, 64, 128, 256 and 512 pixels.
    Choice: a segment that fits is wholly in its crop. Released code: only the centre of its box."""

    def __init__(self, dataset, index, size, short_side=0, scale=(0.5, 2.0), flip=0.5, jitter=0.0,
                 hue=0.0, stuff=False, measure="mask", batch=2, seed=0, start=0, rank=0, world=1):
        if batch < 2 or batch % 2:
            raise ValueError(f"{batch} crops a process are not made of pairs; take an even number")
        if not 0 < scale[0] <= scale[1] < math.inf:
            raise ValueError(f"scale = {scale} must be two positive factors, the smaller first")
        self.categories = [c for c, category in enumerate(dataset.categories)
                           if (stuff or category.isthing) and len(index.images_with(c)) > 1]
        if not self.categories:
            raise ValueError("no category of things occurs in two images; use another sampler")
        self.dataset, self.index, self.size, self.limits = dataset, index, tuple(size), scale
        self.short_side, self.flip, self.jitter, self.hue = short_side, flip, jitter, hue
        self.pairs, self.seed, self.start, self.measure = batch // 2, seed, start, measure
        self.rank, self.world = rank, world

    def pair(self, p):
        """Pair number p -> [(image [3, h, w], Target), (image, Target)]."""
        # A generator keeps 32 bits of its seed: hash seed and number, do not add them.
        digest = hashlib.sha256(f"{self.seed} {p}".encode()).digest()
        g = torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
        category = self.categories[pick(len(self.categories), g)]      # 1. a category of things
        images = self.index.images_with(category)                      # 2. two images with it
        first = pick(len(images), g)
        second = (first + 1 + pick(len(images) - 1, g)) % len(images)
        size_1, *part_1 = self.choose(int(images[first]), category, g)         # 3. a segment each
        size_2, *part_2 = self.choose(int(images[second]), category, g)
        sigmas = common_size(size_1, size_2, self.limits, generator=g)          # 4. resize; 5. crop
        return [self.crop(*part, sigma=s, generator=g) for part, s in zip((part_1, part_2), sigmas)]

    def choose(self, image, category, generator):
        """Step 3: a random segment of the category -> its size (pixels, see `measure`), image,
        sample, row in the Index, and the factor that `short_side` asks for."""
        rows = self.index.rows(image, category)
        row, sample = int(rows[pick(len(rows), generator)]), self.dataset[image]
        factor = self.short_side / min(sample.segments.shape) if self.short_side else 1.0
        area = {"mask": (sample.segments == self.index.segment[row]).sum(),
                "box": self.index.box[row].view(2, 2).diff(dim=0).prod()}[self.measure].item()
        return factor * area ** 0.5, image, sample, row, factor

    def crop(self, image, sample, row, factor, sigma, generator):
        """Step 5: a crop of the image, resized by factor * sigma, that contains the segment."""
        old, box = sample.segments.shape, self.index.box[row].tolist()
        size = tuple(max(1, round(n * factor * sigma)) for n in old)
        mirror = torch.rand((), generator=generator).item() < self.flip
        y, x, instance = random_pixel(sample.segments, box, self.index.segment[row:row + 1],
                                      size=size, generator=generator)
        rows = [v * size[0] / old[0] for v in box[1::2]]               # the resized box
        columns = [v * size[1] / old[1] for v in box[0::2]]
        if mirror:
            x, columns = size[1] - 1 - x, [size[1] - v for v in reversed(columns)]
        top = window_start(y, rows, size[0], window=self.size[0], generator=generator)
        left = window_start(x, columns, size[1], window=self.size[1], generator=generator)
        part, target = crop(sample, top, left, self.size, size=size, flip=mirror, scale=sigma,
                            boxes=self.index.boxes(image, len(sample.categories)),
                            image_id=image, instance=instance)
        if self.jitter or self.hue:
            part = colour_jitter(part, generator, self.jitter, hue=self.hue)
        return part, target

    def batch(self, b):
        """This process's share of batch number b -> (images [batch, 3, h, w], Targets)."""
        first = b * self.pairs * self.world + self.rank
        pairs = [self.pair(first + self.world * n) for n in range(self.pairs)]
        return collate([crop for pair in pairs for crop in pair])

    def __iter__(self):
        worker = get_worker_info()                             # the loader asks its workers in turn
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for b in itertools.count(self.start + number, step):
            yield self.batch(b)


# --- How to use it in a network of your own ---------------------------------------------------

class MinimalNet(nn.Module):
    """The smallest unified network: it is told the box of each thing and answers with its mask.

    Convolutions make two maps at stride 4: features F, and a kernel at each pixel. The embedding of
    a thing is the kernel at the middle of its box. H and W are multiples of 4.

    The lines that end in IBS are all that a network of your own needs. Give `ibs_loss` each
    embedding of inference, not a mean (exercise 3)."""

    def __init__(self, isthing, channels=32, ibs_weight=1.0, paired=True):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, channels, 7, stride=4, padding=3), nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=4, dilation=4), nn.ReLU())
        self.features, self.kernels = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        self.register_buffer("isthing", torch.as_tensor(isthing), persistent=False)
        self.ibs_weight, self.paired = ibs_weight, paired

    def forward(self, images, boxes):
        """images [B, 3, H, W] and the boxes [N_i, 4] of the things of each -> embeddings, B tensors
        [N_i, C], and features [B, C, H/4, W/4]."""
        x = self.body(images)
        middles = [((b[:, :2] + b[:, 2:]) / 8).long().T for b in boxes]          # at stride 4
        embeddings = [k[:, y, x].T for k, (x, y) in zip(self.kernels(x), middles)]
        return embeddings, self.features(x)

    def losses(self, images, targets):
        """images [B, 3, H, W], B Targets -> scalars. Only "mask" leaves out void and crowds."""
        things = [thing_truth(t, self.isthing) for t in targets]
        embeddings, features = self(images, [boxes for _, boxes, _, _ in things])
        loss = features[:0].sum()
        for e, f, (number, *_), t in zip(embeddings, features, things, targets):
            known = semantic_target(t)[2::4, 2::4] != IGNORE                     # at stride 4
            truth = t.segments[2::4, 2::4] == number[:, None, None]              # [N, H/4, W/4]
            loss = loss + F.binary_cross_entropy_with_logits(
                mask_logits(e, f), truth.float(), known.float(), reduction="sum") / known.numel()
        is_thing = [torch.ones(len(e), dtype=torch.bool) for e in embeddings]                # IBS
        other = pick_targets(torch.tensor([t.image_id for t in targets]), paired=self.paired)  # IBS
        ibs = self.ibs_weight * ibs_loss(embeddings, features, is_thing, targets=other)      # IBS
        return {"mask": loss / len(targets), "ibs": ibs}


def demo(quick=False, full=False, device="cpu", out="figures"):
    """Figure 5 and Table 3 in small: five networks of kernels learn from equally many pixels."""
    print("two crops, two logits, loss {:.4f}\n".format(example()))
    from lab.demo_ibs import compare
    steps, training, unseen = (6, 20, 4) if quick else (6400, 400, 60) if full else (640, 400, 60)
    compare(steps, training, unseen, device=device, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="six steps each", full="6400 steps each, not 640")

# Exercises
# 1. Let `pick_targets` take any other crop, as the paper does. Which test fails first? Train on
#    four images, whose crops overlap in nearly every batch: does the demo's table notice?
# 2. Supervise stuff too: `is_thing` all True. Why does PQ_st fall in the demo's table?
# 3. Let `ibs_loss` see one mask a crop: of the mean of its things' embeddings. Two of them have the
#    logits 10 and -30 on a pixel. Which test shows what their mean hides?
