"""The spec of cabb_loss.py: the claims of "Improving Panoptic Segmentation at All Scales" (Porzi et al., CVPR 2021) about
the crop-aware box loss, sections 2.2 to 2.4, one a test.

The oracles are brute force over the set rho(G, C) of Eq. 2, written from its definition: every width on a fine grid, finer
grids around the best ones. They know nothing of (O1) and (O2). Random material is rounded to float32, so that one
brute force holds for both precisions.
"""
import math
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder

import cabb_loss as cabb
from cabb_loss import (box_loss, cabb_loss, cabb_targets, decode, encode, ignoring_loss, minimise_where, smooth_l1, solve_o1,
                       solve_o2, standard_loss)

torch.set_num_threads(1)
BETAS = (1 / 9, 0.5, 1.0, 2.0, 4.0, 16.0)
MORE_BETAS = (*BETAS, 0.01, 2.5, 3.0, 8.0, 40.0)          # the turning points of (O1) meet the ends of its regimes
CROP = (384, 640)                                       # height, width: not square on purpose
EPS = {torch.float64: 2.2e-16, torch.float32: 1.2e-7}


# --- Oracles --------------------------------------------------------------------------------------------------------------

def huber(z, beta):
    """Below Eq. 1: z^2 / 2 beta within beta of 0, |z| - beta / 2 beyond."""
    z = z.abs()
    return torch.where(z <= beta, z * z / (2 * beta), z - beta / 2)


def eq1(deltas, truth, beta):
    """Eq. 1 for a truth that is coded already."""
    return huber(deltas - truth, beta).sum(-1)


def coded(boxes, anchors):
    """Section 2.2: delta = (c_G - c_A) / d_A and log omega = log(d_G / d_A)."""
    size, place = anchors[..., 2:] - anchors[..., :2], (anchors[..., 2:] + anchors[..., :2]) / 2
    return torch.cat([((boxes[..., 2:] + boxes[..., :2]) / 2 - place) / size,
                      ((boxes[..., 2:] - boxes[..., :2]) / size).log()], -1)


def clipped(boxes, crop_size):
    """X|C, the part of a box inside [0, width] x [0, height]."""
    edge = torch.tensor([crop_size[1], crop_size[0]] * 2, dtype=boxes.dtype)
    return boxes.clamp_min(0).minimum(edge)


def brute_force(cost, low, high, points):
    """Minimise cost(t) over [low, high], problem by problem: a grid, then ever finer grids around its four lowest valleys.

    low, high [N]; cost maps t [n, p] and the rows it belongs to onto [n, p]. Returns the lowest value, where it is, and the
    value in the second best valley (inf where there is one valley only)."""
    out, ruler, fine = [], torch.linspace(0, 1, points, dtype=torch.float64), torch.linspace(-1, 1, 33, dtype=torch.float64)
    for rows in torch.arange(len(low)).split(16):
        a, b = low[rows, None], high[rows, None]
        t = a + (b - a) * ruler
        v = cost(t, rows)
        wall = torch.full_like(a, torch.inf)
        valley = (v <= torch.cat([wall, v[:, :-1]], 1)) & (v < torch.cat([v[:, 1:], wall], 1))
        best, where = v.masked_fill(~valley, torch.inf).topk(4, largest=False)
        at, step = t.gather(1, where), (b - a) / (points - 1)
        for _ in range(7):
            near = torch.minimum(torch.maximum(at[..., None] + step[..., None] * fine, a[..., None]), b[..., None])  # [n, 4, 33]
            v = cost(near.flatten(1), rows).view(near.shape)
            low_v, i = v.min(-1)
            at, step = torch.where(low_v < best, near.gather(-1, i[..., None])[..., 0], at), step / 12
            best = torch.where(best.isinf(), best, torch.minimum(low_v, best))
        order = best.argsort(1)
        out.append((best.gather(1, order[:, :1])[:, 0], at.gather(1, order[:, :1])[:, 0], best.gather(1, order[:, 1:2])[:, 0]))
    return [torch.cat(x) for x in zip(*out)]


def cheapest(delta, log_omega, lo, hi, free_lo, free_hi, anchor_lo, anchor_hi, beta, points=4000):
    """Eq. 2 in one dimension: the cheapest interval whose part inside the crop is [lo, hi]; all arguments [N].

    Where a side is free (it lies at the crop's edge) the interval may go on beyond it. So a width w of at least hi - lo has its
    centre between hi - w/2 (right end in place) and lo + w/2 (left end in place); within this range the centre nearest to
    the predicted one is the best."""
    place, size = (anchor_lo + anchor_hi) / 2, anchor_hi - anchor_lo
    smallest = ((hi - lo) / size).log()
    reach = 2 * torch.maximum(((lo - place) / size - delta).abs(), ((hi - place) / size - delta).abs())
    largest = torch.maximum(smallest, torch.maximum(log_omega, reach.clamp_min(1e-6).log())) + 0.01
    largest = torch.where(free_lo | free_hi, largest, smallest)

    def cost(t, rows):
        of = lambda x: x[rows, None]
        half = t.exp() / 2                              # in anchors, as all else here
        left_in_place, right_in_place = of((lo - place) / size) + half, of((hi - place) / size) - half
        lower = torch.where(of(free_lo), right_in_place, left_in_place)
        upper = torch.where(of(free_hi), left_in_place, right_in_place)
        at = torch.minimum(torch.maximum(of(delta), lower), upper)
        return huber(at - of(delta), beta) + huber(t - of(log_omega), beta)

    return brute_force(cost, smallest, largest, points)[0]


def crop_aware_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Eq. 2 by brute force; the two dimensions do not meet (section 2.4, Feasible set)."""
    g, total = clipped(gt_boxes, crop_size), 0
    for k, length in ((0, crop_size[1]), (1, crop_size[0])):
        lo, hi = g[:, k], g[:, k + 2]
        free_lo, free_hi = lo <= 0, hi >= length
        if truncated is not None:
            free_lo, free_hi = free_lo & truncated[:, k], free_hi & truncated[:, k + 2]
        total = total + cheapest(deltas[:, k], deltas[:, k + 2], lo, hi, free_lo, free_hi, anchors[:, k], anchors[:, k + 2], beta)
    return total


def sizes(deltas, boxes, anchors, crop_size):
    """[N]: the largest number, in anchors, that takes part in a loss; rounding is relative to it."""
    size = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    edge = torch.tensor([crop_size[1], crop_size[0]] * 2, dtype=boxes.dtype)
    return torch.cat([boxes / size, anchors / size, edge / size, deltas[:, :2]], 1).abs().amax(1).clamp_min(1)


# --- Material -------------------------------------------------------------------------------------------------------------

def rounded(*tensors):
    """To what float32 can hold."""
    return tuple(t.float().double() for t in tensors)


def uniform(g, n, low, high):
    return low + (high - low) * torch.rand(n, generator=g, dtype=torch.float64)


@lru_cache(maxsize=None)
def scene(n, seed=0, crop_size=CROP):
    """Ground truth of all four kinds in each dimension (0 nothing cut, 1 left, 2 right, 3 both), anchors of 1 to 4000 pixels
    anywhere, predictions near the full box, near its visible part, small, and far off. Returns deltas, gt_boxes (in full),
    anchors, kinds [N, 2]."""
    g = torch.Generator().manual_seed(seed)
    gt, anchors = torch.empty(n, 4, dtype=torch.float64), torch.empty(n, 4, dtype=torch.float64)
    kinds = torch.randint(4, (n, 2), generator=g)
    for k, length in ((0, crop_size[1]), (1, crop_size[0])):
        seen = uniform(g, n, 0, math.log(length - 2)).exp()
        beyond = uniform(g, n, -1, math.log(3 * length)).exp() * (torch.rand(n, generator=g) < 0.8)    # 0: ends at the edge
        beyond2 = uniform(g, n, -1, math.log(3 * length)).exp()
        start = 0.5 + torch.rand(n, generator=g, dtype=torch.float64) * (length - 1 - seen)
        kind = kinds[:, k]
        gt[:, k] = torch.where(kind == 0, start, torch.where(kind == 2, length - seen, -beyond))
        past = torch.where(kind == 2, beyond, beyond2) + length
        gt[:, k + 2] = torch.where(kind == 0, start + seen, torch.where(kind == 1, seen, past))
        size = uniform(g, n, 0, math.log(4000)).exp()
        near = (gt[:, k] + gt[:, k + 2]).clamp(0, 2 * length) / 2 + size * uniform(g, n, -0.7, 0.7)
        place = torch.where(torch.rand(n, generator=g) < 0.6, near, uniform(g, n, -length, 2 * length))
        anchors[:, k], anchors[:, k + 2] = place - size / 2, place + size / 2
    gt, anchors = rounded(gt, anchors)
    noise = torch.randn(n, 4, generator=g, dtype=torch.float64)
    full, part = coded(gt, anchors), coded(clipped(gt, crop_size), anchors)
    scale = torch.cat([part[:, 2:].exp(), torch.ones(n, 2, dtype=torch.float64)], 1)
    style = torch.randint(5, (n, 1), generator=g)
    choices = torch.stack([full + 0.3 * noise * scale, part + 0.5 * noise * scale, noise, noise * 4,
                           noise * torch.tensor([60., 60, 3, 3])])
    deltas = choices[style[:, 0], torch.arange(n)]
    return (*rounded(deltas), gt, anchors, kinds)


@lru_cache(maxsize=None)
def solved_scene(beta):
    """A scene and the brute-force value of Eq. 2 for it."""
    deltas, gt, anchors, kinds = scene(500, seed=round(90 * beta))
    return deltas, gt, anchors, kinds, crop_aware_loss(deltas, gt, anchors, beta, CROP)


def inside_rho(gt_boxes, crop_size, g):
    """A random member of rho(G, C) for each box: free sides are pushed out by up to three crops."""
    x = clipped(gt_boxes, crop_size)
    edge = torch.tensor([crop_size[1], crop_size[0]], dtype=x.dtype)
    out = 3 * edge.repeat(2) * torch.rand(x.shape, generator=g, dtype=torch.float64) ** 4
    return torch.cat([torch.where(x[:, :2] <= 0, -out[:, :2], x[:, :2]),
                      torch.where(x[:, 2:] >= edge, edge + out[:, 2:], x[:, 2:])], 1)


def o1_cost(omega, omega_hat, omega_pred, beta):
    return huber((omega - omega_hat) / 2, beta) + huber(omega.log() - omega_pred.log(), beta)


def stationary(omega, beta, regime, sign, g):
    """omega_hat and omega_pred such that the derivative of (O1), l'((w - w^)/2) / 2 + l'(log w - log wP) / w, vanishes at omega
    in the given regime (linear L, quadratic Q; first and second term). sign +1: w^ < omega < wP, -1 the other way round."""
    n, free = len(omega), uniform(g, len(omega), 0.01, 3)
    if regime == "LL":                                  # 1/2 = 1/w: at w = 2, whatever w^ and wP
        return omega - sign * (2 * beta + free), omega * (sign * (beta + uniform(g, n, 0.01, 3))).exp()
    if regime == "LQ":                                  # log(wP / w) = beta w / 2, needs w <= 2
        return omega - sign * (2 * beta + free), omega * (sign * beta * omega / 2).exp()
    if regime == "QL":                                  # (w - w^) / 4 beta = 1 / w, needs w >= 2
        return omega - sign * 4 * beta / omega, omega * (sign * (beta + free)).exp()
    z = sign * uniform(g, n, 0, 1) * torch.minimum(torch.full_like(omega, beta), 2 * beta / omega)     # (w - w^) / 2
    return omega - 2 * z, omega * (omega * z / 2).exp()  # QQ: z / 2 = log(wP / w) / w


@lru_cache(maxsize=None)
def o1_problems(beta):
    """Columns omega_min, omega_hat, omega_pred, then the brute-force minimum, where it is, and the value in the second valley."""
    g = torch.Generator().manual_seed(round(900 * beta))
    parts = []
    # anything
    n = 200
    hat = torch.where(torch.rand(n, generator=g) < 0.5, uniform(g, n, -4, 5).exp(), uniform(g, n, -30, 60))
    parts.append((uniform(g, n, -5, 3).exp(), hat, uniform(g, n, -5, 5).exp()))
    # a stationary point in a chosen regime
    for regime, low, high in (("LL", 2, 2), ("LQ", 0.02, 2), ("QL", 2, 30), ("QQ", 0.02, 30)):
        for sign in (1, -1):
            omega = uniform(g, 45, math.log(low), math.log(high)).exp()
            parts.append((omega * uniform(g, 45, -4, 0.1).exp(), *stationary(omega, beta, regime, sign, g)))
    # two valleys of the same depth: with wP small the lower valley (w < 2) wins, with wP large the upper one; bisect, then stir
    n = 40
    hat = 2 * beta + uniform(g, n, 5, 14)
    few, many = hat.log() - hat - 3, hat.log()
    t = few[:, None] + (many - few)[:, None] * torch.linspace(0, 1, 3000, dtype=torch.float64)
    for _ in range(30):
        middle = (few + many) / 2
        at = t.gather(1, o1_cost(t.exp(), hat[:, None], middle.exp()[:, None], beta).argmin(1)[:, None])[:, 0].exp()
        few, many = torch.where(at < 2, middle, few), torch.where(at < 2, many, middle)
    parts.append((uniform(g, n, -18, -15).exp(), hat, (few + 1e-3 * torch.randn(n, generator=g, dtype=torch.float64)).exp()))
    # three roots in QQ: c(w) = w (w - w^) / 4 + log w turns at w- and w+ when w^ > sqrt(32)
    n = 60
    hat = math.sqrt(32) + uniform(g, n, 0, 4)
    turn = (hat ** 2 - 32).sqrt()
    c = lambda w: w * (w - hat) / 4 + w.log()
    top, bottom = c((hat - turn) / 4), c((hat + turn) / 4)
    parts.append((uniform(g, n, -8, -5).exp(), hat, (bottom + (top - bottom) * uniform(g, n, -0.5, 1.5)).exp()))
    # where c turns or nearly does, with the bound before, in and after each of its stretches
    n = 150
    hat = math.sqrt(32) * uniform(g, n, -0.2, 1.5).exp()
    turn = (hat ** 2 - 32).clamp_min(0).sqrt()
    ends = torch.stack([hat / 8, (hat - turn) / 4, (hat + turn) / 4, hat, (hat - 2 * beta).clamp_min(0.01), hat + 2 * beta])
    root, bound = (ends[torch.randint(6, (n,), generator=g), torch.arange(n)] * (0.2 * torch.randn(n, generator=g)).exp()
                   for _ in range(2))
    bound = torch.where(torch.rand(n, generator=g) < 0.3, bound / 100, bound)
    parts.append((bound, hat, c(root).clamp(-25, 4).exp()))
    low, hat, pred = rounded(*(torch.cat(p) for p in zip(*parts)))
    # beyond max(w^, wP) both terms grow
    high = torch.maximum(low, torch.maximum(hat, pred)).log() + 0.01
    cost = lambda t, rows: o1_cost(t.exp(), hat[rows, None], pred[rows, None], beta)
    return (low, hat, pred, *brute_force(cost, low.log(), high, 10000))


def o2_cost(delta, omega, delta_pred, omega_pred, beta):
    return huber(delta - delta_pred, beta) + huber(omega.log() - omega_pred.log(), beta)


@lru_cache(maxsize=None)
def o2_problems(beta, n=300):
    g = torch.Generator().manual_seed(round(900 * beta) + 1)
    a2 = uniform(g, n, -6, 6)
    b2 = a2 + uniform(g, n, -4, 3).exp()
    delta = (a2 + b2) / 2 + torch.randn(n, generator=g, dtype=torch.float64) * uniform(g, n, -3, 2.5).exp()
    omega = (b2 - a2) * torch.where(torch.rand(n, generator=g) < 0.5, uniform(g, n, -4, 1), uniform(g, n, -1, 5)).exp()
    a2, b2, delta, omega = rounded(a2, b2, delta, omega)
    zero = torch.zeros_like(a2)                         # the anchor [-1/2, 1/2]: anchors are the unit
    lowest = cheapest(delta, omega.log(), a2, b2, zero == 0, zero == 0, zero - 0.5, zero + 0.5, beta)
    return a2, b2, delta, omega, lowest


def row(*numbers):
    return torch.tensor([numbers], dtype=torch.float64)


def in_x(x_gt, x_anchor, delta, omega, beta=1.0, crop=100, **kw):
    """Loss and targets (delta, log omega) of one box in x, crop [0, crop]; in y the prediction is perfect."""
    gt, anchor = row(x_gt[0], 20, x_gt[1], 60), row(x_anchor[0], 20, x_anchor[1], 60)
    args = row(delta, 0, math.log(omega), 0), gt, anchor, beta, (crop, crop)
    return cabb_loss(*args, **kw).item(), cabb_targets(*args, **kw)[0, [0, 2]].tolist()


# --- 2.2 Bounding box regression ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", BETAS)
def test_smooth_l1_is_the_huber_norm_of_section_2_2(beta):
    """Section 2.2, below Eq. 1, against PyTorch's operator, value and slope, also at |z| = beta and 0."""
    z = torch.cat([torch.linspace(-3 * beta, 3 * beta, 301, dtype=torch.float64),
                   torch.tensor([-beta, 0, beta, 1e6], dtype=torch.float64)]).requires_grad_()
    want = F.smooth_l1_loss(z, torch.zeros_like(z), beta=beta, reduction="none")
    got = smooth_l1(z, beta)
    assert torch.allclose(got, want, rtol=1e-14, atol=1e-15)
    assert torch.allclose(torch.autograd.grad(got.sum(), z)[0], torch.autograd.grad(want.sum(), z)[0], rtol=1e-14, atol=1e-15)


def test_encode_is_the_coding_of_section_2_2():
    """Section 2.2: delta_G and log omega_G, against torchvision's BoxCoder with weights 1."""
    _, gt, anchors, _ = scene(300)
    assert torch.allclose(encode(gt, anchors), BoxCoder((1., 1., 1., 1.)).encode_single(gt, anchors), rtol=1e-12, atol=1e-9)


def test_decode_recovers_the_predicted_box():
    """Section 2.2: c_P = c_A + delta_P d_A and d_P = omega_P d_A, against torchvision's BoxCoder below its clamp."""
    g = torch.Generator().manual_seed(0)
    anchors, deltas = scene(300)[2], torch.randn(300, 4, generator=g, dtype=torch.float64).clamp(-4, 4)
    want = BoxCoder((1., 1., 1., 1.)).decode_single(deltas, anchors)
    assert torch.allclose(decode(deltas, anchors), want, rtol=1e-12, atol=1e-9)


def test_decode_undoes_encode_for_boxes_of_any_size():
    """Section 2.2: no clamp on log omega, so that a box 4000 times its anchor comes back too."""
    _, gt, anchors, _ = scene(300)
    gt, anchors = torch.cat([gt, row(-2000, 0, 2000, 4000)]), torch.cat([anchors, row(10, 10, 11, 11)])
    assert torch.allclose(decode(encode(gt, anchors), anchors), gt, rtol=1e-11, atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_box_loss_is_equation_1(beta):
    """Eq. 1 as a plain loop over boxes and dimensions."""
    deltas, gt, anchors, _ = scene(60)
    got = box_loss(deltas, gt, anchors, beta)
    assert got.shape == (60,)
    for n, (d, b, a) in enumerate(zip(deltas.tolist(), gt.tolist(), anchors.tolist())):
        want = 0
        for k in (0, 1):
            size = a[k + 2] - a[k]
            shift = ((b[k] + b[k + 2]) / 2 - (a[k] + a[k + 2]) / 2) / size
            for z in (d[k] - shift, d[k + 2] - math.log((b[k + 2] - b[k]) / size)):
                want += z * z / (2 * beta) if abs(z) <= beta else abs(z) - beta / 2
        assert got[n].item() == pytest.approx(want, rel=1e-11, abs=1e-11)


def test_box_loss_knows_nothing_of_the_crop():
    """Eq. 1: the two losses share a signature, the standard one ignores crop_size and truncated."""
    deltas, gt, anchors, _ = scene(60)
    all_cut = torch.ones(60, 4, dtype=torch.bool)
    assert torch.equal(box_loss(deltas, gt, anchors, 1.0), box_loss(deltas, gt, anchors, 1.0, CROP, all_cut))


# --- 2.4 Solving (O1) -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", MORE_BETAS)
def test_o1_reaches_the_global_minimum(beta):
    """Section 2.4, (O1), against a grid of all widths in float64."""
    low, hat, pred, lowest, _, _ = o1_problems(beta)
    omega = solve_o1(low, hat, pred, beta)
    assert omega.shape == low.shape and omega.dtype == torch.float64
    assert ((o1_cost(omega, hat, pred, beta) - lowest).abs() <= 1e-9 * lowest.clamp_min(1)).all()


@pytest.mark.parametrize("beta", MORE_BETAS)
def test_o1_reaches_the_global_minimum_in_float32(beta):
    """Section 2.4, (O1): the same problems in single precision."""
    low, hat, pred, lowest, _, _ = o1_problems(beta)
    omega = solve_o1(low.float(), hat.float(), pred.float(), beta).double()
    assert (o1_cost(omega, hat, pred, beta) - lowest <= 1e-5 * lowest.clamp_min(1) + 1e-6 * omega).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", BETAS)
def test_o1_keeps_its_constraint(beta, dtype):
    """(O1): omega >= b1 - a1, not a rounding below."""
    low, hat, pred, *_ = (x.to(dtype) for x in o1_problems(beta))
    assert (solve_o1(low, hat, pred, beta) >= low).all()


def test_o1_problems_cover_every_regime():
    """Section 2.4: the minimum was found with each term linear or quadratic, w^ on either side of wP, and on the bound."""
    for beta in BETAS:
        low, hat, pred, lowest, at, _ = o1_problems(beta)
        omega = at.exp()
        inside, below = omega > low * (1 + 1e-6), hat < pred
        first, second = (omega - hat).abs() / 2 < beta, (omega / pred).log().abs() < beta      # quadratic there
        assert (inside & below & ~first & ~second).sum() >= 10          # LL: a minimum at w = 2
        for q1, q2, side in ((False, True, below), (False, True, ~below), (True, False, below), (True, False, ~below),
                             (True, True, below), (True, True, ~below)):
            assert (inside & side & (first == q1) & (second == q2)).sum() >= 5, (beta, q1, q2)
        assert (~inside).sum() >= 30 and (hat < 0).sum() >= 30


def test_o1_problems_have_two_valleys_of_nearly_equal_depth():
    """Section 2.4: "the objective might have multiple local minima"; here some of them within 1 % of each other."""
    for beta in BETAS:
        low, hat, pred, lowest, at, second = o1_problems(beta)
        assert second.isfinite().sum() >= 40
        close = second - lowest < 1e-2 * lowest
        assert (close & (at.exp() < 2)).sum() >= 5 and (close & (at.exp() > 2)).sum() >= 5


def test_o1_problems_cover_the_three_monotone_stretches():
    """Quadratic in both terms the roots obey w (w - w^) / 4 + log w = log wP, whose left side turns twice when w^ > sqrt(32)."""
    first = middle = last = 0
    for beta in (4.0, 16.0):
        low, hat, pred, lowest, at, second = o1_problems(beta)
        turn = (hat ** 2 - 32).sqrt()                   # nan where there is one stretch only
        omega, lower, upper = at.exp(), (hat - turn) / 4, (hat + turn) / 4
        c = lambda w: w * (w - hat) / 4 + w.log()
        inside = (omega > low * (1 + 1e-6)) & ((omega - hat).abs() / 2 < beta) & ((omega / pred).log().abs() < beta)
        first += (inside & (omega < lower)).sum()
        last += (inside & (omega > upper)).sum()
        middle += (inside & (c(upper) < pred.log()) & (pred.log() < c(lower)) & second.isfinite()).sum()
    assert first >= 15 and middle >= 15 and last >= 15


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("regime, omega", [("LL", 2.0), ("LQ", 0.3), ("LQ", 1.7), ("QL", 2.3), ("QL", 20.0), ("QQ", 0.4),
                                           ("QQ", 5.0)])
def test_o1_finds_a_known_stationary_point(regime, omega, beta):
    """(O1) with w^ < wP has one minimum only: in every regime, choose it and compute w^ and wP from the derivative. "Under the
    desired precision": here that of float64."""
    omega = torch.full((20,), omega, dtype=torch.float64)
    hat, pred = stationary(omega, beta, regime, 1, torch.Generator().manual_seed(1))
    assert torch.allclose(solve_o1(omega / 10, hat, pred, beta), omega, rtol=1e-12)


@pytest.mark.parametrize("beta", [2.5, 4.0, 16.0])
def test_o1_chooses_among_three_roots(beta):
    """(O1) quadratic in both terms, w^ > sqrt(32): two thousand problems between the turns w- and w+ of w (w - w^) / 4 + log w,
    where the derivative may vanish three times, bounds anywhere, against a grid."""
    n, g = 2000, torch.Generator().manual_seed(5)
    hat = math.sqrt(32) * uniform(g, n, 0.001, 1.2).exp()
    turn = (hat ** 2 - 32).sqrt()
    c = lambda w: w * (w - hat) / 4 + w.log()
    top, bottom = c((hat - turn) / 4), c((hat + turn) / 4)
    pred = (bottom + (top - bottom) * uniform(g, n, -0.1, 1.1)).exp()
    low = torch.where(torch.rand(n, generator=g) < 0.6, uniform(g, n, -14, -3).exp(), hat * uniform(g, n, -5, -0.1).exp())
    cost = lambda t, rows: o1_cost(t.exp(), hat[rows, None], pred[rows, None], beta)
    lowest = brute_force(cost, low.log(), hat.log() + 0.01, 1500)[0]
    assert ((o1_cost(solve_o1(low, hat, pred, beta), hat, pred, beta) - lowest).abs() <= 1e-9 * lowest.clamp_min(1)).all()


@pytest.mark.parametrize("beta, low, hat, pred", [(2.0, 1.7065162, 5.7022039, 0.3109138), (2.2, 2.2760224, 5.9380077, 0.2860248),
                                                  (8.0, 0.3490891, 15.8438226, 0.00010988590)])
def test_o1_compares_the_bound_with_the_valley_beyond_it(beta, low, hat, pred):
    """(O1): rare cases, where the bound cuts off the left valley and hardly anything but the right one is cheaper."""
    low, hat, pred = (torch.tensor([x], dtype=torch.float64) for x in (low, hat, pred))
    lowest = brute_force(lambda t, rows: o1_cost(t.exp(), hat, pred, beta), low.log(), hat.log() + 0.01, 10000)[0]
    assert o1_cost(solve_o1(low, hat, pred, beta), hat, pred, beta).item() == pytest.approx(lowest.item(), rel=1e-9)


def test_o1_linear_in_both_terms_has_its_minimum_at_two():
    """(O1), w^ < 2 - 2 beta and wP > 2 e^beta: slope 1/2 against 1/w. By hand for beta = 1, w^ = -1, wP = 2 e^3."""
    omega = solve_o1(row(1)[0], row(-1)[0], row(2 * math.e ** 3)[0], 1.0)
    assert omega.item() == pytest.approx(2, abs=1e-9)
    assert o1_cost(omega, row(-1)[0], row(2 * math.e ** 3)[0], 1.0).item() == pytest.approx(3.5, abs=1e-9)


def test_o1_jumps_from_one_valley_to_the_other():
    """(O1), beta = 1, wP = e^(-1/4) / 2, by hand. Lower valley: w = 1/2. Upper valley: w^2 - w^ w + 4 = 0. w^ = 4.5 leaves the
    lower one the global minimum (1.53125 against 1.817), w^ = 8 the upper one (2.48915 against 3.28125)."""
    pred = 0.5 * math.exp(-0.25)
    omega = solve_o1(row(0.01, 0.01)[0], row(4.5, 8)[0], row(pred, pred)[0], 1.0)
    assert omega.tolist() == pytest.approx([0.5, 4 + math.sqrt(12)], abs=1e-8)
    cost = o1_cost(omega, row(4.5, 8)[0], row(pred, pred)[0], 1.0)
    assert cost.tolist() == pytest.approx([1.53125, 2.48915], abs=1e-5)


def test_o1_returns_the_bound_where_the_prediction_is_smaller():
    """(O1): right of both w^ and wP the cost grows, so the bound is the minimum, exactly."""
    low = row(0.3, 1, 2, 7)[0]
    for beta in BETAS:
        assert torch.equal(solve_o1(low, low - row(0, 0.5, 4, 20)[0], low * row(1, 0.9, 0.5, 0.001)[0], beta), low)


def test_o1_of_nothing_is_nothing():
    """Batched over no problem at all."""
    none = torch.empty(0)
    assert solve_o1(none, none, none, 1.0).shape == (0,)


# --- 2.4 Solving (O2) -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", MORE_BETAS)
def test_o2_reaches_the_global_minimum(beta):
    """Section 2.4, (O2), against a grid of all widths with the best place for each, in float64."""
    a2, b2, delta_pred, omega_pred, lowest = o2_problems(beta)
    delta, omega = solve_o2(a2, b2, delta_pred, omega_pred, beta)
    cost = o2_cost(delta, omega, delta_pred, omega_pred, beta)
    assert ((cost - lowest).abs() <= 1e-9 * lowest.clamp_min(1)).all()
    assert (lowest > 1e-6).sum() > 100 and (lowest < 1e-12).sum() > 20


@pytest.mark.parametrize("beta", BETAS)
def test_o2_reaches_the_global_minimum_in_float32(beta):
    """(O2): the same problems in single precision."""
    a2, b2, delta_pred, omega_pred, lowest = o2_problems(beta)
    delta, omega = (x.double() for x in solve_o2(a2.float(), b2.float(), delta_pred.float(), omega_pred.float(), beta))
    cost = o2_cost(delta, omega, delta_pred, omega_pred, beta)
    assert (cost - lowest <= 1e-5 * lowest.clamp_min(1) + 1e-6 * (delta_pred.abs() + a2.abs() + b2.abs())).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", BETAS)
def test_o2_keeps_both_constraints(beta, dtype):
    """(O2): delta - omega/2 <= a2 and delta + omega/2 >= b2, to rounding."""
    a2, b2, delta_pred, omega_pred = (x.to(dtype) for x in o2_problems(beta)[:4])
    delta, omega = solve_o2(a2, b2, delta_pred, omega_pred, beta)
    slack = 4 * EPS[dtype] * (a2.abs() + b2.abs() + delta.abs() + omega)
    assert (delta - omega / 2 <= a2 + slack).all() and (delta + omega / 2 >= b2 - slack).all()


def test_no_feasible_point_of_the_plane_beats_o2():
    """(O2) in both variables: random points of the feasible set, near the solution and far from it."""
    g = torch.Generator().manual_seed(0)
    for beta in (1 / 9, 1.0, 4.0):
        a2, b2, delta_pred, omega_pred = (x[:100, None] for x in o2_problems(beta)[:4])
        delta, omega = solve_o2(a2[:, 0], b2[:, 0], delta_pred[:, 0], omega_pred[:, 0], beta)
        spread = torch.tensor([1e-3, 0.03, 0.3, 3], dtype=torch.float64).repeat(500)
        w = omega[:, None] * (torch.randn(100, 2000, generator=g, dtype=torch.float64) * spread).exp()
        d = delta[:, None] + torch.randn(100, 2000, generator=g, dtype=torch.float64) * spread * omega[:, None]
        cost = o2_cost(d, w, delta_pred, omega_pred, beta)
        cost[(d - w / 2 > a2) | (d + w / 2 < b2)] = torch.inf
        assert cost.isfinite().sum() > 20000
        assert (o2_cost(delta, omega, delta_pred[:, 0], omega_pred[:, 0], beta) <= cost.amin(1) + 1e-12).all()


def test_o2_returns_a_feasible_prediction_as_it_is():
    """Section 2.4: "the unconstrained optimum is given by delta_P, omega_P"; if it obeys the constraints it is the solution."""
    for beta in BETAS:
        a2, b2, delta_pred, omega_pred, _ = o2_problems(beta)
        feasible = (delta_pred - omega_pred / 2 <= a2) & (delta_pred + omega_pred / 2 >= b2)
        assert feasible.sum() > 20
        delta, omega = solve_o2(a2, b2, delta_pred, omega_pred, beta)
        assert torch.equal(delta[feasible], delta_pred[feasible]) and torch.equal(omega[feasible], omega_pred[feasible])
        assert not (delta.isclose(delta_pred) & omega.isclose(omega_pred))[~feasible].all()


def test_o2_takes_the_cheaper_of_its_two_boundaries():
    """(O2): mirrored about the middle of a2 and b2, the other constraint is the active one."""
    for beta in BETAS:
        a2, b2, delta_pred, omega_pred, _ = o2_problems(beta)
        delta, omega = solve_o2(a2, b2, delta_pred, omega_pred, beta)
        mirrored = solve_o2(-b2, -a2, -delta_pred, omega_pred, beta)
        want = o2_cost(delta, omega, delta_pred, omega_pred, beta)
        assert torch.allclose(o2_cost(mirrored[0], mirrored[1], -delta_pred, omega_pred, beta), want, rtol=1e-9, atol=1e-12)
        left, right = (delta - omega / 2 - a2).abs() < 1e-9, (delta + omega / 2 - b2).abs() < 1e-9
        assert (left & ~right).sum() > 10 and (right & ~left).sum() > 10


# --- 2.3 Crop-aware bounding box ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("beta", BETAS)
def test_cabb_loss_is_the_minimum_of_equation_2(beta):
    """Eq. 2 against brute force over rho(G, C), all sixteen ways of being cut."""
    deltas, gt, anchors, kinds, lowest = solved_scene(beta)
    assert (kinds @ torch.tensor([1, 4])).bincount(minlength=16).min() >= 10
    loss = cabb_loss(deltas, gt, anchors, beta, CROP)
    assert loss.shape == (500,) and loss.dtype == torch.float64
    assert ((loss - lowest).abs() <= 1e-9 * lowest.clamp_min(1)).all()


@pytest.mark.parametrize("beta", BETAS)
def test_cabb_loss_is_the_minimum_of_equation_2_in_float32(beta):
    """Eq. 2: the same boxes in single precision; coordinates of some thousand anchors are themselves rounded to 1e-4."""
    deltas, gt, anchors, _, lowest = solved_scene(beta)
    loss = cabb_loss(deltas.float(), gt.float(), anchors.float(), beta, CROP)
    assert loss.dtype == torch.float32
    assert ((loss - lowest).abs() <= 1e-5 * lowest.clamp_min(1) + 1e-6 * sizes(deltas, gt, anchors, CROP)).all()


@pytest.mark.parametrize("beta", BETAS)
def test_cabb_targets_are_where_the_minimum_is(beta):
    """Proposition 1: L_CABB(D) = L_BB(D, phi(D))."""
    deltas, gt, anchors, _, lowest = solved_scene(beta)
    targets = cabb_targets(deltas, gt, anchors, beta, CROP)
    assert targets.shape == deltas.shape and targets.dtype == torch.float64
    assert ((eq1(deltas, targets, beta) - lowest).abs() <= 1e-9 * lowest.clamp_min(1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", BETAS)
def test_targets_cropped_are_the_ground_truth_cropped(beta, dtype):
    """Section 2.3: phi(D) is in rho(G, C) = {X : X|C = G|C}; to rounding, which is relative to anchor and crop."""
    deltas, gt, anchors = (x.to(dtype) for x in solved_scene(beta)[:3])
    targets = cabb_targets(deltas, gt, anchors, beta, CROP).double()
    size, place = (anchors[:, 2:] - anchors[:, :2]).double(), (anchors[:, 2:] + anchors[:, :2]).double() / 2
    middle, half = place + targets[:, :2] * size, targets[:, 2:].exp() * size / 2
    got = clipped(torch.cat([middle - half, middle + half], 1), CROP)
    scale = size * targets[:, :2].abs() + half * (2 + targets[:, 2:].abs()) + place.abs() + max(CROP)
    assert ((got - clipped(gt, CROP).double()).abs() <= 8 * EPS[dtype] * scale.repeat(1, 2)).all()


def test_no_box_of_the_set_is_cheaper():
    """Eq. 2 from the definition alone: random boxes X that are cropped as G is never cost less."""
    deltas, gt, anchors, _ = scene(300, seed=5)
    g, want = torch.Generator().manual_seed(0), clipped(gt, CROP)
    loss = {beta: cabb_loss(deltas, gt, anchors, beta, CROP) for beta in (1 / 9, 1.0, 4.0)}
    for _ in range(300):
        x = inside_rho(gt, CROP, g)
        assert torch.equal(clipped(x, CROP), want)
        for beta in loss:
            assert (loss[beta] <= eq1(deltas, coded(x, anchors), beta) * (1 + 1e-12) + 1e-12).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("beta", BETAS)
def test_cabb_never_exceeds_the_standard_loss(beta, dtype):
    """Section 2.3: "L_CABB lower bounds L_BB", because the cropped box is in the feasible set. A few units in the last place."""
    deltas, gt, anchors = (x.to(dtype) for x in solved_scene(beta)[:3])
    loss, standard = cabb_loss(deltas, gt, anchors, beta, CROP), box_loss(deltas, clipped(gt, CROP), anchors, beta)
    assert (loss <= standard + 4 * EPS[dtype] * torch.maximum(standard, sizes(deltas, gt, anchors, CROP))).all()
    assert (loss < 0.9 * standard).sum() > 150          # and it is no trivial bound


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_slivers(beta):
    """Eq. 2 where only 2 to 50 hundredths of a pixel are visible, against brute force: as any other box."""
    deltas, gt, anchors, _ = scene(160, seed=15)
    edge = torch.tensor([CROP[1], CROP[0]], dtype=torch.float64)
    thin = uniform(torch.Generator().manual_seed(4), 160, math.log(0.02), math.log(0.5)).exp()[:, None]
    gt = torch.where(torch.arange(160)[:, None] % 2 == 0, torch.cat([-30 + 0 * gt[:, :2], thin + 0 * gt[:, :2]], 1),
                     torch.cat([edge - thin, edge + 30 + 0 * thin], 1))
    want = crop_aware_loss(deltas, gt, anchors, beta, CROP)
    assert ((cabb_loss(deltas, gt, anchors, beta, CROP) - want).abs() <= 1e-9 * want.clamp_min(1)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_box_inside_the_crop_costs_the_standard_loss(dtype):
    """Section 2.3: rho(G, C) = {G} if G is strictly contained in the crop. To the last bit."""
    deltas, gt, anchors, kinds = scene(800, seed=3)
    deltas, gt, anchors = (x[(kinds == 0).all(1)].to(dtype) for x in (deltas, gt, anchors))
    assert len(gt) > 20
    for beta in BETAS:
        assert torch.equal(cabb_loss(deltas, gt, anchors, beta, CROP), box_loss(deltas, gt, anchors, beta))
        off = (cabb_targets(deltas, gt, anchors, beta, CROP) - encode(gt, anchors)).abs()
        assert (off.amax(1) <= (0 if dtype == torch.float64 else 1e-6) * sizes(deltas, gt, anchors, CROP)).all()


def test_the_dimensions_do_not_meet():
    """Section 2.4, Feasible set: cut in x only, the target in y is the ground truth's, and the other way round."""
    deltas, gt, anchors, kinds = scene(400, seed=4)
    targets, truth = cabb_targets(deltas, gt, anchors, 1.0, CROP), coded(clipped(gt, CROP), anchors)
    uncut = (kinds == 0).repeat(1, 2)
    assert uncut.sum() > 200 and torch.allclose(targets[uncut], truth[uncut], rtol=1e-12, atol=1e-9)
    assert (targets != truth)[~uncut].float().mean() > 0.5


def test_an_edge_half_a_pixel_inside_is_not_free():
    """Section 2.4, Feasible set: a side is free if the box reaches the crop's edge, c_G <= d_G / 2, not if it is near it."""
    gt, anchors = row(0.5, 0.5, CROP[1] - 0.5, CROP[0] - 0.5), row(100, 100, 300, 300)
    deltas = coded(row(-500, -500, 2000, 2000), anchors)
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, CROP), box_loss(deltas, gt, anchors, 1.0))


def test_without_a_crop_nothing_is_cut():
    """crop_size=None: full images; Eq. 2 is Eq. 1, whatever truncated says."""
    deltas, gt, anchors, _ = scene(100)
    marked = torch.ones(100, 4, dtype=torch.bool)
    for kw in ({}, {"truncated": marked}):
        assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, None, **kw), box_loss(deltas, gt, anchors, 1.0))
        assert torch.equal(cabb_targets(deltas, gt, anchors, 1.0, None, **kw), encode(gt, anchors))


@pytest.mark.parametrize("beta", BETAS)
def test_a_prediction_that_is_cropped_like_the_truth_costs_nothing(beta):
    """Eq. 2: if the prediction is in rho(G, C) the minimum is 0, and it is the target."""
    _, gt, anchors, _ = scene(400, seed=6)
    deltas = coded(inside_rho(gt, CROP, torch.Generator().manual_seed(1)), anchors)
    scale = sizes(deltas, gt, anchors, CROP)
    assert (cabb_loss(deltas, gt, anchors, beta, CROP) <= 1e-13 * scale).all()
    assert ((cabb_targets(deltas, gt, anchors, beta, CROP) - deltas).abs().amax(1) <= 1e-12 * scale).all()


def test_a_box_in_full_and_its_visible_part_cost_the_same():
    """Section 2.3: rho(G, C) depends on G|C only; what lies outside the crop is not known."""
    deltas, gt, anchors, _ = scene(300, seed=7)
    part = clipped(gt, CROP)
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, CROP), cabb_loss(deltas, part, anchors, 1.0, CROP))
    assert torch.equal(cabb_targets(deltas, gt, anchors, 1.0, CROP), cabb_targets(deltas, part, anchors, 1.0, CROP))


# --- Figure 3 by hand: crop [0, 100], beta = 1, one dimension -------------------------------------------------------------

@pytest.mark.parametrize("box", [(-60, 40), (-4000, 40), (-1, 40), (0, 40)])
def test_beyond_the_cut_edge_costs_nothing(box):
    """Figure 3: visible [0, 40], cut on the left; however far the prediction goes on to the left, it may be right."""
    delta, omega = ((box[0] + box[1]) / 2 - 20) / 40, (box[1] - box[0]) / 40
    loss, target = in_x((-30, 40), (0, 40), delta, omega)
    assert loss == pytest.approx(0, abs=1e-15) and target == pytest.approx([delta, math.log(omega)], abs=1e-12)


@pytest.mark.parametrize("gt, anchor, box", [((-30, 40), (0, 40), (10, 40)), ((60, 130), (60, 100), (60, 90))])
def test_short_of_the_cut_edge_costs_what_equation_1_costs_there(gt, anchor, box):
    """Figure 3: a quarter of the visible 40 pixels is missed at the cut edge: |delta| = 1/8, omega = 3/4, target (0, log 1)."""
    middle = sum(anchor) / 2
    loss, target = in_x(gt, anchor, ((box[0] + box[1]) / 2 - middle) / 40, (box[1] - box[0]) / 40)
    assert loss == pytest.approx(1 / 128 + math.log(0.75) ** 2 / 2, abs=1e-12) and target == pytest.approx([0, 0], abs=1e-9)


def test_a_fixed_edge_in_the_wrong_place_is_shared_between_place_and_size():
    """(O1) by hand, both terms linear: visible [0, 40] = anchor, right side fixed, delta_P = 1 and omega_P = 2 e^3, so w^ = -1.
    Best is w = 2, the box [-40, 40]: 3/2 - 1/2 for the place, 3 - 1/2 for the size."""
    loss, target = in_x((-30, 40), (0, 40), 1, 2 * math.e ** 3)
    assert loss == pytest.approx(3.5, abs=1e-9) and target == pytest.approx([-0.5, math.log(2)], abs=1e-7)


def test_cut_on_both_sides_a_small_prediction_in_the_middle_is_pulled_to_the_crop():
    """(O2) by hand, symmetric: visible = crop = anchor, omega_P = 1/2 in the middle: target the crop itself, log(2)^2 / 2."""
    loss, target = in_x((-30, 130), (0, 100), 0, 0.5)
    assert loss == pytest.approx(math.log(2) ** 2 / 2, abs=1e-12) and target == pytest.approx([0, 0], abs=1e-9)


@pytest.mark.parametrize("side", [1, -1])
def test_cut_on_both_sides_a_shifted_prediction_is_pulled_to_the_nearer_boundary(side):
    """(O2) by hand: delta_P = 0.7, omega_P = 2 e^-0.2 begins at 0.7 - 0.82 > -1/2. On delta = -1/2 + w/2 we have w^ = 2.4, and
    w = 2 is a root of w (w - w^) / 4 = log(wP / w) = -0.2: target (1/2, log 2), the box [0, 200], for 0.2^2 / 2 twice.
    Mirrored likewise."""
    loss, target = in_x((-30, 130), (0, 100), side * 0.7, 2 * math.exp(-0.2))
    assert loss == pytest.approx(0.04, abs=1e-12) and target == pytest.approx([side * 0.5, math.log(2)], abs=1e-8)


def test_cut_on_both_sides_a_large_prediction_costs_nothing():
    """(O2): the prediction [-40, 160] covers the crop, so it is feasible and free."""
    loss, target = in_x((0, 100), (0, 100), 0.1, 2.0)
    assert loss == 0 and target == pytest.approx([0.1, math.log(2)], abs=1e-15)


# --- Footnote 2: only what is really cut is free --------------------------------------------------------------------------

@pytest.mark.parametrize("beta", BETAS)
def test_a_side_is_free_if_it_is_marked_and_at_the_edge(beta):
    """Footnote 2, random marks on random boxes, against brute force with the same sides free."""
    deltas, gt, anchors, _ = scene(150, seed=8)
    marks = torch.rand(150, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    want = crop_aware_loss(deltas, gt, anchors, beta, CROP, marks)
    assert ((cabb_loss(deltas, gt, anchors, beta, CROP, marks) - want).abs() <= 1e-9 * want.clamp_min(1)).all()
    got = eq1(deltas, cabb_targets(deltas, gt, anchors, beta, CROP, marks), beta)
    assert ((got - want).abs() <= 1e-9 * want.clamp_min(1)).all()


def test_all_marked_is_the_paper():
    """Footnote 2: marks on every side say no more than the crop does."""
    deltas, gt, anchors, _ = scene(200, seed=9)
    every = torch.ones(200, 4, dtype=torch.bool)
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, CROP, every), cabb_loss(deltas, gt, anchors, 1.0, CROP))


def test_none_marked_is_the_standard_loss_of_the_visible_part():
    """Footnote 2: a box that merely touches the crop's edge is not extended beyond it."""
    deltas, gt, anchors, _ = scene(200, seed=9)
    none = torch.zeros(200, 4, dtype=torch.bool)
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, CROP, none), box_loss(deltas, clipped(gt, CROP), anchors, 1.0))
    assert torch.equal(cabb_targets(deltas, gt, anchors, 1.0, CROP, none), encode(clipped(gt, CROP), anchors))


def test_marked_but_away_from_the_edge_is_not_free():
    """Footnote 2: a mark where the box does not reach the crop's edge has no meaning."""
    deltas, gt, anchors, kinds = scene(800, seed=3)
    deltas, gt, anchors = (x[(kinds == 0).all(1)] for x in (deltas, gt, anchors))
    every = torch.ones(len(gt), 4, dtype=torch.bool)
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0, CROP, every), box_loss(deltas, gt, anchors, 1.0))


@pytest.mark.parametrize("side", [0, 1, 2, 3], ids=["left", "top", "right", "bottom"])
def test_each_mark_frees_its_own_side(side):
    """Footnote 2, order left top right bottom: the truth fills the crop, the prediction goes on beyond one side only."""
    whole, anchor = row(0, 0, CROP[1], CROP[0]), row(100, 50, 500, 400)
    outward = torch.zeros(4, dtype=torch.float64)
    outward[side] = 200 if side > 1 else -200
    deltas = coded(whole + outward, anchor)
    only = torch.zeros(1, 4, dtype=torch.bool)
    only[0, side] = True
    assert cabb_loss(deltas, whole, anchor, 1.0, CROP, only).item() == pytest.approx(0, abs=1e-14)
    assert torch.allclose(decode(cabb_targets(deltas, whole, anchor, 1.0, CROP, only), anchor), whole + outward, atol=1e-9)
    assert cabb_loss(deltas, whole, anchor, 1.0, CROP, ~only).item() > 1e-3


# --- Proposition 1: the gradient ------------------------------------------------------------------------------------------

def gradient(deltas, gt, anchors, beta, crop_size=CROP, truncated=None):
    deltas = deltas.clone().requires_grad_()
    return torch.autograd.grad(cabb_loss(deltas, gt, anchors, beta, crop_size, truncated).sum(), deltas)[0]


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_equation_1_at_constant_targets(beta):
    """Proposition 1, the envelope theorem: z / beta, at most 1, towards the targets."""
    deltas, gt, anchors = solved_scene(beta)[:3]
    targets = cabb_targets(deltas, gt, anchors, beta, CROP)
    want = ((deltas - targets) / beta).clamp(-1, 1)
    assert torch.allclose(gradient(deltas, gt, anchors, beta), want, rtol=1e-12, atol=1e-12 / beta)


@pytest.mark.parametrize("beta", [1 / 9, 1.0, 4.0])
def test_the_gradient_is_the_slope_of_the_loss(beta):
    """Proposition 1 against central differences. Where two targets tie the loss has a kink and differences at two steps disagree;
    such entries are left out, and they are few."""
    deltas, gt, anchors = (x[:150] for x in scene(200, seed=10)[:3])
    slope = []
    for step in (1e-4, 1e-5):
        move = step * torch.eye(4, dtype=torch.float64).repeat_interleave(150, 0)               # [600, 4]
        many = [x.repeat(4, 1) for x in (gt, anchors)]
        ahead, behind = (cabb_loss(deltas.repeat(4, 1) + s * move, *many, beta, CROP) for s in (1, -1))
        slope.append(((ahead - behind) / (2 * step)).view(4, 150).T)
    smooth = (slope[0] - slope[1]).abs() < 1e-4
    assert smooth.float().mean() > 0.9
    assert (gradient(deltas, gt, anchors, beta) - slope[1])[smooth].abs().max() < 2e-4


def test_the_targets_are_constants():
    """Proposition 1: no gradient through phi, none into ground truth or anchors."""
    deltas, gt, anchors = (x.clone().requires_grad_() for x in scene(100)[:3])
    for truncated in (None, torch.rand(100, 4) < 0.5):
        assert not cabb_targets(deltas, gt, anchors, 1.0, CROP, truncated).requires_grad
        loss = cabb_loss(deltas, gt, anchors, 1.0, CROP, truncated).sum()
        into = torch.autograd.grad(loss, (deltas, gt, anchors), allow_unused=True)
        assert into[0].abs().sum() > 0 and all(x is None or (x == 0).all() for x in into[1:])


def test_a_step_along_the_gradient_helps():
    """Proposition 1 in use: gradient descent on the deltas ends in rho(G, C)."""
    deltas, gt, anchors, _ = scene(100, seed=11)
    deltas = coded(clipped(gt, CROP), anchors) + deltas.clamp(-2, 2)
    for _ in range(60):
        deltas = deltas - 0.5 * gradient(deltas, gt, anchors, 1.0)
    assert cabb_loss(deltas, gt, anchors, 1.0, CROP).max() < 1e-3


# --- Symmetries -----------------------------------------------------------------------------------------------------------

def same_loss(deltas, gt, anchors, crop_size, marks, beta, moved):
    """The loss of the moved problem is that of the original one."""
    want = cabb_loss(deltas, gt, anchors, beta, crop_size, marks)
    scale = sizes(deltas, gt, anchors, crop_size)
    got = cabb_loss(*moved[:3], beta, *moved[3:])
    return ((got - want).abs() <= 1e-12 * torch.maximum(want, scale)).all()


@pytest.fixture
def marked_scene():
    deltas, gt, anchors, _ = scene(300, seed=12)
    return deltas, gt, anchors, CROP, torch.rand(300, 4, generator=torch.Generator().manual_seed(3)) < 0.7


@pytest.mark.parametrize("beta", BETAS)
def test_mirrored_left_to_right(marked_scene, beta):
    """Section 2.4: the cases cut left and cut right are mirror images."""
    deltas, gt, anchors, crop, marks = marked_scene
    turn, flip = [2, 1, 0, 3], torch.tensor([-1., 1, 1, 1], dtype=torch.float64)
    mirror = lambda b: torch.stack([crop[1] - b[:, 2], b[:, 1], crop[1] - b[:, 0], b[:, 3]], 1)
    assert same_loss(*marked_scene, beta, (deltas * flip, mirror(gt), mirror(anchors), crop, marks[:, turn]))


@pytest.mark.parametrize("beta", BETAS)
def test_x_and_y_exchanged(marked_scene, beta):
    """Section 2.4: both dimensions obey the same rules; crop_size is (height, width)."""
    turn = [1, 0, 3, 2]
    deltas, gt, anchors, crop, marks = marked_scene
    assert same_loss(*marked_scene, beta, (deltas[:, turn], gt[:, turn], anchors[:, turn], crop[::-1], marks[:, turn]))


def test_twice_the_pixels(marked_scene):
    """Section 2.2: everything is relative to the anchor, so the unit of length does not matter."""
    deltas, gt, anchors, crop, marks = marked_scene
    assert same_loss(*marked_scene, 1.0, (deltas, 2 * gt, 2 * anchors, (2 * crop[0], 2 * crop[1]), marks))


def test_a_batch_is_its_boxes_one_by_one():
    """Eq. 2 is a loss per box: no box's company matters."""
    deltas, gt, anchors, _ = scene(600, seed=13)
    loss, targets = cabb_loss(deltas, gt, anchors, 0.5, CROP), cabb_targets(deltas, gt, anchors, 0.5, CROP)
    for n in range(0, 600, 15):
        one = (deltas[n:n + 1], gt[n:n + 1], anchors[n:n + 1], 0.5, CROP)
        assert cabb_loss(*one).item() == pytest.approx(loss[n].item(), rel=1e-10, abs=1e-10)
        assert torch.allclose(eq1(one[0], cabb_targets(*one), 0.5), eq1(one[0], targets[n:n + 1], 0.5), rtol=1e-10, atol=1e-10)


# --- Precision, extremes, degenerate boxes --------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_deltas(dtype):
    """Under autocast the deltas come as bfloat16: the loss is float32 and right for these rounded deltas."""
    deltas, gt, anchors, _ = scene(400, seed=14)
    deltas = deltas.to(dtype)
    want = cabb_loss(deltas.double(), gt, anchors, 1.0, CROP)
    scale = sizes(deltas.double(), gt, anchors, CROP)
    loss = cabb_loss(deltas, gt.float(), anchors.float(), 1.0, CROP)
    assert loss.dtype == torch.float32
    targets = cabb_targets(deltas, gt.float(), anchors.float(), 1.0, CROP)
    assert targets.dtype in (torch.float32, torch.float64)
    assert ((eq1(deltas.double(), targets.double(), 1.0) - want).abs() <= 1e-5 * want.clamp_min(1) + 1e-6 * scale).all()
    assert ((loss - want).abs() <= 1e-5 * want.clamp_min(1) + 1e-6 * scale).all()
    slope = gradient(deltas, gt.float(), anchors.float(), 1.0)
    assert slope.dtype == dtype and slope.isfinite().all()


EXTREMES = torch.cartesian_prod(*[torch.tensor([-100., 0, 100])] * 4).double()                  # [81, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1e-3, 1, 300, 1e6])
def test_extreme_predictions_stay_finite(size, dtype):
    """Eq. 2 and its gradient at deltas of 100 (a box e^100 anchors wide), anchors of a thousandth and a million pixels, truths of
    one pixel and of the whole crop."""
    truths = [row(0, 0, CROP[1], CROP[0]), row(0, 0, 1, 1), row(CROP[1] - 1, CROP[0] - 1, CROP[1], CROP[0]), row(9, 9, 10, 10)]
    gt = torch.cat(truths).repeat_interleave(81, 0)
    anchors = row(320 - size / 2, 200 - size / 2, 320 + size / 2, 200 + size / 2).repeat(len(gt), 1)
    if size < 1:
        anchors = row(0, 0, size, size).repeat(len(gt), 1)      # float32 cannot hold 320 and a half thousandth
    other = torch.float64 if dtype == torch.float64 else torch.float32
    for beta in (1 / 9, 4.0):
        args = EXTREMES.repeat(4, 1).to(dtype), gt.to(other), anchors.to(other), beta
        assert cabb_loss(*args, CROP).isfinite().all() and cabb_targets(*args, CROP).isfinite().all()
        slope = gradient(*args)
        assert slope.isfinite().all() and (slope.abs() <= 1 + 1e-6).all()


def test_extreme_predictions_cost_the_minimum():
    """Eq. 2 at deltas of 100, against brute force."""
    for truth in (row(0, 0, CROP[1], CROP[0]), row(0, 0, 30, 20), row(600, 300, 640, 384)):
        gt, anchors = truth.repeat(81, 1), row(100, 100, 300, 200).repeat(81, 1)
        for beta in (1 / 9, 4.0):
            want = crop_aware_loss(EXTREMES, gt, anchors, beta, CROP)
            assert torch.allclose(cabb_loss(EXTREMES, gt, anchors, beta, CROP), want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("truncated", [None, torch.zeros(0, 4, dtype=torch.bool)])
def test_no_box_no_loss(truncated):
    """An image without matched anchors: shapes [0], and a sum with a gradient attached."""
    deltas, none = torch.empty(0, 4, requires_grad=True), torch.empty(0, 4)
    loss = cabb_loss(deltas, none, none, 1.0, CROP, truncated)
    assert loss.shape == (0,) and cabb_targets(deltas, none, none, 1.0, CROP, truncated).shape == (0, 4)
    assert box_loss(deltas, none, none, 1.0).shape == (0,)
    loss.sum().backward()
    assert deltas.grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("box", [(-50, 20, -10, 60), (700, 20, 800, 60), (20, -50, 60, 0), (-90, -90, -10, -10),
                                 (20, 500, 60, 600)])
def test_a_truth_outside_the_crop_does_no_harm(box, dtype):
    """Degenerate: G|C is empty and no value is right, but loss and gradient are finite."""
    g = torch.Generator().manual_seed(0)
    deltas = torch.randn(50, 4, generator=g, dtype=dtype) * 3
    gt, anchors = row(*box).to(dtype).repeat(50, 1), row(10, 10, 90, 70).to(dtype).repeat(50, 1)
    for marks in (None, torch.zeros(50, 4, dtype=torch.bool)):
        assert cabb_loss(deltas, gt, anchors, 1.0, CROP, marks).isfinite().all()
        assert gradient(deltas, gt, anchors, 1.0, truncated=marks).isfinite().all()


def test_inputs_are_left_as_they_are():
    """The truth is clipped to the crop in a copy."""
    args = [x.clone() for x in scene(50)[:3]]
    cabb_loss(*args, 1.0, CROP)
    assert all(torch.equal(a, b) for a, b in zip(args, scene(50)[:3]))


# --- Where the work is done, and what the demo compares with --------------------------------------------------------------

def test_solving_all_problems_and_only_the_wanted_ones_agree():
    """A GPU solves all so as not to wait, a CPU only those of sides that were cut; unwanted ones never win: f is infinite."""
    g = torch.Generator().manual_seed(3)
    wanted = torch.rand(200, 2, 2, generator=g) < 0.4
    t_min, hat, t_pred = (torch.randn(200, 2, 2, generator=g, dtype=torch.float64) * s for s in (1, 4, 1))
    (t, f), (t_all, f_all) = (minimise_where(wanted, t_min, hat, t_pred, 0.5, select) for select in (True, False))
    assert torch.equal(f, f_all) and torch.equal(t, t_all)
    assert f[~wanted].eq(math.inf).all() and f[wanted].isfinite().all() and torch.equal(t[~wanted], t_min[~wanted])


CUT = row(-60, 50, 100, 90)                                   # cut on the left, all else shows: its visible part is 0 50 100 90
AT = row(10, 40, 110, 80)                                     # an anchor of 100 by 40


@pytest.mark.parametrize("loss, x1, other", [("standard_loss", 0, -60), ("full_loss", -60, 0)])
def test_the_standard_loss_asks_for_what_shows_and_the_full_loss_for_all(loss, x1, other):
    here, there = (encode(row(x, 50, 100, 90), AT) for x in (x1, other))
    value = getattr(cabb, loss)
    assert value(here, CUT, AT, 1.0, CROP).item() == pytest.approx(0, abs=1e-12)
    cost = box_loss(there, row(x1, 50, 100, 90), AT, 1.0).item()
    assert value(there, CUT, AT, 1.0, CROP).item() == pytest.approx(cost, rel=1e-9) and cost > 0.01


def test_ignoring_cut_sides_asks_only_for_the_sides_that_show():
    """The left side may be anywhere, inside the crop too; the right side pays for its distance, 20 pixels = 0.2 anchors; y pays
    Eq. 1."""
    for x1 in (-300, -60, 0, 50):
        assert ignoring_loss(encode(row(x1, 50, 100, 90), AT), CUT, AT, 1.0, CROP).item() == pytest.approx(0, abs=1e-12)
    assert ignoring_loss(encode(row(-20, 50, 120, 90), AT), CUT, AT, 1.0, CROP).item() == pytest.approx(0.2 ** 2 / 2, rel=1e-6)
    right, over = row(20, 50, 700, 90), row(20, 50, 90, 90)   # cut on the right: now the left side is asked for
    assert ignoring_loss(encode(over, AT), right, AT, 1.0, CROP).item() == pytest.approx(0, abs=1e-12)
    assert ignoring_loss(encode(over + row(30, 0, 0, 0), AT), right, AT, 1.0, CROP).item() == pytest.approx(0.3 ** 2 / 2, rel=1e-6)
    lower = encode(row(-20, 50, 100, 110), AT)                # 20 pixels taller: centre by 10 of 40, size by 60 / 40
    assert ignoring_loss(lower, CUT, AT, 1.0, CROP).item() == pytest.approx(0.25 ** 2 / 2 + math.log(1.5) ** 2 / 2, rel=1e-6)
    marks = torch.zeros(1, 4, dtype=torch.bool)               # nothing goes on: the standard loss of what shows
    assert torch.equal(ignoring_loss(lower, CUT, AT, 1.0, CROP, marks), standard_loss(lower, CUT, AT, 1.0, CROP))
    wide = row(-60, 50, 700, 90)                              # cut on both sides: x costs nothing at all
    assert ignoring_loss(encode(row(200, 50, 300, 90), AT), wide, AT, 1.0, CROP).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("loss", [box_loss, cabb_loss])
@pytest.mark.parametrize("wrong, word", [({"deltas": torch.zeros(3, 4)}, "[N, 4]"), ({"anchors": torch.ones(1, 4)}, "[N, 4]"),
                                         ({"gt_boxes": torch.ones(2, 5)}, "[N, 4]"), ({"beta": 0.0}, "beta"), ({"beta": -1.0}, "beta"),
                                         ({"deltas": torch.zeros(2, 5), "gt_boxes": torch.zeros(2, 5), "anchors": torch.zeros(2, 5)}, "[N, 4]")])
def test_what_cannot_be_meant_is_refused_in_one_sentence(loss, wrong, word):
    args = {"deltas": torch.zeros(2, 4), "gt_boxes": row(0, 0, 9, 9).repeat(2, 1), "anchors": row(0, 0, 9, 9).repeat(2, 1), "beta": 1.0}
    with pytest.raises(ValueError) as e:
        loss(**{**args, **wrong}, crop_size=CROP)
    assert word in str(e.value)
