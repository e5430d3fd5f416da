"""torchvision's own Mask R-CNN on the same body, stuff by the same semantic head, fused by the same
rule: the peer of Seamless."""
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from data import Prediction, semantic_target, thing_truth
from seamless import (Seamless, SemanticHead, at_size, fuse, hardest_pixels_loss,
                      resize_logits)


class MaskRCNN(nn.Module):
    """Its keyword parameters are those of seamless.Seamless. isthing: bool [C]; body: the pyramid
    of seamless.resnet_fpn.

    Choice: torchvision's defaults for all that Seamless's recipe does not name."""

    def __init__(self, isthing, body, canonical=224, anchor_scale=8, ratios=(0.5, 1, 2), rois=512,
                 proposals=1000, window=64, stuff_area=4096):
        super().__init__()
        self.body, self.stuff_area, c = body, stuff_area, body.channels
        self.body.out_channels = c                             # torchvision asks for it
        isthing = torch.as_tensor(isthing, dtype=torch.bool)
        self.register_buffer("isthing", isthing, persistent=False)
        levels, classes = [str(i) for i in range(4)], int(isthing.sum()) + 1    # 0: background
        anchors = AnchorGenerator(tuple((anchor_scale * s,) for s in body.strides),
                                  (tuple(ratios),) * len(body.strides))
        pools = [MultiScaleRoIAlign(levels, size, 2, canonical_scale=canonical) for size in (7, 14)]
        faster, mask = detection.faster_rcnn, detection.mask_rcnn
        peer = detection.MaskRCNN(
            body, None, rpn_anchor_generator=anchors, box_roi_pool=pools[0], mask_roi_pool=pools[1],
            box_head=faster.TwoMLPHead(c * 49, 4 * c),
            box_predictor=faster.FastRCNNPredictor(4 * c, classes),
            mask_head=mask.MaskRCNNHeads(c, (c,) * 4, 1),
            mask_predictor=mask.MaskRCNNPredictor(c, c, classes),
            rpn_post_nms_top_n_train=2 * proposals, rpn_post_nms_top_n_test=proposals,
            box_batch_size_per_image=rois)
        self.rpn, self.roi_heads = peer.rpn, peer.roi_heads
        self.semantic_head = SemanticHead(c, len(isthing), c // 2, window=window)

    def instances(self, images, features, targets=None):
        """torchvision's two heads on our features -> (detections, losses). In float32, which its
        coding of boxes and its losses need."""
        named = {str(i): f.float() for i, f in enumerate(features.values())}
        batch = ImageList(images, [tuple(images.shape[-2:])] * len(images))
        with torch.autocast(images.device.type, enabled=False):
            proposals, rpn = self.rpn(batch, named, targets)
            found, roi = self.roi_heads(named, proposals, batch.image_sizes, targets)
        return found, {**rpn, **roi}

    def losses(self, images, targets):
        """images [B, 3, H, W], a Target an image -> torchvision's five losses and the semantic one.
        torchvision knows no void: its negatives learn there too."""
        features, things = self.body(images), []
        for t in targets:
            numbers, boxes, _, category = thing_truth(t, self.isthing)
            things.append({"boxes": boxes, "labels": self.isthing.long().cumsum(0)[category],
                           "masks": (t.segments == numbers[:, None, None]).to(torch.uint8)})
        logits = resize_logits(self.semantic_head(features).float(), images.shape[-2:])
        truth = torch.stack([semantic_target(t) for t in targets])
        return {**self.instances(images, features, things)[1],
                "semantic": hardest_pixels_loss(logits, truth)}

    @torch.no_grad()
    def predict(self, image, size=None):
        """image [3, H, W] -> Prediction at `size`, the image's own if None."""
        features, own = self.body(image[None]), image.shape[-2:]
        size, found = size or own, self.instances(image[None], features)[0][0]
        found["categories"] = torch.where(self.isthing)[0][found.pop("labels") - 1]
        found["masks"] = torch.logit(found["masks"][:, 0], 1e-6)   # torchvision: probabilities
        found = at_size(found, own, size)
        semantic = resize_logits(self.semantic_head(features).float(), size)[0].argmax(0)
        fused = fuse(found["masks"], found["scores"], found["categories"], semantic=semantic,
                     isthing=self.isthing,
                     stuff_area=self.stuff_area * size[0] * size[1] / (1024 * 2048))
        return Prediction(*fused, found)

    stages = Seamless.stages                                   # the same optimiser
