"""Bad input, one line each: settings, the model's files, and the paths given to the other commands.

Every line must be refused in one sentence that contains the words behind the bar: key, value and, where there is one,
the fix. `tests/integration/test_config.py` has the settings that contradict each other.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from recipes import checkpoint, evaluate, plan, report, status
from recipes.checks import keys, ranges
from recipes.checks.settings import load_checked
from recipes.launch import launch
from recipes.models.prepare import make_tiny_model

SETTINGS = """
optim.betas=[0.9]                       | optim.betas=[0.9] / two numbers
optim.betas=[0.9,0.99,0.999]            | optim.betas=[0.9, 0.99, 0.999] / two numbers
optim.betas=[1.5,0.9]                   | optim.betas=1.5 / below 1
optim.betas=0.9                         | optim.betas=0.9 / a list
optim.lr=inf                            | optim.lr=inf / finite
optim.lr=nan                            | optim.lr=nan / finite
optim.lr=-1                             | optim.lr=-1 / at least 0
optim.lr=fast                           | optim.lr=fast / a number
optim.lr=                               | optim.lr= / a number
optim.lr=1e-4,1e-5                      | optim.lr=1e-4,1e-5 / one value / [a,b]
optim.eps=0                             | optim.eps=0.0 / above 0
optim.weight_decay=nan                  | optim.weight_decay=nan / finite
optim.clip_grad=-1                      | optim.clip_grad=-1.0 / 0 switches clipping off
optim.warmup_steps=-1                   | optim.warmup_steps=-1 / at least 0
optim.min_lr=1                          | optim.min_lr=1.0 / optim.lr
optim.decay=step                        | optim.decay=step / constant | linear | cosine
optim.optimizer=adamw                   | optim.optimizer=adamw / 'adam'
train.steps=0                           | train.steps=0 / at least 1 / recipes.evaluate
train.steps=-1                          | train.steps=-1 / at least 1
train.threads=100000                    | train.threads=100000 / at most 1024
train.threads=0                         | train.threads=0 / at least 1
train.mini_batch_prompts=0               | train.mini_batch_prompts=0 / at least 1
train.mini_batch_prompts=3               | train.mini_batch_prompts=3 / divisor
train.keep_checkpoints=0                | train.keep_checkpoints=0 / at least 1
train.save_every=-1                     | train.save_every=-1 / at least 0
train.entropy_probe_every=-1            | train.entropy_probe_every=-1 / at least 0
train.tis_cap=0                         | train.tis_cap=0.0 / null switches
train.tis_cap=nan                       | train.tis_cap=nan / finite
train.loss_chunk_tokens=-1              | train.loss_chunk_tokens=-1 / at least 0
train.micro_batch_tokens=0              | train.micro_batch_tokens=0 / at least 1
train.old_logprobs=both                 | train.old_logprobs=both / learner | rollout
reference.kl_coef=nan                   | reference.kl_coef=nan / finite
reference.kl_coef=inf                   | reference.kl_coef=inf / finite
reward.memory_mb=50                     | reward.memory_mb=50 / at least 256
reward.workers=0                        | reward.workers=0 / at least 1
reward.workers=100000                   | reward.workers=100000 / at most 1024
reward.timeout_s=0                      | reward.timeout_s=0.0 / above 0
reward.failure_score=nan                | reward.failure_score=nan / finite
reward.params=3                         | reward.params=3 / a mapping
reward.params.nonsense=1                | reward.params.nonsense / marker
rollout.n=1000000000                    | rollout.n=1000000000 / responses a step / the most
rollout.n=-1                            | rollout.n=-1 / at least 1
rollout.n=1                             | rollout.n=1 / advantage.name=grpo / reinforce_pp
rollout.n                               | 'rollout.n' / key=value / give rollout.n a value
rollout.n=4 rollout.n=x                 | rollout.n=x / whole number
rollout.n=x rollout.n=y                 | rollout.n=y / whole number
rollout.n=[                             | rollout.n=[ / quote
rollout..n=3                            | 'rollout..n' / 'rollout.n'
rollout=3                               | rollout=3 / a section / one by one
rollout={n:3}                           | rollout={n:3} / a section
rollout=null                            | rollout=null / a section
rollout.temperature=0                   | rollout.temperature=0.0 / above 0
rollout.temperature=nan train.tis_cap=2 | rollout.temperature=nan / finite
rollout.top_p=0 train.tis_cap=2         | rollout.top_p=0.0 / above 0 and at most 1
rollout.top_p=2 train.tis_cap=2         | rollout.top_p=2.0 / at most 1
rollout.timeout_s=-1                    | rollout.timeout_s=-1.0 / above 0
rollout.probe_s=nan                     | rollout.probe_s=nan / finite
rollout.max_num_seqs=0                  | rollout.max_num_seqs=0 / at least 1
rollout.max_model_len=0                 | rollout.max_model_len=0 / at least 1
rollout.max_tokens=0                    | rollout.max_tokens=0 / at least 1
rollout.num_servers=0                   | rollout.num_servers=0 / at least 1
rollout.agreement_limit=nan             | rollout.agreement_limit=nan / finite
rollout.urls=[here]                     | rollout.urls / 'here' / http://
rollout.urls=[http://a,http://a]        | rollout.urls / twice
rollout.gpu_memory_utilization=1.5      | rollout.gpu_memory_utilization=1.5 / at most 1
rollout.engine=vlm                      | rollout.engine=vlm / 'vllm'
rollout.dtype=half                      | rollout.dtype=half / bfloat16
rollout.max_staleness=1.5               | rollout.max_staleness=1.5 / whole number
eval.n=0                                | eval.n=0 / at least 1
eval.k=[0]                              | eval.k=0 / at least 1
eval.k=[a]                              | eval.k[0] / 'a'
eval.k=[9]                              | eval.k=[9] / eval.n >= 9
eval.temperature=nan                    | eval.temperature=nan / finite
eval.top_p=1.5                          | eval.top_p=1.5 / at most 1
eval.problems=0                         | eval.problems=0 / at least 1
eval.max_tokens=0                       | eval.max_tokens=0 / null takes rollout.max_tokens
eval.every=-1                           | eval.every=-1 / at least 0
run.dir=                                | run.dir='' / empty / directory
run.dir=null                            | run.dir=null / text
run.dir={file}                          | run.dir={file} / is a file
run.dir=a=b                             | run.dir=a=b / quote
run.dir=${nothing}                      | run.dir=${nothing}
run.name=''                             | run.name='' / empty
run.report_every=-1                     | run.report_every=-1 / at least 0
run.peak_tflops=inf                     | run.peak_tflops=inf / finite / GPU's name
seed=-1                                 | seed=-1 / at least 0
seed=x                                  | seed=x / whole number
seed=99999999999999999999               | seed=99999999999999999999 / at most 4294967295
parallel.tp=0                           | parallel.tp=0 / at least 1
parallel.pp=1.5                         | parallel.pp=1.5 / whole number
parallel.nproc=0                        | parallel.nproc=0 / null takes the fewest
critic.lr=nan                           | critic.lr=nan / finite
critic.clip_range=0                     | critic.clip_range=0.0 / null switches
critic.warmup_steps=9 train.steps=9 advantage.name=gae | critic.warmup_steps=9 / below train.steps=9
advantage.params.delta=nan              | advantage.params.delta=nan / [0, inf)
advantage.params.delta=x                | advantage.params.delta='x'
advantage.name=gae advantage.params.lam=2 | advantage.params.lam=2 / [0, 1]
advantage.aggregation=mean              | advantage.aggregation=mean / token_mean
advantage.overlong=drop                 | advantage.overlong=drop / filter
advantage.overlong=penalty advantage.overlong_buffer=99 | advantage.overlong_buffer=99 / 24
advantage.overlong_factor=nan           | advantage.overlong_factor=nan / finite
loss.eps_low=nan                        | loss.eps_low=nan / a number
loss.eps_low=x                          | loss.eps_low='x' / a number
loss.eps_low=true                       | loss.eps_low=True / a number
loss.eps_low=null                       | loss.eps_low=None / a number
loss.eps_low=2                          | loss.eps_low=2 / [0, 1]
loss.beta1=inf                          | loss.beta1=inf / [0, inf)
loss.beta1=1e400                        | loss.beta1=inf / [0, inf)
loss.dual_clip=0.5                      | loss.dual_clip=0.5 / [1, inf]
loss.name=nonsense                      | loss.name='nonsense' / ce_gppo
loss={}                                 | loss={} / ce_gppo
loss=null                               | loss=null / ce_gppo
loss=dynamic_clip loss.strategy=x       | loss.strategy='x' / id | did | od
loss=dynamic_clip loss.step=3           | loss.step=3 / leave it out
loss=dynamic_clip loss.initial_state=2  | loss.initial_state=2 / 0 | 1
loss=dynamic_clip loss.alpha_high=-9    | loss.alpha_high=-9 / [-0.5, inf)
selection=clip_b selection.tokens=both  | selection.tokens='both' / negative | positive | all
selection=clip_b selection.per_update=7 | selection.per_update=7 / true or false
selection=clip_b selection.foo=7        | selection.foo=7 / mu_low
selection=forking selection.frac=2      | selection.frac=2 / [0, 1]
selection=entropy_bonus selection.coef=inf | selection.coef=inf / (-inf, inf)
schedule=piecewise schedule.points=3    | schedule.points=3 / a mapping
schedule=piecewise schedule.points.beta1=3 | schedule.points.beta1=3 / a list
schedule=piecewise schedule.points.beta1=[[0,x]] | schedule.points.beta1='x' / a number
schedule=piecewise schedule.points.beta1=[[5,0.5]] | schedule.points.beta1=[[5, 0.5]] / rising steps
schedule=piecewise schedule.points.beta9=[[0,1]] | schedule.points.beta9 / 'beta2'
schedule=entropy_target loss=pg         | 'entropy_target' / loss.name='pg' / ce_gppo
schedule=entropy_target schedule.gain=nan | schedule.gain=nan / a number
schedule=entropy_target schedule.limits.beta1=3 | schedule.limits.beta1=3 / [low, high]
schedule=entropy_target schedule.limits.beta1=[1,0] | schedule.limits.beta1 / widen
data.path=nowhere                       | data.path=nowhere / no such file
data.template=nothing                   | data.template='nothing' / {problem} exactly once
data.template='{problem}{problem}'     | data.template / exactly once
data.max_prompt_tokens=0                | data.max_prompt_tokens=0 / at least 1
data.name=''                            | data.name= / chain
model.path=''                           | model.path= / config.json
model.cache_dir=''                      | model.cache_dir='' / empty
model.dtype=float8                      | model.dtype=float8 / float32 | bfloat16 | float64
model.fp8=e5m2                          | model.fp8=e5m2 / e4m3 | hybrid | null
model.recompute=perhaps                 | model.recompute=perhaps / true or false
model.warm_start.lr=nan                 | model.warm_start.lr=nan / finite
model.warm_start.target_greedy_accuracy=2 | model.warm_start.target_greedy_accuracy=2.0 / at most 1
~optim.lr                               | '~optim.lr' / key=value
++optim.lrr=3                           | optim.lrr / 'optim.lr'
hydra.run.dir=x                         | hydra.run.dir / no key
recipe=../quickstart                    | recipe=../quickstart / 'quickstart'
recipe=base/small                       | recipe=base/small / --help
=3                                      | =3 / no key
"""


def table(text: str) -> list[tuple[str, list[str]]]:
    pairs = [line.partition(" | ")[::2] for line in text.strip().splitlines()]
    return [(left.strip(), [words.strip() for words in re.split(r" / ", right)]) for left, right in pairs]


def test_there_are_enough() -> None:
    assert len(SETTINGS.strip().splitlines()) + len(CONFIG_JSON) + len(TOKENIZER) + len(RUNS) >= 180


@pytest.mark.parametrize(
    ("arguments", "said"), table(SETTINGS), ids=lambda value: value if isinstance(value, str) else ""
)
def test_settings(arguments: str, said: list[str], tmp_path: Path) -> None:
    (file := tmp_path / "file").write_text("")
    with pytest.raises(ValueError) as caught:
        load_checked([word.replace("{file}", str(file)) for word in arguments.split(" ")])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for words in said:
        assert words.replace("{file}", str(file)) in message, message


def test_every_range_is_of_a_key() -> None:
    """Every range names a key of the schema, also where the default is null or an empty list."""
    known = {line.split("=")[0].strip() for name in keys.SECTIONS for line in keys.section_help(name).splitlines()}
    assert set(ranges.RANGES) - known <= {"seed"}


# ------------------------------------------------------------------------------------------------ the model's files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny", 0)


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The error of `recipes.train` before training."""
    capsys.readouterr()
    assert launch(lambda config, directory: pytest.fail("trained"), list(words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


CONFIG_JSON: list[tuple[Any, str]] = [
    ("[]", "config.json holds a list"),
    ("", "is not valid JSON"),
    ("null", "config.json holds a NoneType"),
    ('{"architectures": [', "is not valid JSON"),
    ("{}", "architecture None is not supported"),
    ({"architectures": "Llama"}, "architectures='Llama' in config.json must be a list"),
    ({"architectures": [3]}, "architectures=[3]"),
    ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: "),
    ({"hidden_size": None}, "hidden_size=None in config.json must be a positive integer"),
    ({"hidden_size": "128"}, "hidden_size='128'"),
    ({"num_attention_heads": 0}, "num_attention_heads=0"),
    ({"num_attention_heads": 3}, "num_attention_heads=3 is not a multiple of num_key_value_heads=2"),
    ({"rms_norm_eps": None}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan"),
    ({"rope_parameters": 3}, "rope_parameters=3 in config.json"),
    ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta='x' of the rope parameters in config.json must be a number"),
    ({"rope_parameters": {"rope_type": "su"}}, "rope_type='su' is not supported"),
    ({"intermediate_size": 1.5}, "intermediate_size=1.5"),
    ({"max_position_embeddings": 10}, "max_model_len=128 exceeds the model's 10 positions: set rollout.max_tokens=7"),
    ({"max_position_embeddings": 100}, "set rollout.max_model_len=100, which leaves 76 tokens for a prompt, or raise"),
    ({"hidden_act": "gelu"}, "hidden_act='gelu' in config.json is not supported"),
    ({"vocab_size": 4}, "gives token 5 and the model has 4"),
    ({"vocab_size": 10**9}, "GiB at least, and this machine has"),
]


@pytest.mark.parametrize(("content", "said"), CONFIG_JSON)
def test_config_json(content: Any, said: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = model / "config.json"
    file.write_text(content if isinstance(content, str) else json.dumps(json.loads(file.read_text()) | content))
    assert said in refusal(capsys, f"model.path={model}")


TOKENIZER: list[tuple[str, str | None, str]] = [
    ("tokenizer.json", "{}", "its tokenizer cannot be read"),
    ("tokenizer.json", "[]", "its tokenizer cannot be read"),
    ("tokenizer.json", '{"version": "1.0', "its tokenizer cannot be read"),
    ("tokenizer.json", None, "its tokenizer cannot be read"),
    ("tokenizer_config.json", "[]", "its tokenizer cannot be read"),
    ("chat_template", "{% for", "TemplateSyntaxError"),
    ("chat_template", "{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    ("chat_template", "{{ ''.__class__.__mro__ }}", "SecurityError"),
    ("chat_template", "{{ messages[0].content.foo.bar }}", "UndefinedError"),
    ("chat_template", "{% for i in range(10**9) %}x{% endfor %}", "OverflowError"),
    (
        "chat_template",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "no result after 1 s",
    ),
    ("chat_template", "", "the tokenizer has no chat template"),
]


@pytest.mark.parametrize(("file", "content", "said"), TOKENIZER)
def test_tokenizer_files(
    file: str,
    content: str | None,
    said: str,
    model: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [f"model.path={model}"]
    if file == "chat_template":
        monkeypatch.setattr("recipes.checks.model.TOKENIZER_LIMIT_S", 1.0)
        settings = json.loads((model / "tokenizer_config.json").read_text()) | {"chat_template": content}
        (model / "tokenizer_config.json").write_text(json.dumps(settings))
        words.append("data.template=chat")
    elif content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    assert said in refusal(capsys, *words)


@pytest.mark.parametrize("words", ["parallel.nproc=1000", "rollout.num_servers=1000", "reward.workers=1000"])
def test_more_than_this_machine_holds(words: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "GiB at least, and this machine has" in refusal(capsys, f"model.path={tiny}", words)


def test_what_is_slow_here_is_said(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert launch(lambda config, directory: None, [f"model.path={tiny}", "train.threads=1024"]) == 0
    assert "train.threads=1024 x 1 learner processes are more than" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        OSError(28, "No space left on device", "run/x.pt"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"),
    ],
)
def test_a_full_disk_is_one_sentence(error: Exception, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def train(*_: Any) -> None:
        raise error

    assert launch(train, [f"model.path={tiny}"]) == 2
    said = capsys.readouterr().err
    assert ("no space left for" in said or "free space for run.dir=" in said) and said.count("\n") == 1


# --------------------------------------------------------------------------------------------------- other commands

GOOD = '{"step": 1, "actor/entropy": 0.5, "timing_s/step": 1.0, "critic/rewards/mean": 0.1, "perf/throughput": 3}\n'
CONFIG = "train: {steps: 3}\n"
# (files of a run directory, error of `report`, error of `status`; None: no error)
RUNS: list[tuple[dict[str, str | bytes], str | None, str | None]] = [
    ({}, "holds no metrics.jsonl", "holds neither config.yaml nor logs"),
    ({"config.yaml": CONFIG}, "holds no metrics.jsonl", None),
    ({"metrics.jsonl": b"\x00\xff\n{}\n", "config.yaml": CONFIG}, "line 1 is not JSON", "line 1 is not JSON"),
    ({"metrics.jsonl": '{"a": 1}\n', "config.yaml": CONFIG}, "holds no complete step yet", None),
    ({"metrics.jsonl": '{"step": "x"}\n', "config.yaml": CONFIG}, "holds no complete step yet", None),
    ({"metrics.jsonl": '{"step": [1]}\n' + GOOD, "config.yaml": CONFIG}, None, None),
    ({"metrics.jsonl": '{"step": 1, "timing_s/step": NaN}\n', "config.yaml": CONFIG}, None, None),
    ({"metrics.jsonl": '{"step": 1, "timing_s/step": "x"}\n', "config.yaml": CONFIG}, None, None),
    ({"metrics.jsonl": f'{{"step": 1, "x": {"9" * 400}}}\n', "config.yaml": CONFIG}, None, None),
    ({"metrics.jsonl": "[" * 10**5 + "\n" + GOOD, "config.yaml": CONFIG}, "line 1 is not JSON", "line 1 is not JSON"),
    ({"metrics.jsonl": GOOD, "config.yaml": "a: [1"}, "is not YAML", "is not YAML"),
    ({"metrics.jsonl": GOOD, "config.yaml": b"\xff\xfe\x00"}, "is not YAML", "is not YAML"),
    ({"metrics.jsonl": GOOD, "config.yaml": "- 1"}, "is not a configuration", "is not a configuration"),
    ({"metrics.jsonl": GOOD, "config.yaml": "train: 3\nloss: 4"}, None, None),
    (
        {"metrics.jsonl": GOOD, "config.yaml": "a: !!python/object/apply:os.getcwd []"},
        "is not YAML",
        "is not YAML",
    ),
    ({"metrics.jsonl": GOOD, "config.yaml": CONFIG, "samples.jsonl": "[]\n{}\n"}, "line 1 is not a JSON object", None),
    ({"metrics.jsonl": GOOD, "config.yaml": CONFIG, "samples.jsonl": '{"step": "a"}\n{"step": 1}\n'}, None, None),
]


def run(main: Callable[[list[str]], int], *words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@pytest.mark.parametrize(("files", "from_report", "from_status"), RUNS)
def test_run_directories(
    files: dict[str, str | bytes], from_report: str | None, from_status: str | None, tmp_path: Path
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for main, said in ((report.main, from_report), (status.main, from_status)):
        code, _, err = run(main, tmp_path)
        assert code == (0 if said is None else 2), err
        if said is not None:
            assert err.startswith("error: ") and err.count("\n") == 1 and said in err, err


def test_paths_that_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "checkpoints" / "step_x9").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text(GOOD)
    for main in (report.main, status.main, checkpoint.main):
        for name in ("nowhere", "file"):
            code, _, err = run(main, tmp_path / name)
            assert code == 2 and err.count("\n") == 1 and "give the" in err, err
    assert "no checkpoints there" in run(checkpoint.main, tmp_path / "run")[2]
    assert "is a directory" in run(report.main, tmp_path / "run", "--out", tmp_path)[2]
    assert "No such file" in run(report.main, tmp_path / "run", "--out", tmp_path / "no" / "x.html")[2]


@pytest.mark.parametrize("value", ["-3", "0", "nan", "inf", "big"])
def test_gpu_memory_of_a_plan(value: str) -> None:
    code, _, err = run(plan.main, f"gpu_gib={value}")
    assert code == 2 and err.startswith(f"error: gpu_gib={value} ") and err.count("\n") == 1


# -------------------------------------------------------------------------------------------------------------- help


def test_help_of_the_commands_with_overrides() -> None:
    train: Callable[[Sequence[str]], int] = lambda words: launch(lambda *_: None, words)  # noqa: E731
    for main in (train, plan.main, evaluate.main):
        code, out, _ = run(main, "--help")  # type: ignore[arg-type]
        assert code == 0 and out.startswith("usage: python -m recipes.")
    for main in (train, plan.main):
        code, out, _ = run(main, "--help")  # type: ignore[arg-type]
        assert code == 0 and out.startswith("usage: python -m recipes.") and "--help SECTION" in out
        for section in keys.SECTIONS:
            code, out, _ = run(main, "--help", section)  # type: ignore[arg-type]
            assert code == 0 and len(out.splitlines()) >= 3, section
    assert run(plan.main, "--help", "optimm")[0] == 2


def test_help_comes_from_the_schema_and_the_dataclasses() -> None:
    """Defaults, choices, ranges and remarks have a single source."""
    text = keys.section_help("optim")
    assert "optim.decay=constant  (constant | linear | cosine)" in text and "optim.eps=1e-08  (number, above 0)" in text
    assert "to `min_lr` at the last step" in text
    text = keys.section_help("loss")
    assert "loss.strategy=id  (id | did | od | upper | lower | both)" in text and "Upper offset; inf switches" in text
    assert "loss.total_steps=" not in text, "set by the run, not by the user"
    assert "(token_mean | seq_mean_token_mean" in keys.section_help("advantage")
