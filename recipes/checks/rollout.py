"""Checks of generation settings that depend on each other: asynchrony, its correction, weight transfer."""

from __future__ import annotations

from urllib.parse import urlsplit

from configs.schema import Config, RolloutConfig
from recipes.rollout import routing
from recipes.rollout.vllm.server import parallel_size


def check_settings(c: Config) -> None:
    """Raises ValueError, in one sentence that names the key, for settings that contradict each other."""
    rollout, train = c.rollout, c.train
    for index, url in enumerate(rollout.urls):
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"rollout.urls={rollout.urls}: {url!r} is not an address such as http://node1:8000")
        if url in rollout.urls[:index]:
            raise ValueError(f"rollout.urls={rollout.urls} names {url} twice; name every server once")
    if rollout.max_staleness and train.tis_cap is None and train.old_logprobs == "learner":
        raise ValueError(
            f"rollout.max_staleness={rollout.max_staleness} trains on tokens of older weights, and nothing corrects "
            "for that: set train.tis_cap=2, or train.old_logprobs=rollout"
        )
    if train.tis_cap is not None and train.old_logprobs == "rollout":
        raise ValueError(
            f"train.tis_cap={train.tis_cap} with train.old_logprobs=rollout corrects for the same difference twice: "
            "set train.tis_cap=null or train.old_logprobs=learner"
        )
    if rollout.in_flight != "wait" and not rollout.max_staleness:
        raise ValueError(
            f"rollout.in_flight={rollout.in_flight} has no effect with rollout.max_staleness=0, where no request is in "
            "flight at an update: set rollout.max_staleness to 1 or more, or leave it out"
        )
    if rollout.routing_replay and (why := routing.unfit(rollout)):
        raise ValueError(
            f"rollout.routing_replay=true, but {why}, and then vLLM returns no experts: change rollout.extra_args, or "
            "set rollout.routing_replay=null"
        )
    _check_partial(rollout)
    _check_quantization(c)
    _check_colocated(c)
    _check_server_gpus(rollout)
    if rollout.weight_sync == "ipc" and rollout.urls:
        raise ValueError(
            f"rollout.weight_sync=ipc shares memory with servers that the run itself starts, and rollout.urls="
            f"{rollout.urls} names others: set rollout.weight_sync=auto"
        )
    if rollout.engine == "local":
        for key, usual in (("in_flight", "wait"), ("weight_sync", "auto"), ("batch_invariant", False)):
            if getattr(rollout, key) != usual:
                raise ValueError(
                    f"rollout.{key}={getattr(rollout, key)} has no effect with rollout.engine=local: set it to vllm"
                )


def _check_partial(r: RolloutConfig) -> None:
    if not r.partial:
        return
    if not r.max_staleness:
        raise ValueError(
            "rollout.partial=true continues responses over weight updates, and rollout.max_staleness=0 allows none: "
            "set rollout.max_staleness to 1 or more, or rollout.partial=false"
        )
    most = (1 + r.max_staleness) * r.prompts_per_step
    if r.generated_prompts is not None and r.generated_prompts > most:
        raise ValueError(
            f"rollout.generated_prompts={r.generated_prompts} with rollout.partial=true: some groups would be older "
            f"than rollout.max_staleness={r.max_staleness} when their turn comes; at most (1 + max_staleness) x "
            f"prompts_per_step = {most} may be open"
        )
    if r.engine != "local" and r.in_flight == "wait":
        raise ValueError(
            "rollout.in_flight=wait with rollout.partial=true: every update would wait for the longest response; set "
            "rollout.in_flight=keep"
        )


def _check_quantization(c: Config) -> None:
    if c.rollout.quantization is None:
        return
    if c.train.tis_cap is None and c.train.old_logprobs == "learner":
        raise ValueError(
            f"rollout.quantization={c.rollout.quantization} samples from other probabilities than the learner's, and "
            "nothing corrects for that: set train.tis_cap=2, or train.old_logprobs=rollout"
        )
    if c.rollout.engine == "local":
        raise ValueError(
            f"rollout.quantization={c.rollout.quantization} has no effect with rollout.engine=local: set it to vllm"
        )


def _check_server_gpus(r: RolloutConfig) -> None:
    if r.server_gpus < 1:
        raise ValueError(f"rollout.server_gpus={r.server_gpus} must be at least 1")
    try:
        asked = parallel_size(r.extra_args)
    except ValueError as error:
        raise ValueError(f"rollout.extra_args={r.extra_args}: a parallel size is not a number ({error})") from error
    if asked > 1 and asked != r.server_gpus:
        raise ValueError(
            f"rollout.extra_args={r.extra_args} spread a server over {asked} GPUs, and rollout.server_gpus="
            f"{r.server_gpus}: set both to the same number"
        )


def _check_colocated(c: Config) -> None:
    r = c.rollout
    unfit = {
        f"rollout.max_staleness={r.max_staleness} generates while the learner trains": r.max_staleness > 0,
        f"rollout.engine={r.engine} has no servers": r.engine == "local",
        f"rollout.urls={r.urls} names servers that are not ours to put to sleep": bool(r.urls),
        "rollout.weight_sync=nccl cannot connect two processes on one GPU": r.weight_sync == "nccl",
    }
    for why, applies in unfit.items():
        if r.colocated and applies:
            raise ValueError(f"rollout.colocated=true takes turns with servers, but {why}: set rollout.colocated=false")
