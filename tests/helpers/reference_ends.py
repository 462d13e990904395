"""The operators at the ends of a graph: images, folded scales and shifts, losses, the attack."""

# mypy: disable-error-code="arg-type, assignment, call-arg, no-untyped-def"

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F

from helpers.reference_layouts import pack, unpack

# Input, output, scale and shift


def pack_input(a, x):
    return [pack(x, a["lanes"], a["halo"])]


def unpack_output(a, stack):
    return [unpack(stack, stack.shape[1], 1, 1, 0)[:, :, 0, 0]]


def _entries(a):
    start = 0
    for kind, channels, bias, gamma, beta, statistics in np.asarray(a["entries"]).reshape(-1, 6):
        yield kind, slice(start, start + channels), channels, bias, gamma, beta, statistics
        start += channels


def fold_affine(a, dense, mean, variance):
    total = sum(a["entries"][1::6])
    scale, shift = np.ones(total), np.zeros(total)
    for kind, part, count, bias, gamma, beta, statistics in _entries(a):
        b = dense[bias : bias + count] if bias >= 0 else 0.0
        if kind == 0:
            shift[part] = b
            continue
        g, t = dense[gamma : gamma + count], dense[beta : beta + count]
        if kind == 2:
            scale[part], shift[part] = g, t
            continue
        m, v = mean[statistics : statistics + count], variance[statistics : statistics + count]
        scale[part] = g / np.sqrt(v + a["epsilon"])
        shift[part] = t + (b - m) * scale[part]
    return [np.concatenate([scale, shift])]


def fold_affine_grad(a, affine_grad, dense, mean, variance, dense_grad):
    """Through autograd of the definition of fold_affine, written once more in torch."""
    parameters = torch.tensor(dense, requires_grad=True)
    pieces_scale, pieces_shift = [], []
    for kind, _, count, bias, gamma, beta, statistics in _entries(a):
        b = parameters[bias : bias + count] if bias >= 0 else torch.zeros(count, dtype=torch.float64)
        scale = torch.ones(count, dtype=torch.float64)
        shift = b
        if kind == 2:
            scale, shift = parameters[gamma : gamma + count], parameters[beta : beta + count]
        elif kind == 1:
            part = slice(statistics, statistics + count)
            scale = parameters[gamma : gamma + count] / torch.sqrt(
                torch.tensor(variance[part]) + a["epsilon"]
            )
            shift = parameters[beta : beta + count] + (b - torch.tensor(mean[part])) * scale
        pieces_scale.append(scale)
        pieces_shift.append(shift)
    (torch.cat(pieces_scale + pieces_shift) * torch.tensor(affine_grad)).sum().backward()
    assert parameters.grad is not None
    return [dense_grad + parameters.grad.numpy()]


def zero_affine(a, affine):
    return [np.zeros_like(affine)]


# Losses and the attack


def _logits(stack):
    return torch.tensor(unpack(stack, stack.shape[1], 1, 1, 0)[:, :, 0, 0], requires_grad=True)


def _packed_gradient(logits, lanes):
    return pack(logits.grad.numpy()[:, :, None, None], lanes, 0)


def _correct(logits, labels, weight):
    return float(((logits.detach().numpy().argmax(1) == labels) & (weight > 0)).sum())


def cross_entropy(a, stack, labels, weight):
    logits = _logits(stack)
    loss = (torch.tensor(weight) * F.cross_entropy(logits, torch.tensor(labels), reduction="none")).sum()
    loss.backward()
    gradient = _packed_gradient(logits, stack.shape[2])
    return [loss.detach().numpy(), gradient, np.array([_correct(logits, labels, weight)])]


def two_branches(a, clean_stack, adversarial_stack, labels, weight, rule):
    clean, adversarial = _logits(clean_stack), _logits(adversarial_stack)
    loss = (torch.tensor(weight) * rule(clean, adversarial, torch.tensor(labels), a["beta"])).sum()
    loss.backward()
    lanes = clean_stack.shape[2]
    correct = np.array([_correct(clean, labels, weight), _correct(adversarial, labels, weight)])
    return [
        loss.detach().numpy(),
        _packed_gradient(clean, lanes),
        _packed_gradient(adversarial, lanes),
        correct,
    ]


def _kl(clean, adversarial):
    return (clean.softmax(1) * (clean.log_softmax(1) - adversarial.log_softmax(1))).sum(1)


def trades_loss(clean, adversarial, labels, beta):
    first = F.cross_entropy(clean, labels.clamp(min=0), reduction="none") * (labels >= 0)
    return first + beta * _kl(clean, adversarial)


def mart_loss(clean, adversarial, labels, beta):
    probabilities = adversarial.softmax(1)
    others = probabilities.masked_fill(F.one_hot(labels, probabilities.shape[1]).bool(), -1).amax(1)
    boosted = F.cross_entropy(adversarial, labels, reduction="none") - torch.log(1.0001 - others + 1e-12)
    confidence = clean.softmax(1).gather(1, labels[:, None])[:, 0]
    return boosted + beta * _kl(clean, adversarial) * (1.0000001 - confidence)


def softmax_difference(a, stack, target):
    difference = _logits(stack).softmax(1).detach().numpy() - target
    return [pack(difference[:, :, None, None], stack.shape[2], 0)]


def pgd_step(a, adversarial, x, dx, step_size, epsilon):
    gradient = unpack(dx, *x.shape[1:], a["dx_halo"])
    moved = np.clip(adversarial + step_size * np.sign(gradient), x - epsilon, x + epsilon)
    return [np.clip(moved, 0, 1)]
