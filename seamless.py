"""Seamless Scene Segmentation: one network for things and stuff.

The panoptic challenges of 2018 were won by two networks: one detects things, the other gives each
pixel a category. Both learn the same edges and textures. Parameters and computation are paid twice.
The idea is one ResNet with a feature pyramid, two light branches, and a rule that fuses them:

    image -> ResNet -> FPN, strides 4 8 16 32 (64 128)
                        |-> proposal head -> boxes -> region head -> category, box, mask --.
                        `-> 4 x MiniDL -> concatenate -> 1x1 -> category of each pixel ----+-> fuse

MiniDL ("Mini-DeepLab") is the new part. DeepLab gives each pixel the mean of the whole image, which
changes with the size of the image. MiniDL takes the mean of a window of 64x64 features around it:

               .-> 3x3 ---------------------.
    features --+-> 3x3, dilation 6 ---------+-> concatenate -> 3x3
               `-> mean of a window -> 1x1 -'

The paper claims 51.43 M parameters and 0.514 T multiply-adds at 1024x2048, where two networks take
78.06 M and 0.864 T. PQ is 59.8 on Cityscapes and 46.9 on IDD (two networks: 59.8 and 47.2), 36.2 on
Vistas. With the layers of the released code, see `Body` and `MiniDL`, this file has as many:
48,288,147 + 4,719,104 - 1,572,864 = 51,434,387.

    python seamless.py [--quick] [--full] [--device D] [--out DIR]
                                  the example, costs of each part, MiniDL on ever larger images
    pytest tests/test_seamless.py the spec of this file

Porzi, Rota Bulo, Colovic, Kontschieder, CVPR 2019. Released code: github.com/mapillary/seamseg.
"""
import math
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import (FeaturePyramidNetwork, batched_nms, box_iou, clip_boxes_to_image,
                             roi_align)

from data import (IGNORE, Prediction, command_line, decode, encode, new_numbers, pyramid_level,
                  semantic_target, thing_truth)


def example():
    """Section 3.5 on ten pixels, by hand. Categories: 0 road, 1 car (a thing), 2 sky.

    Car A takes four pixels. Half of car B is free: it keeps its two free pixels. A third of car C
    is free: it is dropped. Pixel 2 is void, as only the semantic head sees a car there. So is the
    sky: one pixel is less than `stuff_area`."""
    masks = torch.zeros(3, 1, 10, dtype=torch.bool)
    masks[0, 0, 3:7] = masks[1, 0, 5:9] = masks[2, 0, 2:5] = True              # A, B, C
    scores, cars = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1])
    semantic = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 2]])
    for rule in (plain_fuse, fuse):
        segments, categories, _ = rule(masks, scores, cars, semantic=semantic, stuff_area=2,
                                       isthing=torch.tensor([False, True, False]))
        assert segments.tolist() == [[3, 3, 0, 1, 1, 1, 1, 2, 2, 0]]
        assert categories.tolist() == [1, 1, 0]
    return segments


# --- 3.1 Shared backbone ----------------------------------------------------------------------
# Deviation: the paper's in-place norm (iABN) recomputes what a plain norm stores. Plain batch norm
# and LeakyReLU(0.01) compute the same numbers in more memory. On several GPUs
# `nn.SyncBatchNorm.convert_sync_batchnorm` makes the norms share their statistics.

leaky = partial(nn.LeakyReLU, 0.01, inplace=True)


def conv_norm(c_in, c_out, kernel, dilation=1):
    """The paper's "convolution": followed by batch norm and LeakyReLU. Keeps height and width."""
    conv = nn.Conv2d(c_in, c_out, kernel, padding=dilation * (kernel // 2), dilation=dilation,
                     bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), leaky())


def norms_of(module):
    """All batch norms inside of a module, synchronised ones too."""
    return [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


class Body(nn.Module):
    """ResNet and pyramid: images [B, 3, H, W] in 0..1 -> {stride: [B, width, H / stride, W /
    stride]}, sizes rounded up. Arguments: see `resnet_fpn`.

    FPN (Lin et al. 2017) of the ResNet's outputs C_2 to C_5, with a norm after each convolution:
    M_5 = 1x1(C_5), M_k = 1x1(C_k) + enlarge(M_{k+1}), P_k = 3x3(M_k).
    Deviation: released code has LeakyReLU after these norms; the paper does not say.
    Deviation: stride 64 is every second pixel of stride 32, "akin to the original FPN". Released
    code computes it from C_5 by a 3x3 convolution with norm: 2048 x 256 x 9 + 512 parameters."""

    def __init__(self, resnet, width, extra, frozen, frozen_norm):
        super().__init__()
        for m in resnet.modules():                             # the stem and each block have one
            if isinstance(getattr(m, "relu", None), nn.ReLU):
                m.relu = leaky()
        stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([stem, resnet.layer1, resnet.layer2, resnet.layer3,
                                     resnet.layer4])
        c_in = [norms_of(stage)[-1].num_features for stage in self.stages[1:]]
        self.fpn = FeaturePyramidNetwork(c_in, width, norm_layer=nn.BatchNorm2d)
        self.strides, self.channels = [4 << i for i in range(4 + extra)], width
        self.frozen, self.frozen_norm = frozen, frozen_norm
        for name, value in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)
        for module in self.fixed():
            module.requires_grad_(False)

    def fixed(self):
        """The modules that do not learn."""
        return [*self.stages[:self.frozen], *(norms_of(self.stages) if self.frozen_norm else [])]

    def train(self, mode=True):
        super().train(mode)
        for module in self.fixed():
            module.eval()                                      # statistics do not move either
        return self

    def forward(self, images):
        x = self.stages[0]((images - self.mean) / self.std)    # ImageNet's colours
        maps = {}
        for i, stage in enumerate(self.stages[1:]):
            x = maps[str(i)] = stage(x)
        levels = list(self.fpn(maps).values())
        while len(levels) < len(self.strides):
            levels.append(F.max_pool2d(levels[-1], 1, 2))      # a window of one pixel, stride 2
        return dict(zip(self.strides, levels))


def thin_resnet(width, blocks):
    """A ResNet of basic blocks with `width` channels in its first stage instead of 64."""
    block = torchvision.models.resnet.BasicBlock
    net = torchvision.models.ResNet(block, list(blocks))       # all its layers are replaced
    net.conv1, net.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    net.inplanes = width
    for i, n in enumerate(blocks):
        layer = net._make_layer(block, width << i, n, stride=1 if i == 0 else 2)
        setattr(net, f"layer{i + 1}", layer)
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
    return net


def resnet_fpn(name="resnet50", width=256, extra=0, weights=None, frozen=0, frozen_norm=False):
    """The body of section 3.1. name: tiny or small (thin, for CPUs), or a ResNet of torchvision.
    extra: levels beyond stride 32; 0 to 2 "depending on the dataset". weights: None, an entry of
    torchvision such as "IMAGENET1K_V1", or a state dict. frozen: how many leading stages do not
    learn (1: stem, 2: conv2 too). frozen_norm: no norm of the ResNet learns, and its statistics
    stay as they are, so that GPUs have none to synchronise there. ValueError for other names.

    Choice: recipes with ImageNet weights have frozen=2, frozen_norm=True. The paper freezes, but
    does not say what; released settings have frozen=2, and their norms learn."""
    thin = {"tiny": (32, (1, 1, 1, 1)), "small": (32, (2, 2, 2, 2))}
    if name in thin:
        if weights is not None:
            raise ValueError(f"the thin body {name!r} has no ImageNet weights; use weights=None or "
                             "a torchvision ResNet")
        net = thin_resnet(*thin[name])
    elif name.startswith("resnet") and name in torchvision.models.list_models():
        state = weights if isinstance(weights, dict) else None
        net = torchvision.models.get_model(name, weights=None if state else weights)
        if state:
            net.load_state_dict(state)
    else:
        raise ValueError(f"unknown body {name!r}; use tiny, small, resnet18, resnet34, resnet50 or "
                         "resnet101")
    return Body(net, width, extra, frozen=frozen, frozen_norm=frozen_norm)


# --- 3.2 Instance segmentation branch: boxes to learn from ------------------------------------

def make_anchors(feature_size, stride, size, ratios, device=None):
    """Anchors of one level in pixels, [h * w * R, 4]: area size^2, ratio height / width, by rows.

    The 3x3 convolution has stride 2 and padding 1. Its output cell (i, j) sees the features around
    (2i, 2j), whose centre is ((2j + .5) stride, (2i + .5) stride). Anchors are centred there."""
    y, x = ((2 * torch.arange(n, device=device) + 0.5) * stride for n in feature_size)
    r = torch.tensor(ratios, device=device).sqrt()
    half = torch.stack([size / r, size * r], 1) / 2                             # [R, 2]
    centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)[:, :, None]   # [h, w, 1, 2]
    return torch.cat([centre - half, centre + half], -1).reshape(-1, 4)


def void_fraction(boxes, void):
    """The share of each box [N, 4] that is void, bool [H, W] -> [N], by a table of the sums over
    all pixels above and to the left."""
    table = F.pad(void.float().cumsum(0).cumsum(1), (1, 0, 1, 0))               # [H + 1, W + 1]
    x1, x2 = (boxes[:, i].round().long().clamp(0, void.shape[1]) for i in (0, 2))
    y1, y2 = (boxes[:, i].round().long().clamp(0, void.shape[0]) for i in (1, 3))
    total = table[y2, x2] - table[y1, x2] - table[y2, x1] + table[y1, x1]
    return total / ((x2 - x1) * (y2 - y1)).clamp(min=1)


def match(boxes, gt_boxes, high, low, rescue=False):
    """The true box of highest IoU for each of N boxes: index [N] and label [N]. The label is 1 from
    an IoU of `high` on, 0 below `low`, else IGNORE. `rescue`: the best boxes of each object have
    label 1, however low their IoU."""
    if len(gt_boxes) == 0:
        zeros = torch.zeros(len(boxes), dtype=torch.long, device=boxes.device)
        return zeros, zeros.clone()
    iou = box_iou(gt_boxes, boxes)                                              # [G, N]
    best, index = iou.max(0)
    label = torch.where(best >= high, 1, torch.where(best < low, 0, IGNORE))
    if rescue and len(boxes):
        top = iou.amax(1, keepdim=True)
        label[((iou == top) & (top > 0)).any(0)] = 1
    return index, label


def draw(label, count, share):
    """Draws `count` boxes of label 1 or 0, at most a `share` of label 1 -> the indices of both."""
    def some(index, n):
        return index[torch.randperm(len(index), device=index.device)[:n]] if len(index) > n else index
    positive = some(torch.where(label == 1)[0], int(count * share))
    return positive, some(torch.where(label == 0)[0], count - len(positive))


def sample(boxes, target, isthing, *, high, low, count, share, rescue=False):
    """What is learnt from which of N boxes: their true things by `match`, `count` of them by `draw`
    -> indices of positives [P] and negatives, and the truth of positives: number of the segment
    [P], box and truncated sides [P, 4], category [P].

    Choice: no negative is more than 0.7 void or crowd. Released code has this share for crowds."""
    truth = thing_truth(target, isthing)
    index, label = match(boxes, truth[1], high, low=low, rescue=rescue)
    void = semantic_target(target) == IGNORE
    label[(label == 0) & (void_fraction(boxes, void) > 0.7)] = IGNORE
    positive, negative = draw(label, count, share)
    return positive, negative, [t[index[positive]] for t in truth]


def smooth_l1_box_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """The box loss of Mask R-CNN -> [N]: the sum over the four deltas of z^2 / (2 beta) if |z| <=
    beta, else |z| - beta / 2. The last two arguments are for losses that know about crops."""
    truth = encode(gt_boxes, anchors)
    return F.smooth_l1_loss(deltas, truth, beta=beta, reduction="none").sum(1)


# --- 3.2 Region proposal head -----------------------------------------------------------------

class RegionProposalHead(nn.Module):
    """RPH: 3x3 convolution of stride 2, norm, 1x1 with (o_u, o_v, o_w, o_h, o_s) for each anchor.
    All levels share it. Only anchors entirely inside of the image exist. isthing bool [C].

    Choice: all levels pass through the norm together, so that training and test see one statistic.
    Released code normalises each level by itself, and its 3x3 convolution has stride 1."""
    samples, nms_threshold = 256, 0.7                          # of Mask R-CNN

    def __init__(self, isthing, channels, strides, anchor_scale=8, ratios=(0.5, 1, 2),
                 proposals=1000, box_loss=smooth_l1_box_loss):
        super().__init__()
        self.strides, self.anchor_scale, self.ratios = list(strides), anchor_scale, tuple(ratios)
        self.proposals, self.box_loss = proposals, box_loss
        self.register_buffer("isthing", isthing, persistent=False)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1, bias=False)
        self.norm, self.act = nn.BatchNorm2d(channels), leaky()
        self.out = nn.Conv2d(channels, 5 * len(ratios), 1)
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def forward(self, features, image_size):
        """-> scores (logits) [B, A], deltas [B, A, 4], anchors [A, 4] and their levels [A]."""
        maps = [self.conv(features[s]) for s in self.strides]
        x = torch.cat([m.flatten(2) for m in maps], 2)[..., None]               # [B, c, sum hw, 1]
        x = self.out(self.act(self.norm(x)))[..., 0].float()                    # [B, 5 R, sum hw]
        x = x.view(len(x), len(self.ratios), 5, -1).permute(0, 3, 1, 2).flatten(1, 2)
        anchors = [make_anchors(m.shape[-2:], s, self.anchor_scale * s, ratios=self.ratios,
                                device=x.device) for m, s in zip(maps, self.strides)]
        level = torch.cat([torch.full_like(a[:, 0], i) for i, a in enumerate(anchors)])
        anchors, (h, w) = torch.cat(anchors), image_size
        inside = (anchors[:, :2] >= 0).all(1) & (anchors[:, 2] <= w) & (anchors[:, 3] <= h)
        return x[:, inside, 4], x[:, inside, :4], anchors[inside], level[inside]

    @torch.no_grad()
    def propose(self, scores, deltas, anchors, level, image_size):
        """One image: scores [A], deltas [A, 4] -> the best `proposals` boxes [P, 4], twice as many
        in training. Six times as many anchors of each level enter the NMS of their level (Mask
        R-CNN: 2000 of 12000 in training, 1000 of 6000)."""
        after = 2 * self.proposals if self.training else self.proposals
        levels = [torch.where(level == k)[0] for k in range(len(self.strides))]
        best = torch.cat([i[scores[i].topk(min(6 * after, len(i))).indices] for i in levels])
        boxes = clip_boxes_to_image(decode(deltas[best], anchors[best]), image_size)
        large = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= 1     # a smaller box has no pixel
        boxes, best = boxes[large], best[large]
        keep = batched_nms(boxes, scores[best], level[best], self.nms_threshold)
        return boxes[keep[:after]]

    def losses(self, scores, deltas, anchors, targets, image_size):
        """Mask R-CNN's: of 256 anchors an image, at most half of them positive (IoU >= 0.7, or best
        of an object; negative: IoU < 0.3), cross entropy of the score and box loss of positives.

        Choice: the box loss is a mean over positives. Mask R-CNN and released code divide by 256:
        images with few objects teach their boxes slowly. Short schedules need more."""
        objectness, regression, count = [], [], 0
        for s, d, target in zip(scores, deltas, targets):
            positive, negative, (_, gt, truncated, _) = sample(
                anchors, target, self.isthing, high=0.7, low=0.3, rescue=True, count=self.samples,
                share=0.5)
            truth = torch.zeros_like(s).index_fill(0, positive, 1)
            chosen = torch.cat([positive, negative])
            objectness.append(F.binary_cross_entropy_with_logits(s[chosen], truth[chosen],
                                                                 reduction="sum"))
            regression.append(self.box_loss(d[positive], gt, anchors[positive], beta=1 / 9,
                                            crop_size=image_size, truncated=truncated).sum())
            count += len(positive)
        return {"rph_score": sum(objectness) / (self.samples * len(targets)),
                "rph_box": sum(regression) / max(count, 1)}


# --- 3.2 Region segmentation head -------------------------------------------------------------

class GroupNorm(nn.GroupNorm):
    """32 groups, fewer for thin layers: a group has at least four channels. Computes in float32;
    the bf16 kernel of a CPU is forty times slower."""

    def __init__(self, channels):
        super().__init__(math.gcd(32, max(channels // 4, 1), channels), channels)

    def forward(self, x):
        return super().forward(x.float())


class RegionSegmentationHead(nn.Module):
    """RSH: 14x14 RoIAlign, then two branches: void or thing category with a box for each, and a
    28x28 mask for each. isthing bool [C]; mask_loss of logits and 0/1 truth [P, 28, 28] -> scalar.

    The first layer takes 7x7 means, as in released code: all 14x14 features would be 38.5 M weights
    more. Deviation: released code has batch norm where the paper, and this file, has group norm."""
    samples, nms_threshold = 512, 0.5                          # of Mask R-CNN

    def __init__(self, isthing, channels, strides, canonical=224, detections=100,
                 box_loss=smooth_l1_box_loss, mask_loss=F.binary_cross_entropy_with_logits):
        super().__init__()
        self.strides, self.canonical, self.detections = list(strides)[:4], canonical, detections
        self.box_loss, self.mask_loss = box_loss, mask_loss
        self.register_buffer("isthing", isthing, persistent=False)
        self.register_buffer("label", new_numbers(isthing)[1:], persistent=False)   # 0 for stuff
        n, c, hidden = int(isthing.sum()), channels, 4 * channels
        self.fc = nn.Sequential(nn.AvgPool2d(2), nn.Flatten(),
                                nn.Linear(c * 49, hidden, bias=False), GroupNorm(hidden), leaky(),
                                nn.Linear(hidden, hidden, bias=False), GroupNorm(hidden), leaky())
        self.out = nn.Linear(hidden, 5 * n + 1)                # n + 1 scores, four deltas for each
        convs = []
        for _ in range(4):
            convs += [nn.Conv2d(c, c, 3, padding=1, bias=False), GroupNorm(c), leaky()]
        self.mask = nn.Sequential(*convs, nn.ConvTranspose2d(c, c, 2, stride=2, bias=False),
                                  GroupNorm(c), leaky(), nn.Conv2d(c, n, 1))
        nn.init.normal_(self.out.weight, std=0.01)
        nn.init.zeros_(self.out.bias)

    def pool(self, features, boxes):
        """RoIAlign on level k of each box: a list of [P_b, 4] -> [sum P, channels, 14, 14]. One
        sample a cell, as in released code. In float32: bf16 is too coarse for coordinates."""
        rois = torch.cat([F.pad(b, (1, 0), value=i) for i, b in enumerate(boxes)])  # image, box
        # k = max(1, min(4, floor(3 + log2(sqrt(w h) / 224))))
        level = pyramid_level(rois[:, 1:], len(self.strides), self.canonical)
        pooled = rois.new_zeros(len(rois), features[4].shape[1], 14, 14)
        for k, stride in enumerate(self.strides, 1):
            at = torch.where(level == k)[0]
            pooled[at] = roi_align(features[stride].float(), rois[at], 14, 1 / stride,
                                   sampling_ratio=1, aligned=True)
        return pooled

    def classify(self, pooled):
        """-> logits [P, 1 + n] (void first) and deltas [P, n, 4]: outputs / (10, 10, 5, 5), since
        corrections of a proposal are small (Mask R-CNN)."""
        x = self.out(self.fc(pooled)).float()
        n = (x.shape[1] - 1) // 5
        logits, deltas = x.split([n + 1, 4 * n], 1)
        return logits, deltas.reshape(len(x), n, 4) / x.new_tensor([10, 10, 5, 5])

    def masks(self, pooled, categories):
        """The mask of P boxes for one thing category each -> logits [P, 28, 28]."""
        index = torch.arange(len(pooled), device=pooled.device)
        return self.mask(pooled).float()[index, self.label[categories] - 1]

    def losses(self, features, proposals, targets, image_size):
        """Mask R-CNN's, of 512 proposals an image, true boxes among them, at most a quarter
        positive (IoU >= 0.5): cross entropy over void and things; box loss and mask loss of
        positives for their true category.

        Choice: one beta for all deltas, so that any box loss fits. 10 l_0.1(z) is Mask R-CNN's
        l_1(10 z) for centres. For sizes it has l_1(5 z): ours weigh up to twice as much."""
        rois, labels, truths = [], [], []
        for boxes, target in zip(proposals, targets):
            boxes = torch.cat([boxes, thing_truth(target, self.isthing)[1]])
            positive, negative, truth = sample(boxes, target, self.isthing, high=0.5, low=0.5,
                                               count=self.samples, share=0.25)
            rois.append(boxes[torch.cat([positive, negative])])
            labels.append(torch.cat([self.label[truth[3]], torch.zeros_like(negative)]))
            truths.append(truth)
        number, gt, truncated, categories = map(torch.cat, zip(*truths))
        image = torch.cat([torch.full_like(label, i) for i, label in enumerate(labels)])
        labels, pooled = torch.cat(labels), self.pool(features, rois)
        logits, deltas = self.classify(pooled)
        positive = torch.where(labels > 0)[0]
        boxes, n = torch.cat(rois)[positive], max(len(labels), 1)
        box = self.box_loss(deltas[positive, labels[positive] - 1], gt, boxes, beta=0.1,
                            crop_size=image_size, truncated=truncated)
        truth = mask_targets(torch.stack([t.segments for t in targets]), image[positive], number,
                             boxes=boxes)
        return {"rsh_class": F.cross_entropy(logits, labels, reduction="sum") / n,
                "rsh_box": 10 * box.sum() / n,
                **self.mask_losses(pooled[positive], categories, truth)}

    def mask_losses(self, pooled, categories, truth):
        """Of P positives, their truth 0/1 [P, 28, 28]. Released code leaves void pixels out."""
        masks = self.masks(pooled, categories)
        return {"rsh_mask": self.mask_loss(masks, truth) if len(masks) else masks.sum()}

    def detect(self, features, proposals, image_size, score_threshold=0.05):
        """Section 3.5 up to the masks: proposals [P_b, 4] of each image -> a dictionary an image,
        best score first: boxes [D, 4], scores [D] with gradient, categories [D], masks [D, 28, 28]
        (logits). A higher threshold removes detections and does not change the others: a box is
        suppressed only by a box of higher score."""
        counts = [len(p) for p in proposals]
        logits, deltas = self.classify(self.pool(features, proposals))
        found = []
        for p, s, d in zip(proposals, logits.softmax(1).split(counts), deltas.split(counts)):
            row, thing = torch.where(s[:, 1:].detach() > score_threshold)
            boxes = clip_boxes_to_image(decode(d[row, thing].detach(), p[row]), image_size)
            score, keep = s[row, thing + 1], torch.where((boxes[:, 2:] > boxes[:, :2]).all(1))[0]
            best = batched_nms(boxes[keep], score[keep].detach(), thing[keep], self.nms_threshold)
            keep = keep[best[:self.detections]]
            found.append({"boxes": boxes[keep], "scores": score[keep],
                          "categories": torch.where(self.isthing)[0][thing[keep]]})
        return self.add_masks(features, found)

    def add_masks(self, features, found):
        """Boxes with categories, a dictionary an image -> the same with their `masks`."""
        boxes, categories = ([f[key] for f in found] for key in ("boxes", "categories"))
        masks = self.masks(self.pool(features, boxes), torch.cat(categories))
        return [{**f, "masks": m} for f, m in zip(found, masks.split([len(b) for b in boxes]))]


def mask_targets(segments, image, number, boxes, size=28):
    """Is the centre of each cell of box p in segment number[p] of image[p]? segments [B, H, W] ->
    0/1 [P, size, size]. No mask of H x W is made for one object."""
    cell = (torch.arange(size, device=boxes.device) + 0.5) / size
    corner, sides = boxes[:, :2, None], (boxes[:, 2:] - boxes[:, :2])[:, :, None]
    x, y = (corner + cell * sides).long().unbind(1)                             # [P, size] each
    x, y = x.clamp(0, segments.shape[2] - 1), y.clamp(0, segments.shape[1] - 1)
    found = segments[image[:, None, None], y[:, :, None], x[:, None]]
    return (found == number[:, None, None]).float()


# --- 3.3 Semantic segmentation branch ---------------------------------------------------------

def plain_window_mean(x, window):
    """3.3: average pooling with stride 1 without padding, then replication of the border."""
    x = F.avg_pool2d(x, window, stride=1)
    low, high = (window - 1) // 2, window // 2
    return F.pad(x, (low, high, low, high), mode="replicate")


def window_mean(x, window):
    """The same, eight times faster: [B, C, H, W] -> [B, C, H, W]. A map smaller than the window is
    pooled over all of it, as in DeepLab.

    The sum of a window is the difference of two running sums, once along each axis."""
    dtype, x = x.dtype, x.float()                              # bf16 has too few digits for a sum
    for axis in (2, 3):
        size, k = x.shape[axis], min(window, x.shape[axis])
        total = F.pad(x.cumsum(axis), (0, 0, 1, 0) if axis == 2 else (1, 0))
        n = size - k + 1
        x = (total.narrow(axis, k, n) - total.narrow(axis, 0, n)) / k
        middle = torch.arange(size, device=x.device) - (k - 1) // 2
        x = x.index_select(axis, middle.clamp(0, n - 1))       # replicates the border
    return x.to(dtype)


class MiniDL(nn.Module):
    """Figure 2: [B, c_in, h, w] -> [B, channels, h, w]. Of one value on, away from borders, it does
    not matter where in an image a feature stands, nor how large the image is.

    Deviation: in released code `out` is a 1x1, which has 3 x 128 x 128 x 8 parameters less."""

    def __init__(self, c_in, channels=128, window=64):
        super().__init__()
        self.window = window
        self.near, self.far = conv_norm(c_in, channels, 3), conv_norm(c_in, channels, 3, dilation=6)
        self.context, self.out = conv_norm(c_in, channels, 1), conv_norm(3 * channels, channels, 3)

    def forward(self, x):
        context = self.context(window_mean(x, self.window))
        return self.out(torch.cat([self.near(x), self.far(x), context], 1))


class SemanticHead(nn.Module):
    """Four MiniDL, one for each of the strides 4 to 32, enlarged to stride 4, concatenated, 1x1:
    features -> logits [B, categories, H / 4, W / 4]. The last 1x1 has no norm, as in released code."""

    def __init__(self, c_in, categories, channels=128, window=64):
        super().__init__()
        self.heads = nn.ModuleList(MiniDL(c_in, channels, window) for _ in range(4))
        self.out = nn.Conv2d(4 * channels, categories, 1)

    def forward(self, features):
        maps = [head(features[s]) for head, s in zip(self.heads, (4, 8, 16, 32))]
        return self.out(torch.cat([resize_logits(m, features[4].shape[-2:]) for m in maps], 1))


def resize_logits(x, size):
    """Bilinear: [B, C, h, w] -> [B, C, *size]. Pixel centres are at +.5."""
    return F.interpolate(x, tuple(size), mode="bilinear") if x.shape[-2:] != tuple(size) else x


# --- 3.4 Training losses ----------------------------------------------------------------------

def hardest_pixels_loss(logits, target, fraction=0.25):
    """L_ss: the mean of -log P(Y) over the quarter of an image's pixels where it is largest, mean
    over images. logits [B, C, H, W], target [B, H, W] with IGNORE for void.

    Deviation: in released code void pixels, with loss 0, count among the W H. Here they do not. One
    labelled pixel is enough. All void: 0 with gradients."""
    loss = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="none")
    total = 0
    for pixels, known in zip(loss.flatten(1), (target != IGNORE).flatten(1).sum(1).tolist()):
        k = math.ceil(fraction * known)                        # omega > 0 for k = W H / 4 pixels
        # L_ss = - sum_ij omega_ij log P_ij(Y_ij), omega = tau = 4 / (W H) = 1 / k
        total = total + pixels.topk(k, sorted=False).values.sum() / max(k, 1)
    return total / len(loss)


# --- 3.5 Testing and panoptic fusion ----------------------------------------------------------

def paste_masks(masks, boxes, size):
    """Logits [D, s, s] in boxes [D, 4] -> bool [D, H, W]: above 0 by bilinear interpolation, at the
    pixels whose centres are in the box."""
    out = torch.zeros(len(masks), *size, dtype=torch.bool, device=masks.device)
    for mask, box, result in zip(masks.float(), boxes.tolist(), out):
        span, place = [], []                                   # of x, then of y
        for low, high, n in zip(box[:2], box[2:], reversed(size)):
            first, last = (min(max(math.ceil(v - 0.5), 0), n) for v in (low, high))
            span.append(slice(first, last))
            centre = torch.arange(first, last, device=masks.device) + 0.5
            place.append(2 * (centre - low) / max(high - low, 1e-6) - 1)        # -1..1 in the box
        grid = torch.stack(torch.meshgrid(*place, indexing="xy"), -1)           # [h, w, 2]
        if grid.numel():
            value = F.grid_sample(mask[None, None], grid[None], padding_mode="border",
                                  align_corners=False)
            result[span[1], span[0]] = value[0, 0] > 0
    return out


def plain_fuse(masks, scores, categories, semantic, isthing, score_threshold=0.5, overlap=0.5,
               stuff_area=4096):
    """The text of 3.5 with sets of pixels. Arguments and results as of `fuse`."""
    def pixels(mask):
        return {tuple(p) for p in mask.nonzero().tolist()}
    segments, kept = torch.zeros_like(semantic), []
    for i in sorted(range(len(scores)), key=lambda i: -scores[i]):
        mask = pixels(masks[i])
        free = {p for p in mask if segments[p] == 0}
        if scores[i] >= score_threshold and mask and len(free) >= overlap * len(mask):
            kept.append((categories[i], scores[i]))
            for p in free:
                segments[p] = len(kept)
    rest = pixels(segments == 0)
    for c in range(len(isthing)):
        stuff = {p for p in rest if semantic[p] == c}
        if stuff and not isthing[c] and len(stuff) >= stuff_area:
            kept.append((c, 1))
            for p in stuff:
                segments[p] = len(kept)
    return segments, torch.tensor([c for c, _ in kept]), torch.tensor([s for _, s in kept])


def fuse(masks, scores, categories, semantic, isthing, score_threshold=0.5, overlap=0.5,
         stuff_area=4096):
    """masks bool [D, H, W], scores [D], categories [D], semantic int64 [H, W] (the likeliest
    category), isthing [C] -> segments int64 [H, W], categories [N], scores [N] (1 for stuff).

    1. Instances, best score first, take their free pixels if these are at least half of them.
    2. What remains takes the semantic category if it is stuff. It is void if it is a thing.
    3. A stuff category of fewer than `stuff_area` pixels in all becomes void.
    The least score of an instance, 0.5, is that of released code."""
    segments, accepted = torch.zeros_like(semantic), []
    order = scores.argsort(descending=True, stable=True)
    for i in order[scores[order] >= score_threshold].tolist():
        free, area = masks[i] & (segments == 0), masks[i].sum()
        if area > 0 and free.sum() >= overlap * area:
            accepted.append(i)
            segments[free] = len(accepted)
    free = (segments == 0) & ~isthing[semantic]
    area = torch.bincount(semantic[free], minlength=len(isthing))
    large = (area > 0) & (area >= stuff_area)
    number = new_numbers(large)[1:]                            # 1, 2, ... for stuff that stays
    number = torch.where(large, number + len(accepted), 0)
    segments = torch.where(free, number[semantic], segments)
    stuff, accepted = torch.where(large)[0], torch.tensor(accepted, dtype=torch.long, device=scores.device)
    return (segments, torch.cat([categories[accepted], stuff]),
            torch.cat([scores[accepted], scores.new_ones(len(stuff))]))


def at_size(found, image_size, size):
    """Detections in an image of `image_size` -> the same at `size`, with masks bool [D, *size]."""
    factor = [size[1] / image_size[1], size[0] / image_size[0]] * 2
    boxes = found["boxes"] * found["boxes"].new_tensor(factor)
    return {**found, "boxes": boxes, "masks": paste_masks(found["masks"], boxes, size)}


def assemble(found, logits, image_size, size, isthing, score_threshold=0.5, stuff_area=4096):
    """Detections and semantic logits [1, C, h, w] of an image -> Prediction at `size`.

    Choice: `stuff_area` is for 1024x2048 pixels and grows with the area of the image."""
    found, area = at_size(found, image_size, size), stuff_area * size[0] * size[1] / (1024 * 2048)
    semantic = resize_logits(logits.float(), size)[0].argmax(0)
    return Prediction(*fuse(found["masks"], found["scores"], found["categories"], semantic=semantic,
                            isthing=isthing, score_threshold=score_threshold, stuff_area=area), found)


# --- The whole network ------------------------------------------------------------------------

class Seamless(nn.Module):
    """Figure 1, right. isthing bool [C]; body from `resnet_fpn`, whose width sets the widths of the
    heads (256: the paper's). canonical: the size in pixels of an object for stride 16. rois:
    proposals an image to learn from. proposals: for how many the region head looks at test time.
    score_threshold, stuff_area: of the fusion. Losses are functions."""

    def __init__(self, isthing, body, box_loss=smooth_l1_box_loss, canonical=224, anchor_scale=8,
                 ratios=(0.5, 1, 2), rois=512, proposals=1000, window=64, detections=100,
                 score_threshold=0.5, stuff_area=4096, semantic_loss=hardest_pixels_loss,
                 mask_loss=F.binary_cross_entropy_with_logits):
        super().__init__()
        isthing, c = torch.as_tensor(isthing, dtype=torch.bool), body.channels
        if not isthing.any():
            raise ValueError("no category is a thing: there is nothing for the instance branch; "
                             "use the body and SemanticHead alone")
        self.register_buffer("isthing", isthing, persistent=False)
        self.body, self.semantic_loss = body, semantic_loss
        self.score_threshold, self.stuff_area = score_threshold, stuff_area
        self.proposal_head = RegionProposalHead(isthing, c, body.strides, anchor_scale=anchor_scale,
                                                ratios=ratios, proposals=proposals,
                                                box_loss=box_loss)
        self.region_head = RegionSegmentationHead(isthing, c, body.strides, canonical=canonical,
                                                  detections=detections, box_loss=box_loss,
                                                  mask_loss=mask_loss)
        self.region_head.samples = rois
        self.semantic_head = SemanticHead(c, len(isthing), c // 2, window=window)

    def losses(self, images, targets):
        """images [B, 3, H, W], a Target an image -> the six losses of both branches."""
        features, size = self.body(images), images.shape[-2:]
        losses, _ = self.detection_losses(features, targets, size)
        return {**losses, **self.semantic_losses(self.semantic_head(features), targets, size)}

    def detection_losses(self, features, targets, image_size):
        """-> the losses of both heads of the instance branch, and the proposals of each image."""
        *output, anchors, level = self.proposal_head(features, image_size)
        proposals = [self.proposal_head.propose(*one, anchors, level=level, image_size=image_size)
                     for one in zip(*output)]
        return {**self.proposal_head.losses(*output, anchors, targets=targets,
                                            image_size=image_size),
                **self.region_head.losses(features, proposals, targets, image_size=image_size)
                }, proposals

    def semantic_losses(self, logits, targets, image_size):
        """Of the semantic logits [B, C, h, w]."""
        truth = torch.stack([semantic_target(t) for t in targets])
        return {"semantic": self.semantic_loss(resize_logits(logits.float(), image_size), truth)}

    def propose(self, features, image_size):
        """The proposals [P, 4] of each image."""
        scores, deltas, anchors, level = self.proposal_head(features, image_size)
        return [self.proposal_head.propose(s, d, anchors, level=level, image_size=image_size)
                for s, d in zip(scores, deltas)]

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size`, the image's own if None. Masks and logits are
        interpolated straight to it: a resized label map would have less detail."""
        features, image_size = self.body(image[None]), image.shape[-2:]
        proposals = self.propose(features, image_size)
        found, = self.region_head.detect(features, proposals, image_size)
        return assemble(found, self.semantic_head(features), image_size, size=size or image_size,
                        isthing=self.isthing, score_threshold=self.score_threshold,
                        stuff_area=self.stuff_area)

    def stages(self, fit):
        """One stage that trains everything: [(name, optimiser, steps)]."""
        return [("all", sgd(self, fit), fit["steps"])]


def sgd(model, fit):
    """SGD of section 5 for what is not frozen, with fit["lr"] and weight decay fit["decay"];
    Nesterov momentum 0.9 as in released code. Without fit["decay_norms"] (section 5.1, "decay BN")
    norms have no decay.
    Choice: nor have biases then; both are the parameters of one dimension."""
    learn = [p for p in model.parameters() if p.requires_grad]
    spared = [p for p in learn if p.ndim <= 1 and not fit["decay_norms"]]
    decayed = [p for p in learn if p.ndim > 1 or fit["decay_norms"]]
    groups = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.SGD(groups, fit["lr"], 0.9, weight_decay=fit["decay"], nesterov=True)


def demo(quick=False, full=False, device="cpu", out="figures"):
    """The ledger, then semantic heads with MiniDL and with global pooling on ever larger images."""
    print("segments of ten pixels:", example()[0].tolist())
    from lab.demo_seamless import heads
    from lab.ledger import print_seamless
    print_seamless()
    steps, tests = (10, 4) if quick else (1500, 200) if full else (260, 60)
    heads(steps, tests, device=device, out=out)


if __name__ == "__main__":
    command_line(demo, __doc__, quick="ten steps, four scenes", full="1500 steps, 200 scenes")

# Exercises
# 1. Let anchors leave the image: make `inside` all True. Which test fails, and what happens to the
#    boxes of objects that a crop has cut?
# 2. Train on all pixels: fraction=1.0 in `hardest_pixels_loss`. Which categories of the toy street
#    lose most, the large or the small?
# 3. Let `fuse` take the lowest score first. Predict the PQ of persons in front of cars before you
#    run `python train.py`.
