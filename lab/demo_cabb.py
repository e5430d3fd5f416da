"""The demo of cabb_loss.py: small detectors learn from crops by four losses.

One textured rectangle an image, sizes 8 to 96 pixels, crops of 64 pixels: the large ones never fit.
How large does a detector that has seen only crops say they are, in whole images of 160 pixels?
"""

import math
import time
from pathlib import Path

import torch

from cabb_loss import (
    box_loss,
    cabb_loss,
    decode,
    encode,
    free_sides,
    objective,
    precise,
    smooth_l1,
    solve_o1,
    visible,
)
from lab.draw import save

SIDE, WHOLE, STRIDE, ANCHOR, BETA = 64, 160, 8, 24.0, 1 / 9


def standard_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Eq. 1 at G|C: what crop-based training usually does."""
    return box_loss(deltas, visible(gt_boxes, crop_size), anchors, beta)


def ignoring_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """A simpler idea: ask nothing of a side that was cut.  Dimensions without a cut side pay Eq. 1;
    in the others a side that shows must be right, l_beta of its distance in anchors, and a side
    that was cut may be anywhere, inside the crop too.
    """
    p, gt, a = precise(deltas, gt_boxes, anchors)
    free, g = free_sides(gt, crop_size, truncated).view(-1, 2, 2), encode(visible(gt, crop_size), a)

    def sides(d):
        return torch.stack(
            [d[:, :2] - d[:, 2:].exp() / 2, d[:, :2] + d[:, 2:].exp() / 2], 1
        )  # [N, low high, x y]

    whole, part = smooth_l1(p - g, beta).view(-1, 2, 2).sum(1), (
        smooth_l1(sides(p) - sides(g), beta) * ~free
    ).sum(1)
    return (
        torch.where(free.any(1), part, whole)
        .sum(1)
        .to(torch.promote_types(deltas.dtype, torch.float32))
    )


def full_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Another idea: the labels know the whole object, so ask for its whole box."""
    return box_loss(deltas, gt_boxes, anchors, beta)


LOSSES = {
    "standard": standard_loss,
    "cut sides ignored": ignoring_loss,
    "full box": full_loss,
    "CABB": cabb_loss,
}
SIZES, SHARES = (8, 16, 32, 48, 64, 80, 97), (0, 0.1, 0.25, 0.5, 0.75, 0.999, 2)


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


def paint(boxes, size, g, telling):
    """Images [n, 3, size, size] of one checked rectangle each.  `telling`: four periods of the
    checks make its size, as wheels tell the size of a car; else the period says nothing."""
    n, p = len(boxes), torch.arange(size) + 0.5
    period = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 4 if telling else log_uniform(n, g) / 4
    wave = torch.sin(
        p * (2 * math.pi / period)[:, None, None] + 6.28 * torch.rand(n, 2, 1, generator=g)
    )  # [n, x y, size]
    checks = wave[:, 1, :, None] * wave[:, 0, None, :] > 0
    b = boxes[:, :, None, None]
    inside = (p >= b[:, 0]) & (p < b[:, 2]) & (p[:, None] >= b[:, 1]) & (p[:, None] < b[:, 3])
    colour = torch.rand(n, 2, 3, 1, 1, generator=g)
    image = torch.where(
        inside[:, None], colour[:, 0] * torch.where(checks, 1.0, 0.5)[:, None], colour[:, 1]
    )
    return image + 0.05 * torch.randn(image.shape, generator=g)


def detector():
    """Images [n, 3, s, s] -> deltas [n, 4, s/8, s/8], one anchor of 24 pixels a cell.  Its
    receptive field is 1 + 2 (1 + 2 + 4 + 8 + 8) = 47 pixels, so it cannot see both ends of a large
    object at once."""

    def block(a, b, stride=1, kernel=3):
        return [
            torch.nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False),
            torch.nn.BatchNorm2d(b),
            torch.nn.ReLU(),
        ]

    net = torch.nn.Sequential(
        *block(3, 16, 2),
        *block(16, 24, 2),
        *block(24, 48, 2),
        *block(48, 48),
        *block(48, 48),
        *block(48, 48, kernel=1),
        torch.nn.Conv2d(48, 4, 1),
    )
    torch.nn.init.zeros_(net[-1].weight)
    return net


def cells(size):
    """Centres [h * h, 2] of a image's cells and their anchors [h * h, 4]."""
    p = (torch.arange(size // STRIDE) + 0.5) * STRIDE
    c = torch.stack(torch.meshgrid(p, p, indexing="xy"), -1).reshape(-1, 2)
    return c, torch.cat([c - ANCHOR / 2, c + ANCHOR / 2], 1)


def train_detectors(seed, telling, steps, device):
    """One detector a loss, from the same first weights, on the same crops."""
    torch.manual_seed(seed)
    g, first = torch.Generator().manual_seed(seed), detector()
    nets = {name: detector().to(device) for name in LOSSES}
    for net in nets.values():
        net.load_state_dict(first.state_dict())
    optimisers = {
        name: torch.optim.AdamW(net.parameters(), weight_decay=1e-4) for name, net in nets.items()
    }
    centre, anchors = cells(SIDE)
    for step in range(steps):
        boxes = place(16, SIDE, g)
        images = paint(boxes, SIDE, g, telling).to(device)
        positive = ((centre >= boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(
            2
        )  # cells whose centre is in the object
        owner, cell = torch.where(positive)
        weight = (1 / positive.sum(1).clamp(min=1) / len(boxes))[owner].to(device)
        truth, anchor = boxes[owner].to(device), anchors[cell].to(device)
        for name, net in nets.items():
            optimisers[name].param_groups[0]["lr"] = (
                4e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
            )
            deltas = net(images).flatten(2).mT[owner, cell]
            loss = (LOSSES[name](deltas, truth, anchor, BETA, (SIDE, SIDE)) * weight).sum()
            optimisers[name].zero_grad()
            loss.backward()
            optimisers[name].step()
    return {name: net.eval() for name, net in nets.items()}


@torch.no_grad()
def judge(nets, size, telling, device, count=480):
    """Predicted box at the cell in the middle of what shows -> true boxes [n, 4], {name: boxes [n,
    4]}."""
    g, centre_anchor = torch.Generator().manual_seed(12345), cells(size)[1]
    truth, found = [], {name: [] for name in nets}
    for _ in range(count // 16):
        boxes = place(16, size, g)
        images, seen = paint(boxes, size, g, telling), visible(boxes, (size, size))
        middle = ((seen[:, :2] + seen[:, 2:]) / 2 / STRIDE).long().clamp(max=size // STRIDE - 1)
        cell = middle[:, 1] * (size // STRIDE) + middle[:, 0]
        truth.append(boxes)
        for name, net in nets.items():
            deltas = net(images.to(device)).flatten(2).mT[torch.arange(16), cell.to(device)].cpu()
            found[name].append(decode(deltas, centre_anchor[cell]))
    return torch.cat(truth), {name: torch.cat(f) for name, f in found.items()}


def ratios(truth, found, value, edges):
    """Median of predicted over true size in each bin of `value`, in percent: {name: [bins]}."""
    bins = [(value >= a) & (value < b) for a, b in zip(edges, edges[1:])]
    return {
        name: [100 * (draw_size(f[m]) / draw_size(truth[m])).median().item() for m in bins]
        for name, f in found.items()
    }


def detectors(seeds=3, steps=350, device="cpu", out="figures"):
    """Four losses, two worlds, several seeds: predicted over true size, against the size on whole
    images and against the share of the object that shows on crops. Prints tables, draws
    cabb_loss.png.

    What it shows is said, with numbers, in RESULTS.md."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    began = time.time()
    worlds = {True: "texture tells the size", False: "texture tells nothing"}
    tables, example = {}, None
    for telling, world in worlds.items():
        by_size, by_share = [], []
        for seed in range(seeds):
            nets = train_detectors(seed, telling, steps, device)
            truth, found = judge(nets, WHOLE, telling, device)
            by_size.append(ratios(truth, found, draw_size(truth), SIZES))
            cut, found_cut = judge(nets, SIDE, telling, device)
            share = draw_size(visible(cut, (SIDE, SIDE))) ** 2 / draw_size(cut) ** 2
            by_share.append(ratios(cut, found_cut, share, SHARES))
            example = example or (truth, found)
            print(f"{world}, seed {seed}: {time.time() - began:.0f} s", flush=True)
        for kind, rows, edges in (("size", by_size, SIZES), ("share", by_share, SHARES)):
            tables[telling, kind] = {
                name: torch.tensor([r[name] for r in rows]) for name in LOSSES
            }  # [seeds, bins]
    for (telling, kind), table in tables.items():
        edges = SIZES if kind == "size" else SHARES
        print(
            f"\n{worlds[telling]}; predicted / true size in %, median over objects, mean and range of {seeds} seeds"
        )
        print(
            ("whole images, size in pixels" if kind == "size" else "crops, share that shows").ljust(
                32
            )
            + "".join(
                f"{a:g}-{min(b, 96 if kind == 'size' else 1):g}".rjust(16)
                for a, b in zip(edges, edges[1:])
            )
        )
        for name, rows in table.items():
            print(
                f"  {name:30s}"
                + "".join(
                    f"{m:6.0f} ({a:3.0f}..{b:3.0f})"
                    for m, a, b in zip(
                        rows.mean(0).tolist(), rows.amin(0).tolist(), rows.amax(0).tolist()
                    )
                )
            )

    fig, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    draw_objective(axes[0, 0])
    draw_example(axes[1, 0], *example)
    for row, telling in zip(axes, worlds):
        for ax, kind, edges in zip(row[1:], ("size", "share"), (SIZES, SHARES)):
            ends = [min(b, 96 if kind == "size" else 1) for b in edges[1:]]
            x = torch.tensor([(a + b) / 2 for a, b in zip(edges, ends)])
            for (name, rows), (colour, style) in zip(
                tables[telling, kind].items(), STYLES.values()
            ):
                ax.plot(x, rows.mean(0), style, color=colour, label=name, lw=2)
                ax.fill_between(x, rows.amin(0), rows.amax(0), color=colour, alpha=0.15, lw=0)
            ax.axhline(100, color="k", lw=0.8)
            ax.set_title(
                f"{'whole images' if kind == 'size' else 'crops'}, {worlds[telling]}", fontsize=10
            )
            ax.set(
                xlabel=(
                    "size of the object, pixels"
                    if kind == "size"
                    else "share of the object that shows"
                ),
                ylabel="predicted / true size, %",
            )
            ax.grid(alpha=0.3)
            if kind == "size":
                ax.axvline(SIDE, color="k", ls=":", lw=1)
                ax.text(SIDE + 1, ax.get_ylim()[0] + 1, "a crop", fontsize=8)
    axes[0, 1].legend(fontsize=9)
    save(fig, Path(out, "cabb_loss.png"))
    plt.close(fig)


STYLES = {
    "standard": ("tab:red", "o-"),
    "cut sides ignored": ("tab:olive", "v-."),
    "full box": ("tab:purple", "s--"),
    "CABB": ("tab:blue", "D-"),
}


def draw_objective(ax):
    """(O1) with two local minima, and how the global one jumps as more of the object shows."""
    hat, pred, beta = 4.6, 0.22, 1 / 9
    omega = torch.linspace(0.16, 5.6, 2000, dtype=torch.float64)
    values = [torch.tensor([v], dtype=torch.float64) for v in (hat, math.log(pred))]
    ax.plot(omega, objective(omega.log(), *values, beta), color="tab:blue", lw=2)
    for bound, colour in ((0.16, "tab:green"), (0.6, "tab:orange"), (1.2, "tab:red")):
        best = solve_o1(
            torch.tensor([bound], dtype=torch.float64), values[0], values[1].exp(), beta
        )
        ax.axvline(bound, color=colour, ls=":", lw=1.5)
        ax.plot(
            best,
            objective(best.log(), *values, beta),
            "o",
            color=colour,
            ms=9,
            ls="",
            label=rf"minimum over $\omega \geq {bound}$",
        )
    ax.set(xlabel=r"$\omega$", ylabel=r"$f(\omega)$ of (O1)")
    ax.set_title(
        rf"two local minima: $\hat\omega={hat}$, $\omega_P={pred}$, $\beta=1/9$", fontsize=10
    )
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def draw_example(ax, truth, found):
    """The largest object of a whole image and the four predicted boxes."""
    which = int(draw_size(truth).argmax())
    for name, boxes in {"truth": truth, **found}.items():
        x1, y1, x2, y2 = boxes[which].tolist()
        colour, style = STYLES.get(name, ("k", "-"))
        ax.plot(
            [x1, x2, x2, x1, x1],
            [y1, y1, y2, y2, y1],
            color=colour,
            lw=2,
            ls="-" if name == "truth" else "--",
            label=name,
        )
    ax.plot(
        [2, 2 + SIDE, 2 + SIDE, 2, 2],
        [2, 2, 2 + SIDE, 2 + SIDE, 2],
        color="grey",
        lw=1,
        ls=":",
        label="a training crop",
    )
    ax.set(xlim=(0, WHOLE), ylim=(WHOLE, 0), aspect="equal")
    ax.set_title(
        f"one object of {draw_size(truth)[which]:.0f} pixels in a whole image", fontsize=10
    )
    ax.legend(fontsize=8, loc="upper right")
