"""Any layout, the same numbers: one recorded batch trained in every layout against one process, in float64.

Five objectives (three losses, and two token selections through the training loop's own code; a mixture of experts
trains two of them on given routing) each take three optimizer steps of SGD, in every layout CE-GPPO and two of the
others in turn; each aggregation is used in three of them.
Compared are the statistics of every token, the selected tokens, the objective, the gradient and its norm, the trace of
every token through the updates, the change of every weight after the three steps, and the statistics under the last
weights; then the weights after three steps of Adam. Layouts also differ in the token budget of a micro-batch, in the
order of the samples and in recomputation. ``pytest -s`` prints the table of largest relative differences.

All tests share eight processes that are started once. Smaller layouts run in several teams in parallel.
"""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import gloo
import invariance
import learner_cases as cases
import pytest
import torch
from invariance import ADAM_LR, CLIP, OBJECTIVES, PROCESSES, REPLAYED, SELECTIONS, SHUFFLED, VARIANTS, Results, Variant
from safetensors.torch import load_file, save_file
from torch import Tensor

BY_NAME = {variant.name: variant for variant in VARIANTS}
OTHERS = [variant for variant in VARIANTS if variant.name != variant.reference]
EXACT = [variant.name for variant in OTHERS if not variant.layout.distributed_optimizer]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory with the models and every layout's results."""
    root = tmp_path_factory.mktemp("layouts")
    cases.make_model(root / "dense", layers=4)
    cases.make_moe_model(root / "moe")
    cases.make_olmo3_model(root / "olmo3")
    cases.make_shared_expert_model(root / "shared-expert")
    cases.make_deepseek_model(root / "deepseek")
    gloo.run(PROCESSES, invariance.run, root, timeout_s=900)
    return root


# Column of the table, a part of its tensors' names, and the largest difference allowed, relative to the
# largest number of the tensor (at least 1e-3). Megatron computes the norm in float32; it is reported, and clips.
COLUMNS = {
    "log p": ("/statistics/logp", 1e-10),
    "H": ("/statistics/entropy", 1e-10),
    "sum p2": ("/statistics/sum_p2", 1e-10),
    "loss": ("/loss/", 1e-10),
    "metrics": ("/metric/", 1e-10),
    "gradient": ("gradient/", 1e-10),
    "norm": ("/norm/", 1e-6),
    "clipped": ("clipped/", 1e-6),
    "weights": ("/weight/", 1e-10),
    "after": ("/statistics/after", 1e-10),
    "trace": ("/statistics/trace", 1e-10),
}


@cache
def _differences(root: Path, name: str) -> dict[str, float]:
    """The largest difference over all objectives, by column of the table."""
    variant = BY_NAME[name]
    got, expected = load_file(root / variant.name), load_file(root / variant.reference)
    source = load_file(root / variant.model / "model.safetensors")
    left_out = tuple(f"{name}/" for name in OBJECTIVES if name not in variant.objectives)
    expected = {name: values for name, values in expected.items() if not name.startswith(left_out or ("-",))}
    assert all(name in got for name in expected if not name.startswith(("initial/", "adam-float32/")))
    worst = dict.fromkeys(COLUMNS, 0.0)
    for column, (part, _) in COLUMNS.items():
        names = [name for name in expected if part in f"/{name}" and not name.startswith("adam")]
        assert names, column
        for name in names:
            values = expected[name]
            if column == "weights":  # the change of the weights
                values = values - source[name.split("/weight/")[1]].double()
            scale = max(float(values.abs().max()), 1e-3)
            difference = float((got[name] - expected[name]).abs().max()) / scale
            worst[column] = max(worst[column], difference if difference == difference else float("inf"))
    return worst


def _selected_differently(root: Path, variant: Variant) -> int:
    """The number of tokens selected differently, over all selections."""
    got, expected = load_file(root / variant.name), load_file(root / variant.reference)
    names = [f"{name}/selected" for name in ("clip_v", "kl_cov", *SELECTIONS) if f"{name}/selected" in got]
    if variant.order == SHUFFLED:
        names.remove("clip_cov/selected")  # its random numbers are keyed by the position in the batch
    return sum(int((got[name] != expected[name]).any(0).sum()) for name in names)


def _adam_difference(got: Results, expected: Results) -> float:
    """Largest difference of a weight after three steps, in learning rates."""
    kind = "adam-float32" if f"adam-float64/weight/{next(iter(_weights(expected)))}" not in got else "adam-float64"
    pairs = [(got[f"{kind}/weight/{name}"], expected[f"{kind}/weight/{name}"]) for name in _weights(expected)]
    return max(float((a - b).abs().max()) for a, b in pairs) / ADAM_LR


def _weights(results: Results) -> list[str]:
    return [name.removeprefix("initial/") for name in results if name.startswith("initial/")]


def test_the_table(root: Path) -> None:
    """Print the table, whose figures the tests below check; docs/layouts.md has the same layouts."""
    head = [f"{name:>9}" for name in (*COLUMNS, "selected", "Adam, lr", "waste", "CPU s")]
    lines = [f"{'layout':38}" + "".join(head)]
    for variant in OTHERS:
        got, expected = load_file(root / variant.name), load_file(root / variant.reference)
        cells = ["-"] * (len(COLUMNS) + 1)
        if not variant.layout.distributed_optimizer:
            cells = [f"{x:.0e}" for x in _differences(root, variant.name).values()]
            cells.append(str(_selected_differently(root, variant)))
        cells.append(f"{_adam_difference(got, expected):.0e}")
        waste = got.get("report/perf/padding_waste")
        cells += ["-" if waste is None else f"{float(waste):.2f}", f"{float(got['seconds']):.1f}"]
        lines.append(f"{variant.name:38}" + "".join(f"{cell:>9}" for cell in cells))
    print("\n" + "\n".join(lines))
    table = (Path(__file__).parents[3] / "docs" / "layouts.md").read_text().partition("\nlayout  ")[2]
    documented = [line[:38].rstrip() for line in table.partition("```")[0].splitlines()[1:]]
    assert documented == [variant.name for variant in OTHERS]


@pytest.mark.parametrize("name", EXACT)
def test_every_layout_gives_the_numbers_of_one_process(root: Path, name: str) -> None:
    worst = _differences(root, name)
    # Megatron's router rounds sigmoids to float32: a last bit of an input may move one of them by 6e-8.
    least = 1e-6 if BY_NAME[name].other == "deepseek" else 0.0
    assert all(worst[column] <= max(limit, least) for column, (_, limit) in COLUMNS.items()), worst
    assert _selected_differently(root, BY_NAME[name]) == 0


@pytest.mark.parametrize("name", ["one", "one-moe", *EXACT])
def test_the_norm_counts_every_gradient_once(root: Path, name: str) -> None:
    """Shards are counted and replicas are not: the reported norm is that of the exported gradient, and clips to it."""
    results = load_file(root / name)
    for kind, expected in (("gradient", float(results["reported/gradient"])), ("clipped", CLIP)):
        gradient = torch.cat([value.flatten() for key, value in results.items() if key.startswith(f"{kind}/")])
        assert float(gradient.norm()) == pytest.approx(expected, rel=1e-5), kind
    assert float(results["reported/gradient"]) > 2 * CLIP


@pytest.mark.parametrize("variant", OTHERS, ids=lambda variant: variant.name)
def test_adam_agrees(root: Path, variant: Variant) -> None:
    """Adam turns the noise of a gradient near 0 into a step of lr; float64 leaves hardly any noise."""
    got, expected = load_file(root / variant.name), load_file(root / variant.reference)
    assert _adam_difference(got, expected) <= (6.0 if variant.layout.distributed_optimizer else 1e-3)
    if variant.layout.distributed_optimizer:
        pairs = [(got[f"adam-float32/weight/{n}"], expected[f"adam-float32/weight/{n}"]) for n in _weights(expected)]
        assert max(float((a - b).abs().mean()) for a, b in pairs) <= 2e-3 * ADAM_LR
        for key in (key for key in expected if key.startswith("adam-float32/statistics/")):
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=5e-5)


@pytest.mark.parametrize("name", [v.name for v in VARIANTS if v.name not in EXACT])
def test_export_before_training_is_the_checkpoint(root: Path, name: str) -> None:
    """The same bytes in float32; the float64 layouts are compared by their change from it."""
    source = load_file(root / BY_NAME[name].model / "model.safetensors")
    results = load_file(root / name)
    exported = {k.removeprefix("initial/"): v for k, v in results.items() if k.startswith("initial/")}
    assert exported.keys() == source.keys()
    assert all(torch.equal(exported[name], source[name]) and exported[name].dtype == torch.float32 for name in source)


@pytest.mark.parametrize("name", ["one", "one-moe"])
def test_one_process_computes_what_transformers_computes(root: Path, name: str, tmp_path: Path) -> None:
    """Before training and after it, of the weights as exported, sequence by sequence, without packing."""
    from transformers import AutoModelForCausalLM

    results, before, after = load_file(root / name), root / BY_NAME[name].model, tmp_path
    shutil.copyfile(before / "config.json", after / "config.json")
    prefix = "ce_gppo/weight/"
    exported = {k.removeprefix(prefix): v.float() for k, v in results.items() if k.startswith(prefix)}
    save_file(exported, after / "model.safetensors", metadata={"format": "pt"})
    statistics = torch.stack([results[f"ce_gppo/statistics/{field}"] for field in cases.FIELDS])
    for directory, expected in ((before, statistics), (after, results["ce_gppo/statistics/after"])):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        torch.testing.assert_close(_textbook_statistics(model), expected, rtol=0, atol=1e-5)


@torch.no_grad()
def _textbook_statistics(model: Any) -> Tensor:
    batch, columns = cases.make_batch(torch.float32), []
    for prompt, response in zip(batch.prompts, batch.responses, strict=True):
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].double()
        logp = logits.log_softmax(-1)
        p = logp.exp()
        taken = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        columns.append(torch.stack([taken, -(p * logp).sum(-1), (p * p).sum(-1), (p * p * logp).sum(-1)]))
    return torch.cat(columns, dim=1)


@pytest.mark.parametrize("name", ["one", "one-moe"])
def test_the_batch_exercises_what_is_compared(root: Path, name: str) -> None:
    results = load_file(root / name)
    for objective in OBJECTIVES:
        for side in ("low", "high"):
            shares = [float(results[f"{objective}/metric/{n}/pg_clipfrac_{side}"]) for n in (0, 1, 2)]
            assert 0.02 < max(shares) and min(shares) < 0.9, (objective, side, shares)
    for objective in ("clip_v", "kl_cov"):
        kept, penalised = results[f"{objective}/selected"]
        assert 0 < kept.sum() and bool(penalised.any()) == (objective == "kl_cov")
        assert objective == "kl_cov" or kept.sum() < sum(cases.LENGTHS)
    assert all(0 < results[f"{selection}/selected"].sum() < sum(cases.LENGTHS) for selection in SELECTIONS)
    assert len({float(results[f"{objective}/norm/0/grad_norm"]) for objective in OBJECTIVES}) == len(OBJECTIVES)
    free, given = (results[f"{objective}/statistics/logp"] for objective in ("ce_gppo", REPLAYED[0]))
    assert torch.equal(free, given) == (name == "one"), "a mixture's replay moves its log-probabilities"


def test_every_objective_meets_every_kind_of_parallelism() -> None:
    for kind in ("tp", "pp", "vpp", "cp", "sp"):
        trained = {o for v in VARIANTS if kind in v.layout.parallel and v.name in EXACT for o in v.objectives}
        assert trained == set(OBJECTIVES), kind
    replicated = {o for v in VARIANTS if v.name.endswith(("dp2", "dp4")) and v.name in EXACT for o in v.objectives}
    assert replicated == set(OBJECTIVES)
    spread = {o for v in VARIANTS if "ep" in v.layout.parallel and v.name in EXACT for o in v.objectives}
    assert spread == {"ce_gppo", *REPLAYED}
