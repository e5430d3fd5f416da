"""The demo of affinity_head.py: what affinities cost, and a head that gives objects more than their
boxes. On balls and crates (lab/balls.py) with boxes that are 25% too small.

The gain is not affinity's alone. Every box is too small by the same share, so a constant undoes it:
Seamless's rules on boxes enlarged by 4/3 reach the same PQ as the head. And of all readings only
the head sees the image. How much affinities themselves add is an open experiment.
"""
import math
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from affinity_head import (IGNORE, InstanceAffinityHead, apply_affinity, box_gate,
                           dynamic_potential, match_segments, panoptic_matching_loss, segment)
from lab.balls import ISTHING, scene
from lab.draw import new_figure, pyplot, save
from pq import PanopticQuality
from seamless import fuse

PAPER = dict(hw=200 * 325, channels=128, potentials=153)       # 800x1300, C, D + N_st
TEST = 10 ** 7                                                 # the first image of the test split
LARGE = dict(size=(256, 384), count=(20, 40))                  # four times as many pixels, objects


# --- The cost of A Psi ------------------------------------------------------------------------

def multiply_adds(hw, channels, potentials):
    """Multiply-adds of Q (Q^T Psi) and of (Q Q^T) Psi for Q [hw, C] and Psi [hw, K]."""
    return 2 * hw * channels * potentials, hw ** 2 * (channels + potentials)


def resident(peak=False):
    """Bytes of memory that this process holds now, or held at most. Linux knows both. Elsewhere it
    is the peak, which includes that of the process that started this one."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def measure(order, sizes, channels=128, potentials=153):
    """Prints pixels, seconds and peak bytes beyond Q and Psi for each number of pixels, ascending:
    order "right" computes Q (Q^T Psi), "left" (Q Q^T) Psi."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.set_num_threads(2)
    warm = torch.rand(1024, 1024, device=device)               # loads the libraries
    for _ in range(3):
        apply_affinity(warm, warm)
        warm @ warm.T @ warm
    for hw in sizes:
        q, psi = (torch.rand(hw, n, device=device) for n in (channels, potentials))
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if cuda else resident()
        started = time.perf_counter()
        out = apply_affinity(q, psi) if order == "right" else q @ q.T @ psi / hw
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated() if cuda else resident(peak=True)
        print(hw, seconds, max(peak - before, out.numel() * 4), flush=True)
        del q, psi, out


def measured(order, sizes):
    """`measure` in a process of its own, with a peak of its own -> {pixels: (seconds, bytes)}."""
    command = [sys.executable, "-m", "lab.demo_affinity", order, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, check=True,
                          cwd=Path(__file__).parent.parent)
    rows = [line.split() for line in done.stdout.splitlines()]
    return {int(hw): (float(seconds), float(size)) for hw, seconds, size in rows}


def print_costs(left, right):
    """The paper's numbers beside ours; left, right: what `measured` returned."""
    (cheap, dense), hw, most = multiply_adds(*PAPER.values()), PAPER["hw"], max(left)
    (seconds, size), (dense_seconds, dense_size) = right[hw], left[most]
    print(f"""800x1300 pixels, d = 4, C = 128, 100 + 53 channels        paper | here
  A in float32                                          15.7 GB | {4 * hw ** 2 / 2 ** 30:.1f} GiB
  Q (Q^T Psi), operations                             5 billion | {2 * cheap / 1e9:.2f} billion
  saved against (Q Q^T) Psi                               99.8% | {100 * (1 - cheap / dense):.1f}%
  measured: Q (Q^T Psi) of {hw} pixels | {seconds:.2f} s, {size / 2 ** 20:.0f} MiB
  measured: (Q Q^T) Psi of {most} pixels | {dense_seconds:.2f} s, {dense_size / 2 ** 20:.0f} MiB""",
          flush=True)


# --- A head that learns on small boxes --------------------------------------------------------

class Encoder(nn.Module):
    """A small pyramid: image [B, 3, H, W] -> {4, 8, 16, 32: [B, width, ..]}.

    It is given the place of each pixel too. It could do without: with places set to 0 a head of 320
    steps (one seed) reached PQ 78.9 on 150 images, with them 78.0."""

    def __init__(self, width=32):
        super().__init__()

        def block(c_in, stride):
            return nn.Sequential(nn.Conv2d(c_in, width, 3, stride, 1, bias=False),
                                 nn.BatchNorm2d(width), nn.ReLU(inplace=True))
        self.stem = nn.Sequential(block(5, 2), block(width, 1), block(width, 2), block(width, 1))
        self.down = nn.ModuleList(nn.Sequential(block(width, 2), block(width, 1))
                                  for _ in range(3))

    def forward(self, images):
        h, w = images.shape[-2:]
        y, x = (torch.arange(n, device=images.device) / 128 - n / 256 for n in (h, w))
        place = torch.stack([y[:, None].expand(h, w), x.expand(h, w)])
        place = place.expand(len(images), -1, -1, -1)
        f = {4: self.stem(torch.cat([images - .5, place], 1))}
        for stride, down in zip((8, 16, 32), self.down):
            f[stride] = down(f[stride // 2])
        for stride in (16, 8, 4):
            coarse = F.interpolate(f[2 * stride], f[stride].shape[-2:], mode="bilinear")
            f[stride] = f[stride] + coarse
        return f


def potential(image, logits, found):
    """Psi and the categories of its channels, of a scene."""
    return dynamic_potential(found, logits, ISTHING, image_size=image.shape[1:])


def mean_loss(outputs, batch):
    """The matching loss of P [K, h, w] of each of a list of scenes, their mean."""
    losses = [panoptic_matching_loss(p.cpu(), found, target, isthing=ISTHING)
              for p, (_, target, _, found) in zip(outputs, batch)]
    return sum(losses) / len(losses)


def train(encoder, head, steps, device):
    """Encoder and head learn from the panoptic matching loss alone, `steps` steps of 8 images."""
    parameters, began = [*encoder.parameters(), *head.parameters()], time.time()
    optimiser = torch.optim.AdamW(parameters, 2e-3, weight_decay=1e-4)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 2e-3 * min(1, (step + 1) / 20) * (1 - step / steps)
        batch = [scene(8 * step + k) for k in range(8)]
        psi = [potential(image, logits, found)[0].to(device) for image, _, logits, found in batch]
        outputs = head(encoder(torch.stack([image for image, *_ in batch]).to(device)), psi)
        loss = mean_loss(outputs, batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss of P {loss.item():.3f}, of Psi "
                  f"{mean_loss(psi, batch).item():.3f}  {time.time() - began:.0f} s", flush=True)


def rules(logits, found, size, factor=1.0):
    """Seamless's fusion of a scene without masks; an object's mask is its category in its box,
    enlarged by `factor` -> segments, categories, scores."""
    semantic = F.interpolate(logits.softmax(0)[None], size=size, mode="bilinear")[0].argmax(0)
    low, high = found["boxes"].split(2, 1)
    middle, half = (low + high) / 2, factor * (high - low) / 2
    boxes = torch.cat([middle - half, middle + half], 1)
    masks = box_gate(boxes, size, size) & (semantic == found["categories"][:, None, None])
    return fuse(masks, found["scores"], found["categories"], semantic=semantic, isthing=ISTHING,
                stuff_area=0)


@torch.no_grad()
def read(encoder, head, indices, device, sum_over=None, **how):
    """Images `indices` by each reading -> {reading: what PanopticQuality computes}. `sum_over`:
    affinities are divided by this number and not by HW: a sum, with the weight of small images."""
    scores = {}
    for i in indices:
        image, target, logits, found = scene(i, **how)
        size = tuple(image.shape[1:])
        psi, channels = potential(image, logits, found)
        p = head(encoder(image[None].to(device)), [psi.to(device)])[0].cpu()
        if sum_over:
            p = psi + (p - psi) * psi[0].numel() / sum_over
        results = {
            "argmax over the potential": segment(psi, channels, found["scores"], size=size),
            "Seamless's fusion heuristic": rules(logits, found, size),
            "affinity head": segment(p, channels, found["scores"], size=size),
            "the heuristic, boxes x 4/3": rules(logits, found, size, factor=4 / 3)}
        for name, (segments, categories, _) in results.items():
            score = scores.setdefault(name, PanopticQuality(ISTHING))
            score.update(segments, categories, target.segments, gt_categories=target.categories)
    return {name: score.compute() for name, score in scores.items()}


def print_rows(rows):
    """Reading, PQ, things, stuff."""
    for name, result in rows.items():
        print(f"  {name:30s}" + "".join(f" {result[k]:7.1f}" for k in ("PQ", "PQ_th", "PQ_st")))


def show(steps, device="cpu", out="figures"):
    """Costs, a head of `steps` steps, its table on unseen and on larger images, the figures."""
    from lab import shapes
    torch.manual_seed(0)
    torch.set_num_threads(min(2, torch.get_num_threads()))
    quick, full = steps < 100, steps > 1000
    sizes = [1024, 2048, 4096] if quick else [1024, 2048, 4096, 8192, 16384]
    left = measured("left", sizes)
    more = [PAPER["hw"]] if quick else [32768, PAPER["hw"], 131072]
    right = measured("right", sizes + more)
    print_costs(left, right)
    encoder, head = Encoder().to(device), InstanceAffinityHead(32, 64).to(device)
    train(encoder, head, steps, device=device)
    encoder.eval()
    head.eval()
    unseen = range(TEST, TEST + (6 if quick else 500 if full else 150))
    print(f"{len(unseen)} unseen images" + "PQ  things   stuff".rjust(35))
    print_rows(read(encoder, head, unseen, device=device))
    print("Images of four times as many pixels and objects; the head was trained on small ones")
    some = unseen[:len(unseen) // 3]
    mean = read(encoder, head, some, device=device, **LARGE)
    total = read(encoder, head, some, device=device, sum_over=32 * 48, **LARGE)
    print_rows({"argmax over the potential": mean["argmax over the potential"],
                "head, A Psi / HW": mean["affinity head"],
                "head, A Psi as a sum": total["affinity head"]})
    cases = recovered(encoder, head, unseen[:60], device=device)
    draw_figure(Path(out, "affinity_head.png"), cases, left, right=right)
    shapes.affinity_head(out, encoder, head)


# --- The figure -------------------------------------------------------------------------------

def affinity_row(head, features, point, stride=4):
    """The affinities of the pixel at `point` (x, y) of the first image with all others, times HW
    -> [h, w]. Positive: it adds what that pixel says; negative: it subtracts it."""
    queries, keys = head.factors(features)
    h, w = features[4].shape[-2:]
    i = int(point[1] // stride) * w + int(point[0] // stride)
    return (keys[0] @ queries[0, i]).view(h, w)


@torch.no_grad()
def recovered(encoder, head, indices, device):
    """Images where the head recovers pixels of an object, best first -> dictionaries: image, boxes,
    the winning channels before, after and in truth, a recovered point and its affinities."""
    found_images = []
    for i in indices:
        image, target, logits, found = scene(i)
        psi, _ = potential(image, logits, found)
        features = encoder(image[None].to(device))
        p = head(features, [psi.to(device)])[0].cpu()
        channel = match_segments(found, target, ISTHING)
        truth = torch.cat([torch.tensor([IGNORE]), channel])[target.segments]
        before, after = (F.interpolate(x[None], size=image.shape[1:], mode="bilinear")[0].argmax(0)
                         for x in (psi, p))
        known = (truth >= 0) & (truth < len(found["boxes"]))
        gained = known & (before != truth) & (after == truth)
        lost = (before == truth) & (after != truth)
        if not gained.any():
            continue
        k = int(torch.bincount(truth[gained]).argmax())        # the object that gained most
        y, x = torch.where(gained & (truth == k))
        middle = (found["boxes"][k, :2] + found["boxes"][k, 2:]) / 2
        far = ((x - middle[0]) ** 2 + (y - middle[1]) ** 2).argsort()[len(y) * 3 // 4]
        point = (x[far].item(), y[far].item())
        found_images.append(dict(
            image=image, boxes=found["boxes"], before=before, after=after, truth=truth,
            point=point, row=affinity_row(head, features, point).cpu(),
            gain=int(gained.sum()) - int(lost.sum())))
    return sorted(found_images, key=lambda c: -c["gain"])


def draw_image(axes, case):
    """One row: image and boxes, channels before, affinities of the cross (yellow adds, blue
    subtracts), channels after, truth."""
    things = torch.tensor(pyplot().get_cmap("tab20").colors)[torch.arange(0, 20, 2).repeat(4)]
    paint = torch.cat([torch.tensor([[.80] * 3, [.60] * 3]), things]).float()      # stuff is grey
    count = len(case["boxes"])
    axes[0].imshow(case["image"].permute(1, 2, 0).numpy())
    for x1, y1, x2, y2 in case["boxes"].tolist():
        for colour, width, style in (("white", 1.2, "-"), ("black", .6, "--")):
            axes[0].plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], style, color=colour, lw=width)
    for ax, name in ((axes[1], "before"), (axes[3], "after"), (axes[4], "truth")):
        channels = case[name]
        index = torch.where(channels >= count, channels - count, channels + 2)
        shown = torch.where((channels == IGNORE)[..., None], torch.ones(3), paint[index])
        ax.imshow(shown.numpy())
    height, width = case["truth"].shape
    limit = case["row"].abs().max().item()
    axes[2].imshow(case["row"].numpy(), vmin=-limit, vmax=limit,
                   extent=(0, width, height, 0))
    for ax in axes[1:4]:
        ax.plot(*case["point"], "k+", ms=9, mew=1.6)
    for ax in axes:
        ax.set(xlim=(0, width), ylim=(height, 0))
        ax.axis("off")


def draw_costs(axes, left, right):
    """Peak memory and seconds of both orders over the number of pixels."""
    for ax, part, label in zip(axes, (1, 0), ("peak memory, MiB", "seconds")):
        for values, style, name in ((left, "s--", "(Q Qᵀ) Ψ"), (right, "o-", "Q (Qᵀ Ψ)")):
            unit = 2 ** 20 if part else 1
            ax.loglog(list(values), [v[part] / unit for v in values.values()], style, label=name)
        ax.set(xlabel="pixels of the map, HW", ylabel=label)
        ax.grid(alpha=.3)
    n = torch.tensor([1024., 131072.])
    axes[0].loglog(n, n ** 2 * 4 / 2 ** 20, ":", color="grey", label="4 (HW)² bytes, the matrix A")
    axes[0].axvline(PAPER["hw"], color="grey", lw=.8)
    axes[0].set_xlabel("pixels of the map, HW; grey line: the paper's")
    for ax in axes:
        ax.legend()


def draw_figure(path, cases, left, right):
    """Three images of `recovered` above, the costs below."""
    figure = new_figure(6)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.8, 1))
    rows = upper.subplots(3, 5)
    for axes, case in zip(rows, cases[::max(1, math.ceil(len(cases) / 8))]):
        draw_image(axes, case)
    for ax, title in zip(rows[0], ("image and its boxes", "argmax of potential Ψ",
                                   "affinities of the cross", "argmax of answer P", "truth")):
        ax.set_title(title)
    draw_costs(lower.subplots(1, 2), left, right=right)
    save(figure, path)


if __name__ == "__main__":
    measure(sys.argv[1], [int(n) for n in sys.argv[2:]])
