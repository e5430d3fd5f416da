"""The backbone of AdaptIS on street scenes: the pyramid of seamless.py, summed into one map."""
import torch.nn.functional as F
from torch import nn


class Fused(nn.Module):
    """images [B, 3, H, W] -> one map [B, channels, h, w] at stride 4, of the pyramid `body`, whose
    levels up to stride 32 are enlarged and summed.

    Deviation: the paper has DeepLabV3+. Here all methods share one body."""

    def __init__(self, body):
        super().__init__()
        self.body, self.stride, self.channels = body, 4, body.channels

    def forward(self, images):
        first, *coarser = [m for stride, m in sorted(self.body(images).items()) if stride <= 32]
        for level in coarser:
            first = first + F.interpolate(level, first.shape[-2:], mode="bilinear")
        return first
