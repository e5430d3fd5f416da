"""What each choice of Seamless's recipe for the toy street is worth, one change at a time.

    python -m lab.changes [--seeds 3] [--only NAME ...] [--out DIR] [flags of train.py]

A change is either some settings, or a function that changes the network after it is built. Each
trains with every seed as `python train.py` does, and is evaluated on 150 images of val. Differences
to "the recipe" are paired by seed, with 95% intervals; DIR/changes.png shows them. A run that DIR
has already is not repeated. One thread needs twenty minutes for a run, half of it with `--steps
475`: give `--threads 1`, run `--only "the recipe"` first, then one program for each core with its
own `--only`.
"""
import copy
import json
from pathlib import Path

import torch
from torch import nn

from lab import ends, evaluate, methods, runs, worlds
from lab.draw import new_figure, save
from lab.intervals import paired_t
from lab.recipes import RECIPES
from seamless import leaky

IMAGES = 150


def rph_of_stride_1(net):
    """Released code: the proposal head looks at every feature, not at every fourth."""
    net.proposal_head.conv.stride = (1, 1)
    return net


def leaky_pyramid(net):
    """Released code: LeakyReLU after the norms of the pyramid."""
    for blocks in (net.body.fpn.inner_blocks, net.body.fpn.layer_blocks):
        for block in blocks:
            block.append(leaky())
    return net


def released_start(net):
    """Released code: Xavier-normal weights outside of the ResNet, with small gains for outputs."""
    for part in (net.body.fpn, net.proposal_head, net.region_head, net.semantic_head):
        for m in part.modules():
            if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
                nn.init.xavier_normal_(m.weight)
    n = net.region_head.things + 1
    scores, boxes = net.region_head.out.weight.detach().split([n, 4 * n - 4])
    masks, logits = net.region_head.mask[-1].weight, net.semantic_head.out.weight
    for weight, gain in ((net.proposal_head.out.weight, 0.01), (scores, 0.01), (boxes, 0.001),
                         (masks, 0.01), (logits, 0.1)):
        nn.init.xavier_normal_(weight, gain)
    return net


class StuffOnly(nn.Module):
    """A semantic head that may not answer with a thing when it is tested."""

    def __init__(self, head, isthing):
        super().__init__()
        self.head, self.isthing = head, isthing

    def forward(self, features):
        logits = self.head(features)
        if self.training:
            return logits
        never = -1e4                                       # not -inf: resizing would make NaN of it
        return logits.masked_fill(self.isthing[None, :, None, None], never)


def without_void(net):
    """Fusion gives a pixel without an instance its likeliest stuff category, never void."""
    net.semantic_head = StuffOnly(net.semantic_head, net.isthing)
    return net


class Averaged(nn.Module):
    """A network that predicts with the running mean of its weights (EMA)."""

    def __init__(self, net, decay=0.99):
        super().__init__()
        self.net, self.decay = net, decay
        self.average = copy.deepcopy(net).requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        """One step of the mean, from the weights as they are."""
        for mean, now in zip(self.average.state_dict().values(), self.net.state_dict().values()):
            if mean.is_floating_point():
                mean.lerp_(now, 1 - self.decay)
            else:
                mean.copy_(now)

    def losses(self, images, targets):
        """Those of the network."""
        self.follow()
        return self.net.losses(images, targets)

    def predict(self, image, size=None):
        """By the mean."""
        return self.average.predict(image, size)

    def stages(self, fit):
        """Those of the network."""
        return self.net.stages(fit)


SGD = ["fit.adam=False", "fit.lr=0.04", "fit.decay=1e-4"]
DROPS = ["fit.cosine=False", "fit.drops=(0.6, 0.85)"]
CHANGES = {  # settings, or a function
    "the recipe": [],
    "SGD, lr 0.04": SGD,
    "SGD, rate falls twice by 10": [*SGD, *DROPS],
    "rate falls twice by 10": DROPS,
    "lr 0.004": ["fit.lr=0.004"],
    "lr 0.001": ["fit.lr=0.001"],
    "anchors of 2 strides": ["model.anchor_scale=2"],
    "positives from 0.7": ["model.positive=0.7"],
    "proposal head of stride 1": rph_of_stride_1,
    "canonical 56": ["model.canonical=56"],
    "canonical 112": ["model.canonical=112"],
    "300 proposals": ["model.proposals=300"],
    "128 boxes an image": ["model.rois=128"],
    "Lovasz loss for masks": ["model.mask_loss=lovasz"],
    "batches of 2, 1900 steps": ["fit.batch=2", "fit.lr=0.0014", "fit.steps=1900"],
    "input x 1.5, tiny body": ["crops.short_side=384", "body.name=tiny"],
    "scales from 0.8 to 1.25": ["crops.scale=(0.8, 1.25)"],
    "ISUS, one scale": ["crops.mode=isus", "crops.scale_things=(1, 1)"],
    "ISUS, scales from 0.8 to 1.25": ["crops.mode=isus", "crops.scale=(0.8, 1.25)",
                                      "crops.scale_things=(0.8, 1.25)"],
    "CUS, one scale": ["crops.mode=cus"],
    "standard box loss": ["model.box_loss=standard"],
    "LeakyReLU in the pyramid": leaky_pyramid,
    "released initial weights": released_start,
    "mean of the weights, 0.99": Averaged,
    "fusion without void": without_void,
}
UNTRAINED = ("fusion without void",)                       # predicts with the recipe's weights


def label(name, seed):
    """The name of the folder of a run."""
    return f"{name.replace(' ', '-').replace(',', '')}-{seed}"


def trained(method, build, settings, *, seed, folder, words, split, images, ready=False):
    """Trains as `python train.py --method METHOD` does on the street, with these settings and a
    network of `build` in place of the method's own, unless `folder` is `ready`; reads the
    checkpoint back -> the network, `images` scenes of a split, the World, and what a result says of
    the run."""
    import train
    methods.METHODS["changed"] = (build, methods.METHODS[method][1])
    RECIPES["changed", "street"] = RECIPES[method, "street"]
    flags = train.parse(["--method", "changed", "--seed", str(seed), "--out", str(folder),
                         "--eval-images", "1", *words])
    flags.set = [*settings, *flags.set]
    if not ready:
        train.run(flags)
    state = runs.load_checkpoint(folder / "last.pt")
    world = runs.World(flags.device, flags.precision, flags.threads or 0)
    scenes = worlds.world("street", split, images)
    net = train.build_model(state["settings"], scenes.categories, world, state, folder)
    return net, scenes, world, dict(seed=seed, split=split, minutes=state["seconds"] / 60,
                                    settings=state["settings"])


def measured(name, seed, out, words):
    """Trains a change and evaluates it on val, unless the folder `out` has it -> metrics."""
    change, path = CHANGES[name], out / label(name, seed) / "val" / "metrics.json"
    if not path.exists():
        settings, after = (change, None) if isinstance(change, list) else ([], change)
        ready = name in UNTRAINED

        def build(*how):
            net = methods.build_seamless(*how)
            return net if ready or after is None else after(net)
        net, val, world, about = trained(
            "seamless", build, settings, seed=seed, words=words, split="val", images=IMAGES,
            folder=out / label("the recipe" if ready else name, seed), ready=ready)
        evaluate.evaluate(after(net) if ready else net, val, world, path.parent, quiet=True,
                          about=about, short_side=about["settings"]["crops"]["short_side"])
    return json.loads(path.read_text())


def table(found):
    """{name: metrics of each seed} -> text: means over the seeds, and differences of PQ."""
    lines = [f"{'mean of seeds':32s}    PQ  PQ_th  PQ_st  minutes  PQ against the recipe, 95%"]
    for name, rows in found.items():
        means = [sum(r[k] for r in rows) / len(rows) for k in ("PQ", "PQ_th", "PQ_st")]
        minutes = sum(r["run"]["minutes"] for r in rows) / len(rows)
        change = paired_t(*([r["PQ"] for r in side] for side in (rows, found["the recipe"])))
        lines.append(f"{name:32s}" + "".join(f"{m:6.1f} " for m in means) + f"{minutes:8.1f}  "
                     + "{:+.1f} [{:+.1f}, {:+.1f}]".format(*change))
    return "\n".join(lines)


def draw(found, path):
    """{name: metrics of each seed} -> a picture: differences to the recipe in PQ of all categories,
    of things and of stuff. A dot is a seed, orange their mean, a bar its 95% interval."""
    against = found["the recipe"]

    def gain(name, key="PQ"):
        return paired_t(*([r[key] for r in side] for side in (found[name], against)))
    names = sorted((n for n in found if n != "the recipe"), key=gain)
    figure = new_figure(1 + 0.25 * len(names))
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    titles = {"PQ": "PQ", "PQ_th": "PQ of things", "PQ_st": "PQ of stuff"}
    for ax, (key, title) in zip(panels, titles.items()):
        for y, name in enumerate(names):
            mean, low, high = gain(name, key)
            ax.plot([low, high], [y, y], color="tab:blue", alpha=0.5, lw=4,
                    solid_capstyle="butt")                     # no longer than the interval
            ax.plot([r[key] - a[key] for r, a in zip(found[name], against)], [y] * len(against),
                    ".", color="black", ms=4)
            ax.plot(mean, y, "|", color="tab:orange", ms=10, mew=2)
        ax.axvline(0, color="gray", lw=0.8)
        ax.set(title=title, xlabel="points against the recipe")
        ax.set_yticks(range(len(names)), names)
    save(figure, path)


def main(argv=None):
    parser = ends.Parser(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=list(CHANGES), choices=list(CHANGES))
    parser.add_argument("--out", default="runs/changes")
    own, words = parser.parse_known_args(argv)
    found, out = {}, Path(own.out)
    for name in dict.fromkeys(["the recipe", *own.only]):
        rows = found[name] = []
        for seed in range(own.seeds):
            rows.append(measured(name, seed, out, words))
            print(f"{name}, seed {seed}: PQ {rows[-1]['PQ']:.1f}", flush=True)
    print(f"\n{table(found)}")
    draw(found, out / "changes.png")


if __name__ == "__main__":
    with ends.one_sentence("lab.changes"):
        main()
