"""Rollouts in this process: transformers' model in float32 with a KV cache, behind the same interface as the servers.

For tests and for machines without vLLM. Each sequence draws its random numbers from Philox keyed by (seed, sample), one
per token, and samples by inverting the cumulative distribution: the tokens depend on the seed and not on the batch they
are computed in (up to float32 rounding of the logits, which batch shapes change in the last digit).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_ext import progress
from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import WeightUpdateError
from recipes.rollout.engine import Sampling, check_request, stop_tokens
from recipes.rollout.routing import Experts, experts_of


class LocalEngine:
    """`RolloutEngine` on the CPU or the current GPU of this process."""

    def __init__(self, model_dir: Path, *, max_model_len: int, max_num_seqs: int) -> None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.version = 0
        self.counters = {"requests": 0}
        self.sync_seconds: dict[str, float] = {}
        self.model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).to(device).eval()
        self._device = device
        self._eos = stop_tokens(model_dir)
        self._max_model_len, self._max_num_seqs = max_model_len, max_num_seqs
        self._experts = experts_of(model_dir)
        self._lock = threading.Lock()  # an update waits for the responses being written, and they for it

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine`."""
        check_request(prompts, n, seeds, self._max_model_len)
        self.counters["requests"] += len(prompts)
        rows = [(index, sample) for index in range(len(prompts)) for sample in range(n)]
        done: list[Rollout] = []
        with self._lock, torch.inference_mode():
            for start in range(0, len(rows), self._max_num_seqs):
                part = rows[start : start + self._max_num_seqs]
                uniforms = [uniform_numbers(seeds[index], sample, sampling.max_tokens) for index, sample in part]
                done += self._decode([list(prompts[index]) for index, _ in part], np.stack(uniforms), sampling)
        return done

    def _decode(self, prompts: list[list[int]], uniforms: np.ndarray, sampling: Sampling) -> list[Rollout]:
        """One batch, row for row. ``uniforms``: (rows, max_tokens) in [0, 1)."""
        batch = _Batch(prompts, self._device)
        stop = torch.tensor(sorted(self._eos | set(sampling.stop_token_ids)), dtype=torch.long, device=self._device)
        limits = torch.tensor([self._max_model_len - len(prompt) for prompt in prompts], device=self._device)
        noise = torch.from_numpy(uniforms).to(self._device)
        output: list[tuple[list[int], list[float]]] = [([], []) for _ in prompts]
        reasons = ["length"] * len(prompts)
        watch = _Watch(self.model, self._experts if sampling.experts else None)
        logits = self._prefill(batch)
        watch.prefilled(batch, prompts)
        for step in range(sampling.max_tokens):
            progress.beat(phase="rollout")
            tokens, logprobs = sample(logits, noise[batch.rows, step], sampling)
            stopped = torch.isin(tokens, stop)
            ended = stopped | (limits[batch.rows] <= step + 1)
            for row, token, logprob, stop_here in zip(
                batch.rows.tolist(), tokens.tolist(), logprobs.tolist(), stopped.tolist(), strict=True
            ):
                output[row][0].append(token)
                output[row][1].append(logprob)
                if stop_here:
                    reasons[row] = "stop"
            if bool(ended.all()) or step + 1 == sampling.max_tokens:
                break
            batch.keep(~ended)
            logits = self._forward(batch, tokens[~ended, None])
            watch.decoded(batch)
        return [
            Rollout(prompt, tokens, logprobs, [self.version] * len(tokens), reason, chosen)
            for prompt, (tokens, logprobs), reason, chosen in zip(
                prompts, output, reasons, watch.close(len(prompts)), strict=True
            )
        ]

    def _prefill(self, batch: _Batch) -> Tensor:
        """Logits after the prompts. A prompt shared by neighbouring rows is computed once."""
        logits = self._forward(batch, batch.unique_ids)
        batch.cache.batch_select_indices(batch.unique_of_row)
        batch.mask = batch.mask[batch.unique_of_row]
        return logits[batch.unique_of_row]

    def _forward(self, batch: _Batch, ids: Tensor) -> Tensor:
        """Logits (rows, V) in float32 at the last position."""
        if batch.cache.get_seq_length():
            batch.mask = torch.nn.functional.pad(batch.mask, (0, 1), value=1)
        positions = (batch.mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids,
            attention_mask=batch.mask,
            position_ids=positions,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def push(self, version: int, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """See `RolloutEngine`. Nothing is copied before names and shapes of the whole update are checked."""
        with self._lock, torch.no_grad():
            given: dict[str, Tensor] = {}
            for name, tensor in tensors:
                if name in given:
                    raise WeightUpdateError(f"weight {name!r} occurs twice in one update: send every name once")
                given[name] = tensor.detach().clone()  # the sender may reuse its buffer
            target = _checkpoint_names(self.model.state_dict(keep_vars=True))
            aliases = self._tied_names(target)
            missing, unknown = sorted(target.keys() - given.keys() - aliases), sorted(given.keys() - target.keys())
            if missing or unknown:
                raise WeightUpdateError(
                    f"weight update refused: {len(missing)} tensors missing {missing[:3]}, {len(unknown)} unknown "
                    f"{unknown[:3]}; send exactly the model's Hugging Face names"
                )
            for name, tensor in given.items():
                if tensor.shape != target[name].shape:
                    raise WeightUpdateError(
                        f"weight update refused: {name} has shape {tuple(tensor.shape)}, "
                        f"expected {tuple(target[name].shape)}"
                    )
            for name, tensor in given.items():
                if name not in aliases:
                    target[name].copy_(tensor)
            self.version = version

    def _tied_names(self, target: dict[str, Any]) -> set[str]:
        """Names that share memory with an earlier one (a tied output head): optional in an update."""
        first: dict[int, str] = {}
        for name, tensor in target.items():
            first.setdefault(tensor.data_ptr(), name)
        return target.keys() - first.values()

    def close(self) -> None:
        """Nothing to stop."""


def _checkpoint_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps the experts of a layer in two tensors; in a checkpoint, and in an update, each has its own."""
    named: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if (match := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name)) is None:
            named[name] = tensor
            continue
        for number, expert in enumerate(tensor.unbind()):
            parts = zip(("gate", "up"), expert.chunk(2), strict=True) if match[2] == "gate_up" else [("down", expert)]
            named |= {f"{match[1]}.{number}.{part}_proj.weight": slice_ for part, slice_ in parts}
    return named


class _Batch:
    """Left-padded rows under generation. ``rows``: (live rows,), their places in the original batch."""

    def __init__(self, prompts: list[list[int]], device: torch.device) -> None:
        unique: list[list[int]] = []
        of_row: list[int] = []
        for prompt in prompts:
            if not unique or unique[-1] != prompt:
                unique.append(prompt)
            of_row.append(len(unique) - 1)
        width = max(map(len, unique))
        padded = [[0] * (width - len(prompt)) + prompt for prompt in unique]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in unique]
        self.unique_ids = torch.tensor(padded, device=device)
        self.unique_of_row = torch.tensor(of_row, device=device)
        self.mask = torch.tensor(mask, device=device)
        self.rows = torch.arange(len(prompts), device=device)
        self.cache = DynamicCache()

    def keep(self, live: Tensor) -> None:
        """Drop the rows where ``live`` (bool, one per row) is False."""
        if not bool(live.all()):
            self.cache.batch_select_indices(live.nonzero()[:, 0])
            self.mask, self.rows = self.mask[live], self.rows[live]


class _Watch:
    """The experts of every token that a batch's rows read; nothing without ``experts``."""

    def __init__(self, model: Any, experts: Experts | None) -> None:
        modules = [module for name, module in model.named_modules() if name.endswith(".experts")] if experts else []
        assert experts is None or len(modules) == len(experts.sparse), "transformers has changed its modules"
        self._experts = experts
        self._last: list[Tensor] = []  # of the forward pass under way, (tokens, top k) by layer
        self._rows: list[list[Tensor]] = []
        self._hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules]

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last.append(args[1] if len(args) > 1 else kwargs["top_k_index"])

    def _taken(self) -> Tensor:
        """(tokens, layers with experts, top k) of the forward pass that has ended."""
        assert self._experts is not None
        taken = torch.stack(self._last, dim=1).cpu().to(torch.from_numpy(np.empty(0, self._experts.dtype)).dtype)
        self._last.clear()
        return taken

    def prefilled(self, batch: _Batch, prompts: list[list[int]]) -> None:
        """After the prompts."""
        if self._experts is None:
            return
        unique, width = batch.unique_ids.shape
        taken = self._taken().unflatten(0, (unique, width))
        places = zip(batch.unique_of_row.tolist(), prompts, strict=True)
        self._rows = [[taken[place, width - len(prompt) :]] for place, prompt in places]

    def decoded(self, batch: _Batch) -> None:
        """After one token of each live row."""
        if self._experts is not None:
            for row, chosen in zip(batch.rows.tolist(), self._taken(), strict=True):
                self._rows[row].append(chosen[None])

    def close(self, rows: int) -> list[Tensor | None]:
        """`Rollout.experts` of each row."""
        for hook in self._hooks:
            hook.remove()
        return [torch.cat(parts) for parts in self._rows] if self._experts is not None else [None] * rows


def uniform_numbers(seed: int, sample: int, count: int) -> np.ndarray:
    """``count`` float64 numbers in [0, 1) for one response, from Philox4x64 keyed by (seed, sample)."""
    return np.random.Generator(np.random.Philox(key=[seed % 2**64, sample])).random(count)


def sample(logits: Tensor, uniform: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Args:
        logits: (rows, V) float32.
        uniform: (rows,) float64 in [0, 1).

    Returns:
        tokens (rows,) int64, and their log-probabilities (rows,) float32 in nats under the distribution they were drawn
        from: after temperature, top-k and top-p; of the model itself for greedy decoding, as vLLM reports them.
    """
    if sampling.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    logprobs = (logits / sampling.temperature).log_softmax(-1)
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logprobs.topk(sampling.top_k, dim=-1).values[:, -1:]  # ties with the last one are kept, as in vLLM
        logprobs = logprobs.masked_fill(logprobs < least, -torch.inf).log_softmax(-1)
    if sampling.top_p < 1:
        ordered, order = logprobs.exp().sort(-1, descending=True)
        beyond = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p is kept
        logprobs = logprobs.masked_fill(beyond.scatter(1, order, beyond), -torch.inf).log_softmax(-1)
    cumulative = logprobs.double().exp().cumsum(-1)
    # Scaled to the rounded total, and capped: a uniform number next to 1 must not fall behind the last token.
    threshold = (uniform * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, threshold, right=True).clamp(max=logits.shape[1] - 1)
    return tokens[:, 0], logprobs.gather(1, tokens)[:, 0]
