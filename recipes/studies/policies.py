"""Policies over the 313 contexts of the chain task: a table of free logits, and a small network with shared weights.

Every parameter has a leading dimension S of independent seeds. A policy returns logits and takes the gradient of the
objective with respect to them, so the engine is the same for both.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from recipes.studies import chain


def log_softmax(logits: Tensor) -> Tensor:
    """Log-softmax over the last dimension. Four times as fast as torch's version for a short dimension."""
    shifted = logits - logits.amax(-1, keepdim=True)
    return shifted - shifted.exp().sum(-1, keepdim=True).log()


def entropy(logp: Tensor) -> Tensor:
    return -(logp.exp() * logp).sum(-1)


class Policy(Protocol):
    parameters: list[Tensor]  # each (S, ...)

    def table(self) -> Tensor:
        """Logits (S, K, V) of all contexts, without gradient."""
        ...

    def rows(self, contexts: Tensor | None) -> Tensor:
        """Logits (S, N, V) of contexts (S, N), or (S, K, V) of all contexts. `backward` refers to the last call."""
        ...

    def backward(self, gradient: Tensor) -> list[Tensor]:
        """Gradients of the parameters, given the gradient (S, N, V) of the logits of the last `rows` call."""
        ...


class Table:
    """The logits are the parameters: different contexts share no parameter."""

    def __init__(self, logits: Tensor) -> None:
        self.parameters = [logits.clone()]
        self._index: Tensor | None = None

    def table(self) -> Tensor:
        return self.parameters[0]

    def rows(self, contexts: Tensor | None) -> Tensor:
        if contexts is None:
            contexts = torch.arange(chain.CONTEXTS).expand(self.parameters[0].shape[0], -1)
        self._index = contexts[..., None].expand(*contexts.shape, chain.CHOICES)
        return self.parameters[0].gather(1, self._index)

    def backward(self, gradient: Tensor) -> list[Tensor]:
        assert self._index is not None
        return [torch.zeros_like(self.parameters[0]).scatter_add_(1, self._index, gradient)]


def _features() -> Tensor:
    """(K, 30) one-hot features: operand x or none (11), kind of context (5), operand d, step or none (14)."""
    onehot = torch.zeros(chain.CONTEXTS, 30)
    for context in range(chain.CONTEXTS):
        if context < chain.FACTS:
            x, kind, d = context // 30, context // 10 % 3, context % 10
        elif context < chain.COPY:
            x, kind, d = 10, 3, 10 + context - chain.CONNECTOR
        else:
            x, kind, d = context - chain.COPY, 4, 13
        onehot[context, [x, 11 + kind, 16 + d]] = 1.0
    return onehot


class Network:
    """Sum of embeddings of x, operator and d; two residual GELU layers; a readout. All contexts share the weights."""

    def __init__(self, seeds: list[int], *, width: int = 64) -> None:
        shapes = [(30, width), (width, 2 * width), (2 * width, width), (width, 2 * width), (2 * width, width)]
        shapes.append((width, chain.CHOICES))
        self.parameters = [torch.empty(len(seeds), *shape) for shape in shapes]
        for i, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(1_000_003 * seed + 43)
            for parameter, (fan_in, _) in zip(self.parameters, shapes, strict=True):
                scale = 1.0 if fan_in == 30 else fan_in**-0.5
                parameter[i] = scale * torch.randn(parameter.shape[1:], generator=generator)
        self._onehot = _features()
        self._graph: tuple[Tensor, list[Tensor]] | None = None

    def _logits(self, parameters: list[Tensor], contexts: Tensor | None) -> Tensor:
        embedding, up1, down1, up2, down2, readout = parameters
        h = self._onehot @ embedding  # S, K, width
        if contexts is not None:
            h = h.gather(1, contexts[..., None].expand(*contexts.shape, h.shape[-1]))
        for up, down in ((up1, down1), (up2, down2)):
            normed = torch.nn.functional.rms_norm(h, h.shape[-1:])
            h = h + torch.nn.functional.gelu(normed @ up) @ down
        logits = torch.nn.functional.rms_norm(h, h.shape[-1:]) @ readout
        which = torch.arange(chain.CONTEXTS).expand(logits.shape[0], -1) if contexts is None else contexts
        connector = (which >= chain.CONNECTOR) & (which < chain.COPY)
        absent = connector[..., None] & (torch.arange(chain.CHOICES) >= chain.CONNECTORS)
        return logits.masked_fill(absent, chain.NEVER)

    def table(self) -> Tensor:
        with torch.no_grad():
            return self._logits(self.parameters, None)

    def rows(self, contexts: Tensor | None) -> Tensor:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.parameters]
            logits = self._logits(leaves, contexts)
        self._graph = (logits, leaves)
        return logits.detach()

    def backward(self, gradient: Tensor) -> list[Tensor]:
        assert self._graph is not None
        logits, leaves = self._graph
        return list(torch.autograd.grad(logits, leaves, gradient))


WARM_STEPS = 400


def warm_started(seeds: list[int], *, lr: float = 5e-3) -> Network:
    """The network at the start of training: fitted to each seed's start table by cross entropy over all contexts."""
    network = Network(seeds)
    target = chain.start_logits(seeds).softmax(-1)
    optimizer = torch.optim.Adam(network.parameters, lr=lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, WARM_STEPS)
    for _ in range(WARM_STEPS):
        logits = network.rows(None)
        gradients = network.backward((logits.softmax(-1) - target) / chain.CONTEXTS)
        for parameter, gradient in zip(network.parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        schedule.step()
    for parameter in network.parameters:
        parameter.grad = None
    return network
