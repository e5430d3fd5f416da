"""Two networks instead of one: what Seamless is compared with in its paper (Porzi 2019, section 5).

One network detects things, the other labels pixels. Each has a body of its own, and the same rule
fuses what they find. So their sum costs a second ResNet and pyramid; see lab/ledger.py.

    python train.py --method two        both at once: they share nothing, but the images of a step
    python -m lab.versus "runs/street-seamless-*" "runs/street-two-*"

Choice: both learn from the same crops, so neither has a sampler for its own needs.
"""
from torch import nn

from seamless import Seamless


class Features(dict):
    """The pyramid of the network of things; `.stuff` is that of the other network."""


class Twins(nn.Module):
    """Two bodies -> `Features` of the first, which carry those of the second."""

    def __init__(self, things, stuff):
        super().__init__()
        self.things, self.stuff = things, stuff
        self.strides, self.channels = things.strides, things.channels

    def forward(self, images):
        features = Features(self.things(images))
        features.stuff = self.stuff(images)
        return features


class OfStuff(nn.Module):
    """A semantic head that looks at the features of the second network."""

    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        return self.head(features.stuff)


def two_networks(isthing, bodies, **options):
    """Seamless with a body for each branch. bodies: two of `seamless.Body`; options: Seamless's."""
    net = Seamless(isthing, Twins(*bodies), **options)
    net.semantic_head = OfStuff(net.semantic_head)
    return net
