"""What ablations of the affinity head (Li et al. 2020) need around Seamless: squeeze and excitation
at the end of the body, and a region head without masks."""
from torch import nn
from torchvision.ops import SqueezeExcitation

from seamless import RegionSegmentationHead


def with_excitation(body):
    """The body with squeeze and excitation behind its last ResNet stage: before the pyramid reads
    them, a look at the whole image weighs the channels. Changes and returns `body`.

    Choice: the middle layer has a sixteenth of the channels, as in Hu et al. 2018."""
    channels = body.fpn.inner_blocks[-1][0].in_channels
    body.stages[-1] = nn.Sequential(body.stages[-1], SqueezeExcitation(channels, channels // 16))
    return body


class NoMasks(nn.Module):
    """Stands where the mask branch stood: a logit of 0 for each thing category."""

    def __init__(self, things):
        super().__init__()
        self.things = things

    def forward(self, pooled):
        return pooled.new_zeros(len(pooled), self.things, 28, 28)


class BoxesOnly(RegionSegmentationHead):
    """A region head of boxes and categories: no mask loss, detections without masks."""

    def losses(self, *args, **settings):
        losses = super().losses(*args, **settings)
        del losses["rsh_mask"]
        return losses

    def add_masks(self, features, found):
        return found


def without_masks(region_head):
    """The region head without its mask branch. Changes and returns `region_head`."""
    region_head.mask = NoMasks(region_head.things)
    region_head.__class__ = BoxesOnly
    return region_head
