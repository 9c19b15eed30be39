r"""Verifiers: extraction of answers, normalisation, the score tables, and equivalence on hand-written cases."""

import statistics

import pytest

from recipes.rewards import RewardItem, make_scorer, make_verifier
from recipes.rewards.verifiers import boxed_answer, found_answer, normalise_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed {7}", "7"),
        (r"\boxed 7 apples", "7"),
        (r"$\boxed{x = \boxed{5}}$", "5"),
        (r"\fboxed{3}", "3"),
        (r"\boxed{}", ""),
        (r"\boxed{1}, \boxed{2} \text{ and } \boxed{3}", "1, 2, 3"),
        (r"$\boxed{4}$ and $\boxed{4}$", "4"),
        ("\\boxed{4}\n\n\\boxed{5}", "5"),
        (r"\boxed{1} or \boxed{2}", "1, 2"),
        (r"\boxed{1} or rather, as we see, \boxed{2}", "2"),
    ],
)
def test_boxed_answer(text: str, answer: str) -> None:
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "text", ["42", "", r"\boxed", r"\boxed{4", r"\boxed{4} then \boxed{\frac{1}{2}", r"\boxed{4\}"]
)
def test_no_boxed_answer(text: str) -> None:
    assert boxed_answer(text) is None


def test_boxed_answer_is_linear_in_hostile_input() -> None:
    hostile = "\\boxed{1}, " * 20_000 + "\\boxed{" * 20_000 + "{" * 200_000
    assert boxed_answer(hostile) is None
    assert boxed_answer("\\boxed{" * 50_000 + "1}") == "1"


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" 42. ", "42"),
        ("$1,234.50", "1234.5"),
        ("007", "7"),
        ("-0.0", "0"),
        ("+3", "3"),
        (".5", "0.5"),
        ("-2.", "-2"),
        ("1,2", "1,2"),
        ("12,345,678", "12345678"),
        ("The  Answer", "the answer"),
        ("$x$", "x"),
        ("100", "100"),
    ],
)
def test_normalise_answer(text: str, canonical: str) -> None:
    assert normalise_answer(text) == canonical


@pytest.mark.parametrize(
    ("text", "gold", "correct"),
    [
        ("so A 3 next B 4 # 8", "8", True),
        ("so A 3 # 8 then # 7", "8", False),
        ("# 8 8", "8", False),
        ("8", "8", False),
        ("#", "8", False),
        ("# ", "", False),
        ("it is 6*12\n#### 72\nThank you", "72", True),
        ("#### $1,200.00", "1200", True),
    ],
)
def test_final_answer(text: str, gold: str, correct: bool) -> None:
    result = make_verifier("final_answer")(RewardItem(text, gold))
    assert (result.score, result.correct, result.status) == (float(correct), correct, "ok")


def test_final_answer_by_last_number() -> None:
    verify = make_verifier("final_answer", marker="####", last_number=True)
    assert verify(RewardItem("She has 3 + 4 = 7 left, that is $1,007.", "1007")).correct
    assert verify(RewardItem("7 of 9 #### 7", "7")).correct, "the marker comes first"
    assert not verify(RewardItem("none at all", "7")).correct


@pytest.mark.parametrize(
    ("text", "truncated", "score", "correct"),
    [
        ("<think>a</think> <answer># 5</answer>", False, 1.0, True),
        ("a # 5", False, 0.0, True),
        ("a # 5", True, 0.0, True),
        ("a # 6", False, -0.1, False),
        ("a # 6", True, -1.0, False),
        ("<think>a</think><answer># 6</answer>", False, -0.1, False),
        ("<think>a</think> no answer tag # 6", True, -1.0, False),
    ],
)
def test_format_reward_table(text: str, truncated: bool, score: float, correct: bool) -> None:
    pattern = r"<think>.*</think>\s*<answer>.*</answer>"
    verify = make_verifier("format", judge="final_answer", judge_params={}, pattern=pattern)
    item = RewardItem(text.replace("</answer>", "\n</answer>"), "5", truncated)  # "#" answers end with their line
    assert (verify(item).score, verify(item).correct) == (score, correct)


def test_random_reward_depends_on_nothing_but_seed_and_key() -> None:
    verify = make_verifier("random", p=0.3, seed=1)
    scores = [verify(RewardItem("# 1", "1", key=key)).score for key in range(4000)]
    assert scores == [verify(RewardItem("other", "2", truncated=True, key=key)).score for key in range(4000)]
    assert set(scores) == {0.0, 1.0}
    assert abs(statistics.mean(scores) - 0.3) < 4 * (0.3 * 0.7 / 4000) ** 0.5
    other_seed = make_verifier("random", p=0.3, seed=2)
    assert scores != [other_seed(RewardItem("# 1", "1", key=key)).score for key in range(4000)]


@pytest.mark.parametrize(("distribution", "mean", "std"), [("normal", 0.0, 1.0), ("uniform", 0.5, 12**-0.5)])
def test_random_reward_distributions(distribution: str, mean: float, std: float) -> None:
    verify = make_verifier("random", distribution=distribution)
    scores = [verify(RewardItem("", "", key=key)).score for key in range(4000)]
    assert abs(statistics.mean(scores) - mean) < 4 * std / 4000**0.5
    assert abs(statistics.stdev(scores) - std) < 0.05


def test_random_reward_still_reports_what_is_correct() -> None:
    verify = make_verifier("random", p=0.0)
    assert [verify(RewardItem(text, "1")).correct for text in ("# 1", "# 2")] == [True, False]


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("maths", {}, "reward.name='maths' is unknown: choose one of final_answer, math"),
        ("math", {"require_boxes": True}, "reward.params.require_boxes is unknown for the math reward"),
        ("random", {"p": 1.5}, "reward.params.p is a probability"),
        ("random", {"distribution": "cauchy"}, "bernoulli, normal or uniform"),
        ("random", {"judge": "maths"}, "'maths' is unknown"),
        ("format", {"pattern": "("}, "reward.params.pattern is not a regular expression"),
        ("final_answer", {"marker": ""}, "reward.params.marker is empty"),
        ("math", {"max_answer_chars": 0}, "must be positive"),
    ],
)
def test_bad_settings_are_refused_in_one_sentence(name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        make_verifier(name, **params)


def test_only_string_work_runs_in_the_trainer() -> None:
    in_process = {
        "final_answer": make_verifier("final_answer").in_process,
        "random": make_verifier("random").in_process,
        "random judged by math": make_verifier("random", judge="math").in_process,
        "math": make_verifier("math").in_process,
        "format": make_verifier("format").in_process,
    }
    assert [name for name, harmless in in_process.items() if harmless] == ["final_answer", "random"]
    scorer = make_scorer("final_answer", {"marker": "="})
    assert [result.correct for result in scorer.score([RewardItem("1+1=2", "2"), RewardItem("1+1=3", "2")])] == [
        True,
        False,
    ]
    assert scorer.counts == {"ok": 2}


# Our own gold answers; the texts are trusted, so math-verify may run in this process.
_EQUAL = [
    ("0.5", r"\frac{1}{2}"),
    (r"\dfrac12", "0.5"),
    (r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"),
    ("1,000", "1000"),
    (r"10{,}000", "10000"),
    (r"\$25", "25"),
    (r"50\%", "50"),
    (r"2x+1", "1+2x"),
    (r"(x+1)^2", "x^2+2x+1"),
    (r"x = 3", "3"),
    (r"\{3, 1, 2\}", r"\{1,2,3\}"),
    (r"(1, 2)", r"\left(1,2\right)"),
    (r"[0, \infty)", r"\left[0,\infty\right)"),
    (r"2\pi", r"\pi + \pi"),
    (r"\text{Monday}", "Monday"),
    (r"3 \text{ cm}", "3"),
    (r"2^{10}", "1024"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
]
_DIFFERENT = [
    ("0.51", r"\frac{1}{2}"),
    ("3", "-3"),
    (r"\frac{1}{3}", "0.33"),
    (r"(2, 1)", "(1, 2)"),
    (r"\{1, 2\}", r"\{1, 2, 3\}"),
    (r"(0, 1)", "[0, 1]"),
    ("x + 1", "x - 1"),
    (r"\text{Monday}", "Tuesday"),
    (r"2^{10}", "1023"),
    ("", "0"),
    (r"\frac{", "1"),
]


@pytest.mark.parametrize(("answer", "gold"), _EQUAL)
def test_math_accepts_equal_answers(answer: str, gold: str) -> None:
    assert make_verifier("math")(RewardItem(rf"Hence \boxed{{{answer}}}.", gold)).correct


@pytest.mark.parametrize(("answer", "gold"), _DIFFERENT)
def test_math_refuses_different_answers(answer: str, gold: str) -> None:
    assert not make_verifier("math")(RewardItem(rf"Hence \boxed{{{answer}}}.", gold)).correct


def test_math_needs_a_box_unless_told_otherwise() -> None:
    item = RewardItem("The answer is $12$.", "12")
    assert not make_verifier("math")(item).correct
    assert make_verifier("math", require_box=False)(item).correct


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("So the answer is 2 + 3 = 5.", "5"),
        ("The total is 3*5 = 15 apples", "15"),
        ("so $y = 2x = 6$.", "y = 2x = 6"),
        ("If there are 3 or more, the answer is 7.", "7"),
        ("The final answer is 20 candles * $40 = $800.", None),  # math-verify reads 20
        ("The answer is x = 5 or x = 7.", None),
        ("The answer is 5 or 4.", None),
    ],
)
def test_an_answer_without_a_box_is_read_to_its_end(text: str, answer: str | None) -> None:
    assert found_answer(text) == answer


def test_math_takes_several_boxes_as_one_answer() -> None:
    verify = make_verifier("math")
    assert verify(RewardItem(r"\boxed{2} and \boxed{1}", r"\{1, 2\}")).correct
    assert not verify(RewardItem(r"\boxed{1} or \boxed{2}", "2")).correct, "hedging must not pay"
    assert not verify(RewardItem(r"\boxed{2}", r"\boxed{1}, \boxed{2}")).correct


def test_math_leaves_overlong_answers_unread() -> None:
    verify = make_verifier("math", max_answer_chars=10)
    assert verify(RewardItem(r"\boxed{1+1+1+1+1}", "5")).correct
    assert not verify(RewardItem(r"\boxed{1+1+1+1+1+1}", "6")).correct
