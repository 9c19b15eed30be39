"""Megatron's Transformer Engine layers through our learner, on a CPU, with a stand-in for Transformer Engine itself.

Real are Megatron's layer specification, its wrappers of Transformer Engine's modules, FP8 contexts, distributed
checkpointing, and all our code. Replaced is Transformer Engine (`stand_in/`), whose kernels only a GPU runs. All tests
run in one spawned process, so that no other test imports the stand-in.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gloo
import learner_cases as cases
import parity
import pytest
import torch
from torch import Tensor

from configs.schema import Config, OptimConfig

if TYPE_CHECKING:
    from megatron_ext.learner.learner import Learner

TE, LOCAL = "transformer_engine", "local"
FP8_MODEL = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8}
MOE_MODEL = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}


def _config(impl: str, *, sharded: bool = False, dtype: str = "float32", **model: Any) -> Config:
    optim = OptimConfig(lr=1e-3, weight_decay=0.1, warmup_steps=8, decay="linear")
    config = cases.make_config(cases.ONE, dtype, optim, micro_batch_tokens=model.pop("micro_batch_tokens", 16))
    config.optim.distributed = sharded
    config.model.transformer_impl = impl
    for key, value in model.items():
        assert hasattr(config.model, key)
        setattr(config.model, key, value)
    return config


def _update(learner: Learner, count: int) -> list[float]:
    """Run ``count`` optimizer steps; return the gradient norms."""
    from megatron_ext.rl.losses import build_loss

    batch, samples = cases.make_batch(torch.float32), range(len(cases.LENGTHS))
    batch.old_logp = batch.old_logp - 3.0
    weights_B, loss = cases.aggregation_weights("token_mean", samples), build_loss("ce_gppo")
    return [learner.update(batch, samples, weights_B, loss).means["grad_norm"] for _ in range(count)]


def _seen(learner: Learner) -> dict[str, Tensor]:
    """Return the exported weights and the statistics of the batch."""
    weights = {name: tensor.double().clone() for name, tensor in learner.export()}
    return {**weights, "statistics": cases.stack(learner.statistics(cases.make_batch(torch.float32))).double()}


def _difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def _compare_layers(root: Path) -> dict[str, Any]:
    """Names, statistics, gradients and two updates of both kinds of layers, for each family."""
    import conversion
    from megatron_ext.learner.learner import Learner
    from megatron_ext.learner.weights import named_parameters

    found: dict[str, Any] = {}
    for family, sizes in (("qwen2", {}), ("qwen3", {"head_dim": 16}), ("qwen3_moe", MOE_MODEL)):
        directory = parity.random_model(root / family, family, **sizes)
        learners = {impl: Learner(_config(impl), directory, total_updates=20) for impl in (LOCAL, TE)}
        own_names = set(dict(learners[TE].chunks[0].module.named_parameters()))
        mapped = {conversion.local_name(name) for name in named_parameters(learners[TE].chunks)}
        before = {impl: _seen(learner) for impl, learner in learners.items()}
        norms = {impl: _update(learner, 2) for impl, learner in learners.items()}
        found[family] = {
            "fused": sum("layer_norm_weight" in name for name in own_names),
            "grouped": sum("linear_fc1.weight3" in name for name in own_names),
            "names": mapped == set(conversion.megatron_names(learners[TE].hf)),
            "before": _difference(before[LOCAL], before[TE]),
            "gradient norms": max(abs(a - b) for a, b in zip(norms[LOCAL], norms[TE], strict=True)),
            "after": _difference(*(_seen(learner) for learner in learners.values())),
        }
    return found


def _exchange_checkpoints(root: Path) -> dict[str, Any]:
    """Train two steps with one kind of layers, save, load into the other, train two more: as without interruption."""
    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner

    found: dict[str, Any] = {}
    for family, sharded in (("qwen2", False), ("qwen2", True), ("qwen3_moe", False)):
        for source, target in ((LOCAL, TE), (TE, LOCAL)):
            first = Learner(_config(source, sharded=sharded), root / family, total_updates=20)
            _update(first, 2)
            saved = checkpoint.save(first, root / f"{family}-{source}-{sharded}", 2, {})
            keys = _checkpoint_keys(saved)
            _update(first, 2)
            second = Learner(_config(target, sharded=sharded), root / family, total_updates=20)
            checkpoint.load(second, saved)
            _update(second, 2)
            name = f"{family}, {source} to {target}" + (", distributed optimizer" if sharded else "")
            found[name] = {
                "difference": _difference(_seen(first), _seen(second)),
                "extra states": sum("_extra_state" in key for key in keys),
            }
    return found


def _other_adam(root: Path) -> dict[str, float]:
    """A checkpoint of torch's Adam continues under Transformer Engine's, and the other way round.

    Without either package Megatron uses torch's; both are available here, so the class is patched.
    """
    import megatron.core.optimizer as megatron_optimizer
    from megatron.core.optimizer import distrib_optimizer

    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner

    fused = megatron_optimizer.Adam

    def use(torch_adam: bool) -> None:
        megatron_optimizer.Adam = torch.optim.AdamW if torch_adam else fused
        megatron_optimizer.USING_PYTORCH_OPTIMIZER = torch_adam
        distrib_optimizer.USING_TE_OPTIMIZER = distrib_optimizer.HAVE_APEX_OR_TE = not torch_adam

    found: dict[str, float] = {}
    for sharded in (False, True):
        for torch_first in (True, False):
            use(torch_first)
            first = Learner(_config(LOCAL, sharded=sharded), root / "qwen2", total_updates=20)
            _update(first, 2)
            saved = checkpoint.save(first, root / f"adam-{torch_first}-{sharded}", 2, {})
            use(not torch_first)
            second = Learner(_config(LOCAL, sharded=sharded), root / "qwen2", total_updates=20)
            checkpoint.load(second, saved)
            _update(second, 2)
            use(torch_first)
            _update(first, 2)
            kind = "torch's to Transformer Engine's" if torch_first else "Transformer Engine's to torch's"
            found[kind + (", distributed optimizer" if sharded else "")] = _difference(_seen(first), _seen(second))
    use(False)
    return found


def _checkpoint_keys(directory: Path) -> list[str]:
    from conversion.megatron_reader import read_metadata

    return list(read_metadata(directory).state_dict_metadata)


def _emulated_fp8(root: Path) -> dict[str, Any]:
    """Statistics with FP8 products: their distance from bfloat16's, and whether packing changes them."""
    from megatron_ext.learner import checkpoint
    from megatron_ext.learner.learner import Learner

    directory = parity.random_model(root / "fp8", "qwen2", **FP8_MODEL)

    def learner(**model: Any) -> Learner:
        return Learner(_config(TE, dtype="bfloat16", **model), directory, total_updates=20)

    def logp(of: Learner) -> Tensor:
        return of.statistics(cases.make_batch(torch.float32)).logp.double()

    plain, reference = logp(learner()), Learner(_config(TE), directory, total_updates=20)
    found: dict[str, Any] = {"bfloat16": {"error": float((plain - logp(reference)).abs().mean())}}
    for scaling in ("blockwise", "tensorwise", "delayed"):
        narrow, wide, kept = (learner(fp8="e4m3", fp8_recipe=scaling, micro_batch_tokens=n) for n in (16, 256, 16))
        first, packed_otherwise = logp(narrow), logp(wide)
        norms = [_update(one, 1) for one in (narrow, learner())]
        _update(narrow, 1)
        seen = _seen(narrow)
        narrow.offload(weights=True)
        copies = sum(bool(getattr(module, "_fp8_workspaces", None)) for module in narrow.chunks[0].modules())
        narrow.reload()
        saved = checkpoint.save(narrow, root / f"fp8-{scaling}", 2, {})
        checkpoint.load(kept, saved)
        at_save = _difference(seen, _seen(kept))
        for one in (narrow, kept):
            _update(one, 2)
        found[scaling] = {
            "error": float((first - logp(reference)).abs().mean()),
            "packing": float((first - packed_otherwise).abs().max()),
            "gradient norms": abs(norms[0][0] / norms[1][0] - 1),
            "at save": at_save,
            "resumed": _difference(_seen(narrow), _seen(kept)),
            "extra states": sum("_extra_state" in key for key in _checkpoint_keys(saved)),
            "copies while offloaded": copies,
        }
    return found


def _gpu_tests_on_cpu(root: Path) -> dict[str, Any]:
    """The measurements of tests/gpu, with the stand-in: this tests the code that checks a GPU."""
    directory = root / "fp8"
    bf16 = parity.measure(parity.settings("bfloat16", TE), directory)
    local = parity.measure(parity.settings("bfloat16", LOCAL), directory)
    fp8, delayed = (
        parity.measure(parity.settings("bfloat16", TE, fp8="e4m3", fp8_recipe=recipe), directory)
        for recipe in ("blockwise", "delayed")
    )
    return {
        "layers": parity.differences(bf16, local),
        "fp8": parity.differences(fp8, bf16),
        "delayed": parity.differences(delayed, bf16),
        "ratio": {"bfloat16": parity.ratio_at_rate_0(bf16), "fp8": parity.ratio_at_rate_0(fp8)},
    }


def _everything(rank: int, root: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "stand_in"))
    import transformer_engine  # noqa: F401  # first: our learner blocks the real one where there is no GPU

    from megatron_ext.learner import model as megatron

    config = _config(TE)
    with megatron.distributed(config.parallel, seed=0, alone=True):
        found = {
            "layers": _compare_layers(root),
            "checkpoints": _exchange_checkpoints(root),
            "adam": _other_adam(root),
            "fp8": _emulated_fp8(root),
            "gpu tests": _gpu_tests_on_cpu(root),
        }
    (root / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("transformer_engine")
    gloo.run(1, _everything, root, timeout_s=300, start_method="spawn")  # before Megatron imports the real one
    result: dict[str, Any] = json.loads((root / "found.json").read_text())
    print(json.dumps(result, indent=1))
    return result


FAMILIES = {"qwen2": (4, 0), "qwen3": (4, 0), "qwen3_moe": (2, 2)}  # two layers: fused norms, grouped experts' weights


@pytest.mark.parametrize("family", FAMILIES)
def test_both_kinds_of_layers_are_the_same_function(found: dict[str, Any], family: str) -> None:
    """Same names once mapped, statistics, gradients and updates; the fused and grouped parameters exist."""
    result = found["layers"][family]
    assert (result["fused"], result["grouped"]) == FAMILIES[family]
    assert result["names"]
    assert result["before"] < 1e-5 and result["gradient norms"] < 1e-5
    assert result["after"] < 1e-4  # Adam, two steps of 1e-3


def test_a_run_goes_on_with_the_other_kind_of_layers(found: dict[str, Any]) -> None:
    assert len(found["checkpoints"]) == 6
    for name, result in found["checkpoints"].items():
        assert result["difference"] < 1e-4, name
        assert result["extra states"] == 0, name


def test_a_run_goes_on_with_the_other_adam(found: dict[str, Any]) -> None:
    """Without the step count, bias correction would restart: an error of the size of the learning rate, 1e-3."""
    assert len(found["adam"]) == 4
    for name, difference in found["adam"].items():
        assert difference < 1e-5, name


def test_fp8_products_are_used_and_aligned(found: dict[str, Any]) -> None:
    """Their error is well above bfloat16's but small; the stand-in rejects unaligned products."""
    for scaling in ("blockwise", "tensorwise", "delayed"):
        result = found["fp8"][scaling]
        assert 2 * found["fp8"]["bfloat16"]["error"] < result["error"] < 0.5, scaling
        assert 1e-5 < result["gradient norms"] < 0.2, scaling


def test_blockwise_scaling_alone_does_not_depend_on_the_packing(found: dict[str, Any]) -> None:
    """Its scales are per token; one scale per tensor follows from all tokens of the micro-batch."""
    assert found["fp8"]["blockwise"]["packing"] == 0.0
    assert found["fp8"]["tensorwise"]["packing"] > 1e-3


def test_an_fp8_run_resumes_bit_for_bit(found: dict[str, Any]) -> None:
    """Also with delayed scaling, whose scales must be saved, and with FP8 weights cached between micro-batches."""
    for scaling in ("blockwise", "tensorwise", "delayed"):
        result = found["fp8"][scaling]
        assert result["at save"] == 0.0 and result["resumed"] == 0.0, scaling
        assert result["copies while offloaded"] == 0, scaling
        assert (result["extra states"] > 0) == (scaling == "delayed"), scaling


def test_the_first_update_under_delayed_scaling_has_scales_for_its_gradients(found: dict[str, Any]) -> None:
    """Without them most gradients are 0 in FP8: cosine 0.34 with bfloat16's on an H100."""
    assert found["gpu tests"]["delayed"]["gradient cosine"] > 0.9


def test_the_measurements_of_the_gpu_tests_work(found: dict[str, Any]) -> None:
    """Both kinds of layers agree to bfloat16's rounding; FP8 differs by more, and its gradient points the same way."""
    layers, fp8, ratio = (found["gpu tests"][key] for key in ("layers", "fp8", "ratio"))
    assert layers["mean |dlogp|"] < 0.02 and layers["gradient cosine"] > 0.999
    assert 2 * layers["mean |dlogp|"] < fp8["mean |dlogp|"] < 0.5 and 0.9 < fp8["gradient cosine"] < 0.9999
    assert 1e-4 < abs(fp8["gradient norm"]) < 0.2 and abs(layers["gradient norm"]) < 0.01
    assert fp8["mean |dH|"] > fp8["dH of the batch"] > 0
    for precision in ("bfloat16", "fp8"):  # the same kernels on the same micro-batches
        assert ratio[precision] == {"max |log r|": 0.0, "mean |log r|": 0.0, "clip fraction": 0.0}
