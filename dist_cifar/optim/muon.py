"""Muon, from its sections of the config: orthogonal steps of the filters, and another optimizer for the rest.

Contract: every rank that holds whole parameters computes the same bits; no matrix is computed together with another,
so the bits of one do not depend on which others there are. A parameter of four dimensions is a matrix [outputs, rest].
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from dist_cifar.config import Config, MuonConfig
from dist_cifar.optim.adam import build_adamw
from dist_cifar.optim.grouped import Group, GroupedOptimizer, State, decay
from dist_cifar.optim.sgd import build_sgd

NORM_EPS = 1e-7
"""Keeps a norm of zero from dividing."""


def newton_schulz(matrix: torch.Tensor, steps: int, polynomial: tuple[float, float, float]) -> torch.Tensor:
    """A matrix with the singular vectors of `matrix` [m, n] and singular values near 1, of its type.

    X = M / (|M| + 1e-7) with the Frobenius norm; then `steps` times X = a X + (b A + c A A) X with A = X X^T, which
    applies a x + b x^3 + c x^5 to each singular value; of a matrix with more rows than columns, on its transpose.
    Source: Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """
    a, b, c = polynomial
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / (torch.linalg.vector_norm(x) + NORM_EPS)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if len(matrix) > matrix.shape[1] else x


class Muon(GroupedOptimizer):
    """For each bank of filters W with gradient G, seen as matrices:

    M = mu M + G; U = G + mu M if Nesterov else M; W *= sqrt(outputs) / (|W| + 1e-7) where renormalising is due;
    W -= lr s NS(U) with the factor s of `muon.scale`; W *= 1 - lr wd. Groups that are not `orthogonal` are stepped as
    `rest` does it. Source: Jordan et al., 2024; the renormalising: Jordan, "94% on CIFAR-10 in 2.59 seconds", 2024.
    """

    def __init__(
        self,
        groups: Iterable[Group],
        rest: GroupedOptimizer,
        config: MuonConfig,
        *,
        lr: float,
        weight_decay: float,
        dtype: torch.dtype,
    ) -> None:
        """`groups` have a key `orthogonal`; `dtype` is that of the iteration."""
        super().__init__(groups, lr=lr, weight_decay=weight_decay)
        self._rest, self._config, self._dtype = rest, config, dtype
        self._filters = {p for group in self.param_groups if group["orthogonal"] for p in group["params"]}

    def new_state(self, parameter: torch.Tensor) -> State:
        """`step` [] and `momentum_buffer` for filters, what the other optimizer has for the rest."""
        if parameter not in self._filters:
            return self._rest.new_state(parameter)
        return {"step": torch.zeros((), device=parameter.device), "momentum_buffer": torch.zeros_like(parameter)}

    def update(self, group: Group, parameters: list[torch.Tensor], states: list[State]) -> None:
        if not group["orthogonal"]:
            self._rest.found_inf = self.found_inf
            self._rest.update(group, parameters, states)
            return
        for parameter, state in zip(parameters, states, strict=True):
            if self.found_inf is None:
                self._update_filters(group, parameter, state)
                continue
            changed = (parameter, *state.values())
            before = [tensor.clone() for tensor in changed]
            self._update_filters(group, parameter, state)
            for tensor, old in zip(changed, before, strict=True):  # the host does not know whether there is a NaN
                tensor.copy_(torch.where(self.found_inf > 0, old, tensor))

    def _update_filters(self, group: Group, parameter: torch.Tensor, state: State) -> None:
        config, gradient, momentum = self._config, parameter.grad, state["momentum_buffer"]
        assert gradient is not None
        # Products and sums are rounded one by one: what fuses them may round the ends of a tensor in another way.
        momentum.mul_(config.momentum).add_(gradient)
        direction = momentum.mul(config.momentum).add_(gradient) if config.nesterov else momentum
        if config.renormalise_every_steps and group["lr_scale"]:  # what is frozen keeps its bits
            due = state["step"] % config.renormalise_every_steps == 0
            factor = math.sqrt(len(parameter)) / (torch.linalg.vector_norm(parameter) + NORM_EPS)
            parameter.mul_(torch.where(due, factor, 1.0))
        state["step"] += 1
        matrix = direction.reshape(len(direction), -1)
        orthogonal = newton_schulz(matrix.to(self._dtype), config.newton_schulz_steps, config.newton_schulz)
        scale = _scale(config.scale, *matrix.shape)
        parameter.sub_(orthogonal.to(parameter.dtype).mul(group["lr"] * scale).view(parameter.shape))
        decay([parameter], group["lr"] * group["weight_decay"], None)


def _scale(rule: str, rows: int, columns: int) -> float:
    """The factor of `muon.scale`. Source of `rms`: Liu et al., "Muon is scalable for LLM training", 2025."""
    factors = {"none": 1.0, "rows": math.sqrt(max(1.0, rows / columns)), "rms": 0.2 * math.sqrt(max(rows, columns))}
    return factors[rule]


def build_muon(groups: list[Group], config: Config) -> Muon:
    """Muon over those parameters of `groups` that have four dimensions, and `muon.rest` over the others."""
    optimizer, muon = config.optimizer, config.muon
    split: list[Group] = []
    for group in groups:
        filters = [parameter for parameter in group["params"] if parameter.dim() == 4]
        others = [parameter for parameter in group["params"] if parameter.dim() != 4]
        lr_scale = group["lr_scale"] * muon.rest_lr_scale
        split.append({**group, "params": filters, "orthogonal": True})
        split.append({**group, "params": others, "orthogonal": False, "lr_scale": lr_scale})
    split = [group for group in split if group["params"]]
    rest = {"sgd": build_sgd, "adamw": build_adamw}[muon.rest]([], config)
    dtype = torch.bfloat16 if config.compute.precision == "bf16" else torch.float32
    return Muon(split, rest, muon, lr=optimizer.lr, weight_decay=optimizer.weight_decay, dtype=dtype)
