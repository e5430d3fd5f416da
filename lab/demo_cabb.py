"""The demo of cabb_loss.py: small detectors learn from crops by four losses.

One textured rectangle an image, sizes 8 to 96 pixels, crops of 64 pixels: the large ones never fit.
How large does a detector that has seen only crops say they are, in whole images of 160 pixels?

What it shows (python cabb_loss.py: 3 seeds of 700 steps; median of predicted over true size; in
brackets the world whose texture does not tell the size):
- The standard loss makes objects too small when they come near the size of a crop: 78% (92%) at 48
  to 64 pixels, 71% (76%) at 64 to 80. CABB gives 86% (100%) and 77% (85%); the ranges of the seeds
  touch at most. An object larger than a crop is never seen whole, and the loss only says "at least
  this large". So CABB is too small there as well.
- Ignoring cut sides is no better than the standard loss, and worse for the largest objects. A cut
  side says "at least up to here". Without it there is no lower bound on the size.
- The full box is the best target where the texture tells the size: 97% and 103%. Where it does not,
  the target is a guess about what no pixel shows: objects of 32 to 64 pixels become 30% too large,
  though they fit into a crop. CABB is at most 10% too large anywhere.
Real objects lie between the two worlds.
"""
import math
import time
from pathlib import Path

import torch

from cabb_loss import (box_loss, cabb_loss, decode, encode, free_sides, objective, precise,
                       smooth_l1, solve_o1, visible)
from lab.draw import new_figure, save

SIDE, WHOLE, STRIDE, ANCHOR, BETA = 64, 160, 8, 24.0, 1 / 9


# --- Four losses ------------------------------------------------------------------------------

def standard_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Eq. 1 at G|C: what crop-based training usually does."""
    return box_loss(deltas, visible(gt_boxes, crop_size), anchors, beta=beta)


def ignoring_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """A simpler idea: ask nothing of a side that was cut. Dimensions without a cut side pay Eq. 1.
    In the others a visible side pays l_beta of its distance in anchors, and a cut side may be
    anywhere, inside the crop too."""
    p, g, anchors = precise(deltas, gt_boxes, anchors)
    free = free_sides(g, crop_size, truncated).view(-1, 2, 2)  # [N, low high, x y]
    g = encode(visible(g, crop_size), anchors)

    def sides(d):
        half = d[:, 2:].exp() / 2
        return torch.stack([d[:, :2] - half, d[:, :2] + half], 1)

    whole = smooth_l1(p - g, beta).view(-1, 2, 2).sum(1)       # [N, x y]
    part = (smooth_l1(sides(p) - sides(g), beta) * ~free).sum(1)
    loss = torch.where(free.any(1), part, whole).sum(1)
    return loss.to(torch.promote_types(deltas.dtype, torch.float32))


def full_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Another idea: the labels know the whole object, so ask for its whole box."""
    return box_loss(deltas, gt_boxes, anchors, beta=beta)


LOSSES = {"standard": standard_loss, "cut sides ignored": ignoring_loss, "full box": full_loss,
          "CABB": cabb_loss}
STYLES = {"standard": ("tab:red", "o-"), "cut sides ignored": ("tab:olive", "v-."),
          "full box": ("tab:purple", "s--"), "CABB": ("tab:blue", "D-")}
SIZES, SHARES = (8, 16, 32, 48, 64, 80, 97), (0, 0.1, 0.25, 0.5, 0.75, 0.999, 2)
WORLDS = {True: "texture tells the size", False: "texture tells nothing"}


# --- The toy world ----------------------------------------------------------------------------

def draw_size(boxes):
    """sqrt(w h) of boxes [N, 4], for the curves."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


def log_uniform(n, g):
    """n sizes in pixels, 8 to 96."""
    return 8 * 12 ** torch.rand(n, generator=g)


def place(n, size, g):
    """n rectangles [n, 4] in pixels: anywhere in a whole image, or, for a crop, with one of their
    pixels on one of its pixels."""
    stretch = torch.exp(0.8 * torch.rand(n, generator=g) - 0.4)
    d = (log_uniform(n, g)[:, None] * torch.stack([stretch, 1 / stretch], 1)).round()
    low, high = (torch.zeros(1), WHOLE - d) if size == WHOLE else (1 - d, torch.tensor(SIDE))
    corner = (low + (high - low) * torch.rand(n, 2, generator=g)).floor()
    return torch.cat([corner, corner + d], 1)


def paint(boxes, size, g, *, telling):
    """Images [n, 3, size, size] of one checked rectangle each. `telling`: four periods of the
    checks make its size, as wheels tell the size of a car; else the period says nothing."""
    n, p = len(boxes), torch.arange(size) + 0.5
    period = (draw_size(boxes) if telling else log_uniform(n, g)) / 4
    frequency = (2 * math.pi / period)[:, None, None]
    wave = torch.sin(p * frequency + 6.28 * torch.rand(n, 2, 1, generator=g))    # [n, x y, size]
    checks = wave[:, 1, :, None] * wave[:, 0, None, :] > 0
    x1, y1, x2, y2 = boxes[:, :, None, None].unbind(1)
    inside = (p >= x1) & (p < x2) & (p[:, None] >= y1) & (p[:, None] < y2)
    colour = torch.rand(n, 2, 3, 1, 1, generator=g)
    object_colour = colour[:, 0] * torch.where(checks, 1.0, 0.5)[:, None]
    image = torch.where(inside[:, None], object_colour, colour[:, 1])
    return image + 0.05 * torch.randn(image.shape, generator=g)


# --- The detectors ----------------------------------------------------------------------------

def detector():
    """Images [n, 3, s, s] -> deltas [n, 4, s/8, s/8], one anchor of 24 pixels a cell. Its receptive
    field is 1 + 2 (1 + 2 + 4 + 8 + 8) = 47 pixels, so it cannot see both ends of a large object at
    once."""
    layers, width = [], 3
    for channels, stride, kernel in ((16, 2, 3), (24, 2, 3), (48, 2, 3), (48, 1, 3), (48, 1, 3),
                                     (48, 1, 1)):
        convolution = torch.nn.Conv2d(width, channels, kernel, stride, kernel // 2, bias=False)
        layers += [convolution, torch.nn.BatchNorm2d(channels), torch.nn.ReLU()]
        width = channels
    last = torch.nn.Conv2d(width, 4, 1)
    torch.nn.init.zeros_(last.weight)
    return torch.nn.Sequential(*layers, last)


def cells(size):
    """Centres [h * h, 2] of an image's cells and their anchors [h * h, 4]."""
    p = (torch.arange(size // STRIDE) + 0.5) * STRIDE
    c = torch.stack(torch.meshgrid(p, p, indexing="xy"), -1).reshape(-1, 2)
    return c, torch.cat([c - ANCHOR / 2, c + ANCHOR / 2], 1)


def train_detectors(seed, telling, steps, device):
    """One detector for each loss, from the same first weights, on the same crops -> {name: net}."""
    torch.manual_seed(seed)
    g, first = torch.Generator().manual_seed(seed), detector()
    nets = {name: detector().to(device) for name in LOSSES}
    optimisers = {}
    for name, net in nets.items():
        net.load_state_dict(first.state_dict())
        optimisers[name] = torch.optim.AdamW(net.parameters(), weight_decay=1e-4)
    centre, anchors = cells(SIDE)
    for step in range(steps):
        boxes = place(16, SIDE, g)
        images = paint(boxes, SIDE, g, telling=telling).to(device)
        positive = ((centre >= boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(2)
        owner, cell = torch.where(positive)                    # cells whose centre is in the object
        weight = (1 / positive.sum(1).clamp(min=1) / len(boxes))[owner].to(device)
        truth, anchor = boxes[owner].to(device), anchors[cell].to(device)
        for name, net in nets.items():
            lr = 4e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
            optimisers[name].param_groups[0]["lr"] = lr
            deltas = net(images).flatten(2).mT[owner, cell]
            loss = LOSSES[name](deltas, truth, anchor, beta=BETA, crop_size=(SIDE, SIDE))
            optimisers[name].zero_grad()
            (loss * weight).sum().backward()
            optimisers[name].step()
    return {name: net.eval() for name, net in nets.items()}


@torch.no_grad()
def judge(nets, size, telling, device, count=480):
    """The box predicted at the cell in the middle of what shows -> true boxes [n, 4],
    {name: boxes [n, 4]}."""
    g, anchors = torch.Generator().manual_seed(12345), cells(size)[1]
    truth, found = [], {name: [] for name in nets}
    for _ in range(count // 16):
        boxes = place(16, size, g)
        images, seen = paint(boxes, size, g, telling=telling), visible(boxes, (size, size))
        middle = ((seen[:, :2] + seen[:, 2:]) / 2 / STRIDE).long().clamp(max=size // STRIDE - 1)
        cell = middle[:, 1] * (size // STRIDE) + middle[:, 0]
        truth.append(boxes)
        for name, net in nets.items():
            deltas = net(images.to(device)).flatten(2).mT[torch.arange(16), cell.to(device)].cpu()
            found[name].append(decode(deltas, anchors[cell]))
    return torch.cat(truth), {name: torch.cat(f) for name, f in found.items()}


def ratios(truth, found, value, edges):
    """Median of predicted over true size in each bin of `value`, in percent: {name: [bins]}."""
    bins = [(value >= a) & (value < b) for a, b in zip(edges, edges[1:])]
    return {name: [100 * (draw_size(f[m]) / draw_size(truth[m])).median().item() for m in bins]
            for name, f in found.items()}


# --- Tables and figure ------------------------------------------------------------------------

def detectors(seeds=3, steps=700, device="cpu", out="figures"):
    """Four losses, two worlds, several seeds: predicted over true size, against the size on whole
    images and against the share of the object that shows on crops. Prints tables, draws
    cabb_loss.png."""
    began, tables, example = time.time(), {}, None
    for telling, world in WORLDS.items():
        by_size, by_share = [], []
        for seed in range(seeds):
            nets = train_detectors(seed, telling, steps, device=device)
            truth, found = judge(nets, WHOLE, telling, device=device)
            by_size.append(ratios(truth, found, draw_size(truth), edges=SIZES))
            cut, found_cut = judge(nets, SIDE, telling, device=device)
            share = draw_size(visible(cut, (SIDE, SIDE))) ** 2 / draw_size(cut) ** 2
            by_share.append(ratios(cut, found_cut, share, edges=SHARES))
            example = example or (truth, found)
            print(f"{world}, seed {seed}: {time.time() - began:.0f} s", flush=True)
        for what, rows in (("size", by_size), ("share", by_share)):              # [seeds, bins]
            tables[telling, what] = {name: torch.tensor([row[name] for row in rows])
                                     for name in LOSSES}
    for (telling, what), table in tables.items():
        print(f"\n{WORLDS[telling]}; predicted / true size in %, median over objects, mean and "
              f"range of {seeds} seed{'s' * (seeds > 1)}")
        print_table(table, what)
    draw_figure(tables, example, out)


def bin_ends(what):
    """The bins of a table over "size" or "share" -> [(from, to)]; the last ends at 96 or 1."""
    edges, last = (SIZES, 96) if what == "size" else (SHARES, 1)
    return [(a, min(b, last)) for a, b in zip(edges, edges[1:])]


def print_table(table, what):
    """A row for each loss: mean and range over the seeds in each bin."""
    title = "whole images, size in pixels" if what == "size" else "crops, share that shows"
    print(title.ljust(32) + "".join(f"{a:g}-{b:g}".rjust(16) for a, b in bin_ends(what)))
    for name, rows in table.items():
        columns = zip(rows.mean(0).tolist(), rows.amin(0).tolist(), rows.amax(0).tolist())
        print(f"  {name:30s}" + "".join(f"{m:6.0f} ({a:3.0f}..{b:3.0f})" for m, a, b in columns))


def draw_figure(tables, example, out):
    """cabb_loss.png: (O1), an example, and the tables as curves."""
    figure = new_figure(5.6)
    axes = figure.subplots(2, 3)
    draw_objective(axes[0, 0])
    draw_example(axes[1, 0], *example)
    for row, telling in zip(axes, WORLDS):
        for ax, what in zip(row[1:], ("size", "share")):
            x = torch.tensor([(a + b) / 2 for a, b in bin_ends(what)])
            for name, rows in tables[telling, what].items():
                colour, style = STYLES[name]
                ax.plot(x, rows.mean(0), style, color=colour, label=name, lw=2)
                ax.fill_between(x, rows.amin(0), rows.amax(0), color=colour, alpha=0.15, lw=0)
            ax.axhline(100, color="k", lw=0.8)
            where = "whole images" if what == "size" else "crops"
            ax.set_title(f"{where}, {WORLDS[telling]}")
            ax.set(ylabel="predicted / true size, %", xlabel="size of the object, pixels"
                   if what == "size" else "share of the object that shows")
            ax.grid(alpha=0.3)
            if what == "size":
                ax.axvline(SIDE, color="k", ls=":", lw=1)
                ax.text(SIDE + 1, ax.get_ylim()[0] + 1, "a crop")
    axes[0, 2].legend(loc="lower right")
    save(figure, Path(out, "cabb_loss.png"))


def draw_objective(ax):
    """(O1) with two local minima, and how the global one jumps as more of the object shows."""
    hat, pred, beta = 4.6, 0.22, 1 / 9
    omega = torch.linspace(0.16, 5.6, 2000, dtype=torch.float64)
    omega_hat, omega_pred = torch.tensor([[hat], [pred]], dtype=torch.float64)

    def f(omega):
        return objective(omega.log(), omega_hat, omega_pred.log(), beta=beta)

    ax.plot(omega, f(omega), color="tab:blue", lw=2)
    for bound, colour in ((0.16, "tab:green"), (0.6, "tab:orange"), (1.2, "tab:red")):
        smallest = torch.tensor([bound], dtype=torch.float64)
        best = solve_o1(smallest, omega_hat, omega_pred, beta=beta)
        ax.axvline(bound, color=colour, ls=":", lw=1.5)
        ax.plot(best, f(best), "o", color=colour, ms=9, ls="",
                label=rf"minimum over $\omega \geq {bound}$")
    ax.set(xlabel=r"$\omega$", ylabel=r"$f(\omega)$ of (O1)")
    ax.set_title(rf"two local minima: $\hat\omega={hat}$, $\omega_P={pred}$, $\beta=1/9$")
    ax.legend()
    ax.grid(alpha=0.3)


def draw_example(ax, truth, found):
    """The largest object of a whole image and the four predicted boxes, in the colours of the
    curves."""
    def outline(x1, y1, x2, y2, **style):
        ax.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], **style)

    which = int(draw_size(truth).argmax())
    outline(*truth[which].tolist(), color="k", lw=2, label="truth")
    for name, boxes in found.items():
        outline(*boxes[which].tolist(), color=STYLES[name][0], lw=2, ls="--")
    outline(2, 2, 2 + SIDE, 2 + SIDE, color="grey", lw=1, ls=":", label="a training crop")
    ax.set(xlim=(0, WHOLE), ylim=(WHOLE, 0), aspect="equal")
    ax.set_title(f"one object of {draw_size(truth)[which]:.0f} pixels in a whole image")
    ax.legend(loc="upper right")
