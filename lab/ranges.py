"""What each number of a run may be: one table for flags, `--set`, recipes and checkpoints.

A new parameter of train.fit, of a sampler or of a method needs a line here; a test looks for it.
"""
from math import inf, isfinite
from typing import NamedTuple

from lab.methods import LOSSES


class Range(NamedTuple):
    """Numbers from `low` to `high`. above: `low` itself is left out. whole: whole numbers only.
    count: None for one number, n for n numbers, "some" for one or more, "any" for none or more."""
    low: float
    high: float = inf
    above: bool = False
    whole: bool = False
    count: object = None

    def fits(self, value):
        """Is this value allowed?"""
        if self.count is None:
            return self.fits_one(value)
        return (isinstance(value, (tuple, list)) and all(map(self.fits_one, value))
                and self.count in ("any", "some" if value else 0, len(value)))

    def fits_one(self, value):
        """Is this one number allowed?"""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            return False
        if self.whole and value != int(value):
            return False
        return self.low < value <= self.high or value == self.low and not self.above

    def __str__(self):
        kind, low, high = "whole number" if self.whole else "number", self.low, f"{self.high:,}"
        if self.above:
            text = f"above {low:g}" + (f", up to {high}" if self.high < inf else "")
        else:
            text = f"from {low:g} to {high}" if self.high < inf else f"of at least {low:g}"
        if self.count is None:
            return f"a {kind} {text}"
        several = {"any": "", "some": "one or more "}.get(self.count, f"{self.count} ")
        return f"{several}{kind}s in brackets, with commas, each {text}"


def whole(low, high=inf, count=None):
    """Whole numbers from `low` to `high`."""
    return Range(low, high, whole=True, count=count)


def number(low, high=inf, count=None):
    """Numbers from `low` to `high`."""
    return Range(low, high, count=count)


def above(low, high=inf, count=None):
    """Numbers above `low`, up to `high`."""
    return Range(low, high, above=True, count=count)


RANGES = {
    # Flags
    "images": whole(0, 10 ** 7), "eval_images": whole(0, 10 ** 7), "eval_every": whole(0),
    "seed": whole(0, 2 ** 32 - 1), "workers": whole(0, 1024), "threads": whole(0, 1024),
    # The loop
    "fit.steps": whole(1), "fit.batch": whole(1, 65536), "fit.accumulate": whole(1, 65536),
    "fit.lr": above(0, 100), "fit.lr_body": number(0, 100), "fit.decay": number(0, 1),
    "fit.warmup": whole(0), "fit.drops": above(0, 1, count="any"), "fit.poly": number(0, 100),
    "fit.clip": above(0), "fit.interval": whole(1),
    # Crops
    "crops.mode": ("isus", "cus", "uniform", "full", "paired"),
    "crops.size": whole(1, 16384, count=2), "crops.short_side": whole(0, 16384),
    "crops.scale": number(0.01, 100, count=2), "crops.scale_things": number(0.01, 100, count=2),
    "crops.canonical": whole(1, 16384), "crops.flip": number(0, 1), "crops.jitter": number(0, 1),
    "crops.hue": number(0, 0.5), "crops.measure": ("mask", "box"),
    "crops.place": ("category", "instance"),
    # The backbone
    "body.name": ("tiny", "small", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "body.width": whole(4, 4096), "body.extra": whole(0, 4), "body.frozen": whole(0, 5),
    # Models
    **{f"model.{key}": tuple(losses) for key, losses in LOSSES.items()},
    "model.canonical": whole(1, 16384), "model.anchor_scale": number(0.1, 100),
    "model.ratios": above(0, 100, count="some"), "model.positive": number(0, 1),
    "model.rois": whole(1, 65536),
    "model.proposals": whole(1, 65536), "model.window": whole(1, 16384),
    "model.score_threshold": number(0, 1), "model.stuff_area": number(0),
    "model.channels": whole(4, 4096), "model.overlap": number(0, 1),
    "affinity.variant": ("A", "B", "C"), "affinity.end_to_end": ("all", "head", "none"),
    "affinity.loss_weights": number(0, count=3),
    "adaptis.window": whole(1, 16384, count=2), "adaptis.proposals": number(0, 1),
    "adaptis.width": whole(1, 4096), "adaptis.blocks": whole(1, 64), "adaptis.radius": number(1),
    "adaptis.points": whole(1, 4096), "adaptis.threshold": number(0, 1),
    "adaptis.per_round": whole(1, 4096), "adaptis.patience": whole(1), "adaptis.min_area": whole(0),
    "model.ibs_weight": number(0), "model.layers": whole(1, 64),
    "ibs.strides": whole(4, 128, count="some"), "ibs.width": whole(1, 4096),
    "ibs.positions": whole(1, 4096), "ibs.similarity": number(-1, 1),
    "ibs.detections": whole(1, 65536), "ibs.weights": number(0, count=2),
    "queries.points": whole(1), "queries.weights": number(0, count=3),
    "queries.strides": whole(4, 128, count="some"), "queries.queries": whole(1, 65536),
    "queries.heads": whole(1, 4096), "queries.no_object": number(0, 1),
}


def rule_of(name, default=None, method=""):
    """What the setting `name` may be -> a Range, a tuple of values, or None: anything. A rule that
    the signature's own default breaks belongs to another method, which uses the same name."""
    section, _, key = name.rpartition(".")
    rule = RANGES.get(name)
    if section == "model":
        rule = RANGES.get(f"{method}.{key}", rule)
    if isinstance(default, bool):
        return True, False
    if default is not None and isinstance(rule, Range) and not rule.fits(default):
        return None
    return rule


def wrong(name, value, default=None, method=""):
    """Why a setting with this `default` in its signature cannot have this value; "" if it can."""
    rule = rule_of(name, default, method)
    if rule is None and default is None or (type(value), value) == (type(default), default):
        return ""
    if isinstance(rule, Range):
        return "" if rule.fits(value) else f"it must be {rule}"
    if rule:
        fits = any(v == value and type(v) is type(value) for v in rule)
        return "" if fits else f"it must be one of {', '.join(map(str, rule))}"
    fits = isinstance(value, (int, float) if isinstance(default, float) else type(default))
    return "" if fits else f"it must be of the type of {default!r}"
