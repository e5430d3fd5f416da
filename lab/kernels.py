"""Embeddings as kernels, after Panoptic FCN (Y. Li et al., "Fully Convolutional Networks for
Panoptic Segmentation", CVPR 2021), one of the two networks that ibs.py is tried on.

    level of    .--> position head --> heat     [categories, h, w]    where is a segment?
    the pyramid                                                          | its cells
                '--> kernel head ----> kernels  [C, h, w] --------------'--> embeddings [N, C]

A peak of the heat of a thing category is one object, and the kernel of its cell is the embedding.
Stuff has one embedding for each category: the mean kernel of its region.

This is a small network. Where the released code of de Geus and Dubbelman, which builds on Panoptic
FCN's, does something else, a line `Deviation:` says so.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from data import pyramid_level
from lab.masks import cross_entropy, dice, segment_masks
from seamless import GroupNorm


# --- Small parts, also of the feature encoder ---------------------------------------------------

def conv(c_in, c_out):
    """3x3 convolution, group norm, ReLU."""
    layer = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
    return nn.Sequential(layer, GroupNorm(c_out), nn.ReLU(inplace=True))


def add_coordinates(x):
    """Appends y and x of the centre of each cell, from -1 at the upper (left) edge of this input to
    1 at the lower (right) edge: [B, C, h, w] -> [B, C + 2, h, w].

    Without them a convolution gives two look-alikes the same numbers. With them the network
    separates look-alikes, but only at distances that occur in its crops."""
    (h, w), like = x.shape[-2:], dict(device=x.device, dtype=x.dtype)
    rows, columns = ((torch.arange(n, **like) * 2 + 1) / n - 1 for n in (h, w))
    place = torch.stack([rows[:, None].expand(h, w), columns.expand(h, w)])
    return torch.cat([x, place.expand(len(x), -1, -1, -1)], 1)


def mask_loss(logits, truth, known):
    """Dice + cross entropy of masks; shapes as in `dice`.

    Deviation: Panoptic FCN has the dice alone. Where all logits of a mask are far below 0, its
    gradient vanishes, for it has a factor p (1 - p). In about every second run on the parking lot
    the ground's mask ended at logits of -27 everywhere. The cross entropy still has its full
    gradient there."""
    return dice(logits, truth, known) + cross_entropy(logits, truth, known)


# --- Where the segments are ---------------------------------------------------------------------

class LevelTruth(NamedTuple):
    """What the heat of one level should show of a crop. Rows are those of the target."""
    things: torch.Tensor   # int64 [n], the rows of the things that belong to this level
    bumps: torch.Tensor    # float [n, h, w], their truth
    stuff: torch.Tensor    # int64 [m], the rows of stuff
    regions: torch.Tensor  # float [m, h, w], its truth: 0 or 1
    known: torch.Tensor    # float [h, w], 1 where a cell is neither void nor crowd


def gaussian_bumps(boxes, image_size, size):
    """A Gaussian at the middle of each box, on a map of `size` (h, w) of an image of `image_size`
    (H, W): boxes [n, 4] in pixels -> [n, h, w].

    It is 1 in the cell of the middle. Its sigma is a twelfth of the width across and a twelfth of
    the height down, at least 0.4 cells.
    Deviation: the released code centres it at the mask's centroid. Its radius r is the largest
    shift at which boxes still overlap by 0.7, and sigma is (2 r + 1) / 3."""
    cells = boxes.new_tensor([size[1] / image_size[1], size[0] / image_size[0]])   # in a pixel
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 * cells).floor()
    sigma = ((boxes[:, 2:] - boxes[:, :2]) / 12 * cells).clamp(min=0.4)
    y, x = (torch.arange(n, device=boxes.device) for n in size)
    across = torch.exp(-((x - middle[:, :1]) / sigma[:, :1]) ** 2 / 2)    # [n, w]
    down = torch.exp(-((y - middle[:, 1:]) / sigma[:, 1:]) ** 2 / 2)      # [n, h]
    return down[:, :, None] * across[:, None]


# --- The family ---------------------------------------------------------------------------------

class Kernels(nn.Module):
    """Heat and kernels on the levels of strides 8, 16 and 32, with shared weights.

    isthing: bool [categories]; c_in: channels of the pyramid; channels: C of the embeddings.
    canonical: a thing whose box has a root area below it belongs to the first level, one below
    twice that to the second, any other to the third.
    layers: convolutions of each head.
    positions: how many kernels stand for one thing in training.
    score_threshold: cells of less heat are not used in inference.
    similarity: kernels of one category of a larger cosine are one object.
    detections: the largest number of peaks.
    weights: of the losses "position" and "mask".

    Seven positions, weights 1 and 3 and a cosine of 0.9 are Panoptic FCN's for COCO. The released
    code has a weight of 4 and a cosine of 0.97 on Cityscapes, 3 positions and 0.95 on Vistas.
    Deviation: the released code has five levels, p3 to p7. Their ranges of sizes overlap (1 to 128,
    64 to 256 pixels, ...), so that a thing may train on two of them. Here a thing has one level;
    with the 224 of the Cityscapes recipe all things below 224 pixels are at stride 8.
    Deviation: its heads have three convolutions of 256 channels, its embeddings 256 numbers. Here
    two convolutions are as wide as the embedding.
    Deviation: its position head has no coordinates. Here both heads have them.
    Deviation: its heat starts at p = 0.1, here at p = 0.01, as in the focal loss's own paper."""
    strides = (8, 16, 32)
    coordinates = True  # of the feature encoder, as in Panoptic FCN

    def __init__(self, isthing, c_in, channels, canonical=64, layers=2, positions=7,
                 score_threshold=0.3, similarity=0.9, detections=100, weights=(1.0, 3.0)):
        super().__init__()
        self.position_head, self.kernel_head = (
            nn.Sequential(*[conv(channels if i else c_in + 2, channels) for i in range(layers)])
            for _ in range(2))
        self.heat = nn.Conv2d(channels, len(isthing), 3, padding=1)
        self.kernel = nn.Conv2d(channels, channels, 1)
        nn.init.constant_(self.heat.bias, -math.log(99))       # p = 0.01: most cells are empty
        nn.init.normal_(self.kernel.weight, std=0.01)          # all masks begin near p = 1/2
        nn.init.zeros_(self.kernel.bias)
        self.register_buffer("isthing", isthing, persistent=False)
        self.canonical, self.positions, self.weights = canonical, positions, weights
        self.score_threshold, self.similarity = score_threshold, similarity
        self.detections = detections

    def maps(self, pyramid):
        """-> for each level heat logits [B, categories, h, w] and kernels [B, C, h, w]."""
        inputs = [add_coordinates(pyramid[s]) for s in self.strides]
        return [(self.heat(self.position_head(x)).float(), self.kernel(self.kernel_head(x)).float())
                for x in inputs]

    def truth(self, target, sizes):
        """-> a LevelTruth for each level, whose maps have `sizes` [(h, w), ...]."""
        thing = self.isthing[target.categories]
        things, stuff = (torch.where(rows & ~target.crowd)[0] for rows in (thing, ~thing))
        level = pyramid_level(target.boxes, len(sizes), self.canonical, k0=2)
        levels = []
        for k, size in enumerate(sizes, 1):
            rows = things[level[things] == k]
            bumps = gaussian_bumps(target.boxes[rows], target.segments.shape, size)
            masks, known = segment_masks(target, size)
            levels.append(LevelTruth(rows, bumps, stuff, masks[stuff], known))
        return levels

    def position_loss(self, heat, target, truth):
        """The focal loss of CenterNet on one crop's heat; heat and truth are lists over levels.

        With p = sigmoid(heat) and y the largest of the bumps or regions of a category,
            -(1 - p)^2 log p              where y = 1
            -(1 - y)^4 p^2 log(1 - p)     elsewhere
        Things: the sum over all cells / the number of things. Stuff: the mean over the cells and
        the stuff categories of a level, summed over levels. Void and crowd cells teach nothing,
        except where a bump has its top.
        Deviation: the released code has the focal loss with alpha 0.25, gamma 2 and y as a soft
        target. Its stuff loss is a sum over categories: the mean here is as many times weaker as
        there are stuff categories, 11 times on Cityscapes."""
        things, stuff = heat[0].new_zeros(()), heat[0].new_zeros(())
        for x, level in zip(heat, truth):                      # [categories, h, w]
            y = torch.zeros_like(x).flatten(1)
            for rows, maps in ((level.things, level.bumps), (level.stuff, level.regions)):
                category = target.categories[rows, None].expand(-1, y.shape[1])
                y = y.scatter_reduce(0, category, maps.flatten(1), "amax")
            y, p = y.view_as(x), x.sigmoid()
            loss = torch.where(y == 1, (1 - p) ** 2 * F.softplus(-x),     # softplus(-x) = -log p
                               (1 - y) ** 4 * p ** 2 * F.softplus(x))
            loss = loss * torch.where(y == 1, 1, level.known)
            things = things + loss[self.isthing].sum()
            if not self.isthing.all():
                stuff = stuff + loss[~self.isthing].mean()
        return things / max(sum(len(level.things) for level in truth), 1) + stuff

    def thing_kernels(self, heat, kernels, level, categories):
        """The kernels that stand for the n things of one level: those of the cells of most heat,
        `positions` at most, among those where the bump is above 0.1 -> weights [n, k] in proportion
        to p, which add up to 1 and have no gradient, and kernels [n, k, C].

        Deviation: the released code takes cells inside the mask, not the bump, and its weights
        have gradients."""
        p = heat[categories].detach().sigmoid().clamp(min=1e-4) * (level.bumps > 0.1)
        weight, cell = p.flatten(1).topk(min(self.positions, kernels[0].numel()))
        return weight / weight.sum(1, keepdim=True), kernels.flatten(1).T[cell]

    def stuff_kernels(self, kernels, truth):
        """The mean kernel of each region over the cells of all levels -> kernels [m, C] of the rows
        int64 [m] of the target, those that have a cell.

        Deviation: the released code has an embedding for each level in training, averaged over
        levels in inference only."""
        with torch.autocast(kernels[0].device.type, enabled=False):       # sums over all cells
            total = sum(level.regions.flatten(1) @ kernel.flatten(1).T
                        for level, kernel in zip(truth, kernels))
        cells = sum(level.regions.flatten(1).sum(1) for level in truth)
        keep = cells > 0
        return total[keep] / cells[keep, None], truth[0].stuff[keep]

    def losses(self, pyramid, features, targets):
        """-> losses "position" and "mask"; the embeddings of each crop, a list of [N_b, C]; which
        of them are things, a list of bool [N_b]: things first, then stuff.

        "position" is a mean over crops, "mask" over the segments of the batch. The mask of a thing
        costs the weighted mean of what its kernels cost one by one.
        Deviation: the embedding of a thing, which intra-batch supervision gets, is the weighted
        mean of its kernels. The released code supervises each kernel, and inference uses single
        ones: two of logits 10 and -30 in another crop cost 7e-14 as a mean, 3.75 one by one."""
        maps = self.maps(pyramid)
        position, mask, embeddings, is_thing = [], [], [], []
        for b, target in enumerate(targets):
            heat, kernels = [h[b] for h, _ in maps], [k[b] for _, k in maps]
            truth = self.truth(target, [k.shape[-2:] for k in kernels])
            position.append(self.position_loss(heat, target, truth))
            masks, known = segment_masks(target, features.shape[-2:])
            things = []                                        # their embeddings, level by level
            for x, kernel, level in zip(heat, kernels, truth):
                weight, cells = self.thing_kernels(
                    x, kernel, level, categories=target.categories[level.things])
                logits = (cells @ features[b].flatten(1)).unflatten(-1, known.shape)
                cost = mask_loss(logits, masks[level.things][:, None], known)        # [n, k]
                mask.append((weight * cost).sum(1))
                things.append((weight[..., None] * cells).sum(1))
            stuff, rows = self.stuff_kernels(kernels, truth)
            logits = (stuff @ features[b].flatten(1)).unflatten(-1, known.shape)
            mask.append(mask_loss(logits, masks[rows], known))
            embeddings.append(torch.cat([*things, stuff]))
            number = torch.arange(len(embeddings[b]), device=features.device)
            is_thing.append(number < len(number) - len(stuff))
        mask = torch.cat(mask)                                 # of no segment: 0, with gradients
        losses = {"position": self.weights[0] * sum(position) / len(position),
                  "mask": self.weights[1] * mask.sum() / max(len(mask), 1)}
        return losses, embeddings, is_thing

    def embed(self, pyramid, features):
        """Inference on the first image -> embeddings [N, C], scores [N], categories [N].

        Things: the cells of more heat than `score_threshold` and than their eight neighbours, the
        best `detections`, fused. Stuff: the mean kernel of all cells above the threshold.
        Deviation: the released code smooths the heat before it looks for peaks, and multiplies the
        score of a thing by the mean probability in its mask.
        Deviation: its stuff categories compete in each cell (argmax). Here each takes every cell
        above the threshold. This is a known defect: training averages over the true region, but in
        inference the ground takes cells of vehicles too. On whole images of the parking lot (280
        steps) the ground's mask has an IoU of 0.37 with these cells and of 0.64 with the true
        ones."""
        things = self.isthing[:, None, None]
        peaks, stuff_heat, cells = [], [], []
        for heat, kernel in self.maps(pyramid):
            p, kernels = heat[0].sigmoid(), kernel[0].flatten(1).T        # [.., h, w], [hw, C]
            p = p * (p > self.score_threshold)
            top = (p > 0) & (p == F.max_pool2d(p[None], 3, 1, padding=1)[0]) & things
            category, cell = torch.where(top.flatten(1))
            peaks.append((kernels[cell], p.flatten(1)[category, cell], category))
            stuff_heat.append((p * ~things).flatten(1))
            cells.append(kernels)
        kernels, scores, categories = (torch.cat(parts) for parts in zip(*peaks))
        best = scores.argsort(descending=True)[:self.detections]
        kernels, scores, categories = fuse_kernels(
            kernels[best], scores[best], categories[best], similarity=self.similarity)
        heat = torch.cat(stuff_heat, 1)                        # [categories, cells of all levels]
        stuff = torch.where(heat.any(1))[0]
        inside = (heat[stuff] > 0).float()
        mean = inside @ torch.cat(cells) / inside.sum(1, keepdim=True)
        return (torch.cat([kernels, mean]), torch.cat([scores, heat[stuff].amax(1)]),
                torch.cat([categories, stuff]))


def fuse_kernels(kernels, scores, categories, similarity=0.9):
    """Kernels [N, C] of falling scores [N] -> kernels, scores, categories of different objects.

    One after the other, a kernel joins the best object of its category whose first kernel has a
    cosine above `similarity` with it, or becomes an object by itself. An object has the mean of its
    kernels and the score of the first. A kernel that has joined another cannot absorb others."""
    unit = F.normalize(kernels, dim=1)
    alike = (unit @ unit.T > similarity) & (categories[:, None] == categories)
    leader = []                                                # the first kernel of each's object
    for i, row in enumerate(alike.tolist()):                   # one transfer: a GPU waits once
        leader.append(next((j for j in range(i) if row[j] and leader[j] == j), i))
    leader = torch.tensor(leader, dtype=torch.long, device=kernels.device)
    objects = torch.unique(leader)
    member = (leader == objects[:, None]).float()              # [objects, N]
    mean = member @ kernels / member.sum(1, keepdim=True)
    return mean, scores[objects], categories[objects]
