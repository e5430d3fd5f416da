"""The affinity head: panoptic segmentation without rules that merge things and stuff.

The problem. A network detects things and labels each pixel with a category; rules merge both. No
loss sees the result, and rules repair nothing: if a box misses a car's front, the front is lost.

The idea. Each detection and each stuff category has a channel. Each pixel adds to its values those
of all pixels of its object. Then argmax decides. Ten pixels, cars 0 and 1, road 2:

    truth               0 0 0 0 1 1 1 1 2 2
    boxes of the cars     [---] [---]          each misses one pixel of its car
    argmax of Psi       2 0 0 0 1 1 1 2 2 2    Psi: the boxes, filled with probabilities
    argmax of P         0 0 0 0 1 1 1 1 2 2    P_i(k) = Psi_i(k) + sum over pixels j A_ij Psi_j(k)

    semantic probabilities V [N, h, w] -------.
    boxes B, scores s, categories c, masks M -+-> potential Psi [K, h, w]            (3.4.1)
    features --> Q [C, h, w] -------------------> P = Psi + A Psi, A from Q Q^T      (3.4.2)
    training: cross entropy against the matched truth; inference: argmax of P        (3.5, 3.4.2)

A has a number for each pair of cells: 15.7 GiB at 800x1300. It is never stored: (Q Q^T) Psi =
Q (Q^T Psi), where Q^T Psi is C x K: so no softmax. No weight has K: it may vary. A has no own loss.

The claims. 99.8% fewer multiply-adds than with A. PQ 61.4 on Cityscapes and 43.4 on COCO with a
ResNet-50. Competitive without masks. Training on predicted, not true boxes: +0.4 PQ, +1.3 box AP.
Here, on wrong boxes: 7.2 PQ above argmax of Psi, 3.0 of them by affinity; rules with as much help
have 1.2 more. On the toy street rules are 2.4 above argmax of P: RESULTS.md says why.

    python affinity_head.py [--quick] [--full] [--device D] [--out DIR]   example, costs, a head
    pytest tests/test_affinity_head.py                                    the spec of this file

Maps have stride 4: h = H / 4, w = W / 4, and HW is short for h w. N categories, N_st of them stuff;
D detections; Psi has K = D + N_st channels, Q has C.

Q. Li, X. Qi, P. Torr, "Unifying Training and Inference for Panoptic Segmentation", CVPR 2020.
"""
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import box_iou, clip_boxes_to_image

from data import IGNORE, Prediction, command_line, nearest, new_numbers, thing_truth


def example():
    """The ten pixels by hand: scores 1, V = .9 for the true category and .1 for the other. Q is
    one-hot, so A_ij = 1/10 within an object, else 0. Pixel 0 is in no box: Psi_0 = (0, 0, .1).
    P_0(car 0) = 3 (.9) / 10 = .27, P_0(road) = .1 + 4 (.1) / 10 = .14: the car wins."""
    psi = torch.tensor([[0, .9, .9, .9, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, .9, .9, .9, 0, 0, 0],
                        [.1, .1, .1, .1, .1, .1, .1, .1, .9, .9]]).T               # [HW, K]
    q = F.one_hot(torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 2, 2])).float()            # [HW, C]
    p = psi + apply_affinity(q, psi)
    winners = [x.argmax(1).tolist() for x in (psi, p)]
    assert winners == [[2, 0, 0, 0, 1, 1, 1, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]
    assert torch.allclose(p[[0, 7, 8]], torch.tensor([[.27, 0, .14], [0, .27, .14], [0, 0, 1.08]]))
    return winners


# --- 3.4.1 Dynamic potential head -------------------------------------------------------------
# Our copy of the paper lacks the formulas. By its words, with box B_k, score s_k, category c_k:
#     Psi_k(i) = s_k V_i(c_k) [i in B_k]                    without masks
#     Psi_k(i) = s_k V_i(c_k) M_i(k) [i in B_k]             variant B: high only where both are
#     Psi_k(i) = s_k (V_i(c_k) + M_i(k)) [i in B_k]         variant C: favours things (A.3)
#     Psi_k(i) = (V_i(c_k) + M_i(k)) [i in B_k]             variant A: V, M are logits (UPSNet)
#     Psi_l(i) = V_i(l)                                     stuff l, in all variants
# Choice: stuff has score 1; A.3 speaks of "unmodified 'stuff' scores". Choice: the box limits the
#   sum of C too. Otherwise V of all cars would enter each car's channel.

def box_gate(boxes, size, image_size):
    """[i in B_k]: boxes [D, 4] in an image of `image_size` (H, W) -> bool [D, h, w], `size` (h, w).
    A cell has H / h by W / w pixels. It is in a box if its centre is.
    Choice: a box that holds no centre of a cell gets the cell around its own middle."""
    def cells(axis):                                           # 0: rows, 1: columns -> bool [D, n]
        low, high = boxes[:, 1 - axis, None], boxes[:, 3 - axis, None]
        cell, d = torch.arange(size[axis], device=boxes.device), image_size[axis] / size[axis]
        inside = ((cell + 0.5) * d >= low) & ((cell + 0.5) * d < high)
        middle = cell == ((low + high) / 2 / d).floor()
        return torch.where(inside.any(1, keepdim=True), inside, middle)
    return cells(0)[:, :, None] & cells(1)[:, None]


def paste(masks, boxes, size, image_size):
    """Raw masks [D, s, s] (logits), "resized to their actual dimensions and pasted" bilinearly ->
    [D, h, w]. Outside of its box a mask repeats its border. Boxes get no gradient."""
    x1, y1, x2, y2 = boxes.detach().float()[:, :, None].unbind(1)                  # [D, 1] each
    y, x = ((torch.arange(n, device=boxes.device) + 0.5) * (side / n)
            for n, side in zip(size, image_size))
    u = 2 * (x - x1) / (x2 - x1).clamp(min=1e-6) - 1           # -1 to 1 from side to side, [D, w]
    v = 2 * (y - y1) / (y2 - y1).clamp(min=1e-6) - 1                               # [D, h]
    grid = torch.stack(torch.broadcast_tensors(u[:, None], v[:, :, None]), -1)
    return F.grid_sample(masks.float()[:, None], grid, padding_mode="border",
                         align_corners=False)[:, 0]


def dynamic_potential(found, logits, isthing, image_size, variant="B"):
    """Psi [K, h, w], a channel for each of D detections, then one for each stuff category, and the
    category of each channel, int64 [K]. found: boxes [D, 4] in pixels, scores [D], categories [D]
    and, if there are any, masks [D, s, s], raw logits. logits [N, h, w] of V; isthing bool [N].
    Gradients reach logits, masks and, except in A, scores; never boxes."""
    if variant not in ("A", "B", "C"):
        raise ValueError(f"variant must be 'A', 'B' or 'C', not {variant!r}")
    if variant == "A" and "masks" not in found:
        raise ValueError("variant A adds the logits of masks, and there are none: take variant B")
    boxes, categories, size = found["boxes"], found["categories"], logits.shape[1:]
    v = logits.float() if variant == "A" else logits.float().softmax(0)
    things = v[categories]                                                         # V_i(c_k)
    if "masks" in found:
        m = paste(found["masks"], boxes, size, image_size=image_size)
        m = m if variant == "A" else m.sigmoid()                                   # M_i(k)
        things = things * m if variant == "B" else things + m
    if variant != "A":
        things = found["scores"][:, None, None] * things
    things = torch.where(box_gate(boxes, size, image_size), things, 0)             # [D, h, w]
    stuff = torch.where(~torch.as_tensor(isthing, device=v.device))[0]
    return torch.cat([things, v[stuff]]), torch.cat([categories, stuff])


# --- 3.4.2 Dense instance affinity head -------------------------------------------------------
# phi_0 and phi_1 are "each a 1x1 convolution followed by an activation", which has no name. Here:
#     A_ij = phi_1(Q_i) . phi_0(Q_j) / HW
# Choice: phi_0 acts on Q. It could act on Q^T Psi too, which has C rows.
# Choice: ELU. ReLU makes all A_ij >= 0; training pushes them to 0, where ReLU has no gradient.
# Choice: / HW. A sum would outweigh Psi on large images. The mean suits stuff, which fills the same
#   share of a larger image. A thing fills a smaller share, so its channel shrinks (see demo).

def apply_affinity(q, psi, keys=None):
    """A Psi with A = Q K^T / HW: q, keys [HW, C] (None: q), psi [HW, K] -> [HW, K]. The plain
    version, (q @ keys.mT / HW) @ psi, takes HW^2 (C + K) multiply-adds; from the right 2 HW C K."""
    return q @ ((q if keys is None else keys).mT @ psi / len(q))


class InstanceAffinityHead(nn.Module):
    """P = Psi + A Psi. channels_in: of the pyramid; channels: C, 128 in the paper.
    Choice: Q has UPSNet's decoder without deformation: two 3x3 with group norm (32 groups of four
    channels at least), upsampling, 1x1. Deviation: V, with "the same architecture", has MiniDL.
    Choice: phi_1 starts small, so that P starts near Psi and A has a gradient."""

    def __init__(self, channels_in, channels=128):
        super().__init__()
        groups = int(np.gcd.reduce([32, max(channels // 4, 1), channels]))
        self.convs = nn.ModuleList(nn.Conv2d(c, channels, 3, padding=1, bias=False)
                                   for c in (channels_in, channels))
        self.norms = nn.ModuleList(nn.GroupNorm(groups, channels) for _ in range(2))
        self.out = nn.Conv2d(4 * channels, channels, 1)
        self.phi0, self.phi1 = (nn.Conv2d(channels, channels, 1) for _ in range(2))
        with torch.no_grad():
            for p in self.phi1.parameters():
                p.mul_(0.1)

    def factors(self, features):
        """{stride: [B, channels_in, ..]} -> phi_1(Q) and phi_0(Q), each float32 [B, HW, C]."""
        maps = []
        for x in (features[stride] for stride in (4, 8, 16, 32)):
            for conv, norm in zip(self.convs, self.norms):
                x = F.relu(norm(conv(x).float()))              # norms in bf16 are slow on a CPU
            maps.append(F.interpolate(x, features[4].shape[2:], mode="bilinear"))
        q = self.out(torch.cat(maps, 1))
        return [F.elu(phi(q)).float().flatten(2).mT for phi in (self.phi1, self.phi0)]

    def forward(self, features, potentials):
        """Features of a batch, Psi [K_b, h, w] of each image -> P of each image."""
        queries, keys = self.factors(features)
        with torch.autocast(queries.device.type, enabled=False):   # sums over all pixels: float32
            return [psi + apply_affinity(q, psi.float().flatten(1).mT, k).mT.reshape(psi.shape)
                    for q, k, psi in zip(queries, keys, potentials)]


# --- 3.5 Panoptic matching loss ---------------------------------------------------------------
# The truth is renumbered to the channels "by maximising the intersection over union between their
# bounding boxes". Choice: of all ways to give true things one detection of their category each, T*
# has the largest sum of box IoUs, all > 0. Things without one have no loss, and no channel in P.

def assign(gain):
    """The one-to-one assignment of rows to columns with the largest sum of gains, exactly.

    gain [G, D], of any sign -> the column of each row, NumPy int64 [G]; -1 for rows that are left
    over if G > D. ValueError for NaN and infinities. The Hungarian method, O(G^2 D): rows come one
    by one. A new row may take the column of another row, which takes the next, up to a free column.
    Prices keep each row at the column of least cost - price. So no step of this chain costs less
    than 0, and Dijkstra's algorithm finds the cheapest chain."""
    cost = -np.asarray(gain, dtype=np.float64)
    if not np.isfinite(cost).all():
        raise ValueError("gains must be finite numbers, without NaN and infinity")
    rows, columns = cost.shape
    cost = np.pad(cost, ((0, 0), (0, max(rows - columns, 0))))     # a column for each row
    price, owner = np.zeros(cost.shape[1]), np.full(cost.shape[1], -1)
    for new in range(rows):
        distance, via = cost[new] - price, np.full(len(price), -1)
        end, done = distance.argmin(), np.zeros(len(price), dtype=bool)
        while owner[end] >= 0:                                 # until the nearest column is free
            done[end], step = True, cost[owner[end]] - price   # its row takes another column
            through = distance[end] + step - step[end]
            nearer = ~done & (through < distance)
            distance[nearer], via[nearer] = through[nearer], end
            end = np.where(done, np.inf, distance).argmin()
        price[done] += distance[done] - distance[end]
        while via[end] >= 0:                                   # the rows move along the chain
            owner[end], end = owner[via[end]], via[end]
        owner[end] = new
    column = np.empty(rows, dtype=np.int64)
    column[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return np.where(column < columns, column, -1)


def match_segments(found, target, isthing):
    """T*: the channel of each true segment, int64; IGNORE for crowd and things without a detection.
    Boxes of `found` are clipped to the crop, so their parts outside do not lower the IoU."""
    stuff = len(found["boxes"]) + (~isthing).long().cumsum(0) - 1                  # [N]
    ignored = isthing[target.categories] | target.crowd
    channel = torch.where(ignored, IGNORE, stuff[target.categories])
    number, truth, _, category = thing_truth(target, isthing)
    if len(number) and len(found["boxes"]):
        boxes = clip_boxes_to_image(found["boxes"].detach().float(), target.segments.shape)
        iou = box_iou(truth.float(), boxes).nan_to_num()       # 0/0: two boxes without area
        iou = iou * (category[:, None] == found["categories"])                     # [G, D]
        column = torch.as_tensor(assign(iou.cpu().numpy()), device=iou.device)
        channel[number - 1] = torch.where(iou[torch.arange(len(iou)), column] > 0, column, IGNORE)
    return channel


def panoptic_matching_loss(potential, found, target, isthing, scale=10.0):
    """Cross entropy of softmax(scale P) against T* at the centre of each cell, mean over the cells
    that have a target. P [K, h, w] of one image, found: its detections.
    Choice: scale. Psi is 0 to 1 in B. With scale 1 a perfect P has the loss log(1 + (K - 1) / e),
    2.9 for K = 50: even correct cells keep a gradient. With 10: log(1 + (K - 1) e^-10) = 0.002."""
    isthing = torch.as_tensor(isthing, device=potential.device)
    channel = match_segments(found, target, isthing)
    y, x = (nearest(old, new) for old, new in zip(target.segments.shape, potential.shape[1:]))
    truth = torch.cat([channel.new_tensor([IGNORE]), channel])[target.segments[y[:, None], x]]
    return known_cross_entropy(scale * potential[None], truth[None])


# --- A.1, A.2, B: losses of the other branches ------------------------------------------------

def known_cross_entropy(logits, target):
    """Cross entropy, mean over the pixels that are not IGNORE; 0 with gradients where all are."""
    total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum")
    return total / (target != IGNORE).sum().clamp(min=1)


def lovasz(errors, truth):
    """The Lovasz extension of 1 - IoU (Berman et al., CVPR 2018): errors >= 0, truth 0/1 [M, P] ->
    mean over M. Pixels go wrong in the order of falling errors. An error's weight is the growth of
    1 - IoU: intersection = positives still right, union = positives + negatives gone wrong."""
    errors, order = errors.sort(dim=1, descending=True)
    truth = truth.gather(1, order)
    positive = truth.sum(1, keepdim=True)
    jaccard = 1 - (positive - truth.cumsum(1)) / (positive + (1 - truth).cumsum(1))
    weight = torch.cat([jaccard[:, :1], jaccard.diff(dim=1)], 1)
    return (errors * weight).sum(1).mean()


def lovasz_softmax(logits, target):
    """Semantic loss on Cityscapes (appendix B): logits [B, N, h, w], target int64 [B, h, w] with
    IGNORE; errors |truth - p|. Choice: one IoU a batch, mean over categories that occur in it."""
    known = target != IGNORE
    p = logits.float().softmax(1).movedim(1, 0)[:, known]                          # [N, P]
    truth = F.one_hot(target[known], logits.shape[1]).T.to(p.dtype)
    present = truth.any(1)
    return lovasz((truth - p)[present].abs(), truth[present]) if known.any() else logits.sum() * 0


def lovasz_hinge(logits, truth):
    """Mask loss (A.2): logits x, truth 0/1 [M, ..]; errors (1 - x)+ where true, else (1 + x)+."""
    logits, truth = logits.float().flatten(1), truth.float().flatten(1)
    return lovasz((1 - logits * (2 * truth - 1)).relu(), truth) if len(logits) else logits.sum()


# --- Inference and the whole method -----------------------------------------------------------

@torch.no_grad()
def segment(potential, categories, scores, size, stuff_area=0):
    """Argmax: P [K, h, w], categories [K], scores [D] -> segments int64 of `size` (H, W), their
    categories, their scores (1 for stuff). Stuff of less than `stuff_area` pixels becomes void, as
    in the paper's numbers (appendix C): a stray pixel is a false positive.
    Choice: P is resized first, for smooth edges, one by one: 153 x 1024 x 2048 take 1.3 GB."""
    best = potential.new_full(size, -torch.inf, dtype=torch.float32)
    winner = torch.zeros(size, dtype=torch.long, device=potential.device)          # 0: none
    for k, channel in enumerate(potential.float(), 1):
        value = F.interpolate(channel[None, None], size=size, mode="bilinear")[0, 0]
        winner, best = torch.where(value > best, k, winner), torch.maximum(value, best)
    count = torch.bincount(winner.flatten(), minlength=len(potential) + 1)[1:]
    keep = count > 0
    keep[len(scores):] &= count[len(scores):] >= stuff_area
    scores = F.pad(scores.float(), (0, len(potential) - len(scores)), value=1.0)
    return new_numbers(keep)[winner], categories[keep], scores[keep]


class Affinity(nn.Module):
    """The whole method. base: a seamless.Seamless, with or without masks; head None: argmax of Psi.
    loss_weights: of detection, semantic and panoptic losses. end_to_end: the panoptic loss trains
    "all", the "head" or nothing ("none"). true_boxes: Psi in training has true boxes of score 1
    (A.4). Choice: else detections above base.score_threshold, the paper's cut-off for inference.
    A.4: its gradients reach the detector, too: here through scores and masks, not boxes."""

    def __init__(self, base, head, loss_weights=(0.25, 1.0, 1.0), variant="B", end_to_end="all",
                 true_boxes=False):
        super().__init__()
        self.base, self.head, self.loss_weights, self.variant = base, head, loss_weights, variant
        self.end_to_end, self.true_boxes = end_to_end, true_boxes

    def outputs(self, features, found, logits, image_size):
        """P of each image and the categories of its channels, in training as in inference."""
        potentials, channels = zip(*(
            dynamic_potential(f, v, self.base.isthing, image_size=image_size, variant=self.variant)
            for f, v in zip(found, logits)))
        if self.end_to_end == "head":
            potentials = [psi.detach() for psi in potentials]
            features = {stride: f.detach() for stride, f in features.items()}
        return self.head(features, potentials) if self.head else potentials, channels

    def losses(self, images, targets):
        """images [B, 3, H, W], a Target an image -> the losses of base and "panoptic", weighted."""
        base, size, features = self.base, images.shape[2:], self.base.body(images)
        losses, proposals = base.detection_losses(features, targets, size)
        logits, (detection, semantic, panoptic) = base.semantic_head(features), self.loss_weights
        losses = {k: detection * v for k, v in losses.items()}
        for k, v in base.semantic_losses(logits, targets, size).items():
            losses[k] = semantic * v
        if self.end_to_end == "none":
            return losses
        if self.true_boxes:
            truths = [thing_truth(t, base.isthing) for t in targets]
            found = base.region_head.add_masks(features, [
                dict(boxes=b, scores=b.new_ones(len(b)), categories=c) for _, b, _, c in truths])
        else:
            proposals = [p[:base.proposal_head.proposals] for p in proposals]      # as inference
            found = base.region_head.detect(features, proposals, size,
                                            score_threshold=base.score_threshold)
        scale = 1.0 if self.variant == "A" else 10.0
        each = [panoptic_matching_loss(p, f, t, isthing=base.isthing, scale=scale) for p, f, t in
                zip(self.outputs(features, found, logits, image_size=size)[0], found, targets)]
        return {**losses, "panoptic": panoptic * sum(each) / len(each)}

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size` or its own size; `instances` are not from P."""
        base, image_size, features = self.base, image.shape[1:], self.base.body(image[None])
        size, found = tuple(size or image_size), base.detect(features, image_size)[0]
        boxes, logits = found["boxes"], base.semantic_head(features)
        sure = {k: v[found["scores"] >= base.score_threshold] for k, v in found.items()}
        (p,), (channels,) = self.outputs(features, [sure], logits, image_size=image_size)
        area = base.stuff_area * size[0] * size[1] / (1024 * 2048)
        segments = segment(p, channels, sure["scores"], size=size, stuff_area=area)
        masks = box_gate(boxes, size, image_size)
        if "masks" not in found:                               # pixels of its category in the box
            v = F.interpolate(logits.float(), size, mode="bilinear")[0]
            masks &= v.argmax(0) == found["categories"][:, None, None]
        for m, box, mask in zip(found.get("masks", []), boxes, masks):
            mask &= paste(m[None], box[None], size, image_size=image_size)[0] > 0
        factor = boxes.new_tensor([size[1] / image_size[1], size[0] / image_size[0]] * 2)
        return Prediction(*segments, {**found, "boxes": boxes * factor, "masks": masks})

    def stages(self, fit):                                     # the base's, for base and head
        return type(self.base).stages(self, fit)


def demo(quick=False, full=False, device="cpu", out="figures"):
    """What affinities cost, and a head that mends boxes, with controls."""
    print("ten pixels: argmax of Psi {}, of P {}".format(*example()))
    from lab.demo_affinity import show
    show(20 if quick else 5000 if full else 800, device=device, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="20 steps", full="5000 steps")

# Exercises
# 1. Let phi_0 and phi_1 end in ReLU. Which test fails? What becomes of the demo's loss of P?
# 2. Leave `box_gate` out of `dynamic_potential`. Which tests fail? What of two cars side by side?
# 3. Make scale=1 the default of `panoptic_matching_loss`. Which test checks the floor?
