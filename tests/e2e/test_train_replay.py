"""The training loop with the local engine, in this process: replays, staleness, learning rate 0, every algorithm."""

from __future__ import annotations

import fcntl
import gzip
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training import arguments, assert_same_run, journal, launch_here, metrics, run_here, weights

from configs.load import choices
from megatron_ext.rl.aggregation import AGGREGATIONS


@pytest.fixture(scope="module")
def recorded(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A live run of four steps; the only one here that writes a report."""
    return run_here(model, tmp_path_factory.mktemp("recorded") / "run", "run.report_every=10")


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    from recipes.loop.run_dir import RunDir

    monkeypatch.setattr(RunDir, "_report", lambda self: self.path / "report.html")


@pytest.fixture
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every start of an engine fail."""
    monkeypatch.setattr("recipes.loop.stream.Collector", None)


def test_a_run_leaves_what_it_promises(recorded: Path) -> None:
    rows = metrics(recorded)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(row["actor/grad_norm"] > 0 and row["rollout/staleness"] == 0 for row in rows)
    assert all(row["rollout_agreement/abs_dp_mean"] < 1e-6 for row in rows), "each step is sampled with its own weights"
    assert [("val-core/chain/avg@2" in row) for row in rows] == [False, True, False, True]
    assert "val-before/chain/avg@2" in rows[0] and "val-before/chain/avg@2" not in rows[1]
    for name in ("config.yaml", "samples.jsonl", "report.html", "hf/config.json", "checkpoints/step_000004/state.json"):
        assert (recorded / name).is_file(), name
    records = journal(recorded)
    assert [(r["kind"], r["step"]) for r in records] == [
        *(("eval", 0), ("rollouts", 0), ("rollouts", 1), ("eval", 2), ("rollouts", 2), ("rollouts", 3), ("eval", 4))
    ]
    for record in records:
        assert {v for g in record.get("groups", []) for r in g["responses"] for v in r["versions"]} <= {record["step"]}
    positions = [record["position"] for record in records if record["kind"] == "rollouts"]
    assert positions == [4, 8, 12, 16]
    problems = [g["problem"] for record in records for g in record.get("groups", [])]
    assert len(set(problems)) == 16, "no problem twice"


@pytest.mark.usefixtures("no_report", "no_engine")
def test_replay_is_bit_identical(model: Path, recorded: Path, tmp_path: Path) -> None:
    replay = run_here(model, tmp_path / "replay", f"rollout.replay={recorded}")
    again = run_here(model, tmp_path / "again", f"rollout.replay={replay}")
    for run in (replay, again):
        assert_same_run(run, recorded)
        assert (run / "journal.bin").read_bytes() == (recorded / "journal.bin").read_bytes()


@pytest.mark.usefixtures("no_report", "no_engine")
def test_rollout_logprobs_save_the_statistics_pass(
    model: Path, recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the first step, which compares them with the learner's; the training result is the same."""
    from megatron_ext.learner.learner import Learner

    passes: list[int] = []
    statistics = Learner.statistics
    monkeypatch.setattr(Learner, "statistics", lambda *a, **k: passes.append(1) or statistics(*a, **k))
    settings = (f"rollout.replay={recorded}", "train.old_logprobs=rollout", "train.entropy_probe_every=0")
    saved = run_here(model, tmp_path / "saved", *settings)
    assert len(passes) == 1
    monkeypatch.setattr("recipes.train.needs_statistics", lambda *_: True)
    whole = run_here(model, tmp_path / "whole", *settings)
    assert len(passes) == 5
    mine, theirs = weights(saved), weights(whole)
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    for a, b in zip(metrics(saved), metrics(whole), strict=True):
        assert a["actor/pg_loss"] == b["actor/pg_loss"]
        # Without the pass it is the entropy of the policy during the updates.
        assert (a["actor/entropy"] == b["actor/entropy"]) == (a["step"] == 1) and 0 < a["actor/entropy"] < math.log(32)
    assert "rollout_agreement/abs_dp_mean" in metrics(saved)[0]
    followed = ("schedule=entropy_target", "selection=clip_v", "train.entropy_probe_every=1")
    monkeypatch.undo()
    for setting in followed:
        assert _needs(model, setting), setting
    assert not _needs(model)


@pytest.mark.usefixtures("no_report", "no_engine")
def test_a_profile_of_one_step(
    model: Path, recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trace has the phases and Megatron's operations; the training result is the same."""
    run = run_here(model, tmp_path / "run", f"rollout.replay={recorded}", "run.profile=torch", "run.profile_steps=[2]")
    assert_same_run(run, recorded)
    (trace,) = (run / "profile").iterdir()
    assert trace.name == "step_000002_rank_0.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    names = [event["name"] for event in events if event.get("ph") == "X"]
    assert names.count("statistics") == names.count("update") == 1 and "aten::mm" in names
    for setting, said in (
        ("run.profile_steps=[5]", "run.profile_steps=[5]: 5 is not between 1 and 4"),
        ("run.profile_ranks=[1]", "run.profile_ranks=[1]: 1 is not between 0 and 0"),
        ("run.profile=nsys", "rank 0 was not started by nsys: put `nsys profile --capture-range=cudaProfilerApi"),
    ):
        words = arguments(model, tmp_path / "bad", f"rollout.replay={recorded}", "run.profile=torch", setting)
        assert launch_here(words) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "bad" / "profile").exists()


@pytest.mark.usefixtures("no_report")
def test_a_mixture_trains_on_the_engines_routing_and_is_replayed_with_it(model: Path, tmp_path: Path) -> None:
    """A bfloat16 learner with the float32 engine; the journal holds the experts, and a replay uses them."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    from recipes.loop.journal import Record, index, read

    mixture = tmp_path / "mixture"
    shutil.copytree(model, mixture)
    tiny = json.loads((model / "config.json").read_text())
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    kept = {key: tiny[key] for key in ("vocab_size", "eos_token_id", "bos_token_id")}
    config = Qwen3MoeConfig(
        **shape, **experts, **kept, head_dim=32, num_hidden_layers=2, initializer_range=0.2, dtype="float32"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen3MoeForCausalLM(config).save_pretrained(mixture)
    settings = ("train.steps=2", "model.dtype=bfloat16", "rollout.agreement_limit=0.2", "eval.every=0")
    run = run_here(mixture, tmp_path / "run", *settings)
    assert_same_run(run_here(mixture, tmp_path / "again", *settings, f"rollout.replay={run}"), run)
    places, _ = index(run / "journal.bin")
    record = Record(read(places["rollouts", 0]))
    assert record.arrays["experts"].shape[1:] == (2, 2) and record.arrays["experts"].dtype == torch.uint8
    off = run_here(mixture, tmp_path / "off", *settings, f"rollout.replay={run}", "rollout.routing_replay=false")
    mismatch = [metrics(directory)[0]["rollout_agreement/abs_dlogp_mean"] for directory in (run, off)]
    assert mismatch[0] < mismatch[1] / 1.5


def _needs(model: Path, *settings: str) -> bool:
    from configs.load import load_config
    from megatron_ext.rl.schedules import build_controller
    from recipes.loop.batch import needs_statistics

    config = load_config(
        arguments(model, Path("unused"), "train.old_logprobs=rollout", "train.entropy_probe_every=0", *settings)
    )
    schedule = dict(config.schedule)
    controller = build_controller(config.loss["name"], config.loss, schedule.pop("name"), **schedule)
    return needs_statistics(config, controller, 1)


@pytest.mark.usefixtures("no_report", "no_engine")
def test_replay_follows_the_settings(model: Path, recorded: Path, tmp_path: Path) -> None:
    """The comparison above can fail: with another learning rate only the first statistics are the same."""
    replay = run_here(model, tmp_path / "replay", f"rollout.replay={recorded}", "optim.lr=1e-3")
    mine, theirs = metrics(replay), metrics(recorded)
    assert mine[0]["actor/entropy"] == theirs[0]["actor/entropy"]
    assert mine[1]["actor/entropy"] != theirs[1]["actor/entropy"]
    assert not torch.equal(weights(replay)["model.norm.weight"], weights(recorded)["model.norm.weight"])


@pytest.mark.usefixtures("no_report")
def test_staleness_labels_every_token(model: Path, tmp_path: Path) -> None:
    """With max_staleness=1 step k is sampled with the weights of step k - 1, as its logprobs prove."""
    from transformers import AutoModelForCausalLM

    stale = ("rollout.max_staleness=1", "train.tis_cap=2", "eval.every=0")
    live = run_here(model, tmp_path / "live", *stale)
    groups = {record["step"]: record["groups"] for record in journal(live) if record["kind"] == "rollouts"}
    for step, members in groups.items():
        assert {v for g in members for r in g["responses"] for v in r["versions"]} == {max(step - 1, 0)}
    assert [row["rollout/staleness"] for row in metrics(live)] == [0, 1, 1, 1]
    replay = run_here(model, tmp_path / "replay", f"rollout.replay={live}", *stale)
    assert_same_run(replay, live)

    one = run_here(model, tmp_path / "one", f"rollout.replay={live}", "train.steps=1", "eval.every=0")
    for directory, matches in ((one / "hf", True), (model, False)):
        policy = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        worst = max(_worst_gap(policy, g["prompt"], r) for g in groups[2] for r in g["responses"])
        assert (worst < 1e-4) == matches, (directory, worst)


@torch.no_grad()
def _worst_gap(policy: Any, prompt: list[int], response: dict[str, Any]) -> float:
    ids = torch.tensor([prompt + response["ids"]])
    logp = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    taken = logp.gather(1, torch.tensor(response["ids"])[:, None])[:, 0]
    return float((taken - torch.tensor(response["logprobs"])).abs().max())


@pytest.mark.usefixtures("no_report", "no_engine")
def test_learning_rate_zero(model: Path, recorded: Path, tmp_path: Path) -> None:
    """The ratio is 1 exactly with the packing of the statistics pass, to rounding with another; nothing is clipped."""
    same = run_here(model, tmp_path / "same", f"rollout.replay={recorded}", "optim.lr=0", "train.mini_batch_prompts=4")
    other = run_here(
        model, tmp_path / "other", f"rollout.replay={recorded}", "optim.lr=0", "train.micro_batch_tokens=40"
    )
    for run, tolerance in ((same, 0.0), (other, 1e-6)):
        for row in metrics(run):
            assert abs(row["actor/ratio_mean"] - 1) <= tolerance and abs(row["actor/ppo_kl"]) <= tolerance
            assert {row[f"actor/pg_clipfrac_{side}"] for side in ("low", "high", "dual")} == {0.0}
            assert row["actor/grad_norm"] > 0
        from safetensors.torch import load_file

        before = load_file(model / "model.safetensors")
        assert all(torch.equal(tensor, before[name]) for name, tensor in weights(run).items())


VARIANTS = [
    *(f"loss={name}" for name in choices("loss")),
    *(f"selection={name}" for name in choices("selection")),
    *(f"schedule={name}" for name in choices("schedule")),
    *(f"loss=dynamic_clip loss.strategy={name}" for name in ("did", "od")),
    *(f"advantage.aggregation={name}" for name in AGGREGATIONS),
    *(f"advantage.name={name}" for name in ("dr_grpo", "rloo", "reinforce_pp")),
    "selection=clip_cov selection.per_update=true selection.renormalise=true",
    "advantage.overlong=filter",
    "advantage.overlong=penalty",
    "train.tis_cap=2",
    "train.tis_cap=1.2 train.tis_floor=0.8 train.tis_mode=mask train.tis_level=geometric train.tis_veto=0.0001",
    "train.positive_nll_coef=0.1 loss=bapo selection=clip_b selection.also=[{name:entropy_ratio}]",
    "train.old_logprobs=rollout",
    "train.epochs=2",
]


@pytest.mark.usefixtures("no_report", "no_engine")
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_algorithm_runs_in_the_loop(model: Path, recorded: Path, tmp_path: Path, variant: str) -> None:
    run = run_here(model, tmp_path / "run", f"rollout.replay={recorded}", "train.steps=2", *variant.split())
    rows = metrics(run)
    assert len(rows) == 2
    for row in rows:
        assert all(math.isfinite(value) for value in row.values())
        assert row["actor/grad_norm"] > 0 and row["actor/updates"] == (4 if "epochs" in variant else 2)
    if "filter" not in variant:  # a filter leaves only the trained tokens' entropy
        assert rows[0]["actor/entropy"] == metrics(recorded)[0]["actor/entropy"], "the same rollouts, the same weights"
    assert not torch.equal(weights(run)["model.norm.weight"], torch.ones(128))


def test_other_weights_than_the_rollouts_are_refused(model: Path, recorded: Path, tmp_path: Path) -> None:
    """A journal made with another model: probabilities disagree, and training would silently go wrong."""
    from recipes.models.prepare import make_tiny_model

    other = make_tiny_model(tmp_path / "other", seed=1)
    assert launch_here(arguments(other, tmp_path / "run", f"rollout.replay={recorded}")) == 2


def test_user_errors_are_one_sentence_and_status_2(
    model: Path, recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def refusal(run_dir: Path, *extra: str) -> str:
        capfd.readouterr()
        assert launch_here(arguments(model, run_dir, *extra)) == 2, extra
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1
        return lines[0]

    def content() -> dict[Path, bytes]:  # .lock names its last holder
        return {path: path.read_bytes() for path in recorded.rglob("*") if path.is_file() and path.name != ".lock"}

    before = content()
    replay = f"rollout.replay={recorded}"
    assert "is this run's own directory; set run.dir to another one" in refusal(recorded, replay)
    assert "holds a run with seed=0, not 1; set run.dir to a new directory" in refusal(recorded, "seed=1")
    with (recorded / ".lock").open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert "wait or choose another" in refusal(recorded)
    assert "journal ends before step 5; set train.steps=4" in refusal(tmp_path / "long", replay, "train.steps=5")
    assert "no journal.bin there" in refusal(tmp_path / "none", f"rollout.replay={tmp_path}")
    assert "parallel.nproc=2" in refusal(tmp_path / "few", "parallel.nproc=2", "parallel.tp=4", "parallel.pp=1")
    after = content()
    assert after == before, "a refused start changes nothing of the run"


@pytest.mark.usefixtures("no_report")
def test_a_replay_continues_only_its_own_journal(
    model: Path, recorded: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A directory that holds steps of one journal is not mixed with those of another."""
    run = run_here(model, tmp_path / "run", f"rollout.replay={recorded}", "train.steps=2", "eval.every=0")
    assert launch_here(arguments(model, run, f"rollout.replay={recorded}", "eval.every=0")) == 0
    assert [row["step"] for row in metrics(run)] == [1, 2, 3, 4]

    other = tmp_path / "other"
    other.mkdir()
    lines = []
    for record in journal(recorded):
        for group in record.get("groups", []):
            group["responses"].reverse()
        lines.append(json.dumps(record) + "\n")
    (other / "journal.jsonl").write_text("".join(lines))  # the format before this one
    fresh = tmp_path / "fresh"
    fresh.mkdir()
    (fresh / "journal.bin").write_bytes((recorded / "journal.bin").read_bytes())
    capfd.readouterr()
    assert launch_here(arguments(model, fresh, f"rollout.replay={other}")) == 2
    assert "holds other rollouts of step" in capfd.readouterr().err


def test_settings_leave_ratios_to_compare(recorded: Path) -> None:
    """The bit-for-bit tests compare nontrivial runs: ratios move, and some are clipped."""
    rows = metrics(recorded)
    assert any(row["actor/pg_clipfrac_low"] + row["actor/pg_clipfrac_high"] > 0 for row in rows)
    assert len({row["actor/entropy"] for row in rows}) == 4
