"""From a command line to the four keyword dictionaries of a recipe: body, model, crops, fit.

A value comes from the signature of its constructor, from the recipe, or from the command line
(`--set model.points=8 fit.lr=2e-4`); the later one wins. `show` prints all of them.
"""
import ast
import inspect

import ibs
import isus
import seamless
from data import DataError
from lab import methods
from lab.recipes import RECIPES

SECTIONS = ("body", "model", "crops", "fit")
# What train.py itself gives to a sampler, by its flags, its process and fit.batch.
GIVEN = {"index", "batch", "seed", "start", "rank", "world", "self", "dataset", "levels"}


def options(function, leave=()):
    """The parameters of a function that have a default -> {name: default}."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters
            if p.name not in leave and p.default is not inspect.Parameter.empty}


def defaults(method, mode, fit):
    """Every setting of this method and this sampler -> {section: {name: default}}."""
    sampler = ibs.PairedCropSampler if mode == "paired" else isus.CropSampler
    crops = {"size": None, **options(sampler.__init__, GIVEN), "mode": mode}
    fixed = {"begin", "held_out"}
    return {"body": options(seamless.resnet_fpn), "model": methods.options(method),
            "crops": crops, "fit": options(fit, fixed)}


def parse_set(pairs):
    """["fit.lr=2e-4"] -> {("fit", "lr"): 0.0002}; a value that is no Python literal is text."""
    found = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot and section in SECTIONS):
            raise DataError(f"--set {pair}: write SECTION.NAME=VALUE, with a section among "
                            f"{', '.join(SECTIONS)}")
        try:
            found[section, key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[section, key] = text
    return found


def check_type(name, value, like):
    """Refuses text where a number is expected, and the like. `like` is the value it replaces."""
    numbers = (int, float)
    if like is None or value is None:
        return
    fine = isinstance(value, type(like))
    if isinstance(like, bool) or isinstance(value, bool):
        fine = isinstance(like, bool) and isinstance(value, bool)
    elif isinstance(like, numbers):
        fine = isinstance(value, numbers)
        fine = fine and not (isinstance(like, int) and value != int(value))
    elif isinstance(like, (tuple, list)):
        fine = isinstance(value, (tuple, list)) and all(isinstance(v, numbers) for v in value)
    elif callable(like):
        fine = isinstance(value, str)
    if not fine:
        raise DataError(f"--set {name}={value!r}: it must be of the type of {like!r}")


def resolve(dataset, method, fit, explicit, stored=None):
    """All settings of a run -> ({section: {name: value}}, {(section, name): where it comes from}).

    `fit` is train.py's function of that name; `explicit` {(section, name): value} is what the
    command line says; `stored` are the settings of a checkpoint, which replace the recipe. Raises
    DataError for a setting that does not exist, naming those that do."""
    if not stored and (method, dataset) not in RECIPES:
        known = ", ".join(sorted(d for m, d in RECIPES if m == method))
        raise DataError(f"there is no recipe for --method {method} on --dataset {dataset}; "
                        f"{method} has recipes for {known}")
    recipe = stored or RECIPES[method, dataset]
    own_mode = recipe["crops"]["mode"]
    mode = explicit.get(("crops", "mode"), own_mode)
    known = defaults(method, mode, fit)
    values = {s: dict(known[s]) for s in SECTIONS}
    origin = {(s, k): "signature" for s in SECTIONS for k in known[s]}
    if recipe["body"].get("name") == "unet":
        values["body"] = {}
        known["body"] = {"name": "unet"}
    for section in SECTIONS:
        for key, value in recipe[section].items():
            if key in known[section]:                          # another sampler has other keys
                values[section][key] = value
                origin[section, key] = "checkpoint" if stored else "recipe"
            elif mode == own_mode:
                raise KeyError(f"the recipe of {method} on {dataset} sets {section}.{key}, which "
                               "does not exist")
    for (section, key), value in explicit.items():
        if key not in known[section]:
            raise DataError(f"--set {section}.{key}: {method} on {dataset} has no such setting; "
                            f"{section} has {', '.join(sorted(known[section]))}")
        check_type(f"{section}.{key}", value, values[section][key])
        values[section][key] = value
        origin[section, key] = "command line"
    if values["body"].get("weights") in (None, "none"):        # from scratch nothing is frozen
        for key, value in (("frozen", 0), ("frozen_norm", False)):
            if key in values["body"] and ("body", key) not in explicit:
                values["body"][key] = value
    return values, origin


def show(values, origin):
    """A table of every setting, its value and where it comes from -> text."""
    lines = []
    for section in SECTIONS:
        for key, value in values[section].items():
            text = getattr(value, "__name__", None) or repr(value)
            where = origin.get((section, key), "recipe")
            lines.append(f"{section + '.' + key:24s}{text:36s}{where}")
    return "\n".join(lines)
