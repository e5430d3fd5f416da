"""Unified panoptic segmentation, the kind of network that ibs.py is for: section 3.1 of D. de Geus,
G. Dubbelman, "Intra-Batch Supervision for Panoptic Segmentation on High-Resolution Images".

    image --> body --> pyramid --> family ------------------> embeddings E [N, C], categories
                          '------> feature encoder ---------> features   F [C, H/4, W/4]

    masks = sigmoid(E F)          for things and stuff alike

The paper tries two such networks: Panoptic FCN (lab/kernels.py) and Mask2Former (lab/queries.py).
They differ in where E comes from, called the family here. Both are small, after what is commonly
known of these networks and what the released code of this paper does.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from data import Prediction
from ibs import ibs_loss, mask_logits, pick_targets
from lab.kernels import Kernels, add_coordinates, conv
from lab.masks import enlarge, mean_probability, merge
from lab.queries import Queries
from pq import confusion_ratio, instance_pixels


class FeatureEncoder(nn.Module):
    """The pyramid {4, 8, 16, 32: [B, c_in, ..]} -> features F [B, channels, H/4, W/4].

    One convolution a level; coarser levels are enlarged and added to the finest; then one more
    convolution, with coordinates if asked for, and a 1x1.
    Deviation: Panoptic FCN's encoder has three convolutions, with coordinates and without norms."""

    def __init__(self, c_in, channels, coordinates):
        super().__init__()
        self.levels = nn.ModuleList(conv(c_in, channels) for _ in range(4))
        self.coordinates = coordinates
        self.out = nn.Sequential(conv(channels + 2 * coordinates, channels),
                                 nn.Conv2d(channels, channels, 1))

    def forward(self, pyramid):
        """{4, 8, 16, 32: [B, c_in, h, w]} -> [B, channels, h, w] of stride 4."""
        maps = [level(pyramid[s]) for level, s in zip(self.levels, (4, 8, 16, 32))]
        size = maps[0].shape[-2:]
        x = maps[0] + sum(F.interpolate(m, size, mode="bilinear") for m in maps[1:])
        return self.out(add_coordinates(x) if self.coordinates else x)


class UnifiedNet(nn.Module):
    """Embeddings times features, with or without intra-batch supervision.

    isthing: bool [categories]; body: the pyramid of seamless.resnet_fpn; family: the class Kernels
    or Queries, which gets `settings`; channels: C of embeddings and features.
    ibs_weight: of intra-batch supervision, 0 for none.
    paired: crops 2 k and 2 k + 1 of a batch supervise each other, if they show different images, as
    section 4.2 wants of the pairs of ibs.PairedCropSampler. Crops of any other sampler are drawn
    independently, so crop 2 k + 1 is a random partner too. False: any other crop (section 4.1).
    score_threshold, overlap, stuff_area: see `merge`; stuff_area counts pixels at 1024x2048 and is
    scaled with the image.

    Each layer of queries draws its partners anew. Deviation: the released code for queries always
    draws them, even with the sampler of pairs.
    Choice: stuff has at least 4096 pixels, as in seamless.py. Deviation: the released code for
    kernels has 2048."""

    def __init__(self, isthing, body, family, channels=64, ibs_weight=0.0, paired=True,
                 score_threshold=0.3, overlap=0.5, stuff_area=4096, **settings):
        super().__init__()
        isthing = torch.as_tensor(isthing, dtype=torch.bool)
        self.body = body
        place = settings.get("coordinates", family.coordinates)
        self.encoder = FeatureEncoder(body.channels, channels, place)
        self.family = family(isthing, body.channels, channels, **settings)
        missing = set(self.family.strides) - set(body.strides)
        if missing:
            raise ValueError(f"the pyramid has no level of stride {min(missing)}: take strides of "
                             f"{', '.join(map(str, body.strides))}, or a larger body.extra")
        self.register_buffer("isthing", isthing, persistent=False)
        self.ibs_weight, self.paired = ibs_weight, paired
        self.score_threshold, self.overlap, self.stuff_area = score_threshold, overlap, stuff_area

    def losses(self, images, targets):
        """images [B, 3, H, W], targets -> {name: scalar}: those of the family and "ibs", unless its
        weight is 0."""
        pyramid = self.body(images)
        features = self.encoder(pyramid).float()
        losses, layers = self.family.losses(pyramid, features, targets)
        if self.ibs_weight:
            ids = torch.tensor([t.image_id for t in targets])
            losses["ibs"] = self.ibs_weight * sum(
                ibs_loss(embeddings, features, is_thing, pick_targets(ids, paired=self.paired),
                         weights=weights, pixels=self.family.ibs_pixels)
                for embeddings, is_thing, weights in layers)
        return losses

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size`, the image's own by default.

        `instances` are all things with an embedding, also those that merging drops. Their score is
        that of their category times the mean probability in their mask, as in the released code.
        Kernels are merged by it, too; queries by the score of the category alone."""
        size = tuple(size or image.shape[-2:])
        pyramid = self.body(image[None])
        features = self.encoder(pyramid).float()
        embeddings, scores, categories = self.family.embed(pyramid, features)
        logits, things = mask_logits(embeddings, features[0]), self.isthing[categories]
        sure = torch.where(things, scores * mean_probability(logits), scores)
        scores = sure if self.family.rescored else scores
        merged = merge(logits, scores, categories, isthing=self.isthing, size=size,
                       score_threshold=self.score_threshold, overlap=self.overlap,
                       stuff_area=self.stuff_area * size[0] * size[1] / (1024 * 2048))
        masks = torch.zeros(int(things.sum()), *size, dtype=torch.bool, device=image.device)
        for mask, x in zip(masks, logits[things]):             # one at a time, as in `merge`
            mask.copy_(enlarge(x, size) > 0)
        return Prediction(*merged, {"masks": masks, "boxes": boxes_of(masks),
                                    "scores": sure[things], "categories": categories[things]})

    def stages(self, fit):
        """One stage for all weights -> [(name, optimiser, steps)]: SGD with Nesterov momentum for
        kernels, or AdamW (fit["adam"]); AdamW for queries, with the rate `lr_body` for the ResNet.

        With `decay_norms` false, norms and biases have no weight decay.
        Deviation: the released code for queries spares norms and embeddings in any case."""
        queries = isinstance(self.family, Queries)
        resnet = {id(p) for p in self.body.stages.parameters()} if queries else set()
        groups = {}
        for p in self.parameters():
            if p.requires_grad:
                decay = fit["decay"] if fit["decay_norms"] or p.ndim > 1 else 0.0
                lr = fit["lr_body" if id(p) in resnet else "lr"]
                groups.setdefault((id(p) in resnet, decay, lr), []).append(p)
        # The ResNet comes last: a run's log shows the rate of the first group.
        groups = [dict(params=p, weight_decay=decay, lr=lr)
                  for (_, decay, lr), p in sorted(groups.items(), key=lambda group: group[0][0])]
        optimiser = (torch.optim.AdamW(groups, fused=True) if queries or fit.get("adam") else
                     torch.optim.SGD(groups, momentum=0.9, nesterov=True))
        return [("all", optimiser, fit["steps"])]

    def report(self):
        """What lab/evaluate.py is to measure beside PQ and AP."""
        return Instances(self.isthing.cpu(), self.score_threshold)


def kernels(isthing, body, **model):
    """A UnifiedNet whose embeddings are kernels; `model` are keywords of UnifiedNet and Kernels."""
    return UnifiedNet(isthing, body, Kernels, **model)


def queries(isthing, body, **model):
    """A UnifiedNet whose embeddings are queries; `model` are keywords of UnifiedNet and Queries."""
    return UnifiedNet(isthing, body, Queries, **model)


def boxes_of(masks):
    """Boxes of masks bool [M, H, W] that may overlap -> float [M, 4]; of an empty mask zeros."""
    columns, rows = masks.any(1).float(), masks.any(2).float()            # [M, W], [M, H]
    first = [line.argmax(1) for line in (columns, rows)]       # argmax takes the first of equals
    last = [line.shape[1] - line.flip(1).argmax(1) for line in (columns, rows)]
    return torch.stack(first + last, 1).float() * columns.amax(1, keepdim=True)


class Instances:
    """Section 6.4: how good the masks of things are before they are merged, when they may overlap.

    Choice: of those whose score is above `threshold`."""

    def __init__(self, isthing, threshold):
        self.isthing, self.threshold = isthing, threshold
        # Pixels right, true, predicted; masks confused at T = 25%, not empty, all; images.
        self.counts = torch.zeros(7, dtype=torch.int64)

    def update(self, sample, prediction):
        """Adds one image: its Sample and the Prediction at its size."""
        keep = prediction.instances["scores"] > self.threshold
        masks, scores, categories = (prediction.instances[k][keep]
                                     for k in ("masks", "scores", "categories"))
        how = dict(gt_segments=sample.segments, gt_categories=sample.categories,
                   isthing=self.isthing, gt_crowd=sample.crowd)
        pixels = instance_pixels(masks, scores, categories, **how)
        confused, some = confusion_ratio(masks, categories, thresholds=[25], **how)
        self.counts += torch.cat([pixels, confused, some, torch.tensor([len(masks), 1])])

    def all_reduce(self):
        """Adds the counts of all processes of a run."""
        if dist.is_initialized():
            counts = self.counts.cuda() if dist.get_backend() == "nccl" else self.counts
            dist.all_reduce(counts)
            self.counts = counts.cpu()

    def compute(self):
        """-> {name: percent, or number an image}."""
        right, true, predicted, confused, some, masks, images = self.counts.tolist()
        return {"Acc_th": 100 * right / max(true, 1), "Prec_th": 100 * right / max(predicted, 1),
                "confusion": 100 * confused / max(some, 1),
                "things an image": masks / max(images, 1),
                "empty masks an image": (masks - some) / max(images, 1)}
