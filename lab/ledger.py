"""What networks cost: parameters, and multiply-adds on one image.

Convention: a multiply-add is one product in a convolution, a fully connected layer or an attention.
Norms, poolings, interpolations and softmax are not counted, as is the custom. All runs on torch's
meta device, where a pass costs nothing, whatever the size of the image.

    python -m lab.ledger     Seamless on Cityscapes, beside the paper's numbers; on the toy street
"""
import copy

import torch
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from lab import methods
from lab.recipes import RECIPES
from seamless import Seamless, conv_norm, resnet_fpn

META = torch.device("meta")


def parameters(*modules, trainable=False):
    """The number of parameters of modules, of all or of those that learn."""
    found = [p for m in modules for p in m.parameters() if p.requires_grad or not trainable]
    return sum(p.numel() for p in found)


def multiply_adds(function, *args):
    """function(*args) without gradients -> its multiply-adds and its result."""
    with torch.no_grad(), FlopCounterMode(display=False) as count:
        result = function(*args)
    return count.get_total_flops() // 2, result                # two operations a multiply-add


def cityscapes():
    """Seamless as Cityscapes wants it, on the meta device: 19 categories, 8 of them things, one
    extra level, stem, conv2 and the ResNet's norms frozen."""
    with META:
        body = resnet_fpn("resnet50", extra=1, frozen=2, frozen_norm=True)
    return Seamless([False] * 11 + [True] * 8, body).eval().to(META)


class Stride64(ExtraFPNBlock):
    """The released code's level of stride 64: a 3x3 convolution of C_5, with norm."""

    def __init__(self, c_in, width):
        super().__init__()
        self.conv = conv_norm(c_in, width, 3, stride=2)

    def forward(self, results, inputs, names):
        return [*results, self.conv(inputs[-1])], [*names, "64"]


def released(net):
    """A copy of a Seamless with the two layers in which the released code differs from the paper's
    text: `Stride64`, and a 1x1 as last convolution of each MiniDL."""
    net = copy.deepcopy(net)
    with META:
        net.body.fpn.extra_blocks = Stride64(net.body.fpn.inner_blocks[-1][0].in_channels,
                                             net.body.channels)
        for head in net.semantic_head.heads:
            c = head.near[0].out_channels
            head.out = conv_norm(3 * c, c, 1)
    return net.eval()


def seamless_ledger(net, size=(1024, 2048), detections=100):
    """A Seamless on the meta device, one image of `size` -> {part: (parameters, of these trainable,
    multiply-adds)}: the dense part, and `detections` objects that pass through both branches of the
    region head."""
    body, rph, rsh = net.body, net.proposal_head, net.region_head
    image = torch.empty(1, 3, *size, device=META)
    pooled = torch.empty(detections, body.channels, 14, 14, device=META)
    whole, features = multiply_adds(body, image)
    maps = {str(i): torch.empty(1, m[0].in_channels, *features[s].shape[2:], device=META)
            for i, (m, s) in enumerate(zip(body.fpn.inner_blocks, body.strides))}
    pyramid, _ = multiply_adds(body.fpn, maps)
    dense = sum(multiply_adds(lambda f: rph.out(rph.conv(f)), f)[0] for f in features.values())
    rows = {"ResNet": ([body.stages], whole - pyramid), "pyramid": ([body.fpn], pyramid),
            "region proposal head": ([rph], dense),
            "region head, boxes": ([rsh.fc, rsh.out], multiply_adds(rsh.classify, pooled)[0]),
            "region head, masks": ([rsh.mask], multiply_adds(rsh.mask, pooled)[0]),
            "semantic head": ([net.semantic_head], multiply_adds(net.semantic_head, features)[0])}
    return {part: (parameters(*m), parameters(*m, trainable=True), work)
            for part, (m, work) in rows.items()}


def ledger(net, size=(1024, 2048)):
    """A network of embeddings and features (lab/unified.py), one image of `size` -> {part:
    (parameters, multiply-adds)}; last the products of embeddings and features, of as many as there
    are queries, or of 100 kernels. `net` stays as it is."""
    net = copy.deepcopy(net).eval().requires_grad_(False).to(META)
    body, pyramid = multiply_adds(net.body, torch.empty(1, 3, *size, device=META))
    encoder, features = multiply_adds(net.encoder, pyramid)
    if hasattr(net.family, "maps"):                            # kernels
        work, count = multiply_adds(net.family.maps, pyramid)[0], net.family.detections
    else:                                                      # the masks between layers included
        work, answers = multiply_adds(net.family.answers, pyramid, features)
        count = answers[-1][1].shape[1]
    rows = {"body": (net.body, body), "feature encoder": (net.encoder, encoder),
            "embeddings": (net.family, work)}
    rows = {part: (parameters(m), work) for part, (m, work) in rows.items()}
    return {**rows, "embeddings x features": (0, count * features.numel())}


def totals(net, **image):
    """-> {networks: (parameters, multiply-adds)} of one Seamless, and of two: the second has a body
    of its own without the extra level. Frozen stages are the same in both and count once."""
    rows = seamless_ledger(net, **image)
    count, _, work = (sum(row[i] for row in rows.values()) for i in range(3))
    second = copy.deepcopy(net)
    second.body.fpn.extra_blocks = None
    alone = seamless_ledger(second, **image)
    more = parameters(second.body) - parameters(*second.body.stages[:net.body.frozen])
    again = alone["ResNet"][2] + alone["pyramid"][2]
    return {"one network": (count, work), "two networks": (count + more, work + again)}


def print_seamless():
    """The Cityscapes model, one network and two, beside the paper's numbers."""
    net = cityscapes()
    print("Cityscapes, one image of 1024x2048, 100 objects   parameters   trainable  multiply-adds")
    for part, (count, learn, work) in seamless_ledger(net).items():
        print(f"  {part:44s} {count / 1e6:8.2f} M  {learn / 1e6:8.2f} M  {work / 1e12:10.3f} T")
    print("                 paper               here                here, with released layers")
    paper = {"one network": "51.43 M  0.514 T", "two networks": "78.06 M  0.864 T"}
    other = totals(released(net))
    for name, (count, work) in totals(net).items():
        print(f"  {name:12s}   {paper[name]}    {count / 1e6:.2f} M  {work / 1e12:.3f} T    "
              f"{other[name][0]:,}  {other[name][1] / 1e12:.3f} T")
    print("The paper says 50.4% more operations for two; 0.864 / 0.514 is 68% more.")
    recipe = RECIPES["seamless", "street"]
    small = methods.build_seamless([False] * 5 + [True] * 4, recipe["body"], recipe["model"])
    print("The toy street, one image of 256x512, 20 objects:")
    small = small.eval().to(META)
    for name, (count, work) in totals(small, size=(256, 512), detections=20).items():
        print(f"  {name:12s}   {count / 1e6:.2f} M  {work / 1e9:.2f} G")


if __name__ == "__main__":
    print_seamless()
