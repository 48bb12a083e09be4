"""What the machine can do at best: the bound that measured speeds stand beside."""

import concurrent.futures
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np

_FLOATS = 1 << 28  # 1 GiB: larger than any cache


def threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def bandwidth() -> float:
    """Bytes per second at which JAX's first device (for a CPU: all cores together) reads memory: the best of 10 looks."""
    import jax  # here, so that a process without JAX may import this module
    import jax.numpy as jnp

    if jax.default_backend() != "cpu":
        array, total = jnp.ones(_FLOATS, jnp.float32), jax.jit(jnp.sum)
        return _fastest(lambda: total(array).block_until_ready())
    parts = np.array_split(np.ones(_FLOATS, np.float32), threads())
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        return _fastest(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))


def _fastest(read: Callable[[], Any]) -> float:
    """Bytes per second of reading all the floats, after a first time that compiles."""
    read()
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - began)
    return 4 * _FLOATS / best


def describe() -> dict[str, Any]:
    """The processor, JAX's device, and versions."""
    import jax

    device = jax.devices()[0]
    return {"processor": _processor(), "cores": threads(), "platform": device.platform, "device": device.device_kind,
            "devices": jax.device_count(), "python": platform.python_version(), "jax": jax.__version__}


def _processor() -> str:
    """The processor's name where Linux tells it, else its architecture."""
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.is_file() else []
    return names[0] if names else platform.machine()
