"""Embeddings as kernels, after Panoptic FCN (Y. Li et al., "Fully Convolutional Networks for
Panoptic Segmentation", CVPR 2021), one of the two networks that ibs.py is tried on.

    level of    .--> position head --> heat     [categories + 1, h, w]   where is a segment?
    the pyramid                                                             | its cells
                '--> kernel head ----> kernels  [C, h, w] -----------------'--> embeddings [N, C]

A peak of the heat of a thing category is one object, and the kernel of its cell is the embedding.
Stuff has one embedding for each category: the mean kernel of its region.

This follows the released code of de Geus and Dubbelman, which builds on Panoptic FCN's. Where that
does something else, a line `Deviation:` says so.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import sigmoid_focal_loss

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
    """What one level should show of a crop. Rows are those of the target."""
    things: torch.Tensor   # int64 [n], the rows of the things that belong to this level, no crowds
    cells: torch.Tensor    # bool [n, h, w], their cells, never none
    stuff: torch.Tensor    # int64 [m], the rows of stuff that have a cell, no crowds
    regions: torch.Tensor  # float [m, h, w], their cells: 0 or 1
    # The truth of the heat, float [categories + 1, h, w]: the largest bump of this level's things;
    # the cells of stuff; last, for "a thing", the cells of things, also of those of other levels.
    heat: torch.Tensor
    known: torch.Tensor    # float [h, w], 1 where a cell is neither void nor crowd


def gaussian_bumps(cells, boxes, image_size):
    """A Gaussian for each thing, on a map of its cells bool [n, h, w] of an image of `image_size`
    (H, W); boxes [n, 4] in pixels -> [n, h, w].

    It is 1 in the thing's own cell that is nearest to the centroid of its cells: there inference
    takes the kernel. A thing without a cell has its top at the middle of its box. Sigma is a
    twelfth of the width across and a twelfth of the height down, at least 0.4 cells.
    Deviation: the released code takes the centroid, also where another thing lies there: on the toy
    street every twelfth kernel at stride 4. Its radius r is the largest shift at which boxes still
    overlap by 0.7, and sigma is (2 r + 1) / 3."""
    (h, w), device = cells.shape[1:], boxes.device
    scale = boxes.new_tensor([w / image_size[1], h / image_size[0]])      # cells in a pixel
    y, x = (torch.arange(n, device=device, dtype=torch.float) for n in (h, w))
    area = cells.sum((1, 2))
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 * scale).floor()
    centroid = torch.stack([cells.float().sum(1) @ x, cells.float().sum(2) @ y], 1) / area[:, None]
    goal = torch.where(area[:, None] > 0, centroid, middle)
    far = (y[:, None] - goal[:, 1, None, None]) ** 2 + (x - goal[:, 0, None, None]) ** 2
    top = far.masked_fill(~cells & (area > 0)[:, None, None], torch.inf).flatten(1).argmin(1)
    sigma = ((boxes[:, 2:] - boxes[:, :2]) / 12 * scale).clamp(min=0.4)
    across = torch.exp(-((x - (top % w)[:, None]) / sigma[:, :1]) ** 2 / 2)          # [n, w]
    down = torch.exp(-((y - (top // w)[:, None]) / sigma[:, 1:]) ** 2 / 2)           # [n, h]
    return down[:, :, None] * across[:, None]


# --- The family ---------------------------------------------------------------------------------

class Kernels(nn.Module):
    """Heat and kernels on some levels of the pyramid, with shared weights.

    isthing: bool [categories]; c_in: channels of the pyramid; channels: C of the embeddings.
    strides: of the levels. A level of stride s has the things whose boxes have a root area of 4 s
    to 16 s pixels, the first also smaller and the last also larger ones. Most belong to two levels.
    layers, width: convolutions of each head, and their channels.
    positions: how many kernels stand for one thing in training.
    similarity: kernels of one category of a larger cosine are one object.
    detections: the largest number of peaks.
    weights: of the losses "position" and "mask".
    coordinates: whether kernel head and feature encoder are told the place of a cell, as in
    Panoptic FCN.

    Defaults are the released code's for Cityscapes. It has 3 positions and a cosine of 0.95 for
    Vistas, and 64 channels and a cosine of 0.9 for COCO.
    Choice: a cell is a segment's if its centre is. Released: if a tenth of it is, for things.
    Choice: heat has an entry "a thing" after those of the categories. There no stuff wins. The
    released code has it for Vistas; for Cityscapes all categories compete with stuff.
    Deviation: its position head has deformable convolutions, and things and stuff have output
    layers of their own. It takes 100 peaks of each level, of a heat above 0.01, and drops things of
    a score below 0.05 after the masks; here `peak` is 0.05."""
    coordinates = True  # the default, for the feature encoder
    peak, region = 0.05, 0.1  # the least heat of a peak; the least mean heat of a stuff region
    rescored = True     # the score of a thing is multiplied by the mean probability in its mask

    def __init__(self, isthing, c_in, channels, strides=(8, 16, 32, 64, 128), layers=3, width=256,
                 positions=7, similarity=0.97, detections=100, weights=(1.0, 4.0),
                 coordinates=True):
        super().__init__()
        self.coordinates = coordinates
        self.position_head, self.kernel_head = (
            nn.Sequential(*[conv(width if i else c, width) for i in range(layers)])
            for c in (c_in, c_in + 2 * coordinates))
        self.heat = nn.Conv2d(width, len(isthing) + 1, 3, padding=1)
        self.kernel = nn.Conv2d(width, channels, 1)
        nn.init.constant_(self.heat.bias, -math.log(9))        # p = 0.1: most cells are empty
        nn.init.normal_(self.kernel.weight, std=0.01)          # all masks begin near p = 1/2
        nn.init.zeros_(self.kernel.bias)
        self.register_buffer("isthing", isthing, persistent=False)
        self.strides, self.positions, self.similarity = tuple(strides), positions, similarity
        self.detections, self.weights = detections, weights

    def maps(self, pyramid):
        """-> for each level heat logits [B, categories + 1, h, w] and kernels [B, C, h, w]."""
        place = add_coordinates if self.coordinates else nn.Identity()
        return [(self.heat(self.position_head(x)).float(),
                 self.kernel(self.kernel_head(place(x))).float())
                for x in (pyramid[s] for s in self.strides)]

    def truth(self, target, sizes):
        """-> a LevelTruth for each level, whose maps have `sizes` [(h, w), ...]."""
        thing, n = self.isthing[target.categories], len(self.isthing)
        side = (target.boxes[:, 2:] - target.boxes[:, :2]).prod(1).sqrt()
        levels = []
        for k, (stride, size) in enumerate(zip(self.strides, sizes)):
            masks, known = segment_masks(target, size)
            here = (side >= 4 * stride) | (k == 0)
            here = here & ((side < 16 * stride) | (k == len(sizes) - 1))
            things = torch.where(thing & here & ~target.crowd)[0]
            stuff = torch.where(~thing & ~target.crowd & masks.flatten(1).any(1))[0]
            cells = masks[things] > 0
            bumps = gaussian_bumps(cells, target.boxes[things], target.segments.shape)
            cells = cells | (bumps == 1)                       # a thing without a cell has one now
            names = target.categories[torch.cat([things, stuff])][:, None, None].expand(-1, *size)
            heat = masks.new_zeros(n, *size).scatter_reduce(
                0, names, torch.cat([bumps, masks[stuff]]), "amax")
            heat = torch.cat([heat, masks[thing].sum(0, keepdim=True)])
            levels.append(LevelTruth(things, cells, stuff, masks[stuff], heat, known))
        return levels

    def position_loss(self, heat, truth):
        """The focal loss (alpha 0.25, gamma 2) of one crop's heat towards its truth y in 0..1; heat
        and truth are lists over levels. With p = sigmoid(heat) and p_t = p y + (1 - p) (1 - y)

            -(1 - p_t)^2 (0.25 y + 0.75 (1 - y)) (y log p + (1 - y) log(1 - p))

        Things: the sum over all cells / the number of pairs of a thing and a level. Stuff and "a
        thing": the mean over the cells of a level, summed over entries and levels.
        Deviation: void and crowd cells teach nothing, except where a bump has its top. The released
        code counts pairs over the batch."""
        things, stuff = heat[0].new_zeros(()), heat[0].new_zeros(())
        for x, level in zip(heat, truth):                      # [categories + 1, h, w]
            loss = sigmoid_focal_loss(x, level.heat, alpha=0.25, gamma=2)
            n = len(self.isthing)
            top = level.heat[:n][self.isthing] == 1
            things = things + (loss[:n][self.isthing] * torch.where(top, 1, level.known)).sum()
            stuff = stuff + (torch.cat([loss[:n][~self.isthing], loss[n:]]) * level.known).mean(
                (1, 2)).sum()
        return things / max(sum(len(level.things) for level in truth), 1) + stuff

    def thing_kernels(self, heat, kernels, cells, categories):
        """The kernels of the n things of one level: those of the cells of most heat among the
        thing's own `cells`, `positions` at most -> weights [n, k] in proportion to p, which add up
        to 1, and are 0 for cells that are not the thing's; kernels [n, k, C]."""
        p = heat[categories].sigmoid().clamp(min=1e-4) * cells
        weight, cell = p.flatten(1).topk(min(self.positions, heat[0].numel()))
        return weight / weight.sum(1, keepdim=True), kernels.flatten(1).T[cell]

    def stuff_kernels(self, kernels, regions):
        """The kernel of each of m regions of one level, the mean of its cells -> weights [m, 1], of
        1, and kernels [m, 1, C]. Deviation: the released code divides the sum by all cells."""
        with torch.autocast(kernels.device.type, enabled=False):          # sums over all cells
            total = regions.flatten(1) @ kernels.flatten(1).T
        mean = total / regions.flatten(1).sum(1, keepdim=True)
        return mean.new_ones(len(mean), 1), mean[:, None]

    def losses(self, pyramid, features, targets):
        """-> losses "position" and "mask"; a list with one entry for intra-batch supervision: the
        embeddings of each crop, [N_b, C]; which of them are things, bool [N_b]; weights [N_b].

        "position" is a mean over crops. Every kernel has a mask of its own. The mask of a thing on
        a level costs the weighted mean of what its kernels cost. "mask" is the mean over pairs of a
        thing and a level, plus that over pairs of a stuff segment and a level.
        Intra-batch supervision gets every kernel, with these weights; some have a weight of 0.
        Deviation: these weights have no gradient there, so that it teaches masks alone."""
        maps = self.maps(pyramid)
        position, costs, crops = [], ([], []), []
        for b, target in enumerate(targets):
            heat, kernels = [h[b] for h, _ in maps], [k[b] for _, k in maps]
            truth = self.truth(target, [k.shape[-2:] for k in kernels])
            position.append(self.position_loss(heat, truth))
            masks, known = segment_masks(target, features.shape[-2:])
            parts = []
            for x, kernel, level in zip(heat, kernels, truth):
                names = target.categories[level.things]
                groups = ((level.things, *self.thing_kernels(x, kernel, level.cells, names)),
                          (level.stuff, *self.stuff_kernels(kernel, level.regions)))
                for cost, (rows, weight, e) in zip(costs, groups):
                    logits = (e @ features[b].flatten(1)).unflatten(-1, known.shape)
                    cost.append((weight * mask_loss(logits, masks[rows][:, None], known)).sum(1))
                    is_thing = self.isthing[target.categories[rows]]
                    parts.append((e.flatten(0, 1), is_thing.repeat_interleave(e.shape[1]),
                                  weight.detach().flatten()))
            crops.append([torch.cat(part) for part in zip(*parts)])
        things, stuff = (torch.cat(c) for c in costs)
        losses = {"position": self.weights[0] * sum(position) / len(position),
                  "mask": self.weights[1] * sum(c.sum() / max(len(c), 1) for c in (things, stuff))}
        return losses, [tuple(zip(*crops))]

    def ibs_pixels(self, logits):
        """Every pixel of a mask counts in intra-batch supervision: [N, P] as it is."""
        return logits

    def embed(self, pyramid, features):
        """Inference on the first image -> embeddings [N, C], scores [N], categories [N].

        Things: the cells of more heat than `peak`, at least as much as their eight neighbours; heat
        is averaged with the mean over 3x3 cells before. The best `detections` are fused.
        Stuff: in each level a cell belongs to the stuff category of most heat, or to "a thing". A
        category whose cells have a mean heat above `region` has their mean kernel; of these, over
        levels, the mean again. Its score is the mean heat, and the mean over levels.
        Deviation: the released code takes the mean over 5x5 cells on the two coarsest levels."""
        things, stuff = torch.where(self.isthing)[0], torch.where(~self.isthing)[0]
        peaks, total = [], {}
        for heat, kernel in self.maps(pyramid):
            p, kernels = heat[0].sigmoid(), kernel[0].flatten(1).T        # [.., h, w], [hw, C]
            mean = F.avg_pool2d(p[None], 3, 1, padding=1, count_include_pad=False)[0]
            smooth = (p + mean) / 2
            top = (smooth > self.peak) & (smooth == F.max_pool2d(smooth[None], 3, 1, padding=1)[0])
            row, cell = torch.where(top[things].flatten(1))
            peaks.append((kernels[cell], smooth[things].flatten(1)[row, cell], things[row]))
            winner = torch.cat([p[stuff], p[-1:]]).argmax(0).flatten()
            for k, c in enumerate(stuff.tolist()):
                inside = winner == k
                score = p[c].flatten()[inside].mean()          # of no cell: NaN, which is not above
                if score > self.region:
                    total.setdefault(c, []).append((kernels[inside].mean(0), score))
        kernels, scores, categories = (torch.cat(parts) for parts in zip(*peaks))
        best = scores.argsort(descending=True)[:self.detections]
        kernels, scores, categories = fuse_kernels(
            kernels[best], scores[best], categories[best], similarity=self.similarity)
        for c, found in total.items():
            kernel, score = (torch.stack(v).mean(0) for v in zip(*found))
            kernels, scores = torch.cat([kernels, kernel[None]]), torch.cat([scores, score[None]])
            categories = torch.cat([categories, categories.new_tensor([c])])
        return kernels, scores, categories


def fuse_kernels(kernels, scores, categories, similarity=0.97):
    """Kernels [N, C] of falling scores [N] -> kernels, scores, categories of different objects.

    One after the other, a kernel joins the best object of its category whose first kernel has a
    cosine above `similarity` with it, or becomes an object by itself. An object has the mean of its
    kernels and the score of the first. A kernel that has joined another cannot absorb others.
    Deviation: in the released code it can, and these are lost."""
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
