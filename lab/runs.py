"""Runs and checkpoints: where a run computes, what its folder holds, how it is read back.

A run's folder holds last.pt (the checkpoint), log.csv (losses of each interval), curves.png,
metrics.json, predictions.png and the predictions in COCO panoptic format.
"""
import csv
import io
import json
import math
import os
import platform
import resource
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from data import Category, DataError
from lab.folders import write_file


MINUTE = 60.0  # seconds of training between two checkpoints, at most


class World:
    """Device, precision and the other processes of a run. One process: rank 0 of 1.

    precision "auto" is bf16 on a GPU and on CPUs that multiply bf16 in hardware, where it is two to
    three times as fast, else float32. `smallest_map` is the side in pixels of the coarsest feature
    map: on a CPU, oneDNN returns wrong bf16 gradients for strided convolutions of one pixel."""

    def __init__(self, device="auto", precision="auto", threads=0, smallest_map=2):
        self.rank = int(os.environ.get("RANK", 0))
        self.size = int(os.environ.get("WORLD_SIZE", 1))
        cuda = torch.cuda.is_available() and device != "cpu"
        if device == "cuda" and not cuda:
            raise DataError("--device cuda: no CUDA device was found; leave --device away to use "
                            "the CPU")
        if threads:
            torch.set_num_threads(threads)
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        supported = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
        fast = cuda or (supported() and smallest_map > 1)
        self.bf16 = precision == "bf16" or (precision == "auto" and fast)
        self.wrong_gradients = self.bf16 and not cuda and smallest_map < 2
        self.signal, self.saved = 0, time.monotonic()          # which one came; the last checkpoint

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def last(self, network, part):
        """The context of a part of a batch: gradients cross processes at the last `part` only."""
        return nullcontext() if part or self.size == 1 else network.no_sync()

    def memory(self):
        """Peak memory in GiB: of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated() / 2 ** 30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2 ** 20

    def hardware(self):
        """Device, number of processes and torch version, as text for a table."""
        name = f"{torch.get_num_threads()} threads of a {platform.machine()} CPU"
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        kind = "bf16" if self.bf16 else "float32"
        return f"{self.size} x {name}, {kind}, torch {torch.__version__.split('+')[0]}"

    def share(self, value):
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def gather(self, value):
        """Every rank's value, a list in the order of ranks, on every rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def align(self, model):
        """Gives every rank the statistics of rank 0's norms. Without it the ranks of a run on CPUs
        would evaluate networks that differ; on GPUs the norms are synchronised anyway."""
        for buffer in model.buffers():
            if self.size > 1 and buffer.is_floating_point():
                dist.broadcast(buffer, 0)

    def workers(self):
        """Loading processes by default: on a GPU one for each core of its share, on a CPU one, for
        the network needs the others."""
        if self.device.type == "cpu":
            return 1
        return max(1, os.cpu_count() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))

    @contextmanager
    def heed_signals(self):
        """Inside, Ctrl-C and SIGTERM only leave a note, which `due` reads after a step. A second
        Ctrl-C stops a single process at once. Several get the signal twice from torchrun."""
        def note(number, frame):
            self.signal = number
            if self.size == 1:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        before = {n: signal.signal(n, note) for n in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, at_interval):
        """Must the run be saved after this step? -> (yes or no, the signal that ends it or 0).

        Yes a minute after the last checkpoint, and when a signal came. Several processes agree on
        it, so they ask only at the end of an interval."""
        if self.size > 1 and not at_interval:
            return False, 0
        late = time.monotonic() - self.saved > MINUTE
        late, number = self.share((late, self.signal))
        return late or number > 0, number

    def say(self, *text):
        if self.rank == 0:
            print(*text, flush=True)

    def close(self):
        if dist.is_initialized():
            dist.destroy_process_group()


def leave_signals(worker):
    """Lets a loading process ignore Ctrl-C, which reaches it too: the run still needs its crops."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# --- Checkpoints ------------------------------------------------------------------------------

def save_checkpoint(path, state):
    """Writes a checkpoint. It is made in memory first: torch's own writer says of a full disk that
    it has an internal error."""
    content = io.BytesIO()
    torch.save(state, content)
    write_file(path, content.getbuffer())


def checkpoint_path(path):
    """The last.pt that --resume, --eval or --predict mean: a run's folder or the file itself."""
    path = Path(path)
    if path.name == "last.pt" and not path.exists() and path.parent.is_dir():
        path = path.parent
    if not path.is_dir():
        return path
    if (path / "log.csv").exists() and not (path / "last.pt").exists():
        raise DataError(f"{path} holds a run that was stopped before its first checkpoint: delete "
                        "the folder and train again")
    return path / "last.pt"


def load_file(path, remedy="give a run's folder or its last.pt"):
    """torch.load for tensors and plain values only, with one clear sentence where that fails."""
    if not Path(path).is_file():
        raise DataError(f"{path}: no such file; {remedy}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:
        raise DataError(f"{path} cannot be read as a checkpoint ({type(e).__name__}): it is "
                        "damaged, cut short or something else; take another copy") from e


def load_checkpoint(path):
    """The checkpoint in that file: model, optimiser, step, seconds, rng, settings, categories."""
    state = load_file(path)
    try:
        settings = state["settings"]
        parts = [*(settings[k] for k in ("body", "model", "crops", "fit")), state["model"],
                 state["optimiser"], *state["rng"]]
        fine = (all(isinstance(p, dict) for p in parts) and isinstance(settings["method"], str)
                and isinstance(settings["dataset"], str) and isinstance(settings["seed"], int)
                and isinstance(settings["crops"]["mode"], str) and int(state["step"]) >= 0
                and all(len(Category(*c).colour) == 3 for c in state["categories"]))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError):
        fine = False
    if not fine:
        raise DataError(f"{path} is no checkpoint of train.py; give a run's folder or its last.pt")
    return state


def restore(model, state, categories, path):
    """Loads the checkpoint's weights; refuses to read one set of categories as another."""
    known = [c[0] for c in state["categories"]]
    names = [c.name for c in categories]
    if known != names:
        raise DataError(f"{path} knows {len(known)} categories ({', '.join(known[:4])}, ...), the "
                        f"data set has {len(names)} ({', '.join(names[:4])}, ...): evaluate it on "
                        "its own data set")
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, TypeError, AttributeError) as e:
        raise DataError(f"{path} holds another network than these settings ask for: leave away "
                        "the flags that change body or model") from e
    return model


def random_state(device):
    """The state of this process's random numbers, as a dict for a checkpoint."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state, device):
    """The inverse of `random_state`."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def strict(value):
    """The same value with None for numbers that JSON does not have (NaN, infinities)."""
    if isinstance(value, dict):
        return {k: strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, type(None))) else str(value)


def write_json(path, value):
    """Strict JSON, written beside the file and moved into place."""
    write_file(path, (json.dumps(strict(value), indent=1, allow_nan=False) + "\n").encode())


def not_finite(world, names, step, begun):
    """The sentence for losses `names` that are no numbers from `step` on, with the advice that fits
    the cause. begun: the step at which this process began."""
    what = f"the loss is not finite from step {step} on ({', '.join(names) or 'the gradient'})"
    if step == begun + 1:
        why = ("no weight has changed yet, so the learning rate is not the cause: check the images "
               "and the weights that the run began with")
    else:
        why = "the training diverges: lower fit.lr or fit.clip"
    return f"{what}; {why}" + (", or try --precision float32" if world.bf16 else "")


# --- The log ----------------------------------------------------------------------------------

class Log:
    """log.csv: a row an interval. A resumed run drops the rows beyond its first step, and a row
    that a full disk cut. A new stage may bring losses of its own: the file gets more columns."""
    FIXED = ("lr", "images_per_second")

    def __init__(self, path, begin=0):
        self.path, self.rows, self.losses = path, [], []
        if path.exists() and begin:
            with open(path) as f:
                rows = [r for r in csv.DictReader(f) if None not in r.values()]
            self.rows = [r for r in rows if int(r["step"]) <= begin]
            fixed = {"step", *self.FIXED}
            self.losses = [k for k in (self.rows[0] if self.rows else {}) if k not in fixed]
            self.write()

    def add(self, step, losses, lr, speed):
        row = {"step": step, **{k: f"{v:.6g}" for k, v in losses.items()}, "lr": f"{lr:.6g}",
               "images_per_second": f"{speed:.3g}"}
        self.rows.append(row)
        new = [k for k in losses if k not in self.losses]
        self.losses += new
        if new:
            self.write()
        else:
            with open(self.path, "a", newline="") as f:
                csv.DictWriter(f, self.columns(), restval="").writerow(row)

    def columns(self):
        return ["step", *self.losses, *self.FIXED]

    def write(self):
        with open(self.path, "w", newline="") as f:
            out = csv.DictWriter(f, self.columns(), restval="")
            out.writeheader()
            out.writerows(self.rows)


def draw_curves(folder):
    """curves.png from log.csv: each loss over the steps."""
    from lab.draw import DPI, new_figure, pyplot
    with open(folder / "log.csv") as f:
        rows = list(csv.DictReader(f))
    figure = new_figure(4.5)
    ax = figure.subplots()
    names = [k for k in (rows[0] if rows else {}) if k not in ("step", *Log.FIXED)]
    for name in names:
        known = [r for r in rows if r[name]]                   # a stage has losses of its own
        ax.semilogy([int(r["step"]) for r in known], [max(float(r[name]), 1e-6) for r in known],
                    label=name, lw=2.5 if name == "total" else 1.2)
    ax.set(xlabel="step", ylabel="loss, mean of an interval")
    if names:
        ax.legend(ncols=2)
    ax.grid(alpha=0.3)
    figure.savefig(folder / "curves.png", dpi=DPI)
    pyplot().close(figure)
