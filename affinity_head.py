r"""The affinity head: panoptic segmentation without a merging heuristic (Q. Li, X. Qi, P. H. S. Torr, "Unifying Training
and Inference for Panoptic Segmentation", CVPR 2020).

What goes wrong without it.  A network detects things and paints categories; a list of rules then glues the two together
(who lies on top, what overlaps too much, what is too small).  The network is never trained on what comes out of the
glue, and the glue cannot mend anything: if a box cuts off the front of a car, the front belongs to nobody.

The idea.  One channel for each detection and for each stuff category, all of them side by side, and argmax decides:

    semantic probabilities V [N, h, w] --.
    boxes B, scores s, classes c  -------+--> potential Psi [D + N_st, h, w]                      (3.4.1, no parameters)
    masks M, if there are any -----------'          |
                                                    v
    features --> Q [C, h, w] ------------> P = Psi + A Psi,   A = phi1(Q) phi0(Q)^T / HW          (3.4.2, learned)
                                                    |
                                training: cross entropy against the matched truth                 (3.5)
                                testing:  argmax over the channels.  That is all.

A says for each PAIR of pixels how much they belong to the same instance.  A pixel that the box cut off hears through A
from its fellows inside the box which channel it belongs to.  A is HW x HW, 15.7 GiB for a picture of 800x1300; but A Psi
needs no A:  (Q Q^T) Psi = Q (Q^T Psi),  and Q^T Psi is a tiny matrix.  The number of channels may differ from picture to picture,
for all weights are in Q.

What the paper claims: 99.8% fewer multiply-adds than with A; PQ 61.4 on Cityscapes and 43.4 on COCO with a ResNet-50;
competitive without any object masks; training on predicted boxes gives +0.4 PQ and +1.3 box AP over true boxes.

    python affinity_head.py             boxes that cut objects off, and a head that learns to mend them; figures/affinity_head.png
    python train.py --method affinity   on the whole network; --no-masks, --no-affinity, --true-boxes, --variant A|B|C
    pytest tests/test_affinity_head.py  the claims of this file as an executable spec

An image is float32 [3, H, W] in 0..1, its maps [.., h, w] at stride d = 4; the paper's HW counts the pixels of a MAP, h w, and
its C the channels of Q; the categories are N = N_st + N_th.  Boxes are float [D, 4], x1 y1 x2 y2 in pixels
of the image, half open.  Segments are int64 [H, W]: 0 is void, k > 0 is segment k, of category `categories[k - 1]`.
A target has `segments`, `categories` [N], `crowd` [N] and `boxes` [N, 4], of what shows of each segment.
"""
import argparse
import math
import os
import subprocess
import sys
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, clip_boxes_to_image

IGNORE = -1                                                   # a pixel that no loss reads


# --- 3.4.1 Dynamic potential head ---------------------------------------------------------------------------------------
# The displayed formulas are missing from the text at hand.  What the prose says: the head "populates each box region with a
# combination of semantic segmentation probabilities V and box confidence scores s", D + N_st channels, a full-image box for
# each stuff category.  "Populates the box region" is an indicator [i in B_k]; scores are there so that "unconfident
# detections will be attenuated", so they multiply; and what is combined is the probability of the box's own class c_k:
#
#     Psi_k(i) = s_k V_i(c_k) [i in B_k]                                                    without masks
#     Psi_k(i) = s_k (V_i(c_k) (.) M_i(k)) [i in B_k],   (.) is product in B, sum in C       with masks
#     Psi_k(i) = (V_i(c_k) + M_i(k)) [i in B_k]          on LOGITS V and M, no score         variant A, as in UPSNet
#     Psi_l(i) = V_i(l)                                                                      stuff l, whatever the variant
#
# Choice: stuff has score 1.  The paper speaks of "unmodified 'stuff' scores" (A.3) when it compares the variants.
# Choice: the box gates the sum of variant C as well; else V of all cars would leak into the channel of each car.

def box_gate(boxes, size, stride=4):
    """[i in B_k] as two bool vectors per box: rows bool [D, h], columns bool [D, w]; their outer product is the gate.

    boxes [D, 4] in pixels, `size` (h, w) of the map.  A cell is in a box if its centre, at ((j + .5) d, (i + .5) d), is.
    Choice: a box so thin that it contains no centre keeps the row (column) of cells in which its own middle lies: an object
    of three pixels is to have a place on a map of stride 4 too.  A box whose middle is off the map as well has none."""
    gates = []
    for lo, hi, n in ((boxes[:, 1:2], boxes[:, 3:4], size[0]), (boxes[:, 0:1], boxes[:, 2:3], size[1])):
        cell = torch.arange(n, device=boxes.device)
        centre = (cell + 0.5) * stride                                        # [n]
        gate = (centre >= lo) & (centre < hi)                                 # [D, n]
        middle = cell == ((lo + hi) / 2 / stride).floor()
        gates.append(torch.where(gate.any(1, keepdim=True), gate, middle))
    return gates


def paste(masks, boxes, size, stride=4):
    """Raw masks [D, s, s] in their boxes -> [D, h, w]: "resized to their actual dimensions and pasted" (3.4.1), bilinear.
    Choice: they are logits here, and become probabilities after they are resized.

    Bilinear interpolation is separable: two matrix products, R_y M R_x^T, with a row of hat weights for a cell of the map.
    Beyond its box a mask goes on with the value at its rim; the gate of the potential cuts that off.  With gradients."""
    def hats(lo, hi, n):                                                      # [D], [D] -> [D, n, s]
        s = masks.shape[-1]
        centre = (torch.arange(n, device=masks.device) + 0.5) * stride
        u = ((centre - lo[:, None]) / (hi - lo).clamp(min=1e-6)[:, None] * s - 0.5).clamp(0, s - 1)
        return (1 - (u[..., None] - torch.arange(s, device=masks.device)).abs()).relu()
    masks, boxes = masks.float(), boxes.detach().float()
    with torch.autocast(masks.device.type, enabled=False):                    # products of coordinates want float32
        return hats(boxes[:, 1], boxes[:, 3], size[0]) @ masks @ hats(boxes[:, 0], boxes[:, 2], size[1]).mT


def dynamic_potential(semantic, boxes, scores, categories, isthing, stride=4, masks=None, variant="B"):
    """Section 3.4.1, formulas above: one channel for each of D detections, then one for each stuff category.

    semantic [N, h, w]: V, probabilities (variant A: logits); boxes [D, 4] in pixels; scores [D] in 0..1; categories [D], the
    class of each detection among the N; isthing bool [N]; masks [D, h, w] pasted into the map: probabilities (A: logits) or
    None.  -> potential [D + N_st, h, w], category of each channel int64 [D + N_st].  Gradients reach semantic, scores (not in
    variant A, which does not look at them) and masks.

    Variant A follows UPSNet, where a thing's logits are 0 outside of its box.  So it wants masks, and a pixel whose logits of
    all stuff are negative can fall to a box that it is not in; where there is stuff, B and C have no such pixel.
    ValueError: an unknown variant; variant A without masks; masks of another size than the map."""
    if variant not in ("A", "B", "C"):
        raise ValueError(f"variant must be 'A', 'B' or 'C', not {variant!r}")
    if variant == "A" and masks is None:
        raise ValueError("variant A adds the logits of masks, and there are none; use variant B, which works without")
    size = tuple(semantic.shape[-2:])
    if masks is not None and tuple(masks.shape) != (len(boxes), *size):
        raise ValueError(f"masks of shape {tuple(masks.shape)} do not fit {len(boxes)} boxes on a map of {size}; `paste` them first")
    isthing = torch.as_tensor(isthing, device=semantic.device)
    stuff = torch.where(~isthing)[0]
    cue = semantic[categories]                                                # V_i(c_k)  [D, h, w]
    if masks is not None:
        cue = cue * masks if variant == "B" else cue + masks
    if variant != "A":
        cue = scores[:, None, None] * cue
    rows, columns = box_gate(boxes, size, stride)
    things = torch.where(rows[:, :, None] & columns[:, None, :], cue, 0)
    return torch.cat([things, semantic[stuff]]), torch.cat([categories, stuff])


# --- 3.4.2 Dense instance affinity head ---------------------------------------------------------------------------------
# The text gives Q [HW, C], A = Q Q^T, says that the product A Psi is computed as Q (Q^T Psi) and added back to the input, and
# that phi_0 and phi_1 are 1x1 convolutions, each followed by an activation.  A 1x1 convolution has a fixed number of
# input channels, and Psi has a varying one, so phi_0 and phi_1 can act on Q only:
#
#     P = Psi + phi_1(Q) (phi_0(Q)^T Psi) / HW
#
# Two factors instead of one let A be unsymmetric: "whom do I listen to" and "who is worth listening to" may differ.
# Choice: ELU is the activation.  With ReLU both factors are >= 0 and A reads as a likelihood; but then every pixel begins by
# hearing a little of everybody, which is worse than hearing nothing, the first thing learnt is silence, and a silent ReLU
# never learns again (exercise 1).  Below 0 ELU still has a slope, and A may also say "certainly not the same".
#
# Choice: / HW.  The sum over j runs over ALL pixels.  Four times as many pixels (a whole picture after training on crops)
# would make A Psi weigh four times as much against the residual Psi; as a mean it keeps its weight.

def apply_affinity(q, psi, keys=None):
    """A Psi without A: Q (K^T Psi) / HW, multiplied from the right.  q [HW, C], psi [HW, K], keys [HW, C] or None for Q
    itself -> [HW, K], the same as (Q K^T) Psi / HW to rounding.  2 HW C K multiply-adds and a [C, K] matrix in between,
    where the other order takes HW^2 (C + K) and a [HW, HW] one."""
    return q @ ((q if keys is None else keys).mT @ psi / len(q))


def multiply_adds(hw, channels, instances):
    """(Q (Q^T Psi), (Q Q^T) Psi): multiply-adds of both orders for hw pixels, C channels and D + N_st = `instances`."""
    return 2 * hw * channels * instances, hw**2 * (channels + instances)


class GroupNorm(nn.GroupNorm):
    """GN with 32 groups, fewer for thin layers so that a group has four channels at least.  In float32, as CUDA's autocast has it:
    on a CPU the bf16 kernel is many times slower."""
    def __init__(self, channels):
        super().__init__(math.gcd(32, max(channels // 4, 1), channels), channels)

    def forward(self, x):
        return super().forward(x.float())


class FeatureDecoder(nn.Module):
    """The affinity feature extractor: {stride: [B, c_in, ..]} of strides 4 to 32 -> Q [B, channels, H/4, W/4].

    The paper's is that of its semantic submodule, whose figure H is missing from the text: an earlier design, modified by a
    group norm after each 3x3 convolution.  Choice: it is UPSNet's, the closest relative by the paper's own word: the same
    3x3 convolutions for all levels, upsampled, concatenated, one 1x1.  Choice: two plain convolutions (UPSNet's are deformable)."""
    def __init__(self, c_in, channels=128, layers=2):
        super().__init__()
        self.level = nn.Sequential(*[m for i in range(layers) for m in (
            nn.Conv2d(channels if i else c_in, channels, 3, padding=1, bias=False), GroupNorm(channels), nn.ReLU(inplace=True))])
        self.out = nn.Conv2d(4 * channels, channels, 1)

    def forward(self, features):
        maps = [self.level(features[s]) for s in (4, 8, 16, 32)]
        size = maps[0].shape[-2:]
        return self.out(torch.cat([maps[0]] + [F.interpolate(m, size, mode="bilinear") for m in maps[1:]], 1))


class InstanceAffinityHead(nn.Module):
    """P = Psi + phi_1(Q) (phi_0(Q)^T Psi) / HW.  All its weights are in Q, phi_0, phi_1: any number of instances will do.

    c_in: channels of the pyramid; channels: C, 128 in the paper.  Choice: phi_1 starts small, so that the head begins as
    the identity ("forming a residual connection to ease the learning task") and has a gradient nevertheless."""
    def __init__(self, c_in, channels=128, layers=2):
        super().__init__()
        self.decoder = FeatureDecoder(c_in, channels, layers)
        self.phi0 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ELU(inplace=True))
        self.phi1 = nn.Sequential(nn.Conv2d(channels, channels, 1), nn.ELU(inplace=True))
        with torch.no_grad():
            for p in self.phi1[0].parameters():
                p.mul_(0.1)

    def factors(self, features):
        """{stride: [B, c_in, ..]} -> queries phi_1(Q) and keys phi_0(Q), each [B, HW, C] in float32."""
        q = self.decoder(features)
        return tuple(phi(q).float().flatten(2).mT for phi in (self.phi1, self.phi0))

    def forward(self, features, potentials):
        """features of a batch and a potential [K_b, h, w] for each of its images (K_b may be 0) -> P of each, same shapes."""
        queries, keys = self.factors(features)
        with torch.autocast(queries.device.type, enabled=False):              # sums over all pixels want float32
            return [psi + apply_affinity(q, psi.float().flatten(1).mT, k).mT.reshape(psi.shape)
                    for q, k, psi in zip(queries, keys, potentials)]

    def affinity(self, features, point, stride=4):
        """How much the pixel at `point` (x, y) of the first image listens to every other one: its row of A, times HW, [h, w].
        Positive: it adds what that pixel says; negative: it takes it off."""
        queries, keys = self.factors(features)
        h, w = features[4].shape[-2:]
        i = int(point[1] // stride) * w + int(point[0] // stride)
        return (keys[0] @ queries[0, i]).view(h, w)


# --- 3.5 Panoptic matching loss -----------------------------------------------------------------------------------------
# The order of the channels is that of the detections, which nobody knows beforehand.  So the truth is renumbered.  This formula
# is lost as well; the text has it "by maximising the intersection over union between their bounding boxes".  Choice: of all
# ways to give each true segment a detection of its own, of its class, T* is the one with the largest sum of box IoUs:
#
#     T* = argmax over one-to-one assignments m of  sum_k IoU(box(T_k), B_m(k)),      loss = cross entropy(softmax P, T*)
#
# Stuff needs no search, its channel is that of its category.  Choice: true things that got no detection have no channel, so
# their pixels are ignored.  Detections that got no truth are channels that are right nowhere: wherever they claim a pixel they lose.
# Choice: a pair whose boxes do not overlap at all is no match, although the sum would not object.

def assign(gain):
    """The one-to-one assignment of rows to columns with the largest sum: gain [G, D] >= 0 -> column of each row, NumPy int64
    [G], -1 where a row gets none, or one of gain 0.  Exact (the Hungarian method with shortest augmenting paths, O(n^3)).

    Row after row is brought in.  Prices on rows and columns keep all reduced costs >= 0, so Dijkstra finds the cheapest
    chain of "take his column, he takes another" that ends in a free column; then everybody on the chain moves on."""
    cost = -np.asarray(gain, dtype=np.float64)
    if cost.shape[0] > cost.shape[1]:                                         # rows are the smaller side
        column = np.full(cost.shape[0], -1)
        owner = assign(np.asarray(gain).T)
        column[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
        return column
    n, m = cost.shape
    row_price, column_price = np.zeros(n), np.zeros(m)
    column, owner = np.full(n, -1), np.full(m, -1)
    for new in range(n):
        distance, via, seen = np.full(m, np.inf), np.full(m, -1), np.zeros(m, bool)
        row, reached, end = new, 0.0, -1
        while end < 0:
            through = reached + cost[row] - row_price[row] - column_price
            nearer = ~seen & (through < distance)
            distance[nearer], via[nearer] = through[nearer], row
            j = int(np.where(seen, np.inf, distance).argmin())
            reached, seen[j] = distance[j], True
            row, end = owner[j], j if owner[j] < 0 else -1
        row_price[new] += reached
        settled = np.flatnonzero(seen & (owner >= 0))
        row_price[owner[settled]] += reached - distance[settled]
        column_price[seen] -= reached - distance[seen]
        while end >= 0:                                                       # move on along the chain, from its end
            row = via[end]
            owner[end] = row
            column[row], end = end, column[row]
    column[np.asarray(gain)[np.arange(n), column] <= 0] = -1
    return column


def match_segments(target, boxes, categories, isthing):
    """T*: the channel of each true segment, int64 [N]; IGNORE for crowd and for things without a detection.

    boxes [D, 4] are clipped to the picture first, as the true boxes are: what a box says about the world beyond a crop's
    edge is not on trial here.  categories [D] of the detections."""
    thing, crowd = isthing[target.categories], target.crowd
    stuff_channel = len(boxes) + (~isthing).long().cumsum(0) - 1              # [C], of use for stuff only
    channel = torch.where(thing | crowd, IGNORE, stuff_channel[target.categories])
    mine = torch.where(thing & ~crowd)[0]
    if len(mine) and len(boxes):
        clipped = clip_boxes_to_image(boxes.detach().float(), target.segments.shape)
        iou = box_iou(target.boxes[mine].float(), clipped).nan_to_num()       # 0/0 of two boxes without area
        iou = iou * (target.categories[mine, None] == categories)
        channel[mine] = torch.as_tensor(assign(iou.cpu().numpy()), device=channel.device)
    return channel


def panoptic_matching_loss(potential, boxes, categories, target, isthing, scale=10.0):
    """Section 3.5, one image: cross entropy of softmax(scale P) against T*, mean over the pixels that have a target.  Scalar.

    potential: P [D + N_st, h, w]; boxes [D, 4], categories [D] of its first D channels; target of the image; isthing bool [C].
    The truth is read at the centre of each cell of the map, whose cells share the picture's sides evenly.  No pixel with a
    target: 0, with gradients.

    Choice: `scale`.  Psi lies in [0, 1] (variant C: [0, 2]), and a softmax of numbers in [0, 1] is never sure: with K channels
    the loss of the perfect potential is log(1 + (K - 1) / e), 2.9 for K = 50, and its gradient would go on pulling at pixels
    that are right.  With scale 10 that floor is log(1 + (K - 1) e^-10) = 0.002.  The argmax does not feel it.  Variant A
    consists of logits already: scale 1."""
    isthing = torch.as_tensor(isthing, device=potential.device)
    channel = match_segments(target, boxes, categories, isthing)
    table = torch.cat([channel.new_tensor([IGNORE]), channel])                # of segment 0, 1, ..
    small = F.interpolate(target.segments[None, None].double(), size=potential.shape[1:], mode="nearest-exact")[0, 0].long()
    truth = table[small]                                                      # [h, w]
    known = int((truth != IGNORE).sum())
    if known == 0:
        return potential.sum() * 0
    return F.cross_entropy(scale * potential.float()[None], truth[None], ignore_index=IGNORE, reduction="sum") / known


# --- A.2 and B Implementation details: the Lovász losses ----------------------------------------------------------------
# Both are "the" convex surrogate of the Jaccard loss 1 - IoU: errors are sorted, and each one is weighed with what the IoU
# loses when this pixel goes wrong after all those with larger errors (Berman et al., CVPR 2018).

def lovasz_gradient(truth):
    """What 1 - IoU gains with each further wrong pixel: truth 0/1 [.., P] in the order of falling errors -> [.., P].

    After the first p pixels are wrong: intersection = positives that are left, union = all positives + negatives so far."""
    positive = truth.sum(-1, keepdim=True)
    jaccard = 1 - (positive - truth.cumsum(-1)) / (positive + (1 - truth).cumsum(-1)).clamp(min=1)
    return torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], -1)


def lovasz_softmax(logits, target):
    """Semantic loss on Cityscapes: logits [B, N, h, w], target int64 [B, h, w] with IGNORE -> mean over the categories that
    occur in the batch of the Lovász extension of 1 - IoU, errors |[c is true] - p(c)|.  The batch of this process is one
    picture (B: "the large number of crops per GPU enables us").  Nothing known: 0, with gradients."""
    p = logits.float().softmax(1).movedim(1, 0)[:, target != IGNORE]          # [C, P]
    truth = F.one_hot(target[target != IGNORE], logits.shape[1]).T.to(p.dtype)
    here = truth.any(1)
    if not here.any():
        return logits.sum() * 0
    errors, order = (truth[here] - p[here]).abs().sort(dim=1, descending=True)
    return (errors * lovasz_gradient(truth[here].gather(1, order))).sum(1).mean()


def lovasz_hinge(logits, truth):
    """Mask loss (A.2): logits [N, ..], truth 0/1 of the same shape -> mean over the N masks of the Lovász extension of
    1 - IoU of the foreground, errors max(0, 1 - m) with the margin m = logit * (+1 where true, -1 elsewhere).  N = 0: 0."""
    if len(logits) == 0:
        return logits.sum()
    logits, truth = logits.float().flatten(1), truth.float().flatten(1)
    errors, order = (1 - logits * (2 * truth - 1)).sort(dim=1, descending=True)
    return (errors.relu() * lovasz_gradient(truth.gather(1, order))).sum(1).mean()


# --- 3.4.2 and C: inference ---------------------------------------------------------------------------------------------

def new_numbers(keep):
    """keep bool [N] -> int64 [N + 1]: the new number of segment 0 (void), 1, .., N where those not kept become void."""
    return F.pad(keep.cumsum(0) * keep, (1, 0))


@torch.no_grad()
def segment(potential, categories, scores, size, chunk=8):
    """Argmax over the channels, nothing else: P [K, h, w], category of each channel [K], scores [D] of the first D channels,
    `size` (H, W) -> segments int64 [H, W], categories [N], scores [N] (1 for stuff).

    Choice: P is enlarged before the argmax (bilinear; a jagged edge otherwise), `chunk` channels at a time against the best
    so far: all 153 of a 1024x2048 picture would take 1.3 GB.  Channels that win no pixel are no segments.  K = 0: all void;
    without stuff a pixel that no box claims falls to the first detection."""
    best = potential.new_full(size, -torch.inf, dtype=torch.float32)
    winner = torch.full(size, -1, dtype=torch.long, device=potential.device)
    for c in range(0, len(potential), chunk):
        p, k = F.interpolate(potential[None, c:c + chunk].float(), size=size, mode="bilinear", align_corners=False)[0].max(0)
        better = p > best
        winner, best = torch.where(better, k + c, winner), torch.where(better, p, best)
    wins = torch.bincount(winner.flatten() + 1, minlength=len(potential) + 1)[1:] > 0
    scores = torch.cat([scores.float(), scores.new_ones(len(potential) - len(scores), dtype=torch.float32)])
    return new_numbers(wins)[winner + 1], categories[wins], scores[wins]


def trim_small_stuff(segments, categories, scores, isthing, area):
    """Appendix C: stuff segments of fewer than `area` pixels become void, the others are renumbered -> the same three.

    No part of the method; "recent panoptic segmentation works collectively resort to" it, because a single stray pixel of a
    stuff category that is not there counts as much against PQ as a missed bus.  The paper's numbers have it on."""
    count = torch.bincount(segments.flatten(), minlength=len(categories) + 1)[1:]
    keep = torch.as_tensor(isthing, device=segments.device)[categories] | (count >= area)
    return new_numbers(keep)[segments], categories[keep], scores[keep]


# --- What to see: python affinity_head.py -------------------------------------------------------------------------------

def measure(order, sizes, channels=128, instances=153):
    """Seconds and peak memory of A Psi, for each number of pixels in `sizes` (ascending), in this process: "right" multiplies
    Q (Q^T Psi), "left" (Q Q^T) Psi.  Prints one line a size: pixels, seconds, bytes above what Q and Psi themselves take."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(2)
    warm = torch.rand(1024, 1024, device=device)                              # the library's own start-up is no part of it
    for _ in range(3):
        apply_affinity(warm, warm), warm @ warm.T @ warm
    for hw in sizes:
        q, psi = torch.rand(hw, channels, device=device), torch.rand(hw, instances, device=device)
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resident()
        started = time.perf_counter()
        out = apply_affinity(q, psi) if order == "right" else q @ q.T @ psi / hw
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
        print(hw, seconds, max(peak - before, out.numel() * 4), flush=True)
        del q, psi, out


def resident(peak=False):
    """Bytes of memory that this process holds now, or held at most.  On Linux from the system's own table; getrusage's peak, which
    serves for both elsewhere, includes that of the process that started this one."""
    try:
        key = "VmHWM:" if peak else "VmRSS:"
        return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
    except OSError:
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(order, sizes):
    """`measure` in a process of its own, whose peak is nobody else's -> {pixels: (seconds, bytes)}."""
    command = [sys.executable, os.path.abspath(__file__), "--measure", order, *map(str, sizes)]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return {int(hw): (float(seconds), float(size)) for hw, seconds, size in map(str.split, lines)}


CATEGORIES = [("wall", False), ("floor", False), ("ball", True), ("crate", True)]     # of the demo's pictures: name, is it a thing


class Truth:
    """The demo's target: segments [H, W], categories, crowd [N], boxes [N, 4] of what shows."""
    def __init__(self, segments, categories):
        keep = torch.bincount(segments.flatten(), minlength=len(categories) + 1)[1:] > 0
        self.segments = new_numbers(keep)[segments]
        n = int(keep.sum())
        self.categories, self.crowd = categories[keep], torch.zeros(n, dtype=torch.bool)
        masks = self.segments == torch.arange(1, n + 1)[:, None, None]
        x, y = masks.any(1).float(), masks.any(2).float()
        first = [v.argmax(1) for v in (x, y)]
        last = [v.shape[1] - v.flip(1).argmax(1) for v in (x, y)]
        self.boxes = torch.stack([*first, *last], 1).float()


def draw_scene(generator, size=(128, 192), count=(5, 10)):
    """Balls and crates of seven colours before a wall: image [3, H, W] and Truth.  Many look alike, and they hide each other."""
    def u(low, high, *shape):
        return low + (high - low) * torch.rand(shape, generator=generator)
    h, w = size
    y, x = torch.meshgrid(torch.arange(h) + .5, torch.arange(w) + .5, indexing="ij")
    segments = 1 + (y > h * u(.3, .5) + w * u(-.1, .1) * (x / w - .5)).long()
    image = torch.where(segments == 1, u(.45, .8, 3, 1, 1), u(.2, .5, 3, 1, 1))
    image = image * (1 - .1 * ((x // 12 + y // 8 * (segments == 1)) % 2 == 0))
    paint = torch.tensor([[.8, .2, .2], [.2, .5, .8], [.9, .7, .2], [.3, .7, .3], [.6, .3, .7], [.85, .85, .85], [.25, .25, .3]])
    categories = [0, 1]
    for k in range(int(u(*count))):
        cx, cy, a, b, turn = u(0, w), u(.25 * h, h), u(10, 30), u(10, 30), u(-.4, .4)
        crate = bool(u(0, 1) < .5)
        s, t = (x - cx) * turn.cos() + (y - cy) * turn.sin(), (y - cy) * turn.cos() - (x - cx) * turn.sin()
        r = torch.maximum((s / a).abs(), (t / b).abs()) if crate else ((s / a) ** 2 + (t / a) ** 2).sqrt()
        inside = r < 1
        shade = 1 + u(-.4, .4) * s / a + u(-.4, .4) * t / a - .5 * (r > .88)
        image = torch.where(inside, paint[int(u(0, 7))][:, None, None] * shade, image)
        segments = torch.where(inside, k + 3, segments)
        categories.append(3 if crate else 2)
    image = image + .04 * torch.randn(3, h, w, generator=generator)
    return image.clamp(0, 1), Truth(segments, torch.tensor(categories))


def degrade(target, isthing, generator, stride=4):
    """What imperfect heads would say -> V [C, h, w], boxes [D, 4], scores [D], categories [D].

    V: the truth, blurred by three cells and mixed up by smooth noise.  Boxes: the true ones, 25% smaller and moved by 10% of
    their size in a random direction; a fifth of them found twice, moved otherwise, with a lower score."""
    h, w = (n // stride for n in target.segments.shape)
    c = len(isthing)
    v = F.one_hot(target.categories[target.segments - 1], c).movedim(-1, 0)[None].float()
    v = F.avg_pool2d(F.pad(F.avg_pool2d(v, stride), (1,) * 4, mode="replicate"), 3, 1)
    noise = F.interpolate(torch.randn(1, c, h // 6, w // 6, generator=generator), (h, w), mode="bilinear")
    v = ((v + .02).log() + .8 * noise).softmax(1)[0]
    things = torch.where(isthing[target.categories])[0]
    twice = things[torch.rand(len(things), generator=generator) < .2]
    chosen = torch.cat([things, twice])
    size, middle = target.boxes[chosen, 2:] - target.boxes[chosen, :2], (target.boxes[chosen, 2:] + target.boxes[chosen, :2]) / 2
    angle = 2 * math.pi * torch.rand(len(chosen), generator=generator)
    middle = middle + .1 * size * torch.stack([angle.cos(), angle.sin()], 1)
    scores = torch.cat([low + .25 * torch.rand(len(found), generator=generator) for low, found in ((.75, things), (.5, twice))])
    return v, torch.cat([middle - .375 * size, middle + .375 * size], 1), scores, target.categories[chosen]


class Encoder(nn.Module):
    """The demo's own small pyramid: image [B, 3, H, W] -> {4, 8, 16, 32: [B, width, ..]}.  It is given the pixel's place as
    well: so small a network, trained for minutes, does not find out by itself which of two look-alikes is the left one."""
    def __init__(self, width=32):
        super().__init__()
        def block(c_in, stride):
            return nn.Sequential(nn.Conv2d(c_in, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stem = nn.Sequential(block(5, 2), block(width, 1), block(width, 2), block(width, 1))
        self.down = nn.ModuleList(nn.Sequential(block(width, 2), block(width, 1)) for _ in range(3))

    def forward(self, images):
        h, w = images.shape[-2:]
        y, x = (torch.arange(n, device=images.device) / 128 - n / 256 for n in (h, w))
        place = torch.stack([y[:, None].expand(h, w), x.expand(h, w)]).expand(len(images), -1, -1, -1)
        f = {4: self.stem(torch.cat([images - .5, place], 1))}
        for stride, down in zip((8, 16, 32), self.down):
            f[stride] = down(f[stride // 2])
        for stride in (16, 8, 4):
            f[stride] = f[stride] + F.interpolate(f[2 * stride], f[stride].shape[-2:], mode="bilinear")
        return f


def scene(i, isthing, size=(128, 192), count=(5, 10)):
    """Picture i of the demo: image, Truth, and the degraded V, boxes, scores, categories."""
    generator = torch.Generator().manual_seed(i)
    image, target = draw_scene(generator, size, count)
    return image, target, *degrade(target, isthing, generator)


def mean_loss(potentials, batch, isthing):
    """The matching loss of the potentials of a list of `scene`s."""
    return sum(panoptic_matching_loss(p.cpu(), boxes, categories, target, isthing)
               for p, (_, target, _, boxes, _, categories) in zip(potentials, batch)) / len(batch)


def train_head(encoder, head, isthing, steps, device):
    """`steps` steps of 8 pictures: encoder and head learn from the panoptic matching loss alone."""
    optimiser, began = torch.optim.AdamW([*encoder.parameters(), *head.parameters()], 2e-3, weight_decay=1e-4), time.time()
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = [scene(8 * step + k, isthing) for k in range(8)]
        potentials = [dynamic_potential(*b[2:], isthing)[0].to(device) for b in batch]
        outputs = head(encoder(torch.stack([b[0] for b in batch]).to(device)), potentials)
        loss = mean_loss(outputs, batch, isthing)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            before = mean_loss(potentials, batch, isthing).item()
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}, of the potential {before:.3f}  {time.time() - began:.0f} s", flush=True)


@torch.no_grad()
def read(encoder, head, isthing, indices, device, sum_over=None, **how):
    """Pictures `indices` by each reading -> {reading: what PanopticQuality computes}.  With `sum_over` pixels the affinities are
    divided by that number whatever the picture's size: a sum, as the formula without the division has it, calibrated on
    training pictures."""
    from pq import PanopticQuality
    from seamless import fuse
    names = ["argmax over the potential", "Seamless's fusion heuristic", "affinity head"]
    scores = {name: PanopticQuality(isthing) for name in names}
    for i in indices:
        image, target, v, boxes, s, categories = scene(i, isthing, **how)
        size = image.shape[1:]
        psi, channels = dynamic_potential(v, boxes, s, categories, isthing)
        p = head(encoder(image[None].to(device)), [psi.to(device)])[0].cpu()
        if sum_over:
            p = psi + (p - psi) * psi[0].numel() / sum_over
        semantic = F.interpolate(v[None], size=tuple(size), mode="bilinear")[0].argmax(0)
        rows, columns = box_gate(boxes, size, 1)
        masks = rows[:, :, None] & columns[:, None] & (semantic == categories[:, None, None])
        results = (segment(psi, channels, s, size), fuse(masks, s, categories, semantic, isthing, stuff_area=0),
                   segment(p, channels, s, size))
        for name, (segments, found, _) in zip(names, results):
            scores[name].update(segments, found, target.segments, target.categories)
    return {name: score.compute() for name, score in scores.items()}


def demo(full=False):
    """Boxes that cut objects off, a head that learns to mend them, and what its affinities cost.

    What it shows.  Detections are the true boxes, 25% smaller and moved by 10%, a fifth of them doubled; V is the truth, blurred and
    mixed up.  Nobody but the head can give an object more than its box.  It is trained by the matching loss alone."""
    import matplotlib
    matplotlib.use("Agg")
    torch.manual_seed(0)
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    isthing = torch.tensor([thing for _, thing in CATEGORIES])
    sizes = [1024, 2048, 4096, 8192, 16384]
    left, right = measured("left", sizes), measured("right", [*sizes, 32768, 65000, 131072])
    cheap, dense = multiply_adds(65000, 128, 153)
    print(f"""800x1300 pixels, d = 4, C = 128, 100 + 53 channels          paper | here
  A in float32                                            15.7 GB | {4 * 65000**2 / 2**30:.1f} GiB
  Q (Q^T Psi), operations                               5 billion | {2 * cheap / 1e9:.2f} billion ({cheap / 1e9:.2f} G multiply-adds)
  saved against (Q Q^T) Psi                                 99.8% | {100 * (1 - cheap / dense):.1f}%
  Q (Q^T Psi), measured                                           | {right[65000][0]:.2f} s, {right[65000][1] / 2**20:.0f} MiB
  (Q Q^T) Psi at a quarter of the pixels, measured                | {left[16384][0]:.2f} s, {left[16384][1] / 2**20:.0f} MiB""",
          flush=True)
    try:
        import pq  # noqa: F401
        import seamless  # noqa: F401
    except ImportError:
        print("pq.py and seamless.py are not beside this file: nothing to measure with, so nothing is trained")
        return
    encoder, head = Encoder().to(device), InstanceAffinityHead(32, 64).to(device)
    train_head(encoder, head, isthing, 5000 if full else 800, device)
    encoder.eval(), head.eval()
    unseen = range(10**7, 10**7 + (500 if full else 150))
    table = read(encoder, head, isthing, unseen, device)
    print(f"{len(unseen)} unseen pictures                 PQ   things   stuff")
    for name, r in table.items():
        print(f"  {name:30s} {r['PQ']:6.1f}  {r['PQ_th']:6.1f}  {r['PQ_st']:6.1f}")
    print("Pictures of four times as many pixels and objects, to a head that was trained on the small ones")
    large = dict(size=(256, 384), count=(20, 40))
    mean, total = (read(encoder, head, isthing, unseen[:len(unseen) // 3], device, n, **large) for n in (None, 32 * 48))
    for name, r in (("argmax over the potential", mean["argmax over the potential"]), ("head, A Psi / HW", mean["affinity head"]),
                    ("head, A Psi as a sum", total["affinity head"])):
        print(f"  {name:30s} {r['PQ']:6.1f}  {r['PQ_th']:6.1f}  {r['PQ_st']:6.1f}")
    draw_figure(encoder, head, isthing, unseen, device, left, right)


@torch.no_grad()
def draw_figure(encoder, head, isthing, unseen, device, left, right):
    """figures/affinity_head.png: three pictures, what the boxes leave, whom a pixel listens to, the result; memory."""
    import matplotlib.pyplot as plt
    paint = torch.cat([torch.tensor([[.80, .80, .80], [.60, .60, .60]]),
                       torch.tensor(plt.get_cmap("tab20").colors)[torch.arange(0, 20, 2).repeat(4)]]).float()
    chosen = []
    for i in unseen[:60]:
        image, target, v, boxes, s, categories = scene(i, isthing)
        psi, _ = dynamic_potential(v, boxes, s, categories, isthing)
        features = encoder(image[None].to(device))
        p = head(features, [psi.to(device)])[0].cpu()
        channel = torch.cat([torch.tensor([IGNORE]), match_segments(target, boxes, categories, isthing)])
        truth = channel[target.segments]
        before, after = (F.interpolate(x[None], size=image.shape[1:], mode="bilinear")[0].argmax(0) for x in (psi, p))
        mended = (before != truth) & (after == truth) & (truth >= 0) & (truth < len(boxes))
        k = int(torch.bincount(truth[mended], minlength=1).argmax())          # the object that gained most
        y, x = torch.where(mended & (truth == k))
        if len(y):
            middle = (boxes[k, :2] + boxes[k, 2:]) / 2
            far = ((x - middle[0]) ** 2 + (y - middle[1]) ** 2).argsort()[len(y) * 3 // 4]
            heard = head.affinity(features, (x[far].item(), y[far].item())).cpu()
            gain = int(mended.sum()) - int(((before == truth) & (after != truth)).sum())
            chosen.append((gain, image, boxes, before, after, truth, heard, (x[far], y[far])))
    chosen.sort(key=lambda c: -c[0])
    fig = plt.figure(figsize=(12, 8), layout="constrained")
    upper, lower = fig.subfigures(2, 1, height_ratios=(2.2, 1))
    titles = ("image and its boxes", "argmax over the potential", "whom the cross listens to", "argmax over the head's answer", "truth")

    def colours(channels, count):                                             # things by channel, stuff in grey, ignored white
        index = torch.where(channels >= count, channels - count, channels + 2)
        return torch.where((channels == IGNORE)[..., None], torch.ones(3), paint[index])
    for row, (_, image, boxes, before, after, truth, heard, (x, y)) in zip(upper.subplots(3, 5), chosen[::max(1, len(chosen) // 8)]):
        row[0].imshow(image.permute(1, 2, 0).numpy())
        for x1, y1, x2, y2 in boxes.tolist():
            row[0].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="white", lw=1.2)
            row[0].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color="black", lw=.6, ls="--")
        for ax, channels in zip((row[1], row[3], row[4]), (before, after, truth)):
            ax.imshow(colours(channels, len(boxes)).numpy())
        limit = heard.abs().max().item()
        row[2].imshow(heard.numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit, extent=(0, image.shape[2], image.shape[1], 0))
        for ax in (row[1], row[2], row[3]):
            ax.plot([x.item()], [y.item()], "k+", ms=9, mew=1.6)
        for ax in row:
            ax.set(xlim=(0, image.shape[2]), ylim=(image.shape[1], 0))
            ax.axis("off")
    for ax, title in zip(upper.axes[:5], titles):
        ax.set_title(title, fontsize=10)
    axes = lower.subplots(1, 2)
    for ax, part, label in zip(axes, (1, 0), ("peak memory, MiB", "seconds")):
        for values, style, name in ((left, "s--", "(Q Qᵀ) Ψ"), (right, "o-", "Q (Qᵀ Ψ)")):
            ax.loglog(list(values), [v[part] / (2**20 if part else 1) for v in values.values()], style, label=name)
        if part:
            n = torch.tensor([1024., 131072.])
            ax.loglog(n, n**2 * 4 / 2**20, ":", color="grey", label="4 (HW)² bytes, the matrix A")
            ax.axvline(65000, color="grey", lw=.8)
            ax.text(60000, 2, "the paper's 800x1300", rotation=90, ha="right", fontsize=8, color="grey")
        ax.set(xlabel="pixels of the map, HW", ylabel=label)
        ax.legend(fontsize=8)
        ax.grid(alpha=.3)
    os.makedirs("figures", exist_ok=True)
    fig.savefig("figures/affinity_head.png", dpi=90)
    print("figures/affinity_head.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="train longer and test on more scenes")
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        measure(args.measure[0], [int(n) for n in args.measure[1:]])
    else:
        demo(args.full)

# --- Exercises ------------------------------------------------------------------------------------------------------------
# 1. Make phi_0 and phi_1 end in ReLU instead of ELU.  Watch the loss of the head and that of the potential: what happens to their
#    difference, and can more steps bring it back?
# 2. Train on the true boxes (leave the shrinking and moving out of `degrade` while training only).  What is left of the gain on
#    bad boxes?  The paper's appendix A.4 has the same experiment.
# 3. Set `scale` in `panoptic_matching_loss` to 1.  Which test tells you the floor of the loss, and what becomes of the table?
