"""The local engine against transformers: log-probabilities, seeds, stopping, and weight updates."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from configs.schema import RolloutConfig
from megatron_ext.rl.types import Rollout
from megatron_ext.sync.base import WeightUpdateError
from recipes.rollout.engine import Request, Sampling, stop_tokens
from recipes.rollout.local import LocalEngine, sample
from recipes.rollout.make import make_engine

EOS = 3
PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("local") / "model"
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=24,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.15,
        tie_word_embeddings=True,
        eos_token_id=EOS,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture
def engine(model_dir: Path) -> LocalEngine:
    return LocalEngine(model_dir, max_model_len=48, max_num_seqs=64)


def reference(model_dir: Path) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


def logprobs_of(model: Qwen2ForCausalLM, rollout: Rollout) -> Tensor:
    ids = torch.tensor([rollout.prompt_ids + rollout.response_ids])
    with torch.no_grad():
        logp = model(ids).logits[0].log_softmax(-1)
    at = torch.arange(len(rollout.prompt_ids) - 1, ids.shape[1] - 1)
    return logp[at, ids[0, 1:][at]]


def test_logprobs_are_the_models(engine: LocalEngine, model_dir: Path) -> None:
    rollouts = engine.generate(PROMPTS, n=6, sampling=Sampling(12), seeds=[1, 2, 3])
    model = reference(model_dir)
    assert len({len(r.response_ids) for r in rollouts}) > 1, "rows of one length would not test dropping rows"
    for rollout in rollouts:
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs_of(model, rollout), rtol=0, atol=2e-5)


def test_groups_follow_the_prompts_and_carry_the_version(engine: LocalEngine) -> None:
    rollouts = engine.generate(PROMPTS, n=2, sampling=Sampling(4), seeds=[1, 2, 3])
    assert [r.prompt_ids for r in rollouts] == [p for p in PROMPTS for _ in range(2)]
    assert {v for r in rollouts for v in r.weight_versions} == {0}


def test_same_seed_same_tokens_whatever_the_batch(engine: LocalEngine, model_dir: Path) -> None:
    together = engine.generate(PROMPTS, n=4, sampling=Sampling(10), seeds=[1, 2, 3])
    alone = [
        r
        for prompt, seed in zip(PROMPTS, [1, 2, 3], strict=True)
        for r in engine.generate([prompt], n=4, sampling=Sampling(10), seeds=[seed])
    ]
    small = LocalEngine(model_dir, max_model_len=48, max_num_seqs=3)  # cuts groups apart
    split = small.generate(PROMPTS, n=4, sampling=Sampling(10), seeds=[1, 2, 3])
    tokens = [r.response_ids for r in together]
    assert tokens == [r.response_ids for r in alone] == [r.response_ids for r in split]
    other = engine.generate(PROMPTS, n=4, sampling=Sampling(10), seeds=[4, 5, 6])
    assert tokens != [r.response_ids for r in other]
    assert len({tuple(r.response_ids) for r in together}) > 6, "samples of a prompt must differ"


def test_frequencies_match_probabilities(engine: LocalEngine, model_dir: Path) -> None:
    count = 4000
    many = LocalEngine(model_dir, max_model_len=48, max_num_seqs=count)
    rollouts = many.generate([[5, 6, 7]], n=count, sampling=Sampling(1), seeds=[7])
    found = np.bincount([r.response_ids[0] for r in rollouts], minlength=24) / count
    with torch.no_grad():
        expected = reference(model_dir)(torch.tensor([[5, 6, 7]])).logits[0, -1].softmax(-1).numpy()
    sigma = np.sqrt(expected * (1 - expected) / count)
    assert np.all(np.abs(found - expected) < 5 * sigma + 1e-3)


def test_stop_and_length(engine: LocalEngine) -> None:
    rollouts = engine.generate([[5, 6, 7]], n=64, sampling=Sampling(12, stop_token_ids=(9,)), seeds=[0])
    stopped = [r for r in rollouts if r.finish_reason == "stop"]
    assert stopped and {r.response_ids[-1] for r in stopped} == {EOS, 9}
    for rollout in rollouts:
        assert not {EOS, 9} & set(rollout.response_ids[:-1])
        assert rollout.finish_reason == "stop" or len(rollout.response_ids) == 12


def test_never_longer_than_the_model(model_dir: Path) -> None:
    engine = LocalEngine(model_dir, max_model_len=8, max_num_seqs=64)
    rollouts = engine.generate([[5, 6, 7, 8, 9], [5]], n=16, sampling=Sampling(12), seeds=[0, 1])
    lengths = [len(r.prompt_ids) + len(r.response_ids) for r in rollouts if r.finish_reason == "length"]
    assert lengths and set(lengths) == {8}
    with pytest.raises(ValueError, match="max_model_len=8"):
        engine.generate([[5] * 8], n=1, sampling=Sampling(1), seeds=[0])


@pytest.mark.parametrize("with_head", [False, True])
def test_push_replaces_all_weights(engine: LocalEngine, model_dir: Path, with_head: bool) -> None:
    model = reference(model_dir)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    names = model.state_dict() if with_head else dict(model.named_parameters())
    assert ("lm_head.weight" in names) is with_head
    engine.push(5, names.items())
    rollouts = engine.generate(PROMPTS, n=2, sampling=Sampling(6), seeds=[1, 2, 3])
    for rollout in rollouts:
        torch.testing.assert_close(torch.tensor(rollout.logprobs), logprobs_of(model, rollout), rtol=0, atol=2e-5)
    assert engine.version == 5 and {v for r in rollouts for v in r.weight_versions} == {5}


def test_push_knows_experts_by_their_names_in_a_checkpoint(tmp_path: Path) -> None:
    shape = {"vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    config = Qwen3MoeConfig(**shape, **experts, num_key_value_heads=1, head_dim=16, eos_token_id=EOS)
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    given = {name: 2 * tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    assert "model.layers.0.mlp.experts.2.up_proj.weight" in given
    engine = LocalEngine(tmp_path, max_model_len=8, max_num_seqs=1)
    before = {name: parameter.clone() for name, parameter in engine.model.named_parameters()}
    engine.push(1, given.items())
    assert all(torch.equal(parameter, 2 * before[name]) for name, parameter in engine.model.named_parameters())


def test_partial_push_is_refused_and_changes_nothing(engine: LocalEngine, model_dir: Path) -> None:
    before = engine.generate(PROMPTS, n=2, sampling=Sampling(6), seeds=[1, 2, 3])
    doubled = {name: 2 * p.detach() for name, p in reference(model_dir).named_parameters()}
    missing = dict(list(doubled.items())[:-1])
    bent = doubled | {"model.norm.weight": torch.ones(3)}
    for bad, message in [(missing, "1 tensors missing"), (doubled | {"x": torch.ones(1)}, "unknown"), (bent, "shape")]:
        with pytest.raises(WeightUpdateError, match=message):
            engine.push(1, bad.items())
    with pytest.raises(WeightUpdateError, match="twice"):
        engine.push(1, [*doubled.items(), *doubled.items()])
    assert engine.version == 0
    assert engine.generate(PROMPTS, n=2, sampling=Sampling(6), seeds=[1, 2, 3]) == before


def test_top_p_and_temperature_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4, 1)
    sampling = Sampling(1, top_p=0.75, allow_off_policy_sampling=True)  # keeps 0.5 and 0.3, which crosses 0.75
    tokens, logprobs = sample(logits, torch.tensor([0.0, 0.6249, 0.6251, 0.9999999], dtype=torch.float64), sampling)
    assert tokens.tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(logprobs.exp(), torch.tensor([0.625, 0.625, 0.375, 0.375]))
    hot = Sampling(1, temperature=0.5, allow_off_policy_sampling=True)  # p^2, normalised: 0.25/0.365
    _, logprobs = sample(logits[:1], torch.zeros(1, dtype=torch.float64), hot)
    assert logprobs.exp().item() == pytest.approx(0.25 / 0.365, rel=1e-6)
    greedy = Sampling(1, temperature=0, allow_off_policy_sampling=True)
    tokens, logprobs = sample(logits[:1], torch.tensor([0.99], dtype=torch.float64), greedy)
    assert tokens.item() == 0 and logprobs.exp().item() == pytest.approx(0.5)


def test_the_largest_uniform_number_gives_a_possible_token() -> None:
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    tokens, logprobs = sample(logits, torch.tensor([1 - 2**-53], dtype=torch.float64), Sampling(1))
    assert tokens.item() == 1 and torch.isfinite(logprobs).all()


def test_off_policy_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="allow_off_policy_sampling"):
        Sampling(4, temperature=0.7)
    with pytest.raises(ValueError, match="top_p=0.9"):
        Sampling(4, top_p=0.9)
    assert Sampling(4, temperature=0.7, allow_off_policy_sampling=True).temperature == 0.7


def test_make_engine_says_what_is_wrong(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rollout.engine='sglang'"):
        make_engine(RolloutConfig(engine="sglang"), model_dir, tmp_path)
    with pytest.raises(ValueError, match="no config.json"):
        make_engine(RolloutConfig(engine="local"), tmp_path, tmp_path)
    assert isinstance(make_engine(RolloutConfig(engine="local"), model_dir, tmp_path), LocalEngine)


def test_stop_tokens_come_from_both_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    assert stop_tokens(tmp_path) == {2, 7, 9}
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": None}))
    assert stop_tokens(tmp_path) == set()


def test_halted_responses_go_on_under_other_weights(engine: LocalEngine, model_dir: Path) -> None:
    """Every token's log-probability is that of the weights of its version, given all tokens before it."""
    requests = [Request(PROMPTS[k % 3], 1, k) for k in range(12)]
    tensors = load_file(model_dir / "model.safetensors")
    changed = {name: tensor * 1.3 for name, tensor in tensors.items()}
    with closing(engine.complete(requests, sampling=Sampling(12))) as parts:
        first = next(parts)
    assert first and len(first) < len(requests) and all(r.rollouts for r in first)
    engine.push(1, changed.items())  # would wait forever if the iterator were not closed
    done = [request for part in engine.complete(requests, sampling=Sampling(12)) for request in part]
    assert {id(r) for r in (*first, *done)} == {id(r) for r in requests} and len(done) == len(requests) - len(first)
    models = [reference(model_dir), reference(model_dir)]
    models[1].load_state_dict(changed, strict=False)
    models[1].tie_weights()
    mixed = 0
    for rollout in (r for request in requests for r in request.rollouts or ()):
        versions = torch.tensor(rollout.weight_versions)
        mixed += len(versions.unique()) > 1
        expected = torch.where(versions == 0, *(logprobs_of(model, rollout) for model in models))
        torch.testing.assert_close(torch.tensor(rollout.logprobs), expected, rtol=0, atol=5e-5)
        assert versions.tolist() == sorted(versions.tolist())
    assert mixed, "no response was cut"


def test_halted_and_continued_by_the_same_weights_changes_no_token(engine: LocalEngine) -> None:
    requests = [Request(PROMPTS[k % 3], 1, k) for k in range(12)]
    with closing(engine.complete(requests, sampling=Sampling(12))) as parts:
        next(parts)
    assert any(request.rollouts is None for request in requests)
    for _ in engine.complete(requests, sampling=Sampling(12)):
        pass
    found = [r.response_ids for request in requests for r in request.rollouts or ()]
    expected = engine.generate([r.prompt for r in requests], n=1, sampling=Sampling(12), seeds=range(12))
    assert found == [r.response_ids for r in expected]
