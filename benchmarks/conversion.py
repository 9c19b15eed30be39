"""Conversion of a checkpoint of random weights, compared with other ways to process the same bytes.

    python -m benchmarks.conversion --shape 0.5b --repeats 5 --dir DIR --json OUT

Every measurement is a fresh process (unless `--one-process`); the candidates alternate, so that other load on the
machine affects all of them. Time is from the first byte read to the last byte on disk (fsync included), without
imports, and with the source in the page cache; the ratio is the median over turns of a candidate's time to that of
safetensors in the same turn. Memory is the peak resident set above what the process held after its imports; mapped file
pages count.

    cp            shutil.copyfile of every file: the kernel copies, nothing is looked at
    safetensors   load_file and save_file of every file: the usual way to touch every tensor
    import        conversion.hf_to_megatron (compares every byte with the source's manifest, counts numbers that are not
                  finite, writes a Megatron checkpoint and its checksums)
    export        conversion.megatron_to_hf (the same the other way)
    verify        conversion.verify, both kinds block by block (reads twice the bytes, writes nothing)
    mbridge       mbridge's tensor mapping from safetensors into memory; nothing is written (if installed)
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14},
    # the widths of a 7B model with 4 of its 28 layers: memory depends on the largest tensors, not on their number
    "7b-wide": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 4, "num_attention_heads": 28},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28},
}


def make_source(directory: Path, shape: str) -> int:
    """A Qwen2 of random bfloat16 weights in the given shape, written block by block; its size in bytes."""
    import torch

    import conversion
    from conversion.hf_files import HFWriter
    from conversion.publish import write_manifest

    raw = {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": 152064 if "7b" in shape else 151936,
        "num_key_value_heads": 4 if "7b" in shape else 2,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": "7b" not in shape,
        "torch_dtype": "bfloat16",
        **SHAPES[shape],
    }
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(raw))
    shapes = conversion.hf_shapes(conversion.parse_config(raw))
    size = 2 * sum(torch.Size(extents).numel() for extents in shapes.values())
    writer = HFWriter(directory, shapes, dict.fromkeys(shapes, torch.bfloat16), max(size // 8, 1 << 20))
    noise = torch.randn(1 << 24).bfloat16()
    for name, extents in shapes.items():
        row = torch.Size(extents[1:]).numel()
        step = max((1 << 24) // row, 1)
        for start in range(0, extents[0], step):
            rows = min(step, extents[0] - start)
            writer.write(name, start, noise[: rows * row].reshape(rows, *extents[1:]))
    write_manifest(directory, tensors=writer.finish())
    return writer.total_bytes


def fsync(path: Path) -> None:
    for file in [path, *path.rglob("*")] if path.is_dir() else [path]:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)


def run_cp(source: Path, out: Path, threads: int) -> None:
    out.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, out / path.name)
    fsync(out)


def run_safetensors(source: Path, out: Path, threads: int) -> None:
    from safetensors.torch import load_file, save_file

    out.mkdir()
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda path: save_file(load_file(path), out / path.name), source.glob("*.safetensors")))
    fsync(out)


def run_import(source: Path, out: Path, threads: int) -> None:
    from conversion import hf_to_megatron

    hf_to_megatron.convert(source, out, threads=threads)


def run_export(source: Path, out: Path, threads: int) -> None:
    from conversion import megatron_to_hf

    megatron_to_hf.convert(source.with_name("megatron"), out, threads=threads)


def run_mbridge(source: Path, out: Path, threads: int) -> None:
    """mbridge's own functions for name and layout, called per tensor: its loader needs CUDA and process groups."""
    import torch
    from mbridge.core.bridge import _MODEL_REGISTRY
    from safetensors import safe_open
    from transformers import AutoConfig

    import conversion

    bridge = object.__new__(_MODEL_REGISTRY["qwen2"])
    bridge.hf_config, bridge.dtype = AutoConfig.from_pretrained(source), torch.bfloat16
    bridge.make_vocab_size_divisible_by = None
    tensors: dict[str, Any] = {}
    for path in source.glob("*.safetensors"):
        handle = safe_open(path, framework="pt")
        tensors.update({name: handle for name in handle.keys()})  # noqa: SIM118
    model = {}
    for name in conversion.megatron_names(conversion.read_config(source)):
        theirs = conversion.te_name(name)
        parts = [tensors[part].get_tensor(part) for part in bridge._weight_name_mapping_mcore_to_hf(theirs)]
        model[name] = bridge._weight_to_mcore_format(theirs, parts).clone()


def run_verify(source: Path, out: Path, threads: int) -> None:
    from conversion.sources import open_source
    from conversion.verify import compare

    assert compare(open_source(source), open_source(source.with_name("megatron")), threads).equal


RUNS: dict[str, Callable[[Path, Path, int], None]] = {
    "cp": run_cp,
    "safetensors": run_safetensors,
    "import": run_import,
    "export": run_export,
    "verify": run_verify,
    "mbridge": run_mbridge,
}


THREADED = ("safetensors", "import", "export", "verify")


def import_all(name: str) -> None:
    """Import a candidate's modules before the timer starts."""
    if name in ("import", "export", "verify"):
        import conversion.hf_to_megatron
        import conversion.megatron_to_hf
        import conversion.verify  # noqa: F401
    elif name == "safetensors":
        import safetensors.torch  # noqa: F401
    elif name == "mbridge":
        import megatron_ext.learner  # noqa: F401  prepares Megatron-Core, which mbridge imports, for the CPU

        import mbridge  # noqa: F401  # isort: skip
        import transformers  # noqa: F401


def prepare(directory: Path) -> None:
    """Remove the last output, wait for the disk, and read the sources: no candidate pays for another one."""
    shutil.rmtree(directory / "out", ignore_errors=True)
    os.sync()
    for path in (path for source in ("hf", "megatron") for path in (directory / source).rglob("*") if path.is_file()):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 20):
                pass


def status_mib(key: str) -> float:
    """A value of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key + ":")) / 1024


def child(name: str, directory: Path, threads: int) -> None:
    import_all(name)
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
    before = status_mib("VmRSS")
    started, cpu = time.perf_counter(), time.process_time()
    RUNS[name](directory / "hf", directory / "out", threads)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    peak = status_mib("VmHWM") - before
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "peak_mib": peak}))


def measure(name: str, directory: Path, threads: int) -> dict[str, float]:
    prepare(directory)
    command = [
        sys.executable,
        "-m",
        "benchmarks.conversion",
        "--child",
        name,
        "--dir",
        str(directory),
        "--threads",
        str(threads),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure_here(name: str, directory: Path, threads: int) -> dict[str, float]:
    """As `measure`, in this process and without its memory: for a machine too busy to start processes."""
    prepare(directory)
    started, cpu = time.perf_counter(), time.process_time()
    RUNS[name](directory / "hf", directory / "out", threads)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_mib": math.nan}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dir", type=Path, required=True, help="scratch directory on the disk to measure")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8))
    parser.add_argument("--only", nargs="*", choices=RUNS, help="candidates (default: all that can run)")
    parser.add_argument("--one-process", action="store_true", help="all turns in this process; memory is not measured")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--child", choices=RUNS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.dir, args.threads)
        return
    size = make_source(args.dir / "hf", args.shape)
    shutil.rmtree(args.dir / "megatron", ignore_errors=True)
    run_import(args.dir / "hf", args.dir / "megatron", args.threads)
    names = args.only or [n for n in RUNS if n != "mbridge" or importlib.util.find_spec("mbridge")]
    plan = [(name, threads) for name in names for threads in ((1, args.threads) if name in THREADED else (1,))]
    results: dict[str, list[dict[str, float]]] = {}
    if args.one_process:
        for name in names:
            import_all(name)
        sys.modules["torch"].set_num_threads(1)
    for _ in range(args.repeats):
        for name, threads in plan:
            label = f"{name} ({threads} thread{'s' * (threads > 1)})" if name in THREADED else name
            results.setdefault(label, []).append(
                (measure_here if args.one_process else measure)(name, args.dir, threads)
            )
    best = f"safetensors ({args.threads} thread{'s' * (args.threads > 1)})"
    floor = [run["seconds"] for run in results.get(best, results[next(iter(results))])]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    machine += f", load average {os.getloadavg()[2]:.0f}"
    print(f"{args.shape}: {size / 2**30:.2f} GiB bfloat16; {machine}; median of {args.repeats} (fastest)")
    print(f"ratios are to {best}")
    print(f"{'':24}{'seconds':>16}{'CPU s':>8}{'GiB/s':>8}{'ratio':>8}{'peak MiB':>10}")
    for label, runs in results.items():
        seconds = [run["seconds"] for run in runs]
        middle, peak = statistics.median(seconds), max(run["peak_mib"] for run in runs)
        cpu = statistics.median(run["cpu_seconds"] for run in runs)
        timing = f"{middle:.2f} ({min(seconds):.2f})"
        ratio = statistics.median(own / base for own, base in zip(seconds, floor, strict=True))
        print(f"{label:24}{timing:>16}{cpu:>8.2f}{size / 2**30 / middle:>8.2f}{ratio:>8.2f}{peak:>10.0f}")
    if args.json:
        known = {label: [{k: v for k, v in run.items() if v == v} for run in runs] for label, runs in results.items()}
        summary = {"shape": args.shape, "bytes": size, "machine": machine, "runs": known}
        args.json.write_text(json.dumps(summary, indent=1) + "\n")
    for leftover in ("hf", "megatron", "out"):
        shutil.rmtree(args.dir / leftover, ignore_errors=True)


if __name__ == "__main__":
    main()
