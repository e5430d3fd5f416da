r"""AdaptIS: point at an object, get its mask.

The problem. A detector finds a box first and a mask in it afterwards. Two cells that lie across
each other share one box, and a box cannot say which of the two is meant:

      +---------+     A point can. The network answers one question: which pixels belong to the
      |\\     //|     object at (x, y)? Any point of a cell gives that cell. There are
      |  \\ //  |     no boxes, no anchors and no clustering.
      | //   \\ |     A point on no object is never trained: its mask means nothing.
      +---------+

The idea. The point picks a vector Q(x, y) from the feature map. A few linear layers, the
controller, turn it into scales and shifts. They set a small network, the head, to "this object":

    image --> backbone --> features F ---------------------------------.             once an image
                               |                                       |
    (x, y) -----------> Q(x, y), bilinear --> controller               |             once a point
       |                                          | scale, shift       |
       '--> coordinates X relative to (x, y) -----|------> conv of [F; X] --> AdaIN --> ... --> mask

    AdaIN(x) = scale * (x - mean) / std + shift           mean and std over the pixels of a channel

The paper's claim. AP at an IoU of .9 on overlapping cells is 97.5, for Mask R-CNN 5.8 (Table 1).
With a semantic and a point proposal branch PQ on Cityscapes is 62.0 (Table 2, ResNeXt-101).

    python adaptis.py [--quick] [--full] [--device D] [--out DIR]   example, 5 minutes of training
    python -m lab.clicks 7                                          then: click on cells of image 7
    pytest tests/test_adaptis.py                                    the spec of this file

Points are (x, y) in pixels. A cell of a map covers stride x stride. "Released code": the authors'.

K. Sofiiuk, O. Barinova, A. Konushin, "AdaptIS: Adaptive Instance Selection Network", ICCV 2019.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from data import IGNORE, Prediction, command_line, mask_boxes, nearest, new_numbers


def example():
    """Four pixels, two objects, by hand: one feature map gives two masks.
    The channel 1 1 3 3 has mean 2 and deviation 1: AdaIN gives scale * (-1 -1 1 1) + shift. The
    controller says (-4, 0) at a point of the left object, (4, 0) on the right one."""
    features = torch.tensor([1.0, 1, 3, 3]).expand(2, 1, 1, 4)
    logits = AdaIN()(features, scale=torch.tensor([[-4.0], [4.0]]), shift=torch.zeros(2, 1))
    expected = torch.tensor([[4, 4, -4, -4], [-4, -4, 4, 4]])
    assert (logits[:, 0, 0] - expected).abs().max() < 1e-4
    return logits[:, 0, 0] > 0


# --- 3 Architecture: one feature map, a mask for each point -----------------------------------

def bilinear(features, points, stride):
    """Q(x, y): features [B, C, h, w] at points [B, K, 2] in pixels -> [B, K, C]. The centre of cell
    (i, j) is ((j + .5) stride, (i + .5) stride). Beyond the outermost centres nothing changes."""
    size = points.new_tensor([features.shape[3], features.shape[2]]) * stride
    grid = (points / size * 2 - 1)[:, None].float()            # grid_sample counts from -1 to 1
    q = F.grid_sample(features.float(), grid, padding_mode="border", align_corners=False)
    return q[:, :, 0].transpose(1, 2)


def adain(x, scale, shift):
    """Adaptive instance normalisation as its formula reads: x [N, C, h, w], scale and shift [N, C]
    -> [N, C, h, w]. Batch norm learns scale and shift. Here they are an input: what the point
    knows of its object. The variance gets 1e-5 more, as in batch norm."""
    scale, shift = scale[..., None, None], shift[..., None, None]
    variance, mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
    return scale * (x - mean) / (variance + 1e-5).sqrt() + shift


class AdaIN(nn.Module):
    """The same as one operation, which is faster: batch norm of one image with N C channels."""

    def forward(self, x, scale, shift):
        channels = x.contiguous().view(1, -1, *x.shape[2:])    # [1, N C, h, w]
        precise = torch.promote_types(x.dtype, torch.float32)
        scale, shift = (v.flatten().to(precise) for v in (scale, shift))
        out = torch.batch_norm(channels, scale, shift, None, None, True, 0.0, 1e-5, False)
        return out.view_as(x)                                  # F.batch_norm refuses one pixel


class RelativeCoordConv(nn.Module):
    """Coordinates of a window's cells as seen from the point -> [N, 2, height, width], x first:

        clip((x - x_point) / R, -1, 1),    clip((y - y_point) / R, -1, 1)

    points [N, 2] and the windows' upper left corners [N, 2] in pixels, `size` (height, width) in
    cells. Equal objects have equal features: X tells them apart. R "roughly sets the maximum
    size of an object". InstanceSelection.place convolves X. (Released code adds the distance.)"""

    def __init__(self, radius, stride):
        super().__init__()
        self.radius, self.stride = radius, stride

    def forward(self, points, corners, size):
        rows, columns = (torch.arange(n, device=points.device) + 0.5 for n in size)
        x = corners[:, 0, None] + columns * self.stride - points[:, 0, None]   # [N, width]
        y = corners[:, 1, None] + rows * self.stride - points[:, 1, None]      # [N, height]
        x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])
        return (torch.stack([x, y], -1) / self.radius).clamp(-1, 1).movedim(-1, 1)


class Controller(nn.Module):
    """Q [..., channels] -> scale and shift, each [..., outputs]: the "characteristic vector".
    Choice: "a few fully connected layers" are three, the hidden ones 128 wide."""

    def __init__(self, channels, outputs, hidden=128):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(),
                                    nn.Linear(hidden, hidden), nn.ReLU(),
                                    nn.Linear(hidden, 2 * outputs))

    def forward(self, q):
        return self.layers(q).chunk(2, -1)


def conv(inputs, outputs):
    """3x3 convolution, ReLU, batch norm: Figure 8. Choice: eps 0.01. A channel that is 0 on
    nearly all images has a running variance of 0; with 1e-5 its rare values grow 300 times."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True),
                         nn.BatchNorm2d(outputs, eps=0.01))


def windows(maps, corners, size):
    """Cuts windows of `size` (height, width), K an image, from maps [B, H, W, ...]; corners int64
    [B K, 2] are their upper left places (x, y) -> [B K, height, width, ...]."""
    N, (B, H, W) = len(corners), maps.shape[:3]
    image = torch.arange(N, device=maps.device) // (N // B)
    row = corners[:, 1, None] + torch.arange(size[0], device=maps.device)
    column = corners[:, 0, None] + torch.arange(size[1], device=maps.device)
    place = (image[:, None, None] * H + row[:, :, None]) * W + column[:, None, :]
    return maps.flatten(0, 2).index_select(0, place.flatten()).view(N, *size, *maps.shape[3:])


class InstanceSelection(nn.Module):
    """The head: features [B, C, h, w] and points [B, K, 2] -> logits of a window around each point,
    [B K, H', W'] in pixels, and the windows' upper left corners [B K, 2] (x, y) in pixels.

    The first layer convolves the features F beside the coordinates X. A convolution of a
    concatenation is a sum of two convolutions, of which the first is done once an image:

        W * [F; X] = W_F * F + W_X * X                `share` is W_F, `place` is W_X

    Deviation: with a `window` (height, width) the head sees that many pixels around the point. None
      is the paper's: the whole image (Figure 3 d: 234 of 250 cells of a large one found). AdaIN's
      mean changes with an object's share: a cell fills 2% of 96x96 pixels, 0.1% of 384x384.
    Choice: `blocks` layers of `width` channels with AdaIN, then one with batch norm. The paper has
      no numbers; released code has one AdaIN after three (as good: `python -m lab.variants`).
    Choice: W_X is 1x1. Coordinates are linear: a 3x3 differs only at clipped or padded places.
    As released: scales are 1 + the controller's, the logit is x / 5 - 1.7: p starts near .15."""

    def __init__(self, channels, stride, *, width=32, blocks=3, window=None, radius=280,
                 coordinates=True):
        super().__init__()
        self.stride, self.window, self.width, self.adain = stride, window, width, AdaIN()
        self.controller = Controller(channels, blocks * width)
        self.share = nn.Conv2d(channels, width, 3, padding=1)
        self.relative = RelativeCoordConv(radius, stride)
        self.place = nn.Conv2d(2, width, 1, bias=False) if coordinates else None  # None: Table 7
        more = [nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks - 1)]
        self.adapted = nn.ModuleList(more)
        self.layers = nn.Sequential(conv(width, width), nn.Conv2d(width, stride * stride, 1))

    def corners(self, points, size):
        """Upper left cells int64 [N, 2] of the windows around points [N, 2] on a map of `size`, and
        the windows' (height, width) in cells. At the border windows are moved inside."""
        height, width = size
        if self.window is not None:
            height, width = (min(math.ceil(a / self.stride), b) for a, b in zip(self.window, size))
        first = points / self.stride - points.new_tensor([width / 2, height / 2])
        last = points.new_tensor([size[1] - width, size[0] - height])
        return first.round().clamp(min=0).minimum(last).long(), (height, width)

    def forward(self, features, points, shared=None, corners=None):
        """`shared` is share(features), if known; `corners` [B K, 2]: other windows, in cells."""
        shared = self.share(features) if shared is None else shared            # W_F * F
        q = bilinear(features, points, self.stride).flatten(0, 1)              # [B K, C]
        scales, shifts = (v.split(self.width, 1) for v in self.controller(q))
        points = points.flatten(0, 1)
        around, size = self.corners(points, features.shape[2:])
        corners = around if corners is None else corners
        x = windows(shared.movedim(1, -1), corners, size).movedim(-1, 1)
        if self.place is not None:
            x = x + self.place(self.relative(points, corners * self.stride, size))   # + W_X * X
        return 0.2 * self.mask(F.relu(x), scales, shifts)[:, 0] - 1.7, corners * self.stride

    def mask(self, x, scales, shifts):
        """All after the first layer: x [N, width, h, w] -> [N, 1, h stride, w stride]."""
        x = self.adain(x, 1 + scales[0], shifts[0])
        for layer, scale, shift in zip(self.adapted, scales[1:], shifts[1:]):
            x = self.adain(F.relu(layer(x)), 1 + scale, shift)
        return F.pixel_shuffle(self.layers(x), self.stride)    # Choice: a value for each pixel


# --- 3 Training and appendix A: which points, which loss --------------------------------------

def one_of(groups, ids, generator=None):
    """groups int64 [M]: each member's group. ids int64: groups -> a random member of each."""
    size = torch.bincount(groups)
    first = size.cumsum(0) - size                              # in the order of the groups
    share = torch.rand(ids.shape, generator=generator, device=ids.device)
    return groups.argsort(stable=True)[first[ids] + (share * size[ids]).long()]


def sample_points(segments, objects, count, generator=None):
    """Object-level stratification: "a random object and then ... a random point at that object",
    `count` times. So small objects are asked for as often as large ones. segments int64 [H, W],
    objects int64 [n]: their numbers -> points [count, 2], ids [count]. Training: sample_batch."""
    area = torch.bincount(segments.flatten(), minlength=1 + max(objects.tolist(), default=0))
    if len(objects) == 0 or not area[objects].all():
        raise ValueError(f"objects {objects.tolist()}: at least one is needed, each with a pixel")
    ids = objects[one_of(torch.zeros_like(objects), objects.new_zeros(count), generator)]
    pixel, width = one_of(segments.flatten(), ids, generator), segments.shape[1]
    return torch.stack([pixel % width, pixel // width], 1) + 0.5, ids


def sample_batch(targets, isthing, count, same=False):
    """The same for B Targets (data.py) at once, in one numbering: in a loop over images a GPU would
    wait for each. `same`: all points of an image on one object -> points [B, count, 2]; ids
    [B, count], 0: no object; segments [B, H, W], 0: void; areas; the semantic truth [B, H, W]."""
    one, B = targets[0].crowd.new_ones(1), len(targets)        # void is number 0 of each image
    idle = torch.cat([v for t in targets for v in (one, t.crowd)])             # [S]
    category = torch.cat([v for t in targets for v in (one.long(), t.categories)])
    image = torch.tensor([b for b, t in enumerate(targets) for _ in range(1 + len(t.crowd))])
    image, rows = image.to(idle.device), torch.arange(B, device=idle.device)[:, None]
    numbers = torch.stack([t.segments for t in targets]) + (image < rows).sum(1)[:, None, None]
    area, (H, W) = torch.bincount(numbers.flatten(), minlength=len(idle)), numbers.shape[1:]
    objects = (image == rows) & isthing[category] & ~idle & (area > 0)         # [B, S]
    draw = torch.rand(B, 1 if same else count, len(idle), device=idle.device)  # the highest wins
    ids = (draw * objects[:, None]).argmax(2).expand(B, count)
    pixel = one_of(numbers.flatten(), ids) % (H * W)
    points, void = torch.stack([pixel % W, pixel // W], 2) + 0.5, idle[numbers]
    return points, ids, numbers.where(~void, 0), area, category[numbers].where(~void, IGNORE)


def focal_loss(logits, masks, weight=None, gamma=2, normalized=False):
    """FL = -(1 - p)^gamma log p with p of a pixel's true label: logits, masks [N, h, w] -> [N], the
    means over the pixels. A `weight` [N, h, w] of 0 leaves pixels out. normalized: see NFL."""
    loss = F.binary_cross_entropy_with_logits(logits, masks.to(logits.dtype), reduction="none")
    weight = torch.ones_like(loss) if weight is None else weight.to(loss.dtype)
    focus = weight * (-torch.expm1(-loss)) ** gamma            # 1 - p = 1 - exp(log p)
    P = focus.detach().sum((1, 2)).clamp(min=1e-3)
    return (focus * loss).sum((1, 2)) / (P if normalized else weight.sum((1, 2)).clamp(min=1))


def normalized_focal_loss(logits, masks, weight=None, gamma=2):
    """NFL = -1/P sum of (1 - p)^gamma log p,   P = sum of (1 - p)^gamma over the pixels -> [N].

    The weights (1 - p)^gamma pick the pixels that are still wrong. Their sum P fades as the network
    improves; NFL divides by it. "The total gradient of the NFL is equal to the total gradient of
    BCE" is true of the weights, which sum to 1. By the logits it is not: a pixel of NFL has
    (1 - p)^gamma [(1 - p) - gamma p log p] / P, of BCE (1 - p) / hw.
    Choice: gamma 2 and no gradient through P, as in released code. P is at least 1/1000 (not 0/0).
    Released code also weighs the object by 1/2 (toys) or 1/4, the rest by 1/2 or 3/4."""
    return focal_loss(logits, masks, weight, gamma=gamma, normalized=True)


binary_cross_entropy = partial(focal_loss, gamma=0)            # BCE = -log p, the mean as in FL


# --- 4 Class-agnostic instance segmentation: the greedy algorithm -----------------------------

@torch.no_grad()
def segment_instances(propose, unknown, threshold=0.5, overlap=0.5, per_round=7, patience=20, *,
                      points=None, background=None, min_area=1, generator=None):
    """All objects of an image -> labels int64 [H, W] (0: none), scores [n]: mean confidences.

    propose(points [N, 2]) -> (C [N, h, w], corners [N, 2]): the confidences in a window around each
    point and its upper left pixel (x, y). S is the map of taken pixels: at first all but
    `unknown` bool [H, W]. points [n, 2]: ask there, in this order (section 5); None: at
    random, of `per_round` points that with "the highest average confidence" (section 6).
    background float [H, W]: 1 - the sum of p_l over things, which takes part in the argmax.

        repeat: an answer M = [C > T];  if |M and S| < overlap |M|:  add the object,  S = S or M
        in the end: R(x, y) = argmax_i C_i(x, y) over the objects with C_i > T

    It ends when no point is left on unknown pixels. Choice: or after `patience` tests in a row
    without a new object (released code: 40 in all); no pixel is asked twice; objects under
    `min_area` pixels are dropped; overlap is a share of M; the first object is tested too; a score
    is a mean over R. As in released code, confidence is the mean of C where C > .2."""
    (H, W), device = unknown.shape, unknown.device
    unknown, fresh, objects, failures = unknown.clone(), unknown.clone(), [], 0
    while failures < patience:
        if points is None:
            pixels = (unknown & fresh).nonzero().flip(1)       # (x, y) of those not asked yet
            order = torch.randperm(len(pixels), generator=generator)[:per_round]
            batch = pixels[order.to(device)] + 0.5
        else:
            points = points[unknown[points[:, 1].long(), points[:, 0].long()]]
            batch, points = points[:per_round], points[per_round:]
        if len(batch) == 0:
            break
        C, corners = propose(batch)
        (x, y), answers = batch.long().unbind(1), []
        for c, (left, top) in zip(C, corners.tolist()):
            c = c[:H - top, :W - left].float()                 # the last cell may reach beyond
            answers.append((c, (slice(top, top + c.shape[0]), slice(left, left + c.shape[1]))))
        fresh[y, x], turns = False, range(len(batch))
        if points is None:
            means = [c[c > 0.2].mean().nan_to_num() for c, _ in answers]
            turns = [int(torch.stack(means).argmax())]
        for k in turns:
            if not unknown[y[k], x[k]] or failures == patience:
                continue                                       # a mask of this batch covers it
            c, window = answers[k]
            mask, failures = c > threshold, failures + 1                           # M
            if (mask & ~unknown[window]).sum() < overlap * mask.sum():             # |M and S|
                unknown[window] &= ~mask                                           # S = S or M
                objects.append(answers[k])
                failures = 0
    labels = torch.zeros(H, W, dtype=torch.int64, device=device)
    highest = torch.full((H, W), float(threshold), device=device)
    highest = highest if background is None else highest.maximum(background)
    for i, (c, window) in enumerate(objects, 1):               # R; of equals the first stays
        higher = c > highest[window]
        highest[window][higher] = c[higher]
        labels[window][higher] = i
    area, total = (torch.bincount(labels.flatten(), weights, minlength=len(objects) + 1)[1:]
                   for weights in (None, highest.flatten()))
    keep = area >= max(min_area, 1)
    return new_numbers(keep)[labels], (total / area)[keep]


# --- 5 Panoptic segmentation ------------------------------------------------------------------

def local_maxima(score):
    """Where to point: score [H, W] -> points [n, 2] in pixels, the highest score first.
    A local maximum is an 8-connected plateau of equal values without a higher neighbour, found by
    breadth-first search. Its point is the pixel nearest to its centre, of several the first."""
    top = score == F.max_pool2d(score[None], 3, 1, 1)[0]       # no neighbour is higher
    rest = F.max_pool2d(score.masked_fill(top, -math.inf)[None], 3, 1, 1)[0]
    slope = top & (score == rest)                              # beside an equal pixel, no top
    left, found = set(map(tuple, top.nonzero().tolist())), []
    for start in sorted(left):
        plateau = [start] if start in left else []
        left.discard(start)
        for y, x in plateau:                                   # grows while it is read
            beside = left & {(v, u) for v in (y - 1, y, y + 1) for u in (x - 1, x, x + 1)}
            left -= beside
            plateau += beside
        if plateau and not slope[tuple(zip(*plateau))].any():
            n, y, x = len(plateau), *map(sum, zip(*plateau))   # the centre is (x / n, y / n)
            found.append(min(((n * v - y) ** 2 + (n * u - x) ** 2, v, u) for v, u in plateau)[1:])
    y, x = torch.tensor(found, dtype=torch.int64, device=score.device).view(-1, 2).unbind(1)
    order = score[y, x].argsort(descending=True, stable=True)
    return torch.stack([x, y], 1)[order] + 0.5


class AdaptIS(nn.Module):
    """Backbone, selection network, semantic and point proposal branch (Choice: of two layers each).
    isthing: bool [C]. encoder: images -> one feature map; has `.channels` and `.stride`. points: K,
    points an image in training. loss: of the masks. proposals: share of the steps that train the
    proposal branch; 0: none, points are random. The rest: InstanceSelection, segment_instances."""

    def __init__(self, isthing, encoder, *, width=32, blocks=3, window=None, radius=280,
                 coordinates=True, points=6, loss=normalized_focal_loss, proposals=0.1,
                 threshold=0.5, per_round=7, patience=20, min_area=1, stuff_area=4096, flip=False):
        super().__init__()
        isthing = torch.as_tensor(isthing, dtype=torch.bool)
        if not isthing.any():
            raise ValueError("no category is a thing: there is nothing to point at")
        self.register_buffer("isthing", isthing, persistent=False)
        self.encoder, self.stride, channels = encoder, encoder.stride, encoder.channels
        self.selection = InstanceSelection(channels, encoder.stride, width=width, blocks=blocks,
                                           window=window, radius=radius, coordinates=coordinates)
        self.semantic, self.proposal = (
            nn.Sequential(conv(channels, width), conv(width, width), nn.Conv2d(width, outputs, 1))
            if outputs else None for outputs in (len(isthing), int(proposals > 0)))
        self.points, self.loss, self.threshold, self.flip = points, loss, threshold, flip
        self.search = dict(per_round=per_round, patience=patience, min_area=min_area)
        self.stuff_area, self.proposals, self.random_points = stuff_area, proposals, not proposals

    def stages(self, fit):
        """[(name, optimiser, steps), ...]: all but the proposal branch, then that branch alone.
        The trainer freezes the rest. Section 7: Adam (.9, .999), the backbone at its own rate."""
        encoder = [p for p in self.encoder.parameters() if p.requires_grad]
        heads = [*self.selection.parameters(), *self.semantic.parameters()]
        groups = [{"params": encoder, "lr": fit["lr_body"]}, {"params": heads}]
        adam = partial(torch.optim.Adam, lr=fit["lr"], weight_decay=fit["decay"])
        first = round((1 - self.proposals) * fit["steps"])
        stages = [("masks", adam(groups), first)]
        if self.proposal:
            stages.append(("proposals", adam(self.proposal.parameters()), fit["steps"] - first))
        return stages

    def losses(self, images, targets):
        """images [B, 3, H, W], B Targets -> {"masks", "semantic"}, or {"proposals"} in the second
        stage, when only that branch learns. Void and crowds teach nothing.
        Second stage: 48 random points on a random object of each image. The "top 20%" by the IoU of
        their masks with the truth are positive, the others negative (released code: soft targets).
        Choice: all weights 1; cross entropy for the semantic branch (released code: NFL)."""
        (H, W), s = images.shape[2:], self.stride
        learning = {n.split(".")[0] for n, p in self.named_parameters() if p.requires_grad}
        second = learning == {"proposal"}
        for part in (self.encoder, self.selection, self.semantic) if second else ():
            part.eval()                                        # running statistics stay, too
        K = 48 if second else self.points
        points, ids, segments, area, truth = sample_batch(targets, self.isthing, K, same=second)
        segments = F.pad(segments, (0, -W % s, 0, -H % s))     # whole cells; the rest is void
        features = self.encoder(images)
        logits, corners = self.selection(features, points)
        window = windows(segments, corners, logits.shape[1:])
        masks, known, some = window == ids.reshape(-1, 1, 1), window > 0, ids > 0
        if second:                                             # which points make good masks?
            found = (logits.float().sigmoid() > self.threshold) & known
            common, claimed = (m.sum((1, 2)).view(ids.shape) for m in (found & masks, found))
            iou = common / (claimed + area[ids] - common)                      # [B, 48]
            good = iou.argsort(1, descending=True).argsort(1) < round(0.2 * K)
            proposed = bilinear(self.proposal(features), points, s)[..., 0]
            each = F.binary_cross_entropy_with_logits(proposed, good.float(), reduction="none")
            return {"proposals": (each * some).sum() / some.sum().clamp(min=1)}
        each = self.loss(logits.float(), masks, known).view(ids.shape) * some
        logits = F.interpolate(self.semantic(features).float(), scale_factor=s, mode="bilinear")
        total = F.cross_entropy(logits[..., :H, :W], truth, ignore_index=IGNORE, reduction="sum")
        return {"masks": each.sum() / some.sum().clamp(min=1),
                "semantic": total / (truth != IGNORE).sum().clamp(min=1)}

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size` (height, width), the image's own by default.
        The greedy algorithm finds things where the semantic branch sees no stuff; random points
        come from seed 0: results repeat. A thing's category is l(M) = argmax_l of the sum of p_l
        over R (paper: over M). `flip`: means over V = 2 views, the image and its mirror image.
        As in released code a background, 1 - the sum of p_l over things, takes part in the argmax:
        no mask takes pixels that are stuff for sure. Other pixels that look like a thing are void.
        Deviation: stuff under `stuff_area` pixels (of 1024x2048, scaled) becomes void."""
        (H, W), s, classes, V = image.shape[1:], self.stride, len(self.isthing), 1 + self.flip
        image = F.pad(image[None], (0, -W % s, 0, -H % s), mode="replicate")
        features = self.encoder(torch.cat([image, image.flip(-1)])[:V])        # [V, C, h, w]
        shared, width = self.selection.share(features), features.shape[3]

        def mean(views):                                       # [V, ..., W] -> [..., W]
            return torch.cat([views[:1], views[1:].flip(-1)]).mean(0)

        def propose(points):
            corners, window = self.selection.corners(points, features.shape[2:])
            mirrored = torch.stack([width * s - points[:, 0], points[:, 1]], 1)
            there = torch.stack([width - window[1] - corners[:, 0], corners[:, 1]], 1)
            logits, _ = self.selection(features, torch.stack([points, mirrored])[:V], shared,
                                       corners=torch.cat([corners, there])[:V * len(points)])
            return mean(logits.float().sigmoid().unflatten(0, (V, -1))), corners * s

        logits = [F.interpolate(branch(features).float(), scale_factor=s, mode="bilinear")
                  for branch in (self.semantic, self.proposal) if branch]
        semantic = mean(logits[0].softmax(1))[:, :H, :W]                       # [classes, H, W]
        proposed = mean(logits[-1].sigmoid())[0, :H, :W]
        points = None if self.random_points else local_maxima(proposed)
        category = semantic.argmax(0)
        labels, scores = segment_instances(
            propose, self.isthing[category], self.threshold, points=points,
            background=1 - semantic[self.isthing].sum(0),
            generator=torch.Generator().manual_seed(0), **self.search)
        n = len(scores)
        sums = semantic.new_zeros(n + 1, classes)
        sums.index_add_(0, labels.flatten(), semantic.flatten(1).t())          # of p_l in R
        things = sums[1:].masked_fill(~self.isthing, -1).argmax(1)
        stuff = torch.where(self.isthing[category], 0, n + 1 + category)       # things are 1..n
        segments = torch.where(labels > 0, labels, stuff)
        h, w = size or (H, W)                                  # the nearest: numbers must not mix
        segments = segments[nearest(H, h)[:, None], nearest(W, w)]
        area = torch.bincount(segments.flatten(), minlength=n + classes + 1)[1:]
        keep = area >= max(self.stuff_area * segments.numel() / (1024 * 2048), 1)
        keep[:n] = area[:n] > 0
        segments, scores = new_numbers(keep)[segments], F.pad(scores, (0, classes), value=1.0)[keep]
        categories = torch.cat([things, torch.arange(classes, device=area.device)])[keep]
        n = int(keep[:n].sum())
        masks = segments == torch.arange(1, n + 1, device=segments.device)[:, None, None]
        instances = dict(boxes=mask_boxes(segments, len(categories))[:n], masks=masks,
                         scores=scores[:n], categories=categories[:n])
        return Prediction(segments, categories, scores, instances)


# --- 6 The backbone of the toy problem --------------------------------------------------------

class UNet(nn.Module):
    """images [B, 3, H, W] -> [B, channels, ceil(H / stride), ceil(W / stride)].
    Choice: the text says no more than "U-Net". This one first folds 2x2 pixels into channels, which
    saves three quarters of the work. `widths` are the channels at strides 2, 4, 8, 16."""

    def __init__(self, widths=(48, 96, 160, 224), channels=32, stride=2):
        super().__init__()
        self.stride, self.channels, pairs = stride, channels, list(zip(widths, widths[1:]))
        self.multiple = stride * 2 ** len(pairs)
        self.first = nn.Sequential(conv(3 * stride * stride, widths[0]), conv(widths[0], widths[0]))
        self.down = nn.ModuleList(nn.Sequential(conv(a, b), conv(b, b)) for a, b in pairs)
        self.up = nn.ModuleList(conv(a + b, a) for a, b in pairs)
        self.last = conv(widths[0], channels)
        self.to(memory_format=torch.channels_last)             # 7% faster on a CPU

    def forward(self, images):
        h, w = images.shape[-2:]
        x = F.pad(images, (0, -w % self.multiple, 0, -h % self.multiple), mode="replicate")
        x = F.pixel_unshuffle(x, self.stride).contiguous(memory_format=torch.channels_last)
        x, finer = self.first(x), []
        for down in self.down:
            finer.append(x)
            x = down(F.max_pool2d(x, 2))
        for up in reversed(self.up):
            x = up(torch.cat([finer.pop(), F.interpolate(x, scale_factor=2)], 1))
        return self.last(x)[..., :math.ceil(h / self.stride), :math.ceil(w / self.stride)]


def demo(quick=False, full=False, device="cpu", out="figures"):
    """Trains on overlapping cells, prints Table 1 and larger images, draws adaptis.png."""
    print("two masks of four pixels:", example().int().tolist())
    from lab.demo_adaptis import cells
    cells(10 if quick else 3000 if full else 300, device=device, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="train for ten seconds", full="train for fifty minutes")

# Exercises
# 1. Let `corners` use the whole map. Which test fails? What becomes of larger images (demo)?
# 2. In `focal_loss` drop `.detach()`. Which test fails? What makes NFL small now?
# 3. In `segment_instances` take the first of seven answers, not the surest. Which tests fail?
