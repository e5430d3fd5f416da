"""Seamless Scene Segmentation: one network for things and stuff.

In 2018 the winners of the panoptic challenges had two networks, one for things and one for the
category of each pixel: the same edges are learnt twice. The idea is one ResNet with a feature
pyramid, two light branches, and a rule that fuses them:

    image -> ResNet -> FPN, strides 4 8 16 32 (64 128)
                        |-> proposal head -> boxes -> region head -> category, box, mask --.
                        `-> 4 x MiniDL -> concatenate -> 1x1 -> category of each pixel ----+-> fuse

MiniDL ("Mini-DeepLab") is new. DeepLab gives each pixel the mean of the whole image: of a crop in
training, of far more at the test. MiniDL takes the mean of a window of 64x64 features around it.

The paper claims 51.43 M parameters and 0.514 TFLOP at 1024x2048; two networks take 78.06 M and
0.864, for the same PQ: Cityscapes 59.8, IDD 46.9 (two: 47.2). On the toy street, 1000 steps, one
has 71.1, two have 71.5 (lab/two.py). This file has 48,288,147 parameters and 0.555 T multiply-adds;
with stride 64 and MiniDL as released 51,434,387 and 0.489 T (`python -m lab.ledger`).

    python seamless.py [--quick] [--full] [--device D] [--out DIR]      example, costs, a figure
    pytest tests/test_seamless.py                                       the spec of this file

Porzi, Rota Bulò, Colovic, Kontschieder, CVPR 2019. Released code: github.com/mapillary/seamseg.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import models, ops

from data import (IGNORE, Prediction, command_line, decode, encode, new_numbers, pyramid_level,
                  semantic_target, thing_truth)


def example():
    """Section 3.5 on seven pixels, by hand. Categories: 0 road, 1 car (a thing), 2 sky.

    Car A takes both pixels. Half of B is free: B keeps it. A third of C is free: C is dropped. Its
    pixel 3 is a car for the semantic head: void. One pixel of sky is below `stuff_area`: void."""
    masks = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0]])
    segments, categories, _ = fuse(
        masks[:, None].bool(), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1]), stuff_area=2,
        semantic=torch.tensor([[1, 1, 1, 1, 0, 0, 2]]), isthing=torch.arange(3) == 1)
    assert segments.tolist() == [[1, 1, 2, 0, 3, 3, 0]] and categories.tolist() == [1, 1, 0]
    return segments


# --- 3.1 Shared backbone ----------------------------------------------------------------------
# Deviation: batch norm and LeakyReLU, not the paper's in-place iABN, which saves memory only.

leaky = partial(nn.LeakyReLU, 0.01, inplace=True)
conv_norm = partial(ops.Conv2dNormActivation, activation_layer=leaky)   # with batch norm, no bias
resize_logits = partial(F.interpolate, mode="bilinear")        # of (x, size); pixel centres at +.5


def load_resnet(name, weights=None):
    """A ResNet of torchvision, or a thin one of basic blocks for CPUs, `tiny` or `small`."""
    thin = {"tiny": [1, 1, 1, 1], "small": [2, 2, 2, 2]}
    known = [*thin, "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    if name not in known or (name in thin and weights is not None):
        raise ValueError(f"unknown body {name!r}, or no ImageNet weights for it; use one of "
                         f"{', '.join(known)}, the first two with weights=None")
    if name not in thin:
        state = weights if isinstance(weights, dict) else None
        net = models.get_model(name, weights=None if state else weights)
        net.load_state_dict(state or net.state_dict())
        return net
    block = models.resnet.BasicBlock
    net = models.ResNet(block, thin[name])                     # its layers are replaced
    net.conv1, net.bn1, net.inplanes = nn.Conv2d(3, 32, 7, 2, 3, bias=False), nn.BatchNorm2d(32), 32
    for i, n in enumerate(thin[name]):
        setattr(net, f"layer{i + 1}", net._make_layer(block, 32 << i, n, stride=2 if i else 1))
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


class Body(nn.Module):
    """ResNet and FPN: images [B, 3, H, W] in 0..1 -> {stride: [B, width, H / stride, W / stride]},
    sizes rounded up. FPN (Lin et al. 2017) of C_2 to C_5, what conv2 to conv5 give, with norms:
    M_5 = 1x1(C_5), M_k = 1x1(C_k) + enlarge(M_{k+1}), P_k = 3x3(M_k).

    extra: levels beyond stride 32. weights: None, a name of torchvision such as "IMAGENET1K_V1", or
    a state dict. frozen: how many leading stages do not learn (1: stem, 2: conv2 too). frozen_norm:
    no norm of the ResNet learns, nor do its statistics move.
    Choice: recipes have frozen=2 and frozen_norm=True with ImageNet weights; the paper is silent.
    In released code frozen is 2, norms learn, and those of the FPN have a LeakyReLU.
    Deviation: stride 64 is every second pixel of stride 32, "akin to the original FPN". Released
    code computes it from C_5 by a 3x3 convolution with norm: 2048 x 256 x 9 + 512 parameters."""

    def __init__(self, name="resnet50", width=256, extra=0, weights=None, frozen=0,
                 frozen_norm=False):
        super().__init__()
        net = load_resnet(name, weights)
        for m in [m for m in net.modules() if hasattr(m, "relu")]:      # the stem, each block
            m.relu = leaky()
        self.stages = nn.ModuleList([nn.Sequential(net.conv1, net.bn1, net.relu, net.maxpool),
                                     net.layer1, net.layer2, net.layer3, net.layer4])
        c = net.layer2[0].conv1.in_channels
        self.fpn = ops.FeaturePyramidNetwork([c, 2 * c, 4 * c, 8 * c], width, None, nn.BatchNorm2d)
        self.strides, self.channels = [4 << i for i in range(4 + extra)], width
        self.frozen, self.frozen_norm = frozen, frozen_norm
        colours = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])  # of ImageNet
        self.register_buffer("colours", colours.view(2, 3, 1, 1), persistent=False)
        for module in self.fixed():
            module.requires_grad_(False)

    def fixed(self):
        norms = [m for m in self.stages.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return [*self.stages[:self.frozen], *(norms if self.frozen_norm else [])]

    def forward(self, images):
        for module in self.fixed():
            module.eval()                                      # statistics do not move either
        x, maps = self.stages[0]((images - self.colours[0]) / self.colours[1]), {}
        for i, stage in enumerate(self.stages[1:]):
            x = maps[str(i)] = stage(x)
        levels = list(self.fpn(maps).values())
        while len(levels) < len(self.strides):
            levels.append(F.max_pool2d(levels[-1], 1, 2))      # a window of one pixel, stride 2
        return dict(zip(self.strides, levels))


resnet_fpn = Body

# --- 3.2 Instance segmentation branch: Mask R-CNN, with changes -------------------------------

def sample(boxes, target, isthing, *, high, low, count, share, rescue=False):
    """Mask R-CNN's choice of boxes [N, 4] to learn from: `count` at random, at most a `share` of
    them positive -> indices of positives [P] and negatives; of each positive's thing the number of
    the segment [P], box and truncated sides [P, 4], category [P]. Positive: the best IoU with a
    thing is at least `high`, or, with `rescue`, the best for some thing. Negative: below `low`.
    Choice: no negative is more than 0.7 void or crowd. Released code has this share for crowds."""
    truth, void = thing_truth(target, isthing), semantic_target(target) == IGNORE
    iou = ops.box_iou(F.pad(truth[1], (0, 0, 0, 1)), boxes)    # [G + 1, N], the last row is 0
    best, index = iou.max(0)
    positive = best >= high
    if rescue and len(boxes):
        positive |= ((iou == iou.amax(1, keepdim=True)) & (iou > 0)).any(0)
    table = F.pad(void.float().cumsum(0).cumsum(1), (1, 0, 1, 0))   # sums above and to the left
    x1, x2 = (boxes[:, i].round().long().clamp(0, void.shape[1]) for i in (0, 2))
    y1, y2 = (boxes[:, i].round().long().clamp(0, void.shape[0]) for i in (1, 3))
    empty = table[y2, x2] - table[y1, x2] - table[y2, x1] + table[y1, x1]       # void pixels
    negative = ~positive & (best < low) & (empty <= 0.7 * ((x2 - x1) * (y2 - y1)))

    def draw(mask, n):
        at = torch.where(mask)[0]
        return at if len(at) <= n else at[torch.randperm(len(at), device=at.device)[:n]]
    positive = draw(positive, int(count * share))
    return positive, draw(negative, count - len(positive)), [t[index[positive]] for t in truth]


def smooth_l1_box_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """The box loss of Mask R-CNN -> [N]: the sum over the four deltas of z^2 / (2 beta) if |z| <=
    beta, else |z| - beta / 2. The last two arguments are for losses that know about crops."""
    return F.smooth_l1_loss(deltas, encode(gt_boxes, anchors), beta=beta, reduction="none").sum(1)


class RegionProposalHead(nn.Module):
    """RPH: 3x3 convolution of stride 2, norm, 1x1 with (o_u, o_v, o_w, o_h, o_s) for each anchor,
    shared by all levels. Only anchors entirely inside of the image exist. isthing bool [C].
    Choice: all levels pass through the norm together: training and test use one set of statistics.
    Released code normalises each level by itself, and its 3x3 convolution has stride 1."""
    samples, nms_threshold = 256, 0.7                          # of Mask R-CNN

    def __init__(self, isthing, body, anchor_scale=8, ratios=(0.5, 1, 2), positive=0.7,
                 proposals=1000, box_loss=smooth_l1_box_loss):
        super().__init__()
        self.strides, self.anchor_scale, self.ratios = body.strides, anchor_scale, ratios
        self.positive, self.proposals, c = positive, proposals, body.channels
        self.register_buffer("isthing", isthing, persistent=False)
        self.conv, self.norm = nn.Conv2d(c, c, 3, 2, 1, bias=False), nn.BatchNorm2d(c)
        self.box_loss, self.act, self.out = box_loss, leaky(), nn.Conv2d(c, 5 * len(ratios), 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def anchors(self, h, w, stride):
        """Of an output of h x w cells, by rows: [h * w * R, 4], area size^2, ratio height / width.
        Cell (i, j) sees the features around (2i, 2j), with centre ((2j + .5) stride, ...)."""
        r, size = torch.tensor(self.ratios).sqrt(), self.anchor_scale * stride
        half = torch.stack([size / r, size * r], 1) / 2                         # [R, 2]
        y, x = ((self.conv.stride[0] * torch.arange(n) + 0.5) * stride for n in (h, w))
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]
        return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)

    def forward(self, features, size):
        """-> scores (logits) [B, A], deltas [B, A, 4], anchors [A, 4] and their levels [A]."""
        maps = [self.conv(features[s]) for s in self.strides]
        x = torch.cat([m.flatten(2) for m in maps], 2)[..., None]               # [B, c, sum hw, 1]
        x = self.out(self.act(self.norm(x)))[..., 0].float()                    # [B, 5 R, sum hw]
        x = x.view(len(x), len(self.ratios), 5, -1).permute(0, 3, 1, 2).flatten(1, 2)
        anchors = [self.anchors(*m.shape[2:], stride=s) for m, s in zip(maps, self.strides)]
        level = torch.cat([torch.full_like(a[:, 0], i) for i, a in enumerate(anchors)]).to(x.device)
        anchors, (h, w) = torch.cat(anchors).to(x.device), size
        inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= w) & (anchors[:, 3] <= h)
        return x[:, inside, 4], x[:, inside, :4], anchors[inside], level[inside]

    @torch.no_grad()
    def propose(self, guesses, size):
        """What `forward` returned -> the best `proposals` boxes [P, 4] of each image, twice as many
        in training, by NMS in each level. Six times as many anchors enter, the best of all."""
        (scores, deltas, anchors, level), found = guesses, []
        after = self.proposals * (2 if self.training else 1)
        for s, d in zip(scores, deltas):
            best = s.topk(min(6 * after, len(s))).indices
            boxes = ops.clip_boxes_to_image(decode(d[best], anchors[best]), size)
            large = ops.remove_small_boxes(boxes, 1)
            boxes, best = boxes[large], best[large]
            keep = ops.batched_nms(boxes, s[best], level[best], self.nms_threshold)
            found.append(boxes[keep[:after]])
        return found

    def losses(self, guesses, targets, size):
        """Mask R-CNN's: cross entropy of the scores of 256 anchors an image, box loss of positives.
        Choice: a mean over positives for boxes. Divided by 256, as released, they learn slowly."""
        (scores, deltas, anchors, _), score, box, count = guesses, 0, 0, 0
        for s, d, target in zip(scores, deltas, targets):
            yes, no, (_, gt, cut, _) = sample(anchors, target, self.isthing, low=0.3, rescue=True,
                                              high=self.positive, count=self.samples, share=0.5)
            score = score + F.softplus(-s[yes]).sum() + F.softplus(s[no]).sum()
            one = self.box_loss(d[yes], gt, anchors[yes], beta=1 / 9, crop_size=size, truncated=cut)
            box, count = box + one.sum(), count + len(yes)
        return {"rph_score": score / (self.samples * len(targets)), "rph_box": box / max(count, 1)}


class GroupNorm(nn.GroupNorm):
    """32 groups, or fewer of at least four channels. In float32: a CPU's bf16 kernel is slow."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, max(channels // 4, 1), channels), channels)

    def forward(self, x):
        return super().forward(x.float())


class RegionSegmentationHead(nn.Module):
    """RSH: 14x14 RoIAlign, then two branches: void or a thing category with a box for each, and a
    28x28 mask for each. isthing bool [C]; mask_loss of logits and 0/1 truth [P, 28, 28] -> scalar.
    Deviation: the first layer takes 7x7 means, as in released code: 38.5 M weights less than of all
    14x14 features. Released code has batch norm where the paper and this file have group norm."""
    nms_threshold, detections = 0.5, 100                       # of Mask R-CNN

    def __init__(self, isthing, body, canonical=224, rois=512, box_loss=smooth_l1_box_loss,
                 mask_loss=F.binary_cross_entropy_with_logits):
        super().__init__()
        self.strides, self.canonical, self.rois = body.strides[:4], canonical, rois
        self.box_loss, self.mask_loss = box_loss, mask_loss
        self.register_buffer("isthing", isthing, persistent=False)
        self.register_buffer("number", new_numbers(isthing)[1:], persistent=False)  # 1.. of things
        c, d, self.things = body.channels, 4 * body.channels, int(isthing.sum())
        self.fc = nn.Sequential(nn.AdaptiveAvgPool2d(7), nn.Flatten(),
                                nn.Linear(49 * c, d, bias=False), GroupNorm(d), leaky(),
                                nn.Linear(d, d, bias=False), GroupNorm(d), leaky())
        self.out = nn.Linear(d, 5 * self.things + 1)           # scores with void, deltas
        self.mask = nn.Sequential(*(conv_norm(c, c, 3, norm_layer=GroupNorm) for _ in range(4)),
                                  nn.ConvTranspose2d(c, c, 2, stride=2, bias=False), GroupNorm(c),
                                  leaky(), nn.Conv2d(c, self.things, 1))
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def pool(self, features, boxes, size=14):
        """RoIAlign on the level of `pyramid_level`: a list of [P_b, 4] -> [sum P, c, size, size].
        14x14 samples, as released; 7: means of 2x2. In float32: bf16 blurs coordinates."""
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # image, box
        level = pyramid_level(rois[:, 1:], len(self.strides), self.canonical)
        pooled = rois.new_zeros(len(rois), features[4].shape[1], size, size)
        for k, stride in enumerate(self.strides, 1):
            at = torch.where(level == k)[0]
            pooled[at] = ops.roi_align(features[stride].float(), rois[at], size, 1 / stride,
                                       sampling_ratio=14 // size, aligned=True)
        return pooled

    def classify(self, pooled):
        """-> logits [P, 1 + n] of void and n things, deltas [P, n, 4], scaled as in Mask R-CNN."""
        logits, deltas = self.out(self.fc(pooled)).float().tensor_split([self.things + 1], 1)
        return logits, deltas.unflatten(1, (-1, 4)) / deltas.new_tensor([10, 10, 5, 5])

    def losses(self, features, proposals, targets, size):
        """Mask R-CNN's, of 512 proposals an image, true boxes among them: cross entropy over void
        and things; box loss and mask loss of positives for their true category.
        Choice: one beta for all deltas, so that any box loss fits. 10 l_0.1(z) is Mask R-CNN's
        l_1(10 z) for centres. For sizes it has l_1(5 z): ours weigh 2 to 4 times as much."""
        rows = []
        for boxes, target in zip(proposals, targets):
            boxes = torch.cat([boxes, thing_truth(target, self.isthing)[1]])
            yes, no, (number, *truth) = sample(boxes, target, self.isthing, high=0.5, low=0.5,
                                               count=self.rois, share=0.25)
            shapes = mask_targets(target.segments, number, boxes[yes])
            rows.append((boxes[yes], boxes[no], *truth, shapes))
        yes, no, *truth = zip(*rows)
        gt, cut, categories, shapes = map(torch.cat, truth)
        pooled = self.pool(features, yes)                      # negatives need no masks: 7x7
        (logits, deltas), (others, _) = map(self.classify, (pooled, self.pool(features, no, 7)))
        boxes, logits, p = torch.cat(yes), torch.cat([logits, others]), len(gt)
        labels, n = F.pad(self.number[categories], (0, len(others))), max(len(logits), 1)  # 0: void
        true = torch.arange(p, device=gt.device), labels[:p] - 1   # category of each positive
        box = self.box_loss(deltas[true], gt, boxes, beta=0.1, crop_size=size, truncated=cut)
        masks = self.mask(pooled).float()[true]
        return {"rsh_class": F.cross_entropy(logits, labels, reduction="sum") / n,
                "rsh_box": 10 * box.sum() / n,
                "rsh_mask": self.mask_loss(masks, shapes) if p else masks.sum()}

    def detect(self, features, proposals, size, score_threshold=0.05):
        """3.5 up to the masks: proposals [P_b, 4] of each image -> a dictionary an image, of boxes
        [D, 4], scores [D] with gradient, categories [D], masks [D, 28, 28] (logits), best first. A
        higher threshold only removes detections: a box is suppressed by boxes of higher score."""
        counts, found = [len(p) for p in proposals], []
        logits, deltas = self.classify(self.pool(features, proposals, 7))
        for p, s, d in zip(proposals, logits.softmax(1).split(counts), deltas.split(counts)):
            row, thing = torch.where(s[:, 1:].detach() > score_threshold)
            boxes = ops.clip_boxes_to_image(decode(d[row, thing].detach(), p[row]), size)
            score, keep = s[row, thing + 1], ops.remove_small_boxes(boxes, 1e-6)
            best = ops.batched_nms(boxes[keep], score[keep], thing[keep], self.nms_threshold)
            keep = keep[best[:self.detections]]
            found.append({"boxes": boxes[keep], "scores": score[keep],
                          "categories": torch.where(self.isthing)[0][thing[keep]]})
        return self.add_masks(features, found)

    def add_masks(self, features, found):
        """Boxes with categories, a dictionary an image -> the same with their `masks`."""
        boxes, categories = ([f[key] for f in found] for key in ("boxes", "categories"))
        things = self.number[torch.cat(categories)] - 1
        masks = self.mask(self.pool(features, boxes))[torch.arange(len(things)), things].float()
        return [{**f, "masks": m} for f, m in zip(found, masks.split([len(b) for b in boxes]))]


def mask_targets(segments, number, boxes, size=28):
    """Is the centre of each cell of box p in segment number[p] of a map [H, W]? 0/1 [P, 28, 28]."""
    cell = (torch.arange(size, device=boxes.device) + 0.5) / size
    x, y = (boxes[:, :2, None] + cell * (boxes[:, 2:] - boxes[:, :2])[:, :, None]).long().unbind(1)
    x, y = x.clamp(0, segments.shape[1] - 1), y.clamp(0, segments.shape[0] - 1)     # [P, size]
    return (segments[y[:, :, None], x[:, None]] == number[:, None, None]).float()


# --- 3.3, 3.4 Semantic segmentation branch and its loss ---------------------------------------

def window_mean(x, window):
    """Mean over a window around each pixel of x [B, C, H, W]; over all of a smaller map. Plain, of
    others: F.pad(F.avg_pool2d(x, window, 1), [(window - 1) // 2, window // 2] * 2, "replicate").
    Faster: the sum of a window is a difference of two running sums, once along each axis."""
    dtype, x = x.dtype, x.float()                              # bf16 has too few digits for a sum
    for axis in (2, 3):
        size, k = x.shape[axis], min(window, x.shape[axis])
        total, n = F.pad(x.cumsum(axis), (0, 0, 1, 0) if axis == 2 else (1, 0)), size - k + 1
        x = (total.narrow(axis, k, n) - total.narrow(axis, 0, n)) / k
        middle = torch.arange(size, device=x.device) - (k - 1) // 2
        x = x.index_select(axis, middle.clamp(0, n - 1))       # replicates the border
    return x.to(dtype)


class MiniDL(nn.Module):
    """Figure 2, [B, c_in, h, w] -> [B, channels, h, w]: three branches, concatenated, a 3x3 (1x1 in
    released code). From 256x384 on it changes fewer toy labels; no gain in mIoU is seen."""

    def __init__(self, c_in, channels=128, window=64):
        super().__init__()
        self.window = window
        self.near, self.far = conv_norm(c_in, channels, 3), conv_norm(c_in, channels, 3, dilation=6)
        self.context, self.out = conv_norm(c_in, channels, 1), conv_norm(3 * channels, channels, 3)

    def forward(self, x):
        context = self.context(window_mean(x, self.window))    # near: 3x3; far: with dilation 6
        return self.out(torch.cat([self.near(x), self.far(x), context], 1))


class SemanticHead(nn.Module):
    """Four MiniDL, one for each of the strides 4 to 32, enlarged to stride 4, concatenated, 1x1:
    features -> logits [B, categories, H / 4, W / 4]. Deviation: the 1x1 has no norm (released)."""

    def __init__(self, c_in, categories, channels=128, window=64):
        super().__init__()
        self.heads = nn.ModuleList(MiniDL(c_in, channels, window) for _ in range(4))
        self.out = nn.Conv2d(4 * channels, categories, 1)

    def forward(self, features):
        first, *rest = (head(features[s]) for head, s in zip(self.heads, (4, 8, 16, 32)))
        return self.out(torch.cat([first, *(resize_logits(m, first.shape[2:]) for m in rest)], 1))


def hardest_pixels_loss(logits, target, fraction=0.25):
    """L_ss = - sum_ij omega_ij log P_ij(Y_ij), mean over images. omega = tau = 4 / (W H) for the
    quarter of the pixels of lowest P(Y), else 0. logits [B, C, H, W], target [B, H, W]. All void: 0
    with gradients. Choice: W H counts known pixels; released code counts void too, with loss 0."""
    loss, total = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none"), 0
    for pixels, known in zip(loss.flatten(1), (target != IGNORE).flatten(1).sum(1).tolist()):
        k = math.ceil(fraction * known)                        # k = W H / 4, so tau = 1 / k
        total = total + pixels.topk(k, sorted=False).values.sum() / max(k, 1)
    return total / len(loss)


# --- 3.5 Testing and panoptic fusion ----------------------------------------------------------

def at_size(found, old, new):
    """Detections at image size `old` -> at size `new`, masks bool [D, H, W]: logit above 0, by
    bilinear interpolation. This is RoIAlign of the mask with a cell for each pixel."""
    end = found["boxes"].new_tensor([new[1], new[0]] * 2)
    boxes = found["boxes"] * (end / end.new_tensor([old[1], old[0]] * 2))
    pixels = (boxes - 0.5).ceil().clamp(min=0).minimum(end)    # first, and one after the last
    corner, sides = boxes[:, :2].repeat(1, 2), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)
    rois = (pixels - corner) / sides.clamp(min=1e-6) * found["masks"].shape[-1]
    masks = torch.zeros(len(boxes), *new, dtype=torch.bool, device=boxes.device)
    for i, (x1, y1, x2, y2) in enumerate(pixels.int().tolist()):
        value = ops.roi_align(found["masks"][i, None, None].float(), [rois[i, None]],
                              (y2 - y1, x2 - x1), sampling_ratio=1, aligned=True)
        masks[i, y1:y2, x1:x2] = value[0, 0] > 0
    return {**found, "boxes": boxes, "masks": masks}


def fuse(masks, scores, categories, semantic, isthing, score_threshold=0.5, overlap=0.5,
         stuff_area=4096):
    """masks bool [D, H, W], scores [D], categories [D], semantic int64 [H, W] (the likeliest
    category), isthing [C] -> segments int64 [H, W], categories [N], scores [N] (1 for stuff).

    1. Instances of a score of at least 0.5 (Choice: as released code; the paper has none), best
       first, take their free pixels if at least half of the mask is free.
    2. What remains takes the semantic category if it is stuff, and is void if it is a thing.
    3. A stuff category of fewer than `stuff_area` pixels in all becomes void."""
    segments, kept = torch.zeros_like(semantic), []
    order = scores.argsort(descending=True, stable=True)
    for i in order[scores[order] >= score_threshold].tolist():
        free, area = masks[i] & (segments == 0), masks[i].sum()
        if area > 0 and free.sum() >= overlap * area:
            kept.append((categories[i], scores[i]))
            segments[free] = len(kept)
    for c in torch.where(~isthing)[0]:
        free = (semantic == c) & (segments == 0)
        if free.sum() >= max(stuff_area, 1):
            kept.append((c, scores.new_ones(())))
            segments[free] = len(kept)
    return segments, *([torch.stack(v) for v in zip(*kept)] or [categories[:0], scores[:0]])


class Seamless(nn.Module):
    """Figure 1, right. isthing bool [C]; body from `resnet_fpn`: its width sets those of the heads.
    canonical: the size in pixels of an object for stride 16. positive: the least IoU of a positive
    anchor. rois, proposals: of the region head in training, at test time. window: of MiniDL."""

    def __init__(self, isthing, body, box_loss=smooth_l1_box_loss, canonical=224, anchor_scale=8,
                 ratios=(0.5, 1, 2), positive=0.7, rois=512, proposals=1000, window=64,
                 score_threshold=0.5, stuff_area=4096, semantic_loss=hardest_pixels_loss,
                 mask_loss=F.binary_cross_entropy_with_logits):
        super().__init__()
        isthing = torch.as_tensor(isthing, dtype=torch.bool)
        if not isthing.any():
            raise ValueError("no category is a thing: use the body and SemanticHead alone")
        self.register_buffer("isthing", isthing, persistent=False)
        self.body, self.semantic_loss = body, semantic_loss
        self.score_threshold, self.stuff_area = score_threshold, stuff_area
        self.proposal_head = RegionProposalHead(isthing, body, anchor_scale, ratios=ratios,
                                                positive=positive, proposals=proposals,
                                                box_loss=box_loss)
        self.region_head = RegionSegmentationHead(isthing, body, canonical, rois=rois,
                                                  box_loss=box_loss, mask_loss=mask_loss)
        self.semantic_head = SemanticHead(body.channels, len(isthing), body.channels // 2, window)

    def losses(self, images, targets):
        """images [B, 3, H, W], a Target each -> six losses of both branches: train on their sum."""
        features, size = self.body(images), images.shape[-2:]
        return {**self.detection_losses(features, targets, size)[0],
                **self.semantic_losses(self.semantic_head(features), targets, size)}

    def detection_losses(self, features, targets, size):
        """-> the losses of both heads of the instance branch, and the proposals of each image."""
        guesses = self.proposal_head(features, size)
        proposals = self.proposal_head.propose(guesses, size)
        return {**self.proposal_head.losses(guesses, targets, size),
                **self.region_head.losses(features, proposals, targets, size=size)}, proposals

    def semantic_losses(self, logits, targets, size):
        """Of the semantic logits [B, C, h, w]."""
        truth = torch.stack([semantic_target(t) for t in targets])
        return {"semantic": self.semantic_loss(resize_logits(logits.float(), size), truth)}

    def detect(self, features, size):
        """What `RegionSegmentationHead.detect` finds in images of this size."""
        proposals = self.proposal_head.propose(self.proposal_head(features, size), size)
        return self.region_head.detect(features, proposals, size)

    @torch.no_grad()
    def predict(self, image, size=None):
        """After eval(): image [3, H, W] in 0..1 -> Prediction at `size`, the image's own if None.
        Choice: `stuff_area` is for 1024x2048 pixels and grows with the area of the image."""
        features, old = self.body(image[None]), image.shape[-2:]
        size = size or old
        found = at_size(self.detect(features, old)[0], old, size)
        semantic = resize_logits(self.semantic_head(features).float(), size)[0].argmax(0)
        fused = fuse(found["masks"], found["scores"], found["categories"], semantic=semantic,
                     isthing=self.isthing, score_threshold=self.score_threshold,
                     stuff_area=self.stuff_area * size[0] * size[1] / (1024 * 2048))
        return Prediction(*fused, found)

    def stages(self, fit):
        """One stage of SGD with Nesterov momentum, as in released code, or of AdamW (fit["adam"]).
        With fit["decay_norms"] norms decay; in Table 1, last row, not. Choice: and biases."""
        learn = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in learn if p.ndim > 1], "weight_decay": fit["decay"]},
                  {"params": [p for p in learn if p.ndim < 2],
                   "weight_decay": fit["decay"] if fit["decay_norms"] else 0.0}]
        if fit.get("adam"):
            return [("all", torch.optim.AdamW(groups, fit["lr"], fused=True), fit["steps"])]
        return [("all", torch.optim.SGD(groups, fit["lr"], 0.9, nesterov=True), fit["steps"])]


def demo(quick=False, full=False, device="cpu", out="figures"):
    """The ledger; then MiniDL and global pooling learn from crops and meet ever larger images."""
    print("segments of seven pixels:", example()[0].tolist())
    from lab.demo_seamless import show
    steps, tests = (10, 4) if quick else (1500, 200) if full else (260, 60)
    show(steps, tests, device=device, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="ten steps, four scenes", full="1500 steps, 200 scenes")

# Exercises
# 1. Make `inside` all True. Which test fails? What happens to the boxes of things that a crop cut?
# 2. Set fraction=1.0 in `hardest_pixels_loss`. Does the PQ of large or of small categories fall?
# 3. Let `fuse` take the lowest score first. Predict the PQ of persons in front of cars.
