"""Puts the ideas together: a panoptic network that trains on a GPU, or on two CPU cores with toys.

    data set -> sampler -> batch of crops -> model.losses() -> optimiser -> checkpoint
    full image -> model.predict() -> pq

    python train.py                                  toy street scenes; minutes on two CPU cores
    python train.py --dataset cells | parking        the toy problems of AdaptIS and of IBS
    python train.py --dataset cityscapes --root DIR  the real thing; coco, mapillary, idd likewise
    python train.py --method seamless|two|affinity|ibs|queries|adaptis|maskrcnn
    python train.py --box-loss cabb|standard --sampler isus|cus|uniform|full|paired
    python train.py --set fit.lr=2e-4 model.window=8 any number of the recipe; --show prints all
    python train.py --resume RUN                     goes on as if the run had not stopped
    python train.py --resume RUN --out OTHER         the same in a copy; RUN stays as it is
    python train.py --eval RUN/last.pt               full images, at their native size
    python train.py --predict RUN/last.pt image.png  segments image files
    python train.py --dataset own --root DIR         your own labels: lab/own_images.md
    torchrun --nproc_per_node=8 train.py ...         one process a GPU

This file is the loop and what surrounds it, in the order of a run: settings, data, model, `fit`,
evaluation. Recipes stand in lab/recipes.py, the methods in lab/methods.py, checkpoints and logs in
lab/runs.py, the metrics in lab/evaluate.py. A run's folder holds last.pt, log.csv, curves.png,
metrics.json, predictions.png and the predictions in COCO panoptic format.
"""
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader

import ibs
import isus
from data import Category, DataError
from lab import ends, evaluate, folders, index, methods, predict, runs, settings, worlds
from lab.ranges import RANGES
from lab.worlds import OFFICIAL, open_dataset

SAMPLERS = RANGES["crops.mode"]


# --- Data -------------------------------------------------------------------------------------

def build_sampler(dataset, args, world, folder, start):
    """The endless supply of batches, from step `start` on; `crops` are its keyword arguments."""
    crops = dict(args["crops"])
    mode, batch, parts = crops["mode"], args["fit"]["batch"], args["fit"]["accumulate"]
    if batch % (world.size * parts):
        raise DataError(f"fit.batch={batch} cannot be shared among {world.size} processes in "
                        f"fit.accumulate={parts} parts; take a multiple of {world.size * parts}")
    table = None
    if isinstance(dataset, worlds.Drawn):
        dataset.fill(os.cpu_count() if args["workers"] else 0)  # nothing is drawn in the timed loop
        table = isus.build_index(dataset)
    elif mode in ("isus", "cus", "paired"):                    # labels on disk are read once
        path = folder.parent / f"index-{args['dataset']}-{args['train_split'] or 'train'}.pt"
        table = index.cached_index(dataset, path, world.rank, world_size=world.size,
                                   workers=args["workers"])
    place = dict(batch=batch // world.size // parts, seed=args["seed"], start=start * parts,
                 rank=world.rank, world=world.size)
    canonical = args["model"].get("canonical")
    if mode == "isus" and canonical not in (None, crops["canonical"]):
        raise DataError(f"crops.canonical={crops['canonical']} and model.canonical={canonical}: "
                        "the sampler must balance the network's own levels; set both alike")
    try:
        if mode == "paired":
            crops.pop("mode")
            return ibs.PairedCropSampler(dataset, table, **crops, **place)
        return isus.CropSampler(dataset, table, **crops, **place)
    except ValueError as e:
        raise DataError(f"--sampler {mode}: {e}") from e


# --- The loop ---------------------------------------------------------------------------------

class Losses(nn.Module):
    """DistributedDataParallel hooks only `forward`. So `forward` returns the losses."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images, targets):
        return self.model.losses(images, targets)


def rate(step, steps, warmup, drops, *, poly, cosine=False):
    """The factor of the learning rate at `step` of a stage of `steps` -> float.

    Linear warm-up from a third, over a quarter of the steps at most; then a tenth after each share
    of `drops`, or, where poly > 0, (1 - step / steps) ** poly, or with `cosine` half a cosine."""
    warmup = min(warmup, steps // 4)
    if step < warmup:
        return 1 / 3 + 2 / 3 * step / warmup
    if cosine:
        return (1 + math.cos(math.pi * step / steps)) / 2
    if poly:
        return (1 - step / steps) ** poly
    return 0.1 ** sum(step >= drop * steps for drop in drops)


def fit(model, batches, world, folder, save, begin=None, held_out=None, *, steps=1000, batch=4,
        accumulate=1, lr=0.01, lr_body=0.0, decay=1e-4, decay_norms=True, adam=False, warmup=0,
        drops=(), poly=0.0, cosine=False, clip=10.0, interval=50):
    """Trains the model stage by stage -> seconds spent. A model offers losses(images, targets),
    stages(plan) -> [(name, optimiser, steps)] and predict(image, size) -> Prediction.

    batches: an iterator of (images [B, 3, h, w], targets). save(optimiser, step, seconds, interval)
    writes a checkpoint: a minute after the last one, at the end, and before a signal ends the run;
    `interval` is what the interval has summed so far. `begin` is the checkpoint to go on from.
    `held_out(step, seconds)` is called after each step; it evaluates now and then. lr_body is the
    rate of the backbone, for methods whose `stages` has one; adam: AdamW, not SGD; clip bounds the
    gradient's norm. A step draws `accumulate` parts of a batch and adds up their gradients.
    `batch` is that of all processes and parts together. The rate does not grow with it.
    "waits" in the log is the share of time without a batch. A step that logs nothing does not wait
    for the GPU: it sums the losses. They are read, and tested for NaN, once an interval and before
    a checkpoint."""
    plan = dict(steps=steps, lr=lr, lr_body=lr_body or lr, decay=decay, decay_norms=decay_norms,
                adam=adam)
    begun, clock = (begin["step"], begin["seconds"]) if begin else (0, 0.0)
    log = runs.Log(folder / "log.csv", begun) if world.rank == 0 else None
    done, first = begun, 0
    for name, optimiser, length in model.stages(plan):
        last = first + length                                  # this stage: steps first..last - 1
        if done >= last and last < steps:
            first = last
            continue
        trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
        for p in model.parameters():
            p.requires_grad_(id(p) in trained)
        trained = [p for p in model.parameters() if p.requires_grad]
        rates = [group["lr"] for group in optimiser.param_groups]
        sums, count, tick = {}, 0, time.time()
        if begin and begun > first:
            optimiser.load_state_dict(begin["optimiser"])
            sums, count, spent = begin["interval"]
            sums, tick = {k: v.to(world.device) for k, v in sums.items()}, tick - spent
        network = Losses(model)
        if world.size > 1:
            network = nn.parallel.DistributedDataParallel(network, find_unused_parameters=True)
        good, waited = count, 0.0      # steps with a finite gradient; seconds without a batch
        while done < last:
            model.train()
            factor = rate(done - first, length, warmup, drops, poly=poly, cosine=cosine)
            for group, base in zip(optimiser.param_groups, rates):
                group["lr"] = base * factor
            optimiser.zero_grad(set_to_none=True)
            for part in range(1, accumulate + 1):
                waited -= time.time()
                images, targets = next(batches)
                waited += time.time()
                images = images.to(world.device, memory_format=torch.channels_last,
                                   non_blocking=True)
                with world.last(network, part == accumulate):
                    with world.autocast():
                        losses = network(images, [t.to(world.device) for t in targets])
                    total = sum(losses.values())
                    (total / accumulate).backward()
                for key, value in (*losses.items(), ("total", total)):
                    sums[key] = sums.get(key, 0) + value.detach() / accumulate
            norm = nn.utils.clip_grad_norm_(trained, clip)
            optimiser.step()
            done, count, good = done + 1, count + 1, good + torch.isfinite(norm)
            logs = done % interval == 0 or done == last        # a stage ends: its time counts
            saves, number = world.due(logs)
            saves = saves or done == steps
            if logs or saves:
                means = {k: v.item() / count for k, v in sums.items()}
                bad = [k for k, v in means.items() if not math.isfinite(v)]
                if bad or good < count:
                    wrong = min(done - count + int(good) + 1, done)
                    raise DataError(runs.not_finite(world, bad, wrong, begun=begun))
            if logs:
                each, late = (time.time() - tick) / count, waited / (time.time() - tick)
                clock, sums, count, good = clock + time.time() - tick, {}, 0, 0
                if log:
                    log.add(done, means, optimiser.param_groups[0]["lr"], batch / each)
                minutes, seconds = divmod(round(each * (steps - done)), 60)
                world.say(f"step {done:6d}/{steps}  "
                          + "  ".join(f"{k} {v:.3f}" for k, v in means.items())
                          + f"  {batch / each:.1f} img/s  {world.memory():.1f} GiB  "
                          f"waits {late:.0%}  "
                          f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d} left")
                tick, waited = time.time(), 0.0
            if saves:
                save(optimiser, done, clock, (sums, count, time.time() - tick))
            if number:
                text = world.share(world.rank == 0 and folders.how_to_go_on(folder))
                raise folders.Stopped(text, number)
            if held_out and held_out(done, clock):
                tick, waited = time.time(), 0.0                # evaluation is no training time
        first = last
    return clock


# --- A run ------------------------------------------------------------------------------------

def build_model(args, categories, world, state=None, path=""):
    """The model of the settings, on its device; with the weights of a checkpoint, if given."""
    if state:                                                  # its weights replace any others
        args = {**args, "body": {**args["body"]}}
        args["body"].pop("weights", None)
    model = methods.build(args["method"], categories, args)
    if state:
        runs.restore(model, state, categories, path)
    model = model.to(world.device, memory_format=torch.channels_last)
    if world.size > 1 and world.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model


def train(args, world, folder, state=None):
    """From `state` (a checkpoint) or from the beginning to the evaluation -> its metrics."""
    dataset = worlds.open_training(args)
    torch.manual_seed(args["seed"])
    model = build_model(args, dataset.categories, world, state, folder / "last.pt")
    torch.manual_seed(args["seed"] + 1000 * world.rank + 1)
    if state:
        own = state["rng"][world.rank if world.rank < len(state["rng"]) else 0]
        runs.set_random_state(own, world.device)
    weights = sum(p.numel() for p in model.parameters())
    world.say(f"{args['method']} on {args['dataset']}: {len(dataset)} training images, "
              f"{weights / 1e6:.2f}M parameters, {world.size} x {world.device.type}, "
              f"{'bf16' if world.bf16 else 'float32'}, into {folder}")
    sampler = build_sampler(dataset, args, world, folder, start=state["step"] if state else 0)
    loader = DataLoader(sampler, batch_size=None, num_workers=args["workers"],
                        pin_memory=world.device.type == "cuda", generator=torch.Generator(),
                        worker_init_fn=runs.leave_signals)

    def save(optimiser, step, seconds, interval):
        rng = world.gather(runs.random_state(world.device))
        if world.rank == 0:
            runs.save_checkpoint(folder / "last.pt", {
                "model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step,
                "seconds": seconds, "interval": interval, "rng": rng, "settings": args,
                "categories": [[c.name, bool(c.isthing), list(c.colour)]
                               for c in dataset.categories]})
        world.saved = time.monotonic()

    def test(split, into, seconds=0.0, quiet=False):
        about = dict(seed=args["seed"], split=split, minutes=seconds / 60,
                     steps=args["fit"]["steps"], batch=args["fit"]["batch"], settings=args,
                     command=" ".join(["python", *sys.argv]), hardware=world.hardware())
        return evaluate.evaluate(model, open_dataset(args, split), world, into, about=about,
                                 short_side=args["crops"]["short_side"], quiet=quiet,
                                 images=args["eval_images"], workers=args["workers"])

    def held_out(step, seconds):
        if not args["eval_every"] or step % args["eval_every"] or step == args["fit"]["steps"]:
            return False
        result = test("val", folder / "val", seconds, quiet=True)
        if world.rank == 0:
            evaluate.add_to_curve(folder / "curve.csv", step, seconds, result)
        return True

    with world.heed_signals():
        seconds = fit(model, iter(loader), world, folder, save, state, held_out, **args["fit"])
    if world.rank == 0:
        runs.draw_curves(folder)
    return test("test", folder, seconds)


def parse(argv):
    """The command line -> a Namespace of flags, None where one is missing."""
    p = ends.Parser(__doc__)
    p.add_argument("--dataset", choices=[*worlds.TOYS, *OFFICIAL], help="default: street")
    p.add_argument("--root", help="folder of a real data set, in its official layout")
    p.add_argument("--train-split", help="its training part, if not the official one")
    p.add_argument("--eval-split", help="its evaluation part, if not the official one")
    p.add_argument("--cache", metavar="DIR", help="keep its decoded training images there")
    p.add_argument("--images", type=int, help="toy images to train on")
    p.add_argument("--eval-images", type=int, help="images to evaluate on, 0: all")
    p.add_argument("--method", choices=list(methods.METHODS), help="default: seamless; on cells "
                   "adaptis, on parking ibs")
    p.add_argument("--box-loss", choices=list(methods.LOSSES["box_loss"]), help="of seamless")
    p.add_argument("--sampler", choices=SAMPLERS, help="which crops to train on")
    p.add_argument("--steps", type=int, help="length of the training")
    p.add_argument("--eval-every", type=int, help="steps between evaluations on the val "
                   "split, written to curve.csv; 0: none")
    p.add_argument("--set", nargs="+", action="extend", default=[], metavar="SECTION.NAME=VALUE",
                   help="any setting of body, model, crops, fit")
    p.add_argument("--show", action="store_true", help="print all settings and stop")
    p.add_argument("--resume", metavar="RUN", help="go on with the run in this folder; with --out "
                   "on a copy in another folder")
    p.add_argument("--eval", metavar="RUN/last.pt", help="evaluate on full images")
    p.add_argument("--predict", nargs="+", metavar=("RUN/last.pt", "IMAGE"), help="segment images")
    p.add_argument("--out", help="the run's folder; default: the first free runs/DATASET-METHOD-N")
    p.add_argument("--seed", type=int, help="of weights and crops; default 0")
    p.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    p.add_argument("--precision", choices=["auto", "bf16", "float32"], default="auto")
    p.add_argument("--workers", type=int, help="loading processes; default: from the cores")
    p.add_argument("--threads", type=int, help="of the CPU, 0: all")
    return p.parse_args(argv)


def arguments(flags, state=None, path="", job="training"):
    """Flags, recipe or checkpoint, and signatures -> (all settings of the run, their origins)."""
    stored = state["settings"] if state else {}
    settings.check_same_run(flags, stored, path)
    dataset = stored.get("dataset") or flags.dataset or "street"
    own = {"cells": "adaptis", "parking": "ibs"}.get(dataset, "seamless")
    method = stored.get("method") or flags.method or own
    settings.check_flags(flags, job, dataset, toy=dataset in worlds.TOYS)
    explicit = {("model", "box_loss"): flags.box_loss, ("crops", "mode"): flags.sampler,
                ("fit", "steps"): flags.steps}
    explicit = {k: v for k, v in explicit.items() if v is not None}
    explicit |= settings.parse_set(flags.set)
    values, origin = settings.resolve(dataset, method, fit, explicit, stored)
    plain = dict(root=None, train_split=None, eval_split=None, cache=None, images=0, eval_images=0,
                 seed=0, eval_every=0)
    for key, default in plain.items():
        given = getattr(flags, key)
        plain[key] = stored.get(key, default) if given is None else given
    return {"dataset": dataset, "method": method, **plain, **values}, origin


def run(flags):
    """Decides what is asked for and does it -> metrics, where it evaluates."""
    jobs = {"--eval": flags.eval, "--predict": flags.predict and flags.predict[0],
            "--resume": flags.resume}
    asked = [job for job, path in jobs.items() if path is not None]
    if len(asked) > 1:
        raise DataError("--eval, --predict and --resume: ask for one of them at a time")
    path = runs.checkpoint_path(jobs[asked[0]]) if asked else None
    state = runs.load_checkpoint(path) if path else None
    job = "training" if flags.resume or not asked else asked[0]
    args, origin = arguments(flags, state, path, job=job)
    if flags.show:
        return print(settings.show(args, origin))
    size, extra = args["crops"]["size"], args["body"].get("extra", 0)
    smallest = math.ceil(max(size) / (32 << extra)) if size else 2
    world = runs.World(flags.device, flags.precision, flags.threads or 0, smallest)
    args["workers"] = world.workers() if flags.workers is None else flags.workers
    try:
        if flags.predict:
            out = Path(flags.out or path.parent, "predict")
            categories = [Category(*c) for c in state["categories"]]
            model = build_model(args, categories, world, state, path)
            return predict.predict_files(model, flags.predict[1:], categories, world, out,
                                         short_side=args["crops"]["short_side"])
        if flags.eval:
            dataset = open_dataset(args, "test")
            model = build_model(args, dataset.categories, world, state, path)
            out = folders.make_folder(flags.out or path.parent / "eval")
            return evaluate.evaluate(model, dataset, world, out, images=args["eval_images"],
                                     short_side=args["crops"]["short_side"],
                                     workers=args["workers"])
        return start(args, world, state, flags.out, source=path and path.parent)
    finally:
        world.close()


def start(args, world, state, out, source):
    """Takes the run's folder and trains there; from `source` on, if that is a run's folder."""
    if world.wrong_gradients:
        raise DataError("--precision bf16: a CPU gives wrong gradients where the coarsest feature "
                        "map has one pixel; take --precision float32 or a larger crops.size")
    if state and args["fit"]["steps"] < state["step"]:
        raise DataError(f"--steps {args['fit']['steps']}: the run in {source} has done "
                        f"{state['step']} already; give more steps, or --eval {source}")
    first, new = world.rank == 0, not (source or out)
    folder = Path(out or source or world.share(
        first and folders.new_folder(f"{args['dataset']}-{args['method']}")))
    with folders.taken(folder, source, new) if first else nullcontext():
        if source and first and not folder.samefile(source):
            folders.branch(source, folder)
        return train(args, world, folder, state)


def main(argv=None):
    """Exit code 2 and one sentence for what the user can mend, 130 after Ctrl-C."""
    with ends.one_sentence("train.py"):
        run(parse(argv))


if __name__ == "__main__":
    main()
