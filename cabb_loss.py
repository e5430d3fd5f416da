"""Crop-aware bounding box loss (Porzi, Rota Bulò, Kontschieder, "Improving Panoptic Segmentation at All Scales", CVPR 2021).

What goes wrong without it.  Large images do not fit on a GPU, so networks train on crops.  A crop cuts objects, and the usual
box loss then demands the box of what is left of them: "this car ends at the edge of the picture".  It does not, the crop
does.  The network learns that no object is larger than a crop, and on whole images it cuts large objects short.

The idea.  A cut box is not one box but a SET of boxes: all those that look the same through the crop.

      crop C                              the standard target  G|C     the left part only
    .--------------.
    |       .------+- - - - - .           CABB  rho(G, C)              left, top and bottom edges fixed,
    |       | seen |  unseen  :                                        the right edge anywhere beyond the crop
    |       '------+- - - - - '
    '--------------'                      loss = distance to the NEAREST box of the set

    L_CABB(Delta_P) = min over Delta in rho_A(G, C) of L_BB(Delta_P; Delta)                                        (Eq. 2)

The minimum is over two numbers per dimension, non-convex, and has to be found for each box in each step.  The paper has an
iterative solver "under the desired precision" whose details are in a supplement; this file finds the exact global
minimum: it cuts the problem into stretches with at most one minimum each and visits them all (section 2.4 below).

What the paper claims: +4.5 PQ and +5.2 mask mAP on Mapillary Vistas over the previous best (together with the sampling in
isus.py and a new architecture), at about 10 ms a batch.

    python cabb_loss.py                trains small detectors on crops and runs them on whole images; figures/cabb_loss.png
    pytest tests/test_cabb_loss.py     the claims of this file as an executable spec

Boxes are float [N, 4] x1 y1 x2 y2 in pixels, half open.  Deltas are float [N, 4]: a box relative to an anchor A, written
(delta_x, delta_y, log omega_x, log omega_y) with delta = (c_G - c_A) / d_A and omega = d_G / d_A, c centres, d sizes.  The
crop is [0, width] x [0, height]; `crop_size` is (height, width).
"""
import argparse
import math
import os
import time

import torch

# --- 2.2 Bounding box regression ------------------------------------------------------------------------------------------


def precise(*tensors):
    """Float64 copies (float32 on devices that have nothing better).

    Choice: an anchor of 4 pixels that is 2000 pixels away has delta = 500, and float32 resolves that to 3e-5 of an anchor only.
    A few thousand boxes cost nothing, so all of Eq. 1 and Eq. 2 is computed in double precision, whatever comes in."""
    return [t.to(torch.float32 if t.device.type == "mps" else torch.float64) for t in tensors]


def encode(boxes, anchors):
    """Delta_G = G (-) A = ((c_G - c_A) / d_A, log(d_G / d_A)): boxes [N, 4], anchors [N, 4] -> [N, 4]."""
    d_a, d_g = anchors[:, 2:] - anchors[:, :2], boxes[:, 2:] - boxes[:, :2]
    return torch.cat([(boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / d_a, (d_g / d_a).log()], 1)


def decode(deltas, anchors):
    """The inverse: c_P = c_A + delta_P d_A, d_P = omega_P d_A; [N, 4]."""
    d_a, c_a = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
    c, d = c_a + deltas[:, :2] * d_a, d_a * deltas[:, 2:].exp()
    return torch.cat([c - d / 2, c + d / 2], 1)


def smooth_l1(z, beta):
    """The Huber norm l_beta(z) = z^2 / (2 beta) where |z| <= beta, |z| - beta / 2 elsewhere; beta > 0, any shape."""
    size = z.abs()
    return torch.where(size <= beta, z * z / (2 * beta), size - beta / 2)


def check(deltas, gt_boxes, anchors, beta):
    """One sentence for what cannot be meant: [1, 4] against [N, 4] would broadcast and give numbers, but wrong ones."""
    if not deltas.shape == gt_boxes.shape == anchors.shape == (len(deltas), 4):
        raise ValueError(f"deltas {tuple(deltas.shape)}, gt_boxes {tuple(gt_boxes.shape)} and anchors {tuple(anchors.shape)} must all be "
                         "[N, 4]: one matched ground truth and one anchor for each prediction")
    if not beta > 0:
        raise ValueError(f"beta = {beta} must be above 0: it is where the Huber norm turns from quadratic to linear")


def box_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """Eq. 1, the standard loss: L_BB = sum of l_beta(delta_P - delta_G) + l_beta(log omega_P - log omega_G) over x and y -> [N].
    The last two arguments are there for losses that know about crops, and are ignored.  Raises ValueError for unequal shapes."""
    check(deltas, gt_boxes, anchors, beta)
    p, gt, a = precise(deltas, gt_boxes, anchors)
    return smooth_l1(p - encode(gt, a), beta).sum(1).to(torch.promote_types(deltas.dtype, torch.float32))


# --- 2.3 Crop-aware bounding boxes ----------------------------------------------------------------------------------------

def visible(gt_boxes, crop_size):
    """G|C, the part of a box inside the crop: [N, 4] -> [N, 4].  (A box that lies wholly outside has no such part and nothing
    to teach; it becomes one of a hundredth of a pixel, so that its loss is at least finite.)"""
    h, w = crop_size
    low = gt_boxes[:, :2].clamp(min=0).minimum(gt_boxes.new_tensor([w, h]))
    high = gt_boxes[:, 2:].clamp(min=0).minimum(gt_boxes.new_tensor([w, h]))
    return torch.cat([low, high.maximum(low + 0.01)], 1)


def free_sides(gt_boxes, crop_size, truncated=None):
    """bool [N, 4]: may the left, top, right, bottom side of a box of rho(G, C) lie anywhere beyond the crop?

    rho(G, C) = {X : X|C = G|C}.  X|C has its left side at max(x1, 0).  Where that is inside the crop, x1 must be it; where it
    is 0, any x1 <= 0 will do.  So a side is free if the box reaches the crop's edge.  In the paper's words: c_G <= d_G / 2.

    Footnote 2 of the paper leaves the rest to the reader: an object that ends exactly where the crop ends is complete, and
    should not be extended.  `truncated` bool [N, 4] says beyond which edges the object really goes on (whoever cuts a crop
    from a labelled image knows that); only these are freed.  The crop's edge that is also the image's is such a case: nothing
    is beyond it, at test time either."""
    h, w = crop_size
    free = torch.cat([gt_boxes[:, :2] <= 0, gt_boxes[:, 2:] >= gt_boxes.new_tensor([w, h])], 1)
    return free if truncated is None else free & truncated


# --- 2.4 Computational aspects: one dimension at a time -------------------------------------------------------------------
# L_BB is a sum over x and y, and so are the constraints: from here on all variables belong to ONE dimension.  A box is
# (delta, omega); its sides are delta -/+ omega/2, in units of the anchor.  Let l and r be the sides of G|C.
#
#     no side free           Delta = Delta_G, nothing to solve
#     right side free        delta - omega/2 = l,   delta + omega/2 >= r                       -> (O1)
#     left side free         delta + omega/2 = r,   delta - omega/2 <= l                       -> (O1), mirrored
#     both free              delta - omega/2 <= l,  delta + omega/2 >= r                       -> (O2)
#
# Right side free: delta = l + omega/2 puts delta - delta_P = (omega - omega^)/2 with omega^ = 2 (delta_P - l), and one variable
# is left:
#
#     (O1)    min f(omega) = l_beta((omega - omega^) / 2) + l_beta(log omega - log omega_P)    s.t.  omega >= omega_min = r - l
#
# omega^ is the size that the predicted CENTRE asks for, given the fixed side; omega_P is the predicted SIZE.  The best box is a
# compromise between both.  Left side free: delta = r - omega/2, the same with omega^ = 2 (r - delta_P).
#
# Solving (O1).  With t = log omega the slope of f is
#
#     h(t) = df/dt = omega/2 clip((omega - omega^) / (2 beta), -1, 1) + clip((t - t_P) / beta, -1, 1),      omega = e^t
#
# Outside of the interval between omega^ and omega_P both terms have one sign, so all minima lie inside it or at the bound.
#
# omega^ <= omega_P.  Between them df/domega = clip(.)/2 + clip(.)/omega rises: the first term obviously; the second is -1/omega, or
#     v / (beta omega) with v = log(omega / omega_P) in [-beta, 0], whose derivative (1 - v) / (beta omega^2) is positive.  So f is
#     convex there: ONE minimum, where h turns from - to +.
#
# omega_P < omega^.  The centre pulls up, the size pulls down, and f may have several minima.  Each l_beta is linear (far away) or
#     quadratic (near), which makes four regimes.  Write x = omega:
#       centre linear,    size quadratic:  h = -x/2 + (t - t_P)/beta         rises up to x = 2/beta
#                                          h = 0: log(x / omega_P) = beta x / 2; of its two roots only the smaller is a minimum
#       centre linear,    size linear:     h = -x/2 + 1                      falls: at x = 2 sits a maximum, never a minimum
#       centre quadratic, size linear:     h = x (x - omega^)/(4 beta) + 1   rises from x = omega^/2 on
#                                          h = 0: the larger root of x^2 - omega^ x + 4 beta
#       centre quadratic, size quadratic:  4 beta h = x (x - omega^) + 4 log(x / omega_P),   whose derivative in x,
#                                          2x - omega^ + 4/x, vanishes at x = omega^/4 (1 -/+ sqrt(1 - 32/omega^^2)): h rises, falls
#                                          between these two and rises again; for omega^ < sqrt(32) it rises throughout
#     The fourth regime spans x >= omega^ - 2 beta, so its falling part exists only if (omega^ - x_+)/2 < beta for the larger x_+ of
#     the two; the smallest beta for which that can happen is 2 (at omega^ = 6, x_+ = 2): detectors use 1/9 or 1 and never see it.
#
# So h rises on at most four known stretches (three for beta <= 2), f has at most one minimum on each, and a bisection finds it.
# f is smooth, so the kinks between regimes need no visit of their own.  The best of these and the bound is the global minimum,
# exactly, in a fixed number of steps, for all boxes at once.
# (With omega^ <= omega_P there is a fifth regime with a minimum: centre and size linear, h = x/2 - 1 RISES through x = 2.  The one
# stretch of the convex case has it.)

HALVINGS, POLISH = 24, 2      # an interval of 100 (in log omega) shrinks to 6e-6; each Newton step then doubles the digits


def slope(t, omega_hat, t_pred, beta):
    """h(t) = df/dt of (O1) at omega = e^t."""
    omega = t.exp()
    return ((omega - omega_hat) / (2 * beta)).clamp(-1, 1) * omega / 2 + ((t - t_pred) / beta).clamp(-1, 1)


def curvature(t, omega_hat, t_pred, beta):
    """dh/dt."""
    omega, u, v = t.exp(), t.exp() - omega_hat, t - t_pred
    return ((u / (2 * beta)).clamp(-1, 1) + (u.abs() <= 2 * beta) * omega / (2 * beta)) * omega / 2 + (v.abs() <= beta) / beta


def objective(t, omega_hat, t_pred, beta):
    """f of (O1) at omega = e^t."""
    return smooth_l1((t.exp() - omega_hat) / 2, beta) + smooth_l1(t - t_pred, beta)


def rising_stretches(t_min, omega_hat, t_pred, beta):
    """The stretches of t = log omega on which h rises, as (low, high), each [S, N]; empty ones have low = high."""
    def log(x):
        return x.clamp(min=0).log()                                       # -inf where nothing bounds
    t_hat, near_hat, near_pred = log(omega_hat), log(omega_hat - 2 * beta), t_pred + beta
    top = torch.full_like(t_pred, math.log(2 / beta))
    quadratic = t_pred.maximum(near_hat), t_hat.minimum(near_pred)
    low = [t_pred, near_pred.maximum(near_hat).maximum(t_hat - math.log(2))]
    high = [near_pred.minimum(near_hat).minimum(top), t_hat]
    if beta <= 2:
        low, high = [*low, quadratic[0]], [*high, quadratic[1]]
    else:
        turn = (1 - 32 / omega_hat.clamp(min=1e-6) ** 2).clamp(min=0).sqrt()
        first, second = log(omega_hat / 4 * (1 - turn)), log(omega_hat / 4 * (1 + turn))
        low, high = [*low, quadratic[0], quadratic[0].maximum(second)], [*high, quadratic[1].minimum(first), quadratic[1]]
    convex = t_hat <= t_pred
    low = torch.where(convex, t_hat, torch.stack(low)).maximum(t_min)
    return low, torch.where(convex, t_pred, torch.stack(high)).maximum(low)


def minimise(t_min, omega_hat, t_pred, beta):
    """(O1) in logarithms: t* = log omega* and f(t*); all [N].  The bound itself is returned bit for bit where it is the best."""
    low, high = rising_stretches(t_min, omega_hat, t_pred, beta)
    start, end = low, high
    width = high - low
    for _ in range(HALVINGS):
        width = width / 2
        middle = low + width
        low = torch.where(slope(middle, omega_hat, t_pred, beta) <= 0, middle, low)
    t = low + width / 2
    for _ in range(POLISH):
        step = slope(t, omega_hat, t_pred, beta) / curvature(t, omega_hat, t_pred, beta)
        t = (t - step.nan_to_num(0, 0, 0).clamp(-width, width)).maximum(start).minimum(end)
    t = torch.cat([t_min[None], t])
    f = objective(t, omega_hat, t_pred, beta)
    best = f.argmin(0, keepdim=True)
    return t.gather(0, best)[0], f.gather(0, best)[0]


def solve_o1(omega_min, omega_hat, omega_pred, beta):
    """The global minimiser omega* of (O1): l_beta((omega - omega^)/2) + l_beta(log omega - log omega_P), omega >= omega_min.
    Tensors of one shape, omega_min > 0 and omega_P > 0, beta a number > 0 -> that shape.  No data-dependent loop."""
    shape, dtype = omega_min.shape, omega_min.dtype
    low, hat, pred = precise(*(v.flatten() for v in (omega_min, omega_hat, omega_pred)))
    t, _ = minimise(low.log(), hat, pred.log(), beta)
    return t.exp().maximum(low).view(shape).to(dtype)


def solve_o2(a2, b2, delta_pred, omega_pred, beta):
    """The global minimiser (delta*, omega*) of (O2): l_beta(delta - delta_P) + l_beta(log omega - log omega_P) subject to
    delta - omega/2 <= a2 and delta + omega/2 >= b2, with a2 < b2.  Tensors of one shape -> two of that shape.

    If the prediction satisfies both constraints it is the solution.  Otherwise the solution lies on the boundary: inside, the
    gradient (l'(delta - delta_P), l'(log omega - log omega_P)/omega) vanishes at the prediction only.  Either boundary is a ray,
    and on it the problem is (O1)."""
    shape, dtype = a2.shape, a2.dtype
    a, b, d, w = precise(*(v.flatten() for v in (a2, b2, delta_pred, omega_pred)))
    left, f_left = minimise((b - a).log(), 2 * (d - a), w.log(), beta)               # delta - omega/2 = a2
    right, f_right = minimise((b - a).log(), 2 * (b - d), w.log(), beta)             # delta + omega/2 = b2
    omega = torch.where(f_left <= f_right, left, right).exp()
    delta = torch.where(f_left <= f_right, a + omega / 2, b - omega / 2)
    feasible = (d - w / 2 <= a) & (d + w / 2 >= b)
    return torch.where(feasible, d, delta).view(shape).to(dtype), torch.where(feasible, w, omega).view(shape).to(dtype)


# --- 2.4 Four sides at once -----------------------------------------------------------------------------------------------

def minimise_where(wanted, t_min, hat, t_pred, beta, select):
    """`minimise` for the `wanted` problems, bool of the shape of the others; elsewhere t = t_min and f = inf.  `select`: solve no
    others, so that boxes that are not cut cost nothing; on a GPU the rest is cheaper than waiting for the CPU to learn how many
    there are."""
    t, f = t_min.clone(), torch.full_like(hat, math.inf)
    if select:
        t[wanted], f[wanted] = minimise(t_min[wanted], hat[wanted], t_pred[wanted], beta)
        return t, f
    t_all, f_all = (v.view_as(hat) for v in minimise(*(v.reshape(-1) for v in (t_min, hat, t_pred)), beta))
    return torch.where(wanted, t_all, t), torch.where(wanted, f_all, f)


@torch.no_grad()
def cabb_targets(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """phi(Delta_P), the box of rho_A(G, C) that is nearest to the prediction: deltas [N, 4], float64, without gradient.

    deltas, gt_boxes, anchors [N, 4]; gt_boxes in crop coordinates, whole or already cut; beta > 0; crop_size (height, width);
    truncated bool [N, 4] or None, see `free_sides`.  Raises ValueError for unequal shapes and for beta <= 0."""
    check(deltas, gt_boxes, anchors, beta)
    p, a, whole = precise(deltas, anchors, gt_boxes)
    if crop_size is None:
        return encode(whole, a)
    seen, free = visible(whole, crop_size), free_sides(whole, crop_size, truncated)
    target = encode(seen, a)                                                         # Delta_G, right where nothing is free
    # One (O1) for each free side; where both sides of a dimension are free, (O2)'s two rays.  Dimension k: 0 is x, 1 is y.
    # Problem 0 holds the low side (left, top) and moves the high one, problem 1 the other way round: [N, 2 problems, 2].
    side = ((seen - torch.cat([a[:, :2] + a[:, 2:]] * 2, 1) / 2) / torch.cat([a[:, 2:] - a[:, :2]] * 2, 1)).view(-1, 2, 2)
    wanted = free.view(-1, 2, 2).flip(1)                                             # the moving side must be free
    hat = 2 * torch.stack([p[:, :2] - side[:, 0], side[:, 1] - p[:, :2]], 1)
    t_min, t_pred = target[:, None, 2:].expand_as(hat), p[:, None, 2:].expand_as(hat)
    t, f = minimise_where(wanted, t_min, hat, t_pred, beta, select=not deltas.is_cuda)
    low = f[:, 0] <= f[:, 1]                                                   # [N, 2]: whose solution is better?
    omega = t.exp()
    delta = torch.where(low, side[:, 0] + omega[:, 0] / 2, side[:, 1] - omega[:, 1] / 2)
    log_omega = torch.where(low, t[:, 0], t[:, 1])
    # (O2): the prediction itself, if it is a box of the set; nothing is nearer.
    both, half = wanted.all(1), p[:, 2:].exp() / 2
    here = both & (p[:, :2] - half <= side[:, 0]) & (p[:, :2] + half >= side[:, 1])
    delta, log_omega = torch.where(here, p[:, :2], delta), torch.where(here, p[:, 2:], log_omega)
    # Where the bound is best, G|C itself is the answer: to the last bit, so that nothing ever exceeds Eq. 1 by rounding.
    moved = log_omega > target[:, 2:]
    return torch.where(torch.cat([moved, moved], 1), torch.cat([delta, log_omega], 1), target)


def cabb_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """Eq. 2: L_CABB(Delta_P) = min of L_BB(Delta_P; Delta) over Delta in rho_A(G, C) -> [N].  Arguments as for `cabb_targets`.

    Never more than Eq. 1 at G|C, and equal to it where no side is free.  Proposition 1 (the envelope theorem): the gradient is
    that of Eq. 1 with the minimiser as a constant.  Moving the prediction moves the minimiser too, but to first order that
    changes nothing: at a minimum the objective is flat, and at the bound the minimiser stays."""
    p, target = precise(deltas)[0], cabb_targets(deltas.detach(), gt_boxes, anchors, beta, crop_size, truncated)
    return smooth_l1(p - target, beta).sum(1).to(torch.promote_types(deltas.dtype, torch.float32))


# --- What to see: python cabb_loss.py -------------------------------------------------------------------------------------
# One textured rectangle a picture, sizes 8 to 96 pixels, crops of 64: the large ones never fit.  The question is how large a
# detector that has seen crops only says they are, in whole pictures of 160.
SIDE, WHOLE, STRIDE, ANCHOR, BETA = 64, 160, 8, 24.0, 1 / 9


def standard_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Eq. 1 at G|C: what crop-based training usually does."""
    return box_loss(deltas, visible(gt_boxes, crop_size), anchors, beta)


def ignoring_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Reader's idea 1: ask nothing of a side that was cut.  Dimensions without a cut side pay Eq. 1; in the others a side that
    shows must be right, l_beta of its distance in anchors, and a side that was cut may be anywhere, inside the crop too."""
    p, gt, a = precise(deltas, gt_boxes, anchors)
    free, g = free_sides(gt, crop_size, truncated).view(-1, 2, 2), encode(visible(gt, crop_size), a)
    def sides(d):
        return torch.stack([d[:, :2] - d[:, 2:].exp() / 2, d[:, :2] + d[:, 2:].exp() / 2], 1)        # [N, low high, x y]
    whole, part = smooth_l1(p - g, beta).view(-1, 2, 2).sum(1), (smooth_l1(sides(p) - sides(g), beta) * ~free).sum(1)
    return torch.where(free.any(1), part, whole).sum(1).to(torch.promote_types(deltas.dtype, torch.float32))


def full_loss(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """Reader's idea 2: the labels know the whole object, so ask for its whole box, seen or not."""
    return box_loss(deltas, gt_boxes, anchors, beta)


LOSSES = {"standard": standard_loss, "cut sides ignored": ignoring_loss, "full box": full_loss, "CABB": cabb_loss}
SIZES, SHARES = (8, 16, 32, 48, 64, 80, 97), (0, 0.1, 0.25, 0.5, 0.75, 0.999, 2)


def draw_size(boxes):
    """sqrt(w h) of boxes [N, 4], for the curves."""
    return (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()


def demo(full=False):
    """Four losses, two worlds, several seeds: predicted over true size against size (whole pictures, nothing is cut any more)
    and against the share of the object that shows (crops, as in training).

    What it teaches (3 seeds; in brackets the world whose texture tells nothing).
    - The standard loss shrinks what comes near the size of a crop: to 78% (92%) at 48 to 64 pixels, to 71% (76%) at 64 to 80.
      CABB gives 86% (100%) and 77% (85%); the ranges of the seeds touch at most.  It cannot do wonders: an object larger than
      a crop is never seen whole, the loss says "at least this", and of the sides that do show the short ones are overrepresented.
    - Ignoring cut sides is no better than the standard loss, and worse for the largest.  A cut side carries information, "at least
      up to here"; whoever ignores it lets boxes of any size pass, and what remains to learn from are objects that were not cut.
    - The full box is the best target where the size can be read off the object: 97% and 103%, and in crops right with a tenth of
      the object in view.  Where it cannot, the target is a guess about what nobody sees, and the network learns to guess: +30% for
      objects of 32 to 64 pixels that would have fitted a crop; in crops it invents.  CABB asks for nothing that does not show, and
      is at most 10% too large anywhere.  Real objects lie between the worlds, so it is worth trying `full_loss` in a project of yours."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def log_uniform(n, g):
        """n sizes in pixels, 8 to 96."""
        return 8 * 12 ** torch.rand(n, generator=g)

    def place(n, size, g):
        """n rectangles [n, 4] in pixels: anywhere in a whole picture, or, for a crop, with one of their pixels on one of its pixels."""
        stretch = torch.exp(0.8 * torch.rand(n, generator=g) - 0.4)
        d = (log_uniform(n, g)[:, None] * torch.stack([stretch, 1 / stretch], 1)).round()
        low, high = (torch.zeros(1), WHOLE - d) if size == WHOLE else (1 - d, torch.tensor(SIDE))
        corner = (low + (high - low) * torch.rand(n, 2, generator=g)).floor()
        return torch.cat([corner, corner + d], 1)

    def paint(boxes, size, g, telling):
        """Pictures [n, 3, size, size] of one checked rectangle each.  `telling`: four periods of the checks make its size, as wheels
        tell the size of a car; else the period says nothing."""
        n, p = len(boxes), torch.arange(size) + 0.5
        period = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt() / 4 if telling else log_uniform(n, g) / 4
        wave = torch.sin(p * (2 * math.pi / period)[:, None, None] + 6.28 * torch.rand(n, 2, 1, generator=g))            # [n, x y, size]
        checks = wave[:, 1, :, None] * wave[:, 0, None, :] > 0
        b = boxes[:, :, None, None]
        inside = (p >= b[:, 0]) & (p < b[:, 2]) & (p[:, None] >= b[:, 1]) & (p[:, None] < b[:, 3])
        colour = torch.rand(n, 2, 3, 1, 1, generator=g)
        picture = torch.where(inside[:, None], colour[:, 0] * torch.where(checks, 1.0, 0.5)[:, None], colour[:, 1])
        return picture + 0.05 * torch.randn(picture.shape, generator=g)

    def detector():
        """Pictures [n, 3, s, s] -> deltas [n, 4, s/8, s/8], one anchor of 24 pixels a cell.  Its receptive field is
        1 + 2 (1 + 2 + 4 + 8 + 8) = 47 pixels, so it cannot see both ends of a large object at once."""
        def block(a, b, stride=1, kernel=3):
            return [torch.nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False), torch.nn.BatchNorm2d(b), torch.nn.ReLU()]
        net = torch.nn.Sequential(*block(3, 16, 2), *block(16, 24, 2), *block(24, 48, 2), *block(48, 48), *block(48, 48),
                                  *block(48, 48, kernel=1), torch.nn.Conv2d(48, 4, 1))
        torch.nn.init.zeros_(net[-1].weight)
        return net

    def cells(size):
        """Centres [h * h, 2] of a picture's cells and their anchors [h * h, 4]."""
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
        optimisers = {name: torch.optim.AdamW(net.parameters(), weight_decay=1e-4) for name, net in nets.items()}
        centre, anchors = cells(SIDE)
        for step in range(steps):
            boxes = place(16, SIDE, g)
            pictures = paint(boxes, SIDE, g, telling).to(device)
            positive = ((centre >= boxes[:, None, :2]) & (centre < boxes[:, None, 2:])).all(2)          # cells whose centre is in the object
            owner, cell = torch.where(positive)
            weight = (1 / positive.sum(1).clamp(min=1) / len(boxes))[owner].to(device)
            truth, anchor = boxes[owner].to(device), anchors[cell].to(device)
            for name, net in nets.items():
                optimisers[name].param_groups[0]["lr"] = 4e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
                deltas = net(pictures).flatten(2).mT[owner, cell]
                loss = (LOSSES[name](deltas, truth, anchor, BETA, (SIDE, SIDE)) * weight).sum()
                optimisers[name].zero_grad()
                loss.backward()
                optimisers[name].step()
        return {name: net.eval() for name, net in nets.items()}

    @torch.no_grad()
    def judge(nets, size, telling, device, count=480):
        """Predicted box at the cell in the middle of what shows -> true boxes [n, 4], {name: boxes [n, 4]}."""
        g, centre_anchor = torch.Generator().manual_seed(12345), cells(size)[1]
        truth, found = [], {name: [] for name in nets}
        for _ in range(count // 16):
            boxes = place(16, size, g)
            pictures, seen = paint(boxes, size, g, telling), visible(boxes, (size, size))
            middle = ((seen[:, :2] + seen[:, 2:]) / 2 / STRIDE).long().clamp(max=size // STRIDE - 1)
            cell = middle[:, 1] * (size // STRIDE) + middle[:, 0]
            truth.append(boxes)
            for name, net in nets.items():
                deltas = net(pictures.to(device)).flatten(2).mT[torch.arange(16), cell.to(device)].cpu()
                found[name].append(decode(deltas, centre_anchor[cell]))
        return torch.cat(truth), {name: torch.cat(f) for name, f in found.items()}

    def ratios(truth, found, value, edges):
        """Median of predicted over true size in each bin of `value`, in percent: {name: [bins]}."""
        bins = [(value >= a) & (value < b) for a, b in zip(edges, edges[1:])]
        return {name: [100 * (draw_size(f[m]) / draw_size(truth[m])).median().item() for m in bins] for name, f in found.items()}

    os.makedirs("figures", exist_ok=True)                        # sooner than after minutes of training
    device, began = torch.device("cuda" if torch.cuda.is_available() else "cpu"), time.time()
    seeds, steps = (10, 2000) if full else (3, 700)
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
            tables[telling, kind] = {name: torch.tensor([r[name] for r in rows]) for name in LOSSES}                # [seeds, bins]
    for (telling, kind), table in tables.items():
        edges = SIZES if kind == "size" else SHARES
        print(f"\n{worlds[telling]}; predicted / true size in %, median over objects, mean and range of {seeds} seeds")
        print(("whole pictures, size in pixels" if kind == "size" else "crops, share that shows").ljust(32)
              + "".join(f"{a:g}-{min(b, 96 if kind == 'size' else 1):g}".rjust(16) for a, b in zip(edges, edges[1:])))
        for name, rows in table.items():
            print(f"  {name:30s}" + "".join(f"{m:6.0f} ({a:3.0f}..{b:3.0f})" for m, a, b in
                                            zip(rows.mean(0).tolist(), rows.amin(0).tolist(), rows.amax(0).tolist())))

    fig, axes = plt.subplots(2, 3, figsize=(13, 7.4), layout="constrained")
    draw_objective(axes[0, 0])
    draw_example(axes[1, 0], *example)
    for row, telling in zip(axes, worlds):
        for ax, kind, edges in zip(row[1:], ("size", "share"), (SIZES, SHARES)):
            ends = [min(b, 96 if kind == "size" else 1) for b in edges[1:]]
            x = torch.tensor([(a + b) / 2 for a, b in zip(edges, ends)])
            for (name, rows), (colour, style) in zip(tables[telling, kind].items(), STYLES.values()):
                ax.plot(x, rows.mean(0), style, color=colour, label=name, lw=2)
                ax.fill_between(x, rows.amin(0), rows.amax(0), color=colour, alpha=0.15, lw=0)
            ax.axhline(100, color="k", lw=0.8)
            ax.set_title(f"{'whole pictures' if kind == 'size' else 'crops'}, {worlds[telling]}", fontsize=10)
            ax.set(xlabel="size of the object, pixels" if kind == "size" else "share of the object that shows",
                   ylabel="predicted / true size, %")
            ax.grid(alpha=0.3)
            if kind == "size":
                ax.axvline(SIDE, color="k", ls=":", lw=1)
                ax.text(SIDE + 1, ax.get_ylim()[0] + 1, "a crop", fontsize=8)
    axes[0, 1].legend(fontsize=9)
    fig.savefig("figures/cabb_loss.png", dpi=90)
    print(f"\nfigures/cabb_loss.png  {time.time() - began:.0f} s")


STYLES = {"standard": ("tab:red", "o-"), "cut sides ignored": ("tab:olive", "v-."), "full box": ("tab:purple", "s--"), "CABB": ("tab:blue", "D-")}


def draw_objective(ax):
    """(O1) with two local minima, and how the global one jumps as more of the object shows."""
    hat, pred, beta = 4.6, 0.22, 1 / 9
    omega = torch.linspace(0.16, 5.6, 2000, dtype=torch.float64)
    values = [torch.tensor([v], dtype=torch.float64) for v in (hat, math.log(pred))]
    ax.plot(omega, objective(omega.log(), *values, beta), color="tab:blue", lw=2)
    for bound, colour in ((0.16, "tab:green"), (0.6, "tab:orange"), (1.2, "tab:red")):
        best = solve_o1(torch.tensor([bound], dtype=torch.float64), values[0], values[1].exp(), beta)
        ax.axvline(bound, color=colour, ls=":", lw=1.5)
        ax.plot(best, objective(best.log(), *values, beta), "o", color=colour, ms=9, ls="", label=rf"minimum over $\omega \geq {bound}$")
    ax.set(xlabel=r"$\omega$", ylabel=r"$f(\omega)$ of (O1)")
    ax.set_title(rf"two local minima: $\hat\omega={hat}$, $\omega_P={pred}$, $\beta=1/9$", fontsize=10)
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3)


def draw_example(ax, truth, found):
    """The largest object of a whole picture and the four predicted boxes."""
    which = int(draw_size(truth).argmax())
    for name, boxes in {"truth": truth, **found}.items():
        x1, y1, x2, y2 = boxes[which].tolist()
        colour, style = STYLES.get(name, ("k", "-"))
        ax.plot([x1, x2, x2, x1, x1], [y1, y1, y2, y2, y1], color=colour, lw=2, ls="-" if name == "truth" else "--", label=name)
    ax.plot([2, 2 + SIDE, 2 + SIDE, 2, 2], [2, 2, 2 + SIDE, 2 + SIDE, 2], color="grey", lw=1, ls=":", label="a training crop")
    ax.set(xlim=(0, WHOLE), ylim=(WHOLE, 0), aspect="equal")
    ax.set_title(f"one object of {draw_size(truth)[which]:.0f} pixels in a whole picture", fontsize=10)
    ax.legend(fontsize=8, loc="upper right")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="more seeds and steps")
    demo(parser.parse_args().full)

# --- Exercises ------------------------------------------------------------------------------------------------------------
# 1. In `free_sides` drop `& truncated`.  Which test fails, and what would a network learn about cars that end where a crop ends?
# 2. In `cabb_targets` return `target` for a prediction that is too SMALL and the prediction itself for one that is larger, side by
#    side: a hinge on the two cut sides, with no (O1) at all.  Which tests fail, and by how much does the demo change?
# 3. Let `rising_stretches` forget its last two entries for beta > 2.  For which beta does a test notice?
