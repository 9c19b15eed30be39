"""The chain task as 313 contexts with ten choices each, for many seeds at once.

A prompt is ``x op d op d op d``. A response has seven tokens: (connector, result) x 3 and the answer. All arithmetic is
modulo 10. The context of a result token is (x, op, d), where x is the previous result, right or wrong. A connector is
one of six equivalent words; its context is the step. The context of the answer is the last result.

Shapes: S seeds, B responses of a seed, K = 313 contexts, V = 10 choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

OPERATIONS = 3  # per prompt
FACTS = 300  # contexts (x, op, d): index 30 x + 10 op + d
CONNECTOR = FACTS  # + step
COPY = CONNECTOR + OPERATIONS  # + last result
CONTEXTS = COPY + 10
CHOICES = 10
CONNECTORS = 6  # the first six choices; the other four have probability 0
TOKENS = 2 * OPERATIONS + 1
NEVER = -30.0  # logit of a choice that does not exist


def results() -> Tensor:
    """(300,) int64: the right result of every context (x, op, d), where op is +, - or *."""
    x = torch.arange(10)[:, None]
    d = torch.arange(10)[None, :]
    return torch.stack([(x + d) % 10, (x - d) % 10, (x * d) % 10], dim=1).reshape(FACTS)


RESULTS = results()


def start_logits(seeds: list[int], *, right: float = 3.2, wrong: float = 4.0, noise: float = 0.5) -> Tensor:
    """(S, K, V) float32: logits at the start of reinforcement learning. Each table depends only on its seed.

    Right choices get ``right``. In a random quarter of the facts one wrong result gets ``wrong``, so learning must
    raise a minority token there. With the defaults accuracy is about 0.26 and entropy is 1.31 nats per token.
    """
    tables = []
    rows = torch.arange(FACTS)
    for seed in seeds:
        generator = torch.Generator().manual_seed(1_000_003 * seed + 17)
        table = noise * torch.randn(CONTEXTS, CHOICES, generator=generator)
        table[rows, RESULTS] += right
        believed = (RESULTS + torch.randint(1, 10, (FACTS,), generator=generator)) % 10
        misconceived = torch.rand(FACTS, generator=generator) < 0.25
        table[rows[misconceived], believed[misconceived]] += wrong
        table[CONNECTOR:COPY, CONNECTORS:] = NEVER
        table[COPY + torch.arange(10), torch.arange(10)] += right
        tables.append(table)
    return torch.stack(tables)


class Draws:
    """Prompts and uniform random numbers, from one generator per seed.

    A seed gets the same numbers for every method and every set of seeds, so methods can be compared in pairs.
    """

    def __init__(self, seeds: list[int]) -> None:
        self._generators = [torch.Generator().manual_seed(1_000_003 * seed + 29) for seed in seeds]

    def uniform(self, *shape: int) -> Tensor:
        """(S, *shape) in [0, 1)."""
        return torch.stack([torch.rand(*shape, generator=g) for g in self._generators])

    def prompts(self, count: int) -> Tensor:
        """(S, count, 1 + 6) int64: x, followed by op and d of each step."""
        u = self.uniform(count, 1 + 2 * OPERATIONS)
        sizes = torch.tensor([10, *[3, 10] * OPERATIONS])
        return (u * sizes).long()


def answers(prompts: Tensor) -> Tensor:
    """(...,) int64 right answers of prompts (..., 7)."""
    x = prompts[..., 0]
    for step in range(OPERATIONS):
        x = RESULTS[30 * x + 10 * prompts[..., 1 + 2 * step] + prompts[..., 2 + 2 * step]]
    return x


def sample(logp: Tensor, prompts: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample responses to prompts (S, B, 7) from the table ``logp`` (S, K, V) by inversion of ``uniform`` (S, B, 7).

    Returns the contexts and choices of the responses, (S, B, 7) int64 each.
    """
    cumulative = logp.exp().cumsum(-1)
    rows = torch.arange(logp.shape[0])[:, None]
    x = prompts[..., 0]
    contexts, choices = [], []
    for token in range(TOKENS):
        step = token // 2
        if token == TOKENS - 1:
            context = COPY + x
        elif token % 2 == 0:
            context = torch.full_like(x, CONNECTOR + step)
        else:
            context = 30 * x + 10 * prompts[..., 1 + 2 * step] + prompts[..., 2 + 2 * step]
        total = cumulative[rows, context]
        choice = (total < uniform[..., token, None] * total[..., -1:]).sum(-1).clamp(max=CHOICES - 1)
        contexts.append(context)
        choices.append(choice)
        if token % 2 == 1:
            x = choice
    return torch.stack(contexts, -1), torch.stack(choices, -1)


def solve_probability(logp: Tensor, prompts: Tensor) -> Tensor:
    """(S, P): exact probability that a response is right, for prompts (P, 7) or (S, P, 7)."""
    if prompts.dim() == 2:
        prompts = prompts.expand(logp.shape[0], *prompts.shape)
    p = logp.exp()
    facts = p[:, :FACTS].reshape(-1, 10, 30, CHOICES)  # S, x, (op, d), result
    rows = torch.arange(logp.shape[0])[:, None]
    state = p.new_zeros(*prompts.shape[:2], 10).scatter(2, prompts[..., :1], 1.0)
    for step in range(OPERATIONS):
        question = 10 * prompts[..., 1 + 2 * step] + prompts[..., 2 + 2 * step]
        state = torch.einsum("spx,spxv->spv", state, facts.transpose(1, 2)[rows, question])
    answer = torch.einsum("spx,sxv->spv", state, p[:, COPY:])
    return answer.gather(2, answers(prompts)[..., None]).squeeze(2)
