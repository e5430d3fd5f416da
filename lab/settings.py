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
from lab import methods, ranges, worlds
from lab.recipes import RECIPES

SECTIONS = ("body", "model", "crops", "fit")
FLAGS = {("model", "box_loss"): "--box-loss", ("crops", "mode"): "--sampler",
         ("fit", "steps"): "--steps"}                          # settings with a flag of their own
# What a job reads beside --set, --show, --out, --device, --precision and --threads.
JOBS = {
    "training": {"dataset", "method", "root", "train_split", "eval_split", "images", "eval_images",
                 "eval_every", "box_loss", "sampler", "steps", "seed", "workers", "resume",
                 "cache"},
    "--eval": {"eval", "dataset", "method", "root", "eval_split", "eval_images", "seed", "workers"},
    "--predict": {"predict", "dataset", "method", "seed"},
}
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
    crops = {"size": None, **options(sampler.__init__, GIVEN), "mode": "isus"}
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


def flag_of(section, key):
    """How the command line names a setting."""
    flag, name = FLAGS.get((section, key)), f"{section}.{key}"
    return f"{flag} ({name})" if flag else f"--set {name}"


def check_same_run(flags, stored, path):
    """Refuses flags that contradict the settings `stored` in a checkpoint, and unknown names."""
    for key, known in (("dataset", [*worlds.TOYS, *worlds.OFFICIAL]), ("method", methods.METHODS),
                       ("seed", None)):
        given = getattr(flags, key)
        if stored and given not in (None, stored[key]):
            raise DataError(f"{path} was trained with --{key} {stored[key]}, not {given}: leave "
                            f"--{key} away or train anew")
        if stored and known and stored[key] not in known:
            raise DataError(f"{path} is of --{key} {stored[key]}, which is none of "
                            f"{', '.join(known)}: register it first, as in README's example")


def check_flags(flags, job, dataset, toy):
    """Refuses numbers out of their range, and flags that this job or data set does not read."""
    every = set.union(*JOBS.values())
    of_data = ("root", "train_split", "eval_split", "cache") if toy else ("images",)
    for name, value in vars(flags).items():
        if value in (None, [], False):
            continue
        why = ranges.wrong(name, value) if name in ranges.RANGES else ""
        flag = "--" + name.replace("_", "-")
        if why:
            raise DataError(f"{flag} {value}: {why}")
        reader = job if name in every - JOBS[job] else f"--dataset {dataset}"
        if name in every - JOBS[job] or name in of_data:
            read = ", ".join("--" + n.replace("_", "-") for n in sorted(JOBS[job] - {*of_data}))
            raise DataError(f"{flag}: {reader} does not read it; {job} on {dataset} reads {read}")
    for section, key in parse_set(flags.set) if job != "training" else ():
        if section == "fit" or section == "crops" and key != "short_side":
            raise DataError(f"--set {section}.{key}: {job} does not read it; it reads body, model "
                            "and crops.short_side")


def unread(values, method):
    """Settings that exist but that nothing reads, given the others -> {(section, name): why}."""
    mode, found = values["crops"]["mode"], {}
    if mode != "isus":
        found |= {("crops", key): f"--sampler {mode} does not read it; isus does"
                  for key in ("scale_things", "canonical", "place")}
    if mode == "full":
        found["crops", "size"] = "--sampler full takes whole images; the other samplers read it"
    if method in ("adaptis", "queries"):
        found["fit", "adam"] = f"{method} has an optimiser of its own; seamless reads it"
    if method in ("seamless", "two", "affinity", "ibs", "maskrcnn"):
        found["fit", "lr_body"] = f"{method} has one rate, fit.lr; adaptis and queries have two"
    if method == "adaptis":
        found["fit", "decay_norms"] = "adaptis does not read it; the other methods do"
    if values["fit"]["poly"] or values["fit"]["cosine"]:
        found["fit", "drops"] = "the rate falls smoothly; set fit.poly=0 fit.cosine=False too"
    if values["fit"]["cosine"]:
        found["fit", "poly"] = "the rate falls like a cosine; set fit.cosine=False too"
    return found


def check_values(values, known, origin, method):
    """Refuses values out of their range and settings of the command line that nothing reads."""
    ignored = unread(values, method)
    for section in SECTIONS:
        for key, value in values[section].items():
            name, where = f"{section}.{key}", origin.get((section, key), "recipe")
            flag = flag_of(section, key)
            why = ranges.wrong(name, value, known[section].get(key), method=method)
            if why:
                label = flag if where == "command line" else f"{where}: {name}"
                raise DataError(f"{label} = {value!r}: {why}")
            if where == "command line" and (section, key) in ignored:
                raise DataError(f"{flag}: {ignored[section, key]}")


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
                raise DataError(f"the {'checkpoint' if stored else 'recipe'} of {method} on "
                                f"{dataset} sets {section}.{key}, which does not exist: remove it")
    for (section, key), value in explicit.items():
        if key not in known[section]:
            raise DataError(f"{flag_of(section, key)}: {method} on {dataset} has no such setting; "
                            f"{section} has {', '.join(sorted(known[section]))}")
        values[section][key] = value
        origin[section, key] = "command line"
    if values["body"].get("weights") in (None, "none"):        # from scratch nothing is frozen
        for key, value in (("frozen", 0), ("frozen_norm", False)):
            if key in values["body"] and ("body", key) not in explicit:
                values["body"][key] = value
    check_values(values, known, origin, method=method)
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
