"""Crop-aware bounding boxes (CABB): a box loss that knows where the crop has cut an object.

The problem. Large images do not fit on a GPU, so networks train on crops. A crop cuts objects. The
usual box loss then demands the box of the part that is left. So the network learns to expect small
boxes. On whole images its boxes of large objects are too small.

The idea. A cut box stands for a SET of boxes: all that look the same through the crop.

      crop C
    .--------------.
    |       .------+- - - - - .           standard target  G|C         the left part only
    |       | seen |  unseen  :           CABB             rho(G, C)   left, top, bottom side fixed,
    |       '------+- - - - - '                                        right side anywhere beyond C
    '--------------'
    L_CABB(Delta_P) = min over Delta in rho_A(G, C) of L_BB(Delta_P; Delta)                 (Eq. 2)
G is the true box, G|C its visible part, A the anchor, Delta_P the prediction, L_BB the usual loss.

The claim. +4.5 PQ and +5.2 mask mAP on Mapillary Vistas over the previous best, together with the
sampling of isus.py and a new architecture. The loss alone adds about 10 ms a batch. Here: on the
toy street, from crops of 128x256, box AP of large things is 6.5 [1.1, 12.0] higher than with Eq. 1
(five seeds); they are few, so AP of all things and PQ are equal.

    python cabb_loss.py [--quick] [--full] [--device D] [--out DIR]    example, detectors, figure
    pytest tests/test_cabb_loss.py                                     the spec of this file

Deltas are float [N, 4]: delta_x delta_y log(omega_x) log(omega_y) of a box against an anchor, with
weight 1 (torchvision's box head multiplies them by 10 10 5 5). The crop is [0, width] x [0, height]
and crop_size = (height, width). Nothing pulls a side beyond the crop: a box that is right inside
costs 0, however large. A side that is predicted inside of the crop still costs.

Porzi, Rota Bulò and Kontschieder, "Improving Panoptic Segmentation at All Scales", CVPR 2021.
"""
import math

import torch


def example():
    """An object with 2 of its 4 pixels visible, by hand, along x. Beta is 1, the anchor is [7, 8].

    The crop ends at x = 8, the object goes on: G|C = [6, 8] has centre 7, so delta_G = -0.5 and
    omega_G = 2. The network predicts [6, 10], a box of the set: CABB costs nothing. The standard
    loss costs l(0.5 + 0.5) + l(log 4 - log 2) = 1/2 + log(2)^2 / 2."""
    seen = torch.tensor([[6.0, 2, 8, 4]])
    anchor = torch.tensor([[7.0, 2, 8, 4]])
    deltas = encode(torch.tensor([[6.0, 2, 10, 4]]), anchor)
    standard = box_loss(deltas, seen, anchor, beta=1.0)
    crop_aware = cabb_loss(deltas, seen, anchor, beta=1.0, crop_size=(8, 8))
    assert abs(standard.item() - (1 + math.log(2) ** 2) / 2) < 1e-6
    assert crop_aware.item() < 1e-12
    return standard.item(), crop_aware.item()


# --- 2.2 Bounding box regression --------------------------------------------------------------

def precise(*tensors):
    """Float64 copies, or float32 on devices without float64.

    Choice: an anchor of 4 pixels that is 2000 pixels away has delta = 500. There float32 is exact
    to 3e-5 of an anchor only. A few thousand boxes in float64 cost little."""
    return [t.to(torch.float32 if t.device.type == "mps" else torch.float64) for t in tensors]


def encode(boxes, anchors):
    """Delta_G = G (-) A: (c_G - c_A) / d_A and log omega = log(d_G / d_A); [N, 4] -> [N, 4]."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c_g, d_g = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    return torch.cat([(c_g - c_a) / d_a, (d_g / d_a).log()], 1)


def decode(deltas, anchors):
    """The inverse: c_P = c_A + delta_P d_A, d_P = omega_P d_A; [N, 4] -> [N, 4]."""
    c_a, d_a = (anchors[:, :2] + anchors[:, 2:]) / 2, anchors[:, 2:] - anchors[:, :2]
    c, d = c_a + deltas[:, :2] * d_a, d_a * deltas[:, 2:].exp()
    return torch.cat([c - d / 2, c + d / 2], 1)


def smooth_l1(z, beta):
    """The Huber norm l_beta(z) = z^2 / (2 beta) if |z| <= beta, else |z| - beta / 2; any shape."""
    size = z.abs()
    return torch.where(size <= beta, z * z / (2 * beta), size - beta / 2)


def check(deltas, gt_boxes, anchors, beta):
    """ValueError for wrong shapes, a beta out of range, an empty or reversed box. Boxes are checked
    on the CPU only: on a GPU each check would make the program wait.
    Deviation: the paper allows any beta > 0. The solver below is proved for beta <= 2."""
    if not deltas.shape == gt_boxes.shape == anchors.shape == (len(deltas), 4):
        shapes = [list(t.shape) for t in (deltas, gt_boxes, anchors)]
        raise ValueError("deltas {}, gt_boxes {} and anchors {} must all be [N, 4]".format(*shapes))
    if not 0 < beta <= 2:
        raise ValueError(f"beta = {beta} must lie in (0, 2]; detectors use 1/9 or 1")
    for name, boxes in (("gt_boxes", gt_boxes), ("anchors", anchors)):
        if not boxes.is_cuda and not (boxes[:, 2:] > boxes[:, :2]).all():
            raise ValueError(f"{name} hold a box that is empty or reversed, or NaN: expected x1 y1 "
                             "x2 y2 with x1 < x2 and y1 < y2")


def box_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """The standard loss -> [N]. It does not crop; the last two arguments are ignored.

    Eq. 1: L_BB = || l_beta(delta_P - delta_G) + l_beta(log omega_P - log omega_G) ||_1."""
    check(deltas, gt_boxes, anchors, beta=beta)
    p, g, anchors = precise(deltas, gt_boxes, anchors)
    loss = smooth_l1(p - encode(g, anchors), beta).sum(1)
    return loss.to(torch.promote_types(deltas.dtype, torch.float32))


# --- 2.3 Crop-aware bounding boxes ------------------------------------------------------------

def visible(gt_boxes, crop_size):
    """G|C, the part of a box inside the crop: [N, 4] -> [N, 4].

    Footnote 1: where masks exist, crop the mask and take the box of the rest, as data.crop does. It
    can be smaller than the cropped box.
    Choice: a box wholly outside becomes at least 0.01 pixels long, so that its loss is finite."""
    edge = gt_boxes.new_tensor([crop_size[1], crop_size[0]])
    low, high = (side.clamp(min=0).minimum(edge) for side in (gt_boxes[:, :2], gt_boxes[:, 2:]))
    return torch.cat([low, high.maximum(low + 0.01)], 1)


def free_sides(gt_boxes, crop_size, truncated=None):
    """bool [N, 4]: may the left, top, right, bottom side lie anywhere beyond the crop?

    rho(G, C) = {X : X|C = G|C}, and X|C has its left side at max(x1, 0). If G|C has it inside the
    crop, x1 is fixed. If G|C has it at 0, any x1 <= 0 will do: a side at the crop's edge is free.

    Footnote 2 leaves out objects that end exactly at the crop's edge. Choice: `truncated` bool
    [N, 4], from data.crop, says beyond which edges an object goes on. Only these are freed."""
    edge = gt_boxes.new_tensor([crop_size[1], crop_size[0]])
    free = torch.cat([gt_boxes[:, :2] <= 0, gt_boxes[:, 2:] >= edge], 1)
    return free if truncated is None else free & truncated


# --- 2.4 Computational aspects ----------------------------------------------------------------
# L_BB is a sum over x and y, and rho restricts each by itself. From here on all variables belong to
# ONE dimension. A box is (delta, omega) in units of the anchor; its sides are delta -/+ omega/2.
# G|C is [a, b].
#     no side free       Delta = Delta_G
#     right side free    delta - omega/2 = a,  delta + omega/2 >= b        (O1)
#     left side free     delta + omega/2 = b,  delta - omega/2 <= a        (O1), mirrored
#     both free          delta - omega/2 <= a, delta + omega/2 >= b        (O2)

def nearest_box(a, b, low_free, high_free, delta_pred, omega_pred, beta, reach=8.0, steps=400):
    """The plain version, for one box in one dimension: tries a grid of the set -> (loss, delta,
    omega) of the best. A free side is tried at `steps` places up to `reach` anchors beyond."""
    beyond = torch.linspace(0, reach, steps, dtype=torch.float64)
    low = a - (beyond if low_free else beyond[:1])[:, None]
    high = b + (beyond if high_free else beyond[:1])
    delta, omega = (low + high) / 2, high - low
    loss = smooth_l1(delta - delta_pred, beta) + smooth_l1((omega / omega_pred).log(), beta)
    best = loss.argmin()
    return loss.flatten()[best], delta.flatten()[best], omega.flatten()[best]


# (O1) Right side free: delta = a + omega/2. With omega_hat = 2 (delta_P - a) one variable is left:
#
#     min f(omega) = l_beta((omega - omega_hat) / 2) + l_beta(log omega - log omega_P)
#     subject to omega >= omega_min = b - a
#
# omega_hat is the size at which the predicted CENTRE is right, omega_P is the predicted SIZE. Left
# side free: omega_hat = 2 (b - delta_P). f may have several minima. The paper's solver is in its
# supplement; it reaches "a global solution under the desired precision". The solver below is our
# derivation. With t = log omega, the slope of f is
#
#     h(t) = omega/2 clip((omega - omega_hat) / (2 beta), -1, 1) + clip((t - t_P) / beta, -1, 1)
#
# Outside of the interval between omega_hat and omega_P both terms have the same sign. So each
# minimum lies inside it or at the bound. A minimum inside needs a stretch on which h rises.
#
# 1. omega_hat <= omega_P: one stretch. The first term of h is a product of two factors that are
#    not negative and do not fall. The second term does not fall either. So h rises.
# omega_P < omega_hat: each l_beta is linear (far) or quadratic (near). That makes four regimes.
# 2. Centre linear, size quadratic: h = -omega/2 + (t - t_P)/beta rises up to omega = 2/beta.
# 3. Both linear: h = 1 - omega/2 falls. There is no minimum.
# 4. Centre quadratic, size linear: h = omega (omega - omega_hat) / (4 beta) + 1 rises from
#    omega_hat/2 on.
# 5. Both quadratic: 4 beta h = omega (omega - omega_hat) + 4 (t - t_P) falls only between
#    omega_hat/4 (1 -/+ sqrt(1 - 32/omega_hat^2)). This regime has omega >= omega_hat - 2 beta. For
#    beta <= 2 that lies beyond both turning points (at beta = 2 it touches one, if omega_hat = 6).
# So f has at most one minimum on each of three known stretches, and a bisection finds it. The best
# of these and of the bound is the global minimum.

HALVINGS, POLISH = 24, 2      # 24 halvings shrink an interval of 100 to 6e-6; then Newton's steps


def slope(t, omega_hat, t_pred, beta):
    """h(t) = df/dt of (O1) at omega = e^t."""
    omega = t.exp()
    centre = ((omega - omega_hat) / (2 * beta)).clamp(-1, 1) * omega / 2
    return centre + ((t - t_pred) / beta).clamp(-1, 1)


def curvature(t, omega_hat, t_pred, beta):
    """dh/dt."""
    omega = t.exp()
    u, near = (omega - omega_hat) / (2 * beta), (omega - omega_hat).abs() <= 2 * beta
    centre = (u.clamp(-1, 1) + near * omega / (2 * beta)) * omega / 2
    return centre + ((t - t_pred).abs() <= beta) / beta


def objective(t, omega_hat, t_pred, beta):
    """f of (O1) at omega = e^t."""
    return smooth_l1((t.exp() - omega_hat) / 2, beta) + smooth_l1(t - t_pred, beta)


def rising_stretches(t_min, omega_hat, t_pred, beta):
    """The stretches of t on which h rises -> (low, high), both [3, N]; empty ones: low = high."""
    t_hat, near_hat = (x.clamp(min=0).log() for x in (omega_hat, omega_hat - 2 * beta))  # or -inf
    near_pred = t_pred + beta
    low = torch.stack([t_pred,                                                      # regime 2
                       near_pred.maximum(near_hat).maximum(t_hat - math.log(2)),    # regime 4
                       t_pred.maximum(near_hat)])                                   # regime 5
    high = torch.stack([near_pred.minimum(near_hat).clamp(max=math.log(2 / beta)),
                        t_hat,
                        t_hat.minimum(near_pred)])
    convex = t_hat <= t_pred                                                        # regime 1
    low = torch.where(convex, t_hat, low).maximum(t_min)
    return low, torch.where(convex, t_pred, high).maximum(low)


def solve_o1(omega_min, omega_hat, omega_pred, beta):
    """The global minimiser omega* of (O1) -> the shape of the arguments, tensors of one shape.

    omega_min > 0, omega_pred > 0, 0 < beta <= 2. omega_min, where best, returns bit for bit."""
    bound, hat, pred = precise(*(v.flatten() for v in (omega_min, omega_hat, omega_pred)))
    t_min, t_pred = bound.log(), pred.log()
    start, end = rising_stretches(t_min, hat, t_pred, beta=beta)                           # [3, N]
    low, width = start, end - start
    for _ in range(HALVINGS):                                  # keeps h(low) <= 0 or low = start
        width = width / 2
        middle = low + width
        low = torch.where(slope(middle, hat, t_pred, beta=beta) <= 0, middle, low)
    t = low + width / 2
    for _ in range(POLISH):
        step = slope(t, hat, t_pred, beta=beta) / curvature(t, hat, t_pred, beta=beta)
        step = step.nan_to_num(0, 0, 0).clamp(-width, width)   # x / 0 where h is flat
        t = (t - step).maximum(start).minimum(end)
    t = torch.cat([t_min[None], t])                            # [4, N]
    best = t.gather(0, objective(t, hat, t_pred, beta=beta).argmin(0, keepdim=True))[0]
    omega = torch.where(best > t_min, best.exp(), bound)
    return omega.view(omega_min.shape).to(omega_min.dtype)


def solve_o2(a2, b2, delta_pred, omega_pred, beta):
    """The global minimiser (delta*, omega*) of (O2), a2 < b2: tensors of one shape -> two of it.

        min l_beta(delta - delta_P) + l_beta(log omega - log omega_P)
        subject to delta - omega/2 <= a2 and delta + omega/2 >= b2

    A prediction that satisfies both constraints is the solution. Otherwise the solution lies on the
    boundary, for inside the gradient is zero only at the prediction. The boundary consists of two
    rays, and on each the problem is (O1)."""
    hat = torch.stack([2 * (delta_pred - a2), 2 * (b2 - delta_pred)])
    omega = solve_o1((b2 - a2).expand_as(hat), hat, omega_pred.expand_as(hat), beta=beta)
    delta = torch.stack([a2 + omega[0] / 2, b2 - omega[1] / 2])
    loss = smooth_l1(delta - delta_pred, beta) + smooth_l1((omega / omega_pred).log(), beta)
    first = loss[0] <= loss[1]
    delta, omega = torch.where(first, *delta), torch.where(first, *omega)
    inside = (delta_pred - omega_pred / 2 <= a2) & (delta_pred + omega_pred / 2 >= b2)
    return torch.where(inside, delta_pred, delta), torch.where(inside, omega_pred, omega)


# --- The loss ---------------------------------------------------------------------------------

@torch.no_grad()
def cabb_targets(deltas, gt_boxes, anchors, beta, crop_size, truncated=None):
    """phi(Delta_P): the box of rho_A(G, C) nearest to the prediction -> deltas float64 [N, 4].

    deltas, gt_boxes, anchors [N, 4]; gt_boxes in crop coordinates, best cut at the mask (see
    `visible`). crop_size (height, width); None: no crop. truncated [N, 4]: see `free_sides`."""
    check(deltas, gt_boxes, anchors, beta=beta)
    p, g, anchors = precise(deltas, gt_boxes, anchors)
    if crop_size is None:
        return encode(g, anchors)
    seen, free = visible(g, crop_size), free_sides(g, crop_size, truncated)
    target = encode(seen, anchors)                             # Delta_G
    d_a, c_a = anchors[:, 2:] - anchors[:, :2], (anchors[:, :2] + anchors[:, 2:]) / 2
    a, b = (seen[:, :2] - c_a) / d_a, (seen[:, 2:] - c_a) / d_a                     # [N, 2]
    delta_pred, omega_pred = p[:, :2], p[:, 2:].clamp(-500, 500).exp()              # e^800 = inf
    low_free, high_free = free.split(2, 1)
    one, two, omega = low_free ^ high_free, low_free & high_free, b - a
    # Few boxes are cut: only these are solved. (O1) is mirrored where the low side is free.
    sign, fixed = torch.where(high_free, 1, -1), torch.where(high_free, a, b)
    hat = 2 * sign * (delta_pred - fixed)
    omega[one] = solve_o1(omega[one], hat[one], omega_pred[one], beta=beta)
    delta = fixed + sign * omega / 2
    delta[two], omega[two] = solve_o2(a[two], b[two], delta_pred[two], omega_pred[two], beta=beta)
    # At the bound the answer is G|C to the last bit, so the loss never exceeds Eq. 1 by rounding.
    moved = (omega > b - a).repeat(1, 2)
    return torch.where(moved, torch.cat([delta, omega.log()], 1), target)


def cabb_loss(deltas, gt_boxes, anchors, beta, crop_size=None, truncated=None):
    """Eq. 2: L_CABB(Delta_P) = min of L_BB(Delta_P; Delta) over rho_A(G, C) -> [N].

    crop_size None: Eq. 1, for whole images. Other arguments: see `cabb_targets`. Never more than
    Eq. 1 at G|C; equal to it if no side is free.

    Proposition 1: the gradient is that of Eq. 1 with the minimiser phi(Delta_P) as a constant. phi
    moves with the prediction, but the loss is flat around a minimum, and at the bound phi stays.
    Where two minima are equally good, phi jumps and L_CABB has a kink: either gradient will do."""
    target = cabb_targets(deltas.detach(), gt_boxes, anchors, beta, crop_size=crop_size,
                          truncated=truncated)
    loss = smooth_l1(precise(deltas)[0] - target, beta).sum(1)
    return loss.to(torch.promote_types(deltas.dtype, torch.float32))


def demo(quick=False, full=False, device="cpu", out="figures"):
    """Detectors learn from crops by four losses: how large are their boxes on whole images?"""
    print("half of an object: standard loss {:.3f}, CABB {:.3f}".format(*example()))
    from lab.demo_cabb import detectors
    seeds, steps = (1, 10) if quick else (10, 2000) if full else (3, 700)
    detectors(seeds, steps, device=device, out=out)


if __name__ == "__main__":
    from data import command_line                              # to run the file, not to import it
    command_line(demo, __doc__, quick="one seed, ten steps", full="ten seeds of 2000 steps")

# Exercises
# 1. In `free_sides` drop `& truncated`. Which test fails? What of cars that end where a crop ends?
# 2. Replace (O1) by a hinge: the prediction itself where it is larger than G|C, else G|C. Which
#    tests fail, and what changes in the demo's table?
# 3. Drop regime 5 in `rising_stretches`. Which predictions get a worse box?
