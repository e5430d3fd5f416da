"""95% intervals: of paired differences over seeds, and of means over images."""
import math

import torch


def t_quantile(df, level=0.975):
    """The quantile of Student's t with `df` degrees of freedom, by bisection of its integral."""
    scale = math.exp(math.lgamma((df + 1) / 2) - math.lgamma(df / 2)) / math.sqrt(df * math.pi)
    low, high = 0.0, 1000.0
    for _ in range(60):
        middle = (low + high) / 2
        x = torch.linspace(0, 1, 20001, dtype=torch.float64).square() * middle    # dense near 0
        mass = torch.trapezoid(scale * (1 + x * x / df) ** (-(df + 1) / 2), x).item()
        low, high = (middle, high) if mass < level - 0.5 else (low, middle)
    return low


def paired_t(a, b):
    """Means of a - b over pairs (the same seed on both sides) -> (mean, low, high) of 95%.

    One pair says nothing about the spread: its interval is (-inf, inf)."""
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired differences need pairs, not {len(a)} and {len(b)} numbers")
    d = torch.tensor(a, dtype=torch.float64) - torch.tensor(b, dtype=torch.float64)
    mean = d.mean().item()
    if len(d) == 1:
        return mean, -math.inf, math.inf
    half = t_quantile(len(d) - 1) * (d.std() / math.sqrt(len(d))).item()
    return mean, mean - half, mean + half


def bootstrap(values, statistic=lambda rows: rows.mean(0), draws=1000, seed=0):
    """A 95% percentile interval of a statistic of rows [N, ...], by drawing rows with replacement
    -> (low, high). Rows are what was measured independently: images, not pixels."""
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(values), (draws, len(values)), generator=g)
    found = torch.stack([torch.as_tensor(statistic(values[pick])) for pick in picks])
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)
    return low, high
