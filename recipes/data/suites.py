"""Benchmarks, and the papers' evaluation protocols. Data only; `recipes.data.evalsets` builds evaluation sets from it.

The problems are not shipped: ``eval.data_dir`` names a directory with one file per benchmark, in any format that
`recipes.data.files` reads. Every number of a suite without the word "ours" is printed in the paper that is named.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
GSM8K_MARKED = ' Let\'s think step by step and output the final answer after "####".'
LAST_NUMBER = {"marker": "####", "last_number": True}


@dataclass(frozen=True)
class Benchmark:
    """A published set of problems."""

    title: str
    problems: int  # as published: another number in a file is reported
    files: tuple[str, ...]  # names without extension, in lower case, that its file may have
    origin: str  # a public copy: data set on the Hugging Face hub, or GitHub repository and path


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """The evaluation protocol of one set."""

    n: int = 8  # samples per problem
    k: tuple[int, ...] = (1,)  # pass@k and maj@k, besides avg@n
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all tokens
    max_tokens: int = 4096  # of a response
    template: str = "{problem}"
    reward: str = "math"
    reward_params: dict[str, Any] = field(default_factory=dict)
    problems: int | None = None  # the first so many; None: all
    every: int | None = None  # during training: steps between evaluations; None: eval.every


BENCHMARKS = {
    "aime24": Benchmark("AIME 2024", 30, ("aime24", "aime2024", "aime_2024", "aime-2024"), "HuggingFaceH4/aime_2024"),
    "aime25": Benchmark("AIME 2025", 30, ("aime25", "aime2025", "aime_2025", "aime-2025"), "opencompass/AIME2025"),
    "hmmt25": Benchmark(
        "HMMT February 2025", 30, ("hmmt25", "hmmt2025", "hmmt_feb_2025", "hmmt-202502"), "MathArena/hmmt_feb_2025"
    ),
    "amc23": Benchmark("AMC 2023", 40, ("amc23", "amc2023", "amc_2023"), "math-ai/amc23"),
    "amc22_23": Benchmark(
        "AMC 12, 2022 and 2023", 83, ("amc22_23", "amc", "aimo-validation-amc"), "AI-MO/aimo-validation-amc"
    ),
    "math500": Benchmark("MATH-500", 500, ("math500", "math-500", "math_500"), "HuggingFaceH4/MATH-500"),
    "olympiadbench": Benchmark(
        "OlympiadBench, OE_TO_maths_en_COMP",
        675,  # 674 is also quoted
        ("olympiadbench", "olympiad", "olympiadbench_oe_to_maths_en_comp", "oe_to_maths_en_comp"),
        "Hothan/OlympiadBench",
    ),
    "gsm8k": Benchmark("GSM8K, test", 1319, ("gsm8k_test", "gsm8k-test", "gsm8k"), "openai/gsm8k"),
    "minerva": Benchmark("Minerva Math", 272, ("minerva", "minerva_math", "minervamath"), "math-ai/minervamath"),
    "dapo500": Benchmark(
        "DAPO500: 500 problems held out of DAPO-Math-17k",
        500,  # which ones is not published: python -m recipes.prepare_data heldout=500
        ("dapo500", "dapo-500", "dapo_500"),
        "BytedTsinghua-SIA/DAPO-Math-17k",
    ),
}

# A single benchmark by name: our own protocol with few samples, for a quick check of a model.
_OWN = Protocol(n=4, k=(1, 4), temperature=0.6, top_p=0.95, max_tokens=4096, template="chat:{problem}" + BOXED)
# CE-GPPO sec. 4.1: avg@32, MATH-500 avg@4; 32k tokens for AIME, 16k else; answers from \boxed{}. Temperature and top-p:
# the authors' script. Template: ours, DeepSeek's advice for the R1-distilled models.
_CE_GPPO = replace(_OWN, n=32, k=(1, 32), max_tokens=16384)
_CE_GPPO_AIME = replace(_CE_GPPO, max_tokens=32768)
# Flexible Entropy Control app. D: table 3 (sampling), D.2 (samples), D.3 (template); 4096 tokens: sec. 5.1.
_FLEXIBLE = Protocol(
    n=32, k=(1, 32), temperature=0.7, top_p=0.8, top_k=20, max_tokens=4096, template="chat:{problem}\n" + BOXED
)
# Clip-Low/High app. C.1 and table 1. The GSM8K prompt is verl's (not printed); the boxed one is ours.
_CLIP = Protocol(n=32, k=(1, 32), temperature=1.0, top_p=0.95, max_tokens=4096, template="chat:{problem}" + BOXED)
_CLIP_GSM8K = replace(
    _CLIP, n=8, k=(1, 8), template="chat:{problem}" + GSM8K_MARKED, reward="final_answer", reward_params=LAST_NUMBER
)
# Entropy Dynamics sec. 5.1: temperature 0.7, Avg/Pass@32, @8 for DAPO500. Length: the authors' example configuration.
# Template: ours.
_DYNAMICS = Protocol(n=32, k=(1, 32), temperature=0.7, max_tokens=7168, template="chat:{problem}" + BOXED)

SUITES: dict[str, dict[str, Protocol]] = {
    "ce_gppo": {
        "aime24": _CE_GPPO_AIME,
        "aime25": _CE_GPPO_AIME,
        "hmmt25": _CE_GPPO,
        "math500": replace(_CE_GPPO, n=4, k=(1, 4)),
        "amc23": _CE_GPPO,
    },
    "dynamic_clip": {
        "aime24": _FLEXIBLE,
        "aime25": _FLEXIBLE,
        "amc22_23": _FLEXIBLE,  # "AMC": which one is not said; 83 items is the set that most codes use under this name
        "math500": replace(_FLEXIBLE, n=4, k=(1, 4)),
        "gsm8k": replace(_FLEXIBLE, n=2, k=(1, 2)),
        "olympiadbench": replace(_FLEXIBLE, n=4, k=(1, 4)),
    },
    "clip_low_high": {
        "aime24": replace(_CLIP, n=8, k=(1, 8)),  # figure 10: @8
        "aime25": replace(_CLIP, n=8, k=(1, 8)),
        "amc22_23": _CLIP,  # figure 7: @32; its reference is AI-MO's validation set of 83
        "math500": _CLIP,
    },
    "clip_low_high_gsm8k": {"gsm8k": _CLIP_GSM8K},
    "entropy_dynamics": {
        "aime24": _DYNAMICS,
        "aime25": _DYNAMICS,
        "dapo500": replace(_DYNAMICS, n=8, k=(1, 8)),
    },
}


def named_sets(names: list[str]) -> dict[str, tuple[str, Protocol]]:
    """Set name to (benchmark, protocol), for suites and single benchmarks in the order given.

    A benchmark that two suites evaluate differently occurs once per suite, as ``suite.benchmark``.

    Raises ValueError naming an unknown suite and the known ones.
    """
    found: list[tuple[str, str, Protocol]] = []
    for name in names:
        if name in SUITES:
            found += [(name, benchmark, protocol) for benchmark, protocol in SUITES[name].items()]
        elif name in BENCHMARKS:
            found.append(("", name, _OWN))
        else:
            raise ValueError(
                f"eval.suite={name} is unknown: choose suites of the papers ({', '.join(SUITES)}) or benchmarks "
                f"({', '.join(BENCHMARKS)})"
            )
    sets: dict[str, tuple[str, Protocol]] = {}
    for suite, benchmark, protocol in found:
        others = [p for _, name, p in found if name == benchmark and p != protocol]
        label = f"{suite}.{benchmark}" if others and suite else benchmark
        sets[label] = (benchmark, protocol)
    return sets
