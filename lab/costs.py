"""What A Psi costs: operations, seconds and memory of Q (Q^T Psi) and of (Q Q^T) Psi, for the demo
of affinity_head.py. Each order is measured in a process of its own.
"""
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

from affinity_head import apply_affinity

PAPER = dict(hw=200 * 325, channels=128, potentials=153)       # 800x1300, C, D + N_st


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
    command = [sys.executable, "-m", "lab.costs", order, *map(str, sizes)]
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


if __name__ == "__main__":
    measure(sys.argv[1], [int(n) for n in sys.argv[2:]])
