"""Training in plain PyTorch, fp64: masked loss, schedule, clipping, AdamW and Lion, one loop.

Owns the recipe of arXiv:2404.05728 and the extra warmups of arXiv:2510.19093. It must not import
the package. Weights are drawn by one generator per tensor name, so that anybody can draw the same.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from tests.reference import plain_gpt, rules
from tests.reference.plain_gpt import Weights
from tests.reference.rules import Study

BEGIN, END = 256, 257
FLOOR = 1e-4


@dataclass
class Trajectory:
    """What a run shows: values a step, and the Frobenius norm of every tensor after the last."""

    loss: list[float] = field(default_factory=list)
    gradient_loss: list[float] = field(default_factory=list)
    gradient_norm: list[float] = field(default_factory=list)
    final_norm: dict[str, float] = field(default_factory=dict)


def draw_weights(study: Study) -> dict[str, np.ndarray]:
    """Return the initial value of every tensor as float32, the layer axis first; gains are ones."""
    weights = {}
    for name, shape in rules.tensor_shapes(study).items():
        if name.startswith("g_"):
            weights[name] = np.ones(shape, dtype=np.float32)
            continue
        normal = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
        weights[name] = (rules.initial_std(study, name) * normal).astype(np.float32)
    return weights


def inputs_and_mask(targets_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return inputs shifted right by one begin token, and the mask up to and with the first end."""
    first = np.full_like(targets_BT[:, :1], BEGIN)
    ended_before = np.cumsum(targets_BT == END, axis=1) - (targets_BT == END)
    return np.concatenate([first, targets_BT[:, :-1]], axis=1), ended_before == 0


def schedule_factor(study: Study, step: int) -> float:
    """Return s(t), t from 0: linear from 1e-4 to 1, then linear or cosine down to 1e-4."""
    if step < study.warmup:
        return FLOOR + (1 - FLOOR) * step / study.warmup
    done = (step - study.warmup) / (study.steps - study.warmup)
    left = 1 - done if study.curve == "linear" else (1 + math.cos(math.pi * done)) / 2
    return FLOOR + (1 - FLOOR) * left


def extra_warmup_factor(study: Study, step: int, *, decay_a_step: float) -> float:
    """Return the second warmup: K's Eq. 11 with a = 1 - eta lambda, or m^(t/T - 1) (ours).

    eta lambda is what the tensor itself decays by at peak.
    """
    if study.extra_warmup == "implied":
        a = 1 - decay_a_step
        return 1 / math.sqrt(1 + (study.m**2 - 1) * a ** (2 * step))
    if study.extra_warmup == "exponential" and step < study.extra_warmup_steps:
        return float(study.m ** (step / study.extra_warmup_steps - 1))
    return 1.0


def losses(logits_BTV: Tensor, targets_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss to differentiate (over B T) and the one to report (over the mask)."""
    entropy = torch.logsumexp(logits_BTV, -1) - logits_BTV.gather(-1, targets_BT[..., None])[..., 0]
    total = (entropy * mask_BT).sum()
    return total / mask_BT.numel(), total / mask_BT.sum()


class Optimizer:
    """AdamW or Lion with one learning rate, decay and eps per tensor."""

    def __init__(self, study: Study, weights: Weights) -> None:
        """Start all moments at zero."""
        self.study = study
        self.rules = {name: rules.tensor_rule(study, name) for name in weights}
        self.betas = rules.betas(study)
        self.first = {name: torch.zeros_like(w) for name, w in weights.items()}
        self.second = {name: torch.zeros_like(w) for name, w in weights.items()}

    def _direction(self, name: str, gradient: Tensor, step: int) -> Tensor:
        beta1, beta2 = self.betas
        first, second = self.first[name], self.second[name]
        if self.study.optimizer == "lion":
            direction = (beta1 * first + (1 - beta1) * gradient).sign()
            self.first[name] = beta2 * first + (1 - beta2) * gradient
            return direction
        self.first[name] = first = beta1 * first + (1 - beta1) * gradient
        self.second[name] = second = beta2 * second + (1 - beta2) * gradient.square()
        unbiased_first = first / (1 - beta1 ** (step + 1))
        unbiased_second = second / (1 - beta2 ** (step + 1))
        return unbiased_first / (unbiased_second.sqrt() + self.rules[name].eps)

    def update(self, weights: Weights, gradients: Weights, step: int) -> None:
        """Move every tensor by s(t) (lr direction + decay W); the extra warmup is part of s(t)."""
        with torch.no_grad():
            for name, weight in weights.items():
                rule = self.rules[name]
                factor = schedule_factor(self.study, step)
                if rule.extra_warmup:
                    factor *= extra_warmup_factor(self.study, step, decay_a_step=rule.decay_a_step)
                direction = self._direction(name, gradients[name], step)
                weight -= factor * (rule.lr * direction + rule.decay_a_step * weight)


def train(study: Study, targets: np.ndarray) -> Trajectory:
    """Train in fp64 on targets [steps, B, T] and return what happened."""
    weights = {
        name: torch.tensor(value, dtype=torch.float64, requires_grad=True)
        for name, value in draw_weights(study).items()
    }
    optimizer, result = Optimizer(study, weights), Trajectory()
    for step, targets_BT in enumerate(targets):
        inputs, mask = (torch.from_numpy(part) for part in inputs_and_mask(targets_BT))
        logits_BTV = plain_gpt.logits(study, weights, inputs.long())
        mean, reported = losses(logits_BTV, torch.from_numpy(targets_BT).long(), mask)
        gradients = dict(
            zip(weights, torch.autograd.grad(mean, list(weights.values())), strict=True)
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        shrink = min(1.0, study.clip / norm)
        clipped = {name: shrink * gradient for name, gradient in gradients.items()}
        optimizer.update(weights, clipped, step)
        result.loss.append(reported.item())
        result.gradient_loss.append(mean.item())
        result.gradient_norm.append(norm)
    result.final_norm = {name: weight.norm().item() for name, weight in weights.items()}
    return result
