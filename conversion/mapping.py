"""Tensors by name, in both directions, according to the family tables. Pure torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from conversion.config import HFConfig
from conversion.families import find_family
from conversion.sharding import VOCAB_TENSORS, local_name
from conversion.table import Rule
from conversion.transforms import TRANSFORMS

EMBEDDING, OUTPUT = VOCAB_TENSORS
HF_OUTPUT = "lm_head.weight"


@cache
def _patterns(architecture: str) -> tuple[tuple[Rule, re.Pattern[str]], ...]:
    return tuple((rule, rule.pattern()) for rule in find_family(architecture).rules)


@lru_cache(1 << 16)
def _find(hf: HFConfig, megatron_name: str) -> tuple[Rule, dict[str, str]]:
    """The line of the table for a name, and the layer and expert numbers in it."""
    name = local_name(megatron_name)
    limits = {"layer": hf.num_layers, "expert": hf.experts.count if hf.experts else 0}
    for rule, pattern in _patterns(hf.architecture):
        if match := pattern.fullmatch(name):
            numbers = match.groupdict()
            inside = all(int(number) < limits[key] for key, number in numbers.items())
            if inside and rule.applies(hf, int(numbers["layer"]) if "layer" in numbers else None):
                return rule, numbers
    raise ValueError(f"Megatron tensor {megatron_name!r} has no counterpart in {hf.architecture} with this config")


def _source_name(hf: HFConfig, megatron_name: str) -> str:
    # Under pipeline parallelism the last stage of a tied model holds a copy of the embedding as its output layer.
    return EMBEDDING if hf.tied and megatron_name == OUTPUT else megatron_name


def megatron_names(hf: HFConfig) -> list[str]:
    """Every full parameter, named as in Megatron's local layer spec with model-wide layer and expert numbers.

    In the order of a forward pass, so that neighbours can be streamed together. A tied model has no output layer.
    """
    rules = [rule for rule in find_family(hf.architecture).rules if rule.when(hf)]
    names = [EMBEDDING]
    for layer in range(hf.num_layers):
        for rule in (rule for rule in rules if rule.applies(hf, layer)):
            if "{expert}" in rule.megatron:
                assert hf.experts is not None
                names += [rule.megatron.format(layer=layer, expert=expert) for expert in range(hf.experts.count)]
            elif "{layer}" in rule.megatron:
                names.append(rule.megatron.format(layer=layer))
    return names + [rule.megatron for rule in rules if "{" not in rule.megatron and rule.megatron != EMBEDDING]


@dataclass(frozen=True, slots=True)
class _Part:
    """Rows of a Hugging Face tensor that are one part of a Megatron tensor."""

    name: str
    first: int
    shape: tuple[int, ...]


def _parts(hf: HFConfig, megatron_name: str) -> tuple[Rule, list[_Part]]:
    rule, numbers = _find(hf, megatron_name)
    parts: list[_Part] = []
    ends: dict[str, int] = {}  # of what came before in the same Hugging Face tensor
    for written, shape in zip(rule.parts, rule.shapes(hf), strict=True):
        name = written.partition("#")[0].format(**numbers)
        parts.append(_Part(name, ends.get(name, 0), shape))
        ends[name] = ends.get(name, 0) + shape[0]
    return rule, parts


def hf_parts(hf: HFConfig, megatron_name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of the Hugging Face tensors that one Megatron tensor is made of, in the order of its layout."""
    _, parts = _parts(hf, _source_name(hf, megatron_name))
    return {part.name: (part.first + part.shape[0], *part.shape[1:]) for part in parts}


def hf_shapes(hf: HFConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face checkpoint (no `lm_head.weight` when tied)."""
    return {part: shape for name in megatron_names(hf) for part, shape in hf_parts(hf, name).items()}


def megatron_shape(hf: HFConfig, megatron_name: str) -> tuple[int, ...]:
    """Shape of a full Megatron tensor, without vocabulary padding."""
    shapes = list(hf_parts(hf, megatron_name).values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def stored_dtype(megatron_name: str, asked: torch.dtype | None) -> torch.dtype | None:
    """The dtype in which to store a tensor if a cast is requested; None: its own.

    The bias of a router is not cast: Megatron keeps it in float32, and a rounded one would choose other experts.
    """
    return None if megatron_name.endswith(".router.expert_bias") else asked


def import_tensor(hf: HFConfig, megatron_name: str, get: Callable[[str], Tensor]) -> Tensor:
    """One full (unsharded, unpadded) Megatron tensor, made of Hugging Face tensors.

    Args:
        megatron_name: in either spelling (local or Transformer Engine), with the model-wide layer number.
        get: Hugging Face tensor by name; KeyError when there is none.

    Raises:
        ValueError: unknown name, tensor missing or of another shape than config.json says.
    """

    def get_rows(name: str, start: int, stop: int) -> Tensor:
        part, shape = get(name), parts[name]
        if tuple(part.shape) != shape:
            raise ValueError(f"tensor {name!r} has shape {tuple(part.shape)} but config.json implies {shape}")
        return part[start:stop]

    parts = hf_parts(hf, megatron_name)
    return import_rows(hf, megatron_name, 0, megatron_shape(hf, megatron_name)[0], get_rows)


def import_rows(
    hf: HFConfig, megatron_name: str, start: int, stop: int, get_rows: Callable[[str, int, int], Tensor]
) -> Tensor:
    """Rows [start, stop) of `import_tensor`'s result; `get_rows(name, a, b)` gives rows of a Hugging Face tensor.

    `start` and `stop` must be multiples of `row_unit`. Raises ValueError when a tensor is missing.
    """
    rule, parts = _parts(hf, _source_name(hf, megatron_name))
    transform, rows = TRANSFORMS[rule.transform], [part.shape[0] for part in parts]
    slices = []
    for part, (low, high) in zip(parts, transform.locate(start, stop, hf.num_kv_heads, rows), strict=True):
        if low < high:
            try:
                slices.append(get_rows(part.name, part.first + low, part.first + high))
            except KeyError as error:
                raise ValueError(f"the checkpoint has no tensor {part.name!r}, which {megatron_name} needs") from error
    return transform.merge(slices, (stop - start) // transform.unit(hf.num_kv_heads, rows))


def row_unit(hf: HFConfig, megatron_name: str) -> int:
    """Granularity of the row blocks in which a Megatron tensor can be converted."""
    rule, parts = _parts(hf, _source_name(hf, megatron_name))
    return TRANSFORMS[rule.transform].unit(hf.num_kv_heads, [part.shape[0] for part in parts])


def export_tensors(
    hf: HFConfig, megatron_name: str, full: Tensor, *, explicit_lm_head: bool = False
) -> list[tuple[str, Tensor]]:
    """The Hugging Face tensors that a full Megatron tensor contains, vocabulary padding removed.

    Results are views of `full` where the layout allows it. For a tied model the output layer gives nothing, and the
    embedding gives `lm_head.weight` as well when `explicit_lm_head` is set: files leave it out, but a running vLLM
    keeps a stale output layer unless it is sent.

    Raises:
        ValueError: unknown name, or `full` has another shape than the config implies.
    """
    if hf.tied and megatron_name == OUTPUT:
        return []
    expected, shape = megatron_shape(hf, megatron_name), tuple(full.shape)
    padded = megatron_name in VOCAB_TENSORS and shape[0] >= expected[0] and shape[1:] == expected[1:]
    if shape != expected and not padded:
        raise ValueError(f"Megatron tensor {megatron_name!r} has shape {shape} but the config implies {expected}")
    rows = export_rows(hf, megatron_name, 0, full)
    named = [(name, _stack([piece for of, _, piece in rows if of == name])) for name in hf_parts(hf, megatron_name)]
    if explicit_lm_head and hf.tied and megatron_name == EMBEDDING:
        named.append((HF_OUTPUT, named[0][1]))
    return named


def export_rows(hf: HFConfig, megatron_name: str, start: int, block: Tensor) -> list[tuple[str, int, Tensor]]:
    """Hugging Face (name, first row, rows) contained in the block of a Megatron tensor that begins at row `start`.

    `start` and the number of rows must be multiples of `row_unit`. Vocabulary padding is left out.
    """
    rule, parts = _parts(hf, megatron_name)
    transform, rows = TRANSFORMS[rule.transform], [part.shape[0] for part in parts]
    ranges = transform.locate(start, start + block.shape[0], hf.num_kv_heads, rows)
    groups = block.shape[0] // transform.unit(hf.num_kv_heads, rows)
    pieces = transform.split(block, groups, [high - low for low, high in ranges])
    return [
        (part.name, part.first + low, piece)
        for part, (low, high), piece in zip(parts, ranges, pieces, strict=True)
        if low < high
    ]


def _stack(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def unconsumed(hf: HFConfig, checkpoint_names: Iterable[str]) -> list[str]:
    """Names in a checkpoint that no line of the table reads and the config does not make redundant.

    `lm_head.weight` of a tied model is not reported: the reader of the tensors checks that it equals the embedding.
    """
    known = set(hf_shapes(hf)) | ({HF_OUTPUT} if hf.tied else set())
    return sorted(n for n in checkpoint_names if n not in known and not _ignored(hf, n))


def left_out(hf: HFConfig, checkpoint_names: Iterable[str]) -> list[str]:
    """Names of weights in a checkpoint that belong to layers behind the last one, which no table reads."""
    return sorted(n for n in checkpoint_names if (match := _ignored(hf, n)) and "beyond" in match.groupdict())


def _ignored(hf: HFConfig, name: str) -> re.Match[str] | None:
    """The match of a pattern of the family; a group `beyond` in it must name a layer that the model does not have."""
    for pattern in find_family(hf.architecture).ignored:
        match = re.fullmatch(pattern, name)
        if match and int(match.groupdict().get("beyond") or hf.num_layers) >= hf.num_layers:
            return match
    return None
