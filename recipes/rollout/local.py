"""Rollouts in this process: transformers' model in float32 with a KV cache, behind the same interface as the servers.

For tests and for machines without vLLM. Each sequence gets one random number per token from Philox keyed by (seed,
sample), and samples by inverting the cumulative distribution. So the tokens depend on the seed and not on the batch (up
to float32 rounding of the logits, which depends on the batch shape).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

from megatron_ext import progress
from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import Ranks, WeightUpdateError
from recipes.rollout.engine import Request, Sampling, check_request, stop_tokens
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
        self._closed = False
        self._lock = threading.Lock()  # generation and updates exclude each other

    def generate(
        self, prompts: Sequence[Sequence[int]], *, n: int, sampling: Sampling, seeds: Sequence[int]
    ) -> list[Rollout]:
        """See `RolloutEngine`."""
        check_request(prompts, n, seeds, self._max_model_len)
        requests = [Request(prompt, n, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
        for _ in self.complete(requests, sampling=sampling):
            pass
        return [rollout for request in requests for rollout in request.rollouts or ()]

    def complete(self, requests: Sequence[Request], *, sampling: Sampling) -> Generator[list[Request], None, None]:
        """See `RolloutEngine`. Responses that were halted are read again by the weights of now, and go on."""
        with self._lock:
            for request in requests:
                if request.state is None:
                    self.counters["requests"] += 1
                    request.state = [
                        _Row(
                            list(request.prompt),
                            limit=min(sampling.max_tokens, self._max_model_len - len(request.prompt)),
                            uniforms=uniform_numbers(request.seed, sample, sampling.max_tokens),
                        )
                        for sample in range(request.n)
                    ]
            open_rows = [
                (request, row) for request in requests for row in request.state if request.rollouts is None and row.open
            ]
            for start in range(0, len(open_rows), self._max_num_seqs):
                yield from self._decode(open_rows[start : start + self._max_num_seqs], sampling)

    def _decode(self, rows: Sequence[tuple[Request, _Row]], sampling: Sampling) -> Iterator[list[Request]]:
        """One batch, row for row. Requests are yielded when their last row is complete."""
        batch = _Batch([[*row.prompt, *row.tokens] for _, row in rows], self._device)
        stop = torch.tensor(sorted(self._eos | set(sampling.stop_token_ids)), dtype=torch.long, device=self._device)
        with _Watch(self.model, self._experts if sampling.experts else None) as watch:
            with torch.inference_mode():  # never around a `yield`: the caller's own work would be inside
                logits = self._prefill(batch)
            watch.prefilled(batch, [row for _, row in rows])
            while True:
                progress.beat(phase="rollout")
                if self._closed:
                    raise RuntimeError("the engine was closed while it generated")
                alive = [rows[index] for index in batch.rows.tolist()]
                noise = torch.tensor([row.uniforms[len(row.tokens)] for _, row in alive], dtype=torch.float64)
                with torch.inference_mode():
                    tokens, logprobs = sample(logits, noise.to(self._device), sampling)
                    stopped = torch.isin(tokens, stop)
                for (_, row), token, logprob, stop_here in zip(
                    alive, tokens.tolist(), logprobs.tolist(), stopped.tolist(), strict=True
                ):
                    row.append(token, logprob, self.version, stop_here)
                complete = list(dict.fromkeys(request for request, row in alive if not row.open and _finish(request)))
                if complete:
                    yield complete
                going = torch.tensor([row.open for _, row in alive], device=self._device)
                if not bool(going.any()):
                    return
                with torch.inference_mode():
                    batch.keep(going)
                    logits = self._forward(batch, tokens[going, None])
                watch.decoded([row for _, row in alive if row.open])

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

    @property
    def staging_root(self) -> Path | None:
        """The model is in this process."""
        return None

    def push(self, version: int, tensors: Iterable[tuple[str, Tensor]], ranks: Ranks | None = None) -> None:
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
        """End a `generate` that runs in another thread, which Python would wait for before it exits."""
        self._closed = True


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


class _Row:
    """One response being written."""

    def __init__(self, prompt: list[int], limit: int, uniforms: np.ndarray) -> None:
        self.prompt, self._limit, self.uniforms = prompt, limit, uniforms  # ``uniforms``: (max_tokens,) in [0, 1)
        self.tokens: list[int] = []
        self._logprobs: list[float] = []
        self._versions: list[int] = []
        self.experts: list[Tensor] = []  # of the tokens that were read, in parts
        self._reason = ""

    @property
    def open(self) -> bool:
        return not self._reason

    def append(self, token: int, logprob: float, version: int, stop: bool) -> None:
        self.tokens.append(token)
        self._logprobs.append(logprob)
        self._versions.append(version)
        self._reason = "stop" if stop else "length" if len(self.tokens) == self._limit else ""

    def rollout(self) -> Rollout:
        experts = torch.cat(self.experts) if self.experts else None
        return Rollout(self.prompt, self.tokens, self._logprobs, self._versions, self._reason, experts)


def _finish(request: Request) -> bool:
    """Whether all of its responses are complete, which it then holds."""
    if request.rollouts is not None or any(row.open for row in request.state):
        return False
    request.rollouts, request.state = [row.rollout() for row in request.state], []
    return True


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
        self._hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules]

    def _note(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._last.append(args[1] if len(args) > 1 else kwargs["top_k_index"])

    def _taken(self) -> Tensor:
        """(tokens, layers with experts, top k) of the forward pass that has ended."""
        assert self._experts is not None
        taken = torch.stack(self._last, dim=1).cpu().to(torch.from_numpy(np.empty(0, self._experts.dtype)).dtype)
        self._last.clear()
        return taken

    def __enter__(self) -> _Watch:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def prefilled(self, batch: _Batch, rows: Sequence[_Row]) -> None:
        """After prompts and what was written of responses; of tokens that were read before, the experts stay."""
        if self._experts is None:
            return
        unique, width = batch.unique_ids.shape
        taken = self._taken().unflatten(0, (unique, width))
        for place, row in zip(batch.unique_of_row.tolist(), rows, strict=True):
            known = sum(map(len, row.experts))
            row.experts.append(taken[place, width - len(row.prompt) - len(row.tokens) + known :])

    def decoded(self, rows: Sequence[_Row]) -> None:
        """After one token of each of these rows."""
        if self._experts is not None:
            for row, chosen in zip(rows, self._taken(), strict=True):
                row.experts.append(chosen[None])


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
