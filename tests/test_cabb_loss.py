"""The spec of cabb_loss.py: Porzi et al., CVPR 2021, sections 2.2 to 2.4.
The oracles are brute force over the set rho(G, C) of Eq. 2, written from its definition: every
width on a fine grid, then finer grids around the best ones. They know nothing of (O1) and (O2).
Random numbers are rounded to float32, so that one oracle holds for both precisions."""
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection._utils import BoxCoder

import cabb_loss as module
from cabb_loss import (box_loss, cabb_loss, cabb_targets, decode, encode, nearest_box, smooth_l1,
                       solve_o1, solve_o2, visible)
from claims import claim
from lab import demo_cabb

BETAS = (1 / 9, 1.0, 2.0)
CROP = (384, 640)                                              # height, width: not square
float64 = torch.float64


# --- Oracles ----------------------------------------------------------------------------------
def huber(z, beta):
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


def clipped(boxes, crop_size=CROP):
    """X|C, the part of a box inside [0, width] x [0, height]."""
    edge = torch.tensor([crop_size[1], crop_size[0]] * 2, dtype=boxes.dtype)
    return boxes.clamp_min(0).minimum(edge)


def brute_force(cost, low, high, points=1500):
    """The least cost(t) for t in [low, high] [N]: a grid, then ever finer grids around its four
    lowest valleys. cost maps t [n, p] and the rows it belongs to onto [n, p]."""
    out, ruler = [], torch.linspace(0, 1, points, dtype=float64)
    fine = torch.linspace(-1, 1, 17, dtype=float64)
    for i in torch.arange(len(low)).split(64):
        a, b = low[i, None], high[i, None]
        t, step = a + (b - a) * ruler, (b - a) / (points - 1)
        v, wall = cost(t, i), torch.full_like(a, torch.inf)
        valley = (v <= torch.cat([wall, v[:, :-1]], 1)) & (v < torch.cat([v[:, 1:], wall], 1))
        best, where = v.masked_fill(~valley, torch.inf).topk(4, largest=False)
        at = t.gather(1, where)
        for _ in range(10):
            near = at[..., None] + step[..., None] * fine
            near = near.maximum(a[..., None]).minimum(b[..., None])              # [n, 4, 17]
            value, k = cost(near.flatten(1), i).view(near.shape).min(-1)
            at = torch.where(value < best, near.gather(-1, k[..., None])[..., 0], at)
            best, step = torch.where(best.isinf(), best, value.minimum(best)), step / 6
        out.append(best.amin(1))
    return torch.cat(out)


def cheapest(delta, log_omega, lo, hi, free_lo, free_hi, beta):
    """Eq. 2 in one dimension, in anchors: the least cost of an interval whose part inside the crop
    is [lo, hi]; all arguments [N]. Where a side is free the interval may go on beyond it. So a
    width w of at least hi - lo has its centre between hi - w/2 and lo + w/2; within this range the
    centre nearest to the predicted one is the best."""
    smallest = (hi - lo).log()
    reach = 2 * torch.maximum((lo - delta).abs(), (hi - delta).abs()).clamp_min(1e-6)
    largest = smallest.maximum(log_omega).maximum(reach.log()) + 0.01
    largest = torch.where(free_lo | free_hi, largest, smallest)

    def cost(t, i):
        half, d = t.exp() / 2, delta[i, None]
        left_in_place, right_in_place = lo[i, None] + half, hi[i, None] - half
        lower = torch.where(free_lo[i, None], right_in_place, left_in_place)
        upper = torch.where(free_hi[i, None], left_in_place, right_in_place)
        at = d.maximum(lower).minimum(upper)
        return huber(at - d, beta) + huber(t - log_omega[i, None], beta)
    return brute_force(cost, smallest, largest)


def crop_aware_loss(deltas, gt_boxes, anchors, beta, crop_size=CROP, truncated=None):
    """Eq. 2 by brute force, each dimension by itself (section 2.4, Feasible set)."""
    g, total = clipped(gt_boxes, crop_size), 0
    for k, length in ((0, crop_size[1]), (1, crop_size[0])):
        size, place = anchors[:, k + 2] - anchors[:, k], (anchors[:, k + 2] + anchors[:, k]) / 2
        free_lo, free_hi = g[:, k] <= 0, g[:, k + 2] >= length
        if truncated is not None:
            free_lo, free_hi = free_lo & truncated[:, k], free_hi & truncated[:, k + 2]
        total += cheapest(deltas[:, k], deltas[:, k + 2], (g[:, k] - place) / size,
                          (g[:, k + 2] - place) / size, free_lo, free_hi=free_hi, beta=beta)
    return total


def sizes(deltas, boxes, anchors, crop_size=CROP):
    """[N]: the largest number, in anchors, that takes part; rounding is relative to it."""
    size = (anchors[:, 2:] - anchors[:, :2]).repeat(1, 2)
    edge = torch.tensor([crop_size[1], crop_size[0]] * 2, dtype=boxes.dtype)
    numbers = [boxes / size, anchors / size, edge / size, deltas[:, :2]]
    return torch.cat(numbers, 1).abs().amax(1).clamp_min(1)


def near(found, expected, rel=1e-9):
    return ((found - expected).abs() <= rel * expected.clamp_min(1)).all()


# --- Random boxes and problems ----------------------------------------------------------------
def rounded(*tensors):
    return tuple(t.float().double() for t in tensors)


def uniform(g, n, low, high):
    return low + (high - low) * torch.rand(n, generator=g, dtype=float64)


def scene(n, seed=0):
    """Truths of four kinds a dimension (0 nothing cut, 1 left, 2 right, 3 both), anchors of 1 to
    4000 pixels, predictions near and far -> deltas, gt_boxes (in full), anchors, kinds [N, 2]."""
    g = torch.Generator().manual_seed(seed)
    gt, anchors = torch.empty(2, n, 4, dtype=float64)
    kinds = torch.randint(4, (n, 2), generator=g)
    for k, length in ((0, CROP[1]), (1, CROP[0])):
        kind, seen = kinds[:, k], uniform(g, n, 0, math.log(length - 2)).exp()
        before, after = (uniform(g, n, -1, math.log(3 * length)).exp() for _ in range(2))
        before = before * (torch.rand(n, generator=g) < 0.8)   # 0: the object ends at the edge
        start = 0.5 + uniform(g, n, 0, 1) * (length - 1 - seen)
        gt[:, k] = torch.where(kind == 0, start, torch.where(kind == 2, length - seen, -before))
        past = length + torch.where(kind == 2, before, after)
        gt[:, k + 2] = torch.where(kind == 0, start + seen, torch.where(kind == 1, seen, past))
        size = uniform(g, n, 0, math.log(4000)).exp()
        close = (gt[:, k] + gt[:, k + 2]).clamp(0, 2 * length) / 2 + size * uniform(g, n, -0.7, 0.7)
        anywhere = uniform(g, n, -length, 2 * length)
        place = torch.where(torch.rand(n, generator=g) < 0.6, close, anywhere)
        anchors[:, k], anchors[:, k + 2] = place - size / 2, place + size / 2
    gt, anchors = rounded(gt, anchors)
    noise = torch.randn(n, 4, generator=g, dtype=float64)
    full, part = coded(gt, anchors), coded(clipped(gt), anchors)
    scale = torch.cat([part[:, 2:].exp(), torch.ones(n, 2, dtype=float64)], 1)
    choices = torch.stack([full + 0.3 * noise * scale, part + 0.5 * noise * scale, noise, noise * 4,
                           noise * torch.tensor([60., 60, 3, 3])])
    style = torch.randint(5, (n,), generator=g)
    return (*rounded(choices[style, torch.arange(n)]), gt, anchors, kinds)


def o1_cost(omega, omega_hat, omega_pred, beta):
    return huber((omega - omega_hat) / 2, beta) + huber(omega.log() - omega_pred.log(), beta)


def o1_problems(beta):
    """omega_min, omega_hat, omega_pred: anything; then hat and pred on both sides of a bound or of
    omega, near and far, so that each term is linear in some and quadratic in others."""
    g, n = torch.Generator().manual_seed(round(900 * beta)), 300
    hat = torch.where(torch.rand(n, generator=g) < 0.5, uniform(g, n, -4, 5).exp(),
                      uniform(g, n, -30, 60))
    omega, far = uniform(g, n, -4, 3.4).exp(), uniform(g, n, -3, 3).exp()
    sign = torch.where(torch.rand(n, generator=g) < 0.5, 1.0, -1.0)
    parts = [(uniform(g, n, -5, 3).exp(), hat, uniform(g, n, -5, 5).exp()),
             (omega * uniform(g, n, -4, 0.1).exp(), omega - sign * beta * far,
              omega * (sign * beta * uniform(g, n, -3, 2).exp()).exp())]
    return rounded(*(torch.cat(p) for p in zip(*parts)))


def row(*numbers):
    return torch.tensor([numbers], dtype=float64)


# --- 2.2 Bounding box regression --------------------------------------------------------------
@pytest.mark.parametrize("beta", BETAS)
def test_the_standard_loss_agrees_with_torch_and_torchvision(beta):
    """Huber norm with its slope, also at |z| = beta and 0; coding by BoxCoder((1, 1, 1, 1)); Eq. 1;
    the crop is ignored."""
    z = torch.cat([torch.linspace(-3, 3, 301, dtype=float64), row(-1, 0, 1, 1e6)[0]]) * beta
    z.requires_grad_()
    want = F.smooth_l1_loss(z, torch.zeros_like(z), beta=beta, reduction="none")
    found = smooth_l1(z, beta)
    assert torch.allclose(found, want, rtol=1e-14, atol=1e-15)
    slopes = [torch.autograd.grad(v.sum(), z)[0] for v in (found, want)]
    assert torch.allclose(*slopes, rtol=1e-14, atol=1e-15)
    deltas, gt, anchors, _ = scene(300)
    coder = BoxCoder((1., 1., 1., 1.))
    truth = coder.encode_single(gt, anchors)
    assert torch.allclose(encode(gt, anchors), truth, rtol=1e-12, atol=1e-9)
    small = deltas.clamp(-4, 4)
    assert torch.allclose(decode(small, anchors), coder.decode_single(small, anchors), atol=1e-9)
    far = row(-2000, 0, 2000, 4000), row(10, 10, 11, 11)       # no limit, unlike torchvision
    assert torch.allclose(decode(encode(*far), far[1]), far[0], rtol=1e-11, atol=1e-9)
    want = F.smooth_l1_loss(deltas, truth, beta=beta, reduction="none").sum(1)
    assert torch.allclose(box_loss(deltas, gt, anchors, beta), want, rtol=1e-11)
    cut = torch.ones(300, 4, dtype=torch.bool)
    assert torch.allclose(box_loss(deltas, gt, anchors, beta, crop_size=CROP, truncated=cut), want)


# --- 2.3 The loss is the minimum of Eq. 2 -----------------------------------------------------
@claim("porzi2021", "Eq. 2", "the loss is the minimum of Eq. 1 over rho_A(G, C)", of="cabb_loss")
@claim("porzi2021", "Section 2.3", "never more than the standard loss at G|C", of="cabb_loss")
@pytest.mark.parametrize("beta", BETAS)
def test_cabb_loss_is_the_minimum_of_equation_2(beta):
    """All sixteen ways of being cut; the targets are where the minimum is; also in float32, where
    coordinates of some thousand anchors are themselves rounded."""
    deltas, gt, anchors, kinds = scene(300, seed=round(90 * beta))
    lowest, scale = crop_aware_loss(deltas, gt, anchors, beta), sizes(deltas, gt, anchors)
    assert (kinds @ torch.tensor([1, 4])).bincount(minlength=16).min() >= 8
    loss = cabb_loss(deltas, gt, anchors, beta, crop_size=CROP)
    standard = box_loss(deltas, clipped(gt), anchors, beta)
    assert loss.shape == (300,) and loss.dtype == float64 and near(loss, lowest)
    assert (loss <= standard + 1e-15 * standard.maximum(scale)).all()
    assert (loss < 0.9 * standard).sum() > 90
    targets = cabb_targets(deltas, gt, anchors, beta, crop_size=CROP)
    assert targets.dtype == float64 and near(eq1(deltas, targets, beta), lowest)
    loss = cabb_loss(*(x.float() for x in (deltas, gt, anchors)), beta, crop_size=CROP)
    assert loss.dtype == torch.float32
    assert ((loss - lowest).abs() <= 1e-5 * lowest.clamp_min(1) + 1e-6 * scale).all()


@claim("porzi2021", "Section 2.3", "the target, cropped, is the truth, cropped", of="cabb_targets")
@pytest.mark.parametrize("beta", BETAS)
def test_targets_cropped_are_the_truth_cropped(beta):
    deltas, gt, anchors, _ = scene(300, seed=round(90 * beta))
    targets = cabb_targets(deltas, gt, anchors, beta, crop_size=CROP)
    size, place = anchors[:, 2:] - anchors[:, :2], (anchors[:, 2:] + anchors[:, :2]) / 2
    middle, half = place + targets[:, :2] * size, targets[:, 2:].exp() * size / 2
    found = clipped(torch.cat([middle - half, middle + half], 1))
    scale = size * targets[:, :2].abs() + half * (2 + targets[:, 2:].abs()) + place.abs() + 640
    assert ((found - clipped(gt)).abs() <= 2e-15 * scale.repeat(1, 2)).all()


@claim("porzi2021", "Section 2.3", "rho(G, C) = {G} for a box inside the crop", of="cabb_loss")
def test_a_box_inside_the_crop_costs_the_standard_loss():
    """To the last bit; so does any box without a crop, and half a pixel from the edge. A box in
    full and its visible part cost the same."""
    deltas, gt, anchors, kinds = scene(400, seed=3)
    loss, standard = (f(deltas, gt, anchors, 1.0, crop_size=CROP) for f in (cabb_loss, box_loss))
    inside = (kinds == 0).all(1)
    assert inside.sum() > 10 and torch.equal(loss[inside], standard[inside])
    assert torch.equal(loss, cabb_loss(deltas, clipped(gt), anchors, 1.0, crop_size=CROP))
    assert torch.equal(cabb_loss(deltas, gt, anchors, 1.0), standard)
    assert torch.equal(cabb_targets(deltas, gt, anchors, 1.0, crop_size=None), encode(gt, anchors))
    gt, anchors = row(0.5, 0.5, CROP[1] - 0.5, CROP[0] - 0.5), row(100, 100, 300, 300)
    args = (coded(row(-500, -500, 2000, 2000), anchors), gt, anchors, 1.0)
    assert torch.equal(cabb_loss(*args, CROP), box_loss(*args))


@claim("porzi2021", "Footnote 2", "a box that only touches the edge is not extended beyond it",
       of="free_sides")
def test_a_side_is_free_if_it_is_marked_and_at_the_edge():
    """Random marks against brute force; no marks: the standard loss of the visible part."""
    deltas, gt, anchors, kinds = scene(150, seed=8)
    marks = torch.rand(150, 4, generator=torch.Generator().manual_seed(2)) < 0.5
    for beta in BETAS:
        args = (deltas, gt, anchors, beta, CROP)
        assert near(cabb_loss(*args, marks), crop_aware_loss(*args, marks))
        assert torch.equal(cabb_loss(*args, torch.ones_like(marks)), cabb_loss(*args))
        none = torch.zeros_like(marks)
        assert torch.equal(cabb_loss(*args, none), box_loss(deltas, clipped(gt), anchors, beta))


# --- 2.4 Solving (O1) and (O2) ----------------------------------------------------------------
@claim("porzi2021", "(O1)", "the solver returns the global minimum", of="solve_o1")
@pytest.mark.parametrize("beta", BETAS)
def test_o1_reaches_the_global_minimum(beta):
    """In every regime and on the bound; omega >= omega_min, also in float32."""
    low, hat, pred = o1_problems(beta)
    high = low.maximum(hat).maximum(pred).log() + 0.01         # beyond, both terms grow

    def cost(t, i):
        return o1_cost(t.exp(), hat[i, None], pred[i, None], beta=beta)
    lowest = brute_force(cost, low.log(), high, points=4000)
    omega = solve_o1(low, hat, pred, beta=beta)
    assert omega.dtype == float64 and near(o1_cost(omega, hat, pred, beta=beta), lowest)
    assert (omega >= low).all() and (omega == low).sum() > 30
    omega = solve_o1(low.float(), hat.float(), pred.float(), beta=beta)
    assert omega.dtype == torch.float32 and (omega >= low.float()).all()


def test_boxes_outside_of_the_crop_become_a_hundredth_of_a_pixel_long():
    seen = visible(torch.cat([row(-50, 20, -10, 60), row(700, 20, 800, 60)]), CROP)
    length = (seen[:, 2:] - seen[:, :2]).amin(1)
    assert torch.allclose(length, torch.full_like(length, 0.01)) and (seen >= 0).all()


@claim("porzi2021", "Section 2.4", "in general local, non-global solutions exist", of="solve_o1",
       figure="cabb_loss.png")
def test_o1_jumps_from_one_valley_to_the_other():
    """beta = 1, pred = e^(-1/4) / 2, by hand. Lower valley: 1/2. Upper valley: omega^2 - hat omega
    + 4 = 0. hat = 4.5 leaves the lower one the minimum (1.53125 against 1.817), hat = 8 the upper
    one (2.48915 against 3.28125). Linear in both terms the minimum is at 2. Where the prediction is
    smaller than the bound, the bound is the solution, exactly."""
    pred = 0.5 * math.exp(-0.25)
    omega = solve_o1(row(0.01, 0.01), row(4.5, 8), row(pred, pred), beta=1.0)
    assert omega.tolist()[0] == pytest.approx([0.5, 4 + math.sqrt(12)], abs=1e-8)
    assert solve_o1(row(1), row(-1), row(2 * math.e ** 3), beta=1.0).item() == pytest.approx(2)
    for beta, low, hat, pred in (                              # each needs one end of a stretch
            (0.02, 1.3854699795849623, 2.8275747927038397, 0.45187223332346177),
            (1 / 9, 0.22772957337947372, 2.8283686386048776, 1.5225255444682775),
            (2.0, 0.5267480550804673, 5.461815851631977, 0.3603879598994344)):
        low, hat, pred = (torch.tensor([v], dtype=float64) for v in (low, hat, pred))
        lowest = brute_force(lambda t, i: o1_cost(t.exp(), hat, pred, beta=beta), low.log(),
                             high=hat.log(), points=4000)
        assert near(o1_cost(solve_o1(low, hat, pred, beta=beta), hat, pred, beta=beta), lowest)
    low = row(0.3, 1, 2, 7)
    for beta in BETAS:
        found = solve_o1(low, low - row(0, 0.5, 4, 20), low * row(1, 0.9, 0.5, 0.001), beta=beta)
        assert torch.equal(found, low)


@claim("porzi2021", "(O2)", "the prediction if it is feasible, else the better of two (O1)",
       of="solve_o2")
@pytest.mark.parametrize("beta", BETAS)
def test_o2_reaches_the_global_minimum(beta):
    """Both constraints hold; a feasible prediction is returned as it is; either boundary is met."""
    g, n = torch.Generator().manual_seed(round(900 * beta) + 1), 200
    a2 = uniform(g, n, -6, 6)
    b2 = a2 + uniform(g, n, -4, 3).exp()
    delta = (a2 + b2) / 2 + uniform(g, n, -2, 2) * uniform(g, n, -3, 2.5).exp()
    omega = (b2 - a2) * uniform(g, n, -4, 5).exp()
    free = torch.ones(n, dtype=torch.bool)
    lowest = cheapest(delta, omega.log(), a2, b2, free, free_hi=free, beta=beta)
    found, size = solve_o2(a2, b2, delta, omega, beta=beta)
    cost = huber(found - delta, beta) + huber(size.log() - omega.log(), beta)
    assert near(cost, lowest) and (lowest > 1e-6).sum() > 60 and (lowest < 1e-12).sum() > 15
    assert (found - size / 2 <= a2 + 1e-12 * size.clamp_min(9)).all()
    assert (found + size / 2 >= b2 - 1e-12 * size.clamp_min(9)).all()
    feasible = (delta - omega / 2 <= a2) & (delta + omega / 2 >= b2)
    assert torch.equal(found[feasible], delta[feasible]) and torch.equal(size[feasible],
                                                                         omega[feasible])
    left, right = (found - size / 2 - a2).abs() < 1e-9, (found + size / 2 - b2).abs() < 1e-9
    assert (left & ~right).sum() > 10 and (right & ~left).sum() > 10


@pytest.mark.parametrize("low_free, high_free", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_the_plain_version_agrees(low_free, high_free):
    """A grid of boxes in one dimension; in the other the prediction is perfect."""
    g = torch.Generator().manual_seed(low_free + 2 * high_free)
    a, b = -0.5 if low_free else -0.2, 0.5 if high_free else 0.2
    for delta, log_omega in uniform(g, (12, 2), -1, 1).tolist():
        loss, at, size = nearest_box(a, b, low_free, high_free, delta, math.exp(log_omega), beta=.5)
        found = cabb_loss(row(delta, 0, log_omega, 0), row(100 * a + 50, 20, 100 * b + 50, 60),
                          row(0, 20, 100, 60), 0.5, crop_size=(100, 100)).item()
        assert loss.item() - 2e-3 < found <= loss.item() + 1e-12
        cost = smooth_l1(at - delta, .5) + smooth_l1(size.log() - log_omega, .5)
        assert cost.item() == pytest.approx(loss.item())
        low, high = (at - size / 2).item(), (at + size / 2).item()     # a box of the set
        assert low <= a + 1e-12 and high >= b - 1e-12
        assert (low_free or low == pytest.approx(a)) and (high_free or high == pytest.approx(b))


# --- Figure 3 by hand: crop [0, 100], beta = 1, one dimension ---------------------------------
@claim("porzi2021", "Figure 3", "beyond the cut edge nothing is asked for", of="cabb_loss")
@pytest.mark.parametrize("gt, anchor, delta, omega, cost, target", [
    ((-30, 40), (0, 40), -0.75, 2.5, 0, (-0.75, 2.5)),                 # from -60 to 40
    ((-30, 40), (0, 40), -50, 101, 0, (-50, 101)),                     # from -4000 to 40
    ((-30, 40), (0, 40), 0, 1, 0, (0, 1)),                             # from 0 to 40
    ((-30, 40), (0, 40), 0.125, 0.75, 1 / 128 + math.log(0.75) ** 2 / 2, (0, 1)),
    ((60, 130), (60, 100), -0.125, 0.75, 1 / 128 + math.log(0.75) ** 2 / 2, (0, 1)),
    ((-30, 40), (0, 40), 1, 2 * math.e ** 3, 3.5, (-0.5, 2)),          # place and size disagree
    ((-30, 130), (0, 100), 0, 0.5, math.log(2) ** 2 / 2, (0, 1)),      # (O2), small
    ((-30, 130), (0, 100), 0.7, 2 * math.exp(-0.2), 0.04, (0.5, 2)),   # (O2), either boundary
    ((-30, 130), (0, 100), -0.7, 2 * math.exp(-0.2), 0.04, (-0.5, 2)),
    ((0, 100), (0, 100), 0.1, 2.0, 0, (0.1, 2))])                      # (O2), feasible
def test_one_box_by_hand(gt, anchor, delta, omega, cost, target):
    args = (row(delta, 0, math.log(omega), 0), row(gt[0], 20, gt[1], 60),
            row(anchor[0], 20, anchor[1], 60), 1.0, (100, 100))
    assert cabb_loss(*args).item() == pytest.approx(cost, abs=1e-9)
    found = cabb_targets(*args)[0]
    assert (found[0].item(), found[2].exp().item()) == pytest.approx(target, abs=1e-7)


# --- Proposition 1: the gradient --------------------------------------------------------------
def gradient(deltas, gt, anchors, beta, crop_size=CROP, truncated=None):
    deltas = deltas.clone().requires_grad_()
    loss = cabb_loss(deltas, gt, anchors, beta, crop_size=crop_size, truncated=truncated)
    return torch.autograd.grad(loss.sum(), deltas)[0]


@claim("porzi2021", "Proposition 1", "the gradient is that of Eq. 1 at a constant target",
       of="cabb_loss")
@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_the_slope_of_the_loss(beta):
    """Central differences too. Where two targets tie the loss has a kink, and differences at two
    steps disagree; such entries are left out, and they are few."""
    deltas, gt, anchors = (x[:100].clone() for x in scene(150, seed=10)[:3])
    targets = cabb_targets(deltas, gt, anchors, beta, crop_size=CROP)
    found = gradient(deltas, gt, anchors, beta)
    want = ((deltas - targets) / beta).clamp(-1, 1)
    assert torch.allclose(found, want, rtol=1e-12, atol=1e-12 / beta)
    slopes = []
    for step in (1e-4, 1e-5):
        move = step * torch.eye(4, dtype=float64).repeat_interleave(100, 0)      # [400, 4]
        many = [x.repeat(4, 1) for x in (gt, anchors)]
        ahead, behind = (cabb_loss(deltas.repeat(4, 1) + s * move, *many, beta, crop_size=CROP)
                         for s in (1, -1))
        slopes.append(((ahead - behind) / (2 * step)).view(4, 100).T)
    smooth = (slopes[0] - slopes[1]).abs() < 1e-4
    assert smooth.float().mean() > 0.9 and (found - slopes[1])[smooth].abs().max() < 2e-4
    args = [x.requires_grad_() for x in (deltas, gt, anchors)]
    assert not cabb_targets(*args, beta, crop_size=CROP).requires_grad
    into = torch.autograd.grad(cabb_loss(*args, beta, crop_size=CROP).sum(), args,
                               allow_unused=True)
    assert into[0].abs().sum() > 0 and all(x is None or (x == 0).all() for x in into[1:])


# --- Precision and refusals -------------------------------------------------------------------
def test_bfloat16_and_extreme_predictions():
    """Deltas of 100 (a box e^100 anchors wide) cost the minimum, deltas of 800 (an overflow) are
    finite; bfloat16 deltas give a float32 loss and a bfloat16 gradient."""
    deltas = torch.cartesian_prod(*[row(-100, 0, 100)[0]] * 4)                   # [81, 4]
    for truth in (row(0, 0, CROP[1], CROP[0]), row(0, 0, 30, 20), row(639, 383, 640, 384)):
        args = (truth.repeat(81, 1), row(0, 0, 200, 200).repeat(81, 1), 1 / 9)
        assert near(cabb_loss(deltas, *args, CROP), crop_aware_loss(deltas, *args))
        assert cabb_loss(8 * deltas, *args, CROP).isfinite().all()
        loss, slope = (f(deltas.bfloat16(), *args, CROP) for f in (cabb_loss, gradient))
        assert loss.dtype == torch.float32 and loss.isfinite().all()
        assert slope.dtype == torch.bfloat16 and (slope.abs() <= 1.01).all()


@pytest.mark.parametrize("loss", [box_loss, cabb_loss])
@pytest.mark.parametrize("wrong, sentence", [
    ({"deltas": torch.zeros(3, 4)}, r"deltas \[3, 4\], .* must all be \[N, 4\]"),
    ({"anchors": torch.ones(1, 4)}, r"anchors \[1, 4\] must all"),
    ({k: torch.zeros(2, 5) for k in ("deltas", "gt_boxes", "anchors")}, r"\[N, 4\]"),
    ({"beta": 0.0}, "beta = 0.0 must lie in"), ({"beta": 2.1}, "beta = 2.1 must lie in"),
    ({"gt_boxes": torch.full((2, 4), float("nan"))}, "gt_boxes"),
    ({"gt_boxes": row(0, 0, 9, 0).repeat(2, 1)}, "gt_boxes hold a box that is empty or reversed"),
    ({"anchors": row(9, 0, 0, 9).repeat(2, 1)}, "anchors hold a box that is empty or reversed")])
def test_what_cannot_be_meant_is_refused_in_one_sentence(loss, wrong, sentence):
    box = row(0, 0, 9, 9).repeat(2, 1)
    good = dict(deltas=torch.zeros(2, 4), gt_boxes=box, anchors=box, beta=1.0)
    with pytest.raises(ValueError, match=sentence):
        loss(**{**good, **wrong}, crop_size=CROP)


def test_the_example_and_the_demo(tmp_path, capsys, monkeypatch):
    standard, crop_aware = module.example()
    assert standard == pytest.approx((1 + math.log(2) ** 2) / 2) and crop_aware < 1e-12
    monkeypatch.setattr(demo_cabb.judge.__wrapped__, "__defaults__", (16,))      # fewer images
    demo_cabb.detectors(seeds=1, steps=1, out=tmp_path)
    assert (tmp_path / "cabb_loss.png").exists() and "48-64" in capsys.readouterr().out
