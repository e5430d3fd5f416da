"""The methods of train.py by name, and how each is built from a body and its settings.

A method is an nn.Module with
    .losses(images [B, 3, H, W], targets) -> {name: scalar}, zero with gradients without truth
    .predict(image [3, H, W], size=None) -> data.Prediction at `size`, the image's own by default
    .stages(fit) -> [(name, optimiser, steps), ...]
and, if it has more to tell than PQ and AP, .report() (see lab/evaluate.py).
Add yours with `METHODS["mine"] = (build, [functions whose keyword parameters it takes])`.
"""
import inspect

import torch.nn.functional as F

import adaptis
import affinity_head
import cabb_loss
import seamless
from data import DataError
from lab import boxes_only, kernels, peer, queries, two, unified
from lab.fused import Fused
from lab.runs import load_file

# What a text among the settings stands for.
LOSSES = {
    "box_loss": {"cabb": cabb_loss.cabb_loss, "standard": seamless.smooth_l1_box_loss},
    "semantic_loss": {"hardest": seamless.hardest_pixels_loss,
                      "cross-entropy": affinity_head.known_cross_entropy,
                      "lovasz": affinity_head.lovasz_softmax},
    "mask_loss": {"bce": F.binary_cross_entropy_with_logits, "lovasz": affinity_head.lovasz_hinge},
    "loss": {"nfl": adaptis.normalized_focal_loss, "focal": adaptis.focal_loss,
             "bce": adaptis.binary_cross_entropy},
}


def build_body(settings):
    """The one backbone and pyramid that every method stands on, from seamless.resnet_fpn.

    weights: "none", "imagenet" (through torchvision, which needs a network once) or a file."""
    settings = dict(settings)
    weights, name = settings.pop("weights", None), settings.get("name", "resnet50")
    if weights in (None, "none"):
        weights = None
    elif name in ("tiny", "small"):
        raise DataError(f"--set body.weights={weights}: there are no weights for body.name={name}; "
                        "take body.weights=none or a ResNet, as body.name=resnet18")
    else:
        weights = "IMAGENET1K_V1" if weights == "imagenet" else load_file(
            str(weights), "give none, imagenet or a file of weights that torchvision names")
        if not isinstance(weights, (str, dict)):
            raise DataError(f"body.weights: these are not the weights of {name}: the file holds no "
                            "names of tensors")
    try:
        return seamless.resnet_fpn(weights=weights, **settings)
    except OSError as e:
        raise DataError(f"the ImageNet weights of {name} could not be downloaded ({e}): fetch the "
                        "file that torchvision names on a machine with a network and pass it with "
                        "--set body.weights=FILE, or train from scratch with "
                        "--set body.weights=none") from e
    except RuntimeError as e:
        raise DataError(f"body.weights: these are not the weights of {name}: "
                        f"{str(e).splitlines()[0]}") from e


def build_seamless(isthing, body, model):
    """Seamless on a body of these settings; `model` are its keywords."""
    return seamless.Seamless(isthing, build_body(body), **model)


def build_two(isthing, body, model):
    """The branches of Seamless on a body each."""
    return two.two_networks(isthing, [build_body(body), build_body(body)], **model)


def build_maskrcnn(isthing, body, model):
    """torchvision's Mask R-CNN with a semantic head; `model` are keywords of lab/peer.py."""
    return peer.MaskRCNN(isthing, build_body(body), **model)


def affinity_parts(masks=True, affinity=True, excitation=True, channels=128):
    """What the paper's ablations leave out: the mask branch, the affinity head, squeeze and
    excitation on the ResNet's last stage. `channels` are those of the affinity features."""
    return dict(masks=masks, affinity=affinity, excitation=excitation, channels=channels)


def build_affinity(isthing, body, model):
    """The affinity head on Seamless's detections.

    Deviation: all that stands before the head is Seamless's, so that methods here differ in one
    idea: MiniDL with batch norm where the paper's semantic submodule has group norm."""
    own = {k: model.pop(k) for k in list(model) if k in seamless_options()}
    names = [k for k in model if k in options_of(affinity_parts)]
    parts = affinity_parts(**{k: model.pop(k) for k in names})
    if parts["affinity"] and model.get("end_to_end") == "none":
        raise DataError("model.end_to_end=none: nothing would train the affinity head; set "
                        "model.affinity=False too, or let it be 'head' or 'all'")
    if not parts["affinity"] and model.get("end_to_end") == "head":
        raise DataError("model.end_to_end=head: model.affinity=False leaves no head to train; let "
                        "it be 'all' or 'none'")
    if model.get("variant") == "A" and not parts["masks"]:
        raise DataError("model.variant=A adds the logits of masks, and model.masks=False leaves "
                        "them out; take variant B")
    encoder = build_body(body)
    if parts["excitation"]:
        encoder = boxes_only.with_excitation(encoder)
    base = seamless.Seamless(isthing, encoder, **own)
    if not parts["masks"]:
        base.region_head = boxes_only.without_masks(base.region_head)
    head = None
    if parts["affinity"]:
        head = affinity_head.InstanceAffinityHead(encoder.channels, parts["channels"])
    return affinity_head.Affinity(base, head, **model)


def build_adaptis(isthing, body, model):
    """AdaptIS: on cells with its own U-Net, elsewhere on the pyramid."""
    encoder = adaptis.UNet() if body.get("name") == "unet" else Fused(build_body(body))
    return adaptis.AdaptIS(isthing, encoder, **model)


def build_kernels(isthing, body, model):
    """The network of kernels on which IBS is tried."""
    return unified.kernels(isthing, build_body(body), **model)


def build_queries(isthing, body, model):
    """The network of queries on which IBS is tried."""
    return unified.queries(isthing, build_body(body), **model)


METHODS = {
    "seamless": (build_seamless, [seamless.Seamless]),
    "two": (build_two, [seamless.Seamless]),
    "affinity": (build_affinity, [seamless.Seamless, affinity_head.Affinity, affinity_parts]),
    "adaptis": (build_adaptis, [adaptis.AdaptIS]),
    "ibs": (build_kernels, [unified.UnifiedNet, kernels.Kernels]),
    "queries": (build_queries, [unified.UnifiedNet, queries.Queries]),
    "maskrcnn": (build_maskrcnn, [peer.MaskRCNN]),
}


def options_of(function):
    """The parameters of a function or class that have a default -> {name: default}."""
    function = function.__init__ if inspect.isclass(function) else function
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}


def seamless_options():
    """The keywords of Seamless and their defaults."""
    return options_of(seamless.Seamless)


def options(method):
    """Every setting of a method's model -> {name: default}; a loss is named by its text."""
    found = {}
    for function in METHODS[method][1]:
        found |= options_of(function)
    for key, value in found.items():
        names = [name for name, loss in LOSSES.get(key, {}).items() if loss is value]
        found[key] = names[0] if names else value
    return found


def build(method, categories, settings):
    """The model of a method: settings {"body": ..., "model": ...} -> nn.Module."""
    model = dict(settings["model"])
    for key in model.keys() & LOSSES.keys():
        if model[key] not in LOSSES[key]:
            raise DataError(f"model.{key}={model[key]!r}: take one of {', '.join(LOSSES[key])}")
        model[key] = LOSSES[key][model[key]]
    try:
        return METHODS[method][0]([c.isthing for c in categories], settings["body"], model)
    except ValueError as e:
        raise DataError(str(e)) from e
