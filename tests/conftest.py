"""The tests' session: eight simulated CPU devices, strict promotion of dtypes and ranks, a compilation cache.

Programs that tests start as processes inherit the environment: the devices and the cache, not the strictness.
"""

import os
import pathlib
import sys
from collections.abc import Iterator

import hypothesis
import pytest

assert "jax" not in sys.modules, "jax was imported before tests/conftest.py: it would miss these settings"

TESTS = pathlib.Path(__file__).parent

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
# libtpu, when it compiles for a topology, would otherwise ask a cloud's metadata server what machine this is.
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # test processes compile side by side, none has a TPU
os.environ["HF_HUB_OFFLINE"] = "1"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(TESTS.parent / ".cache" / "jax"))
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
# With a limit jax locks the cache; without one, test processes read each other's half-written entries.
os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(4 << 30)

import jax  # noqa: E402  (it reads the environment when it is imported)

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which no deadline fits; the same examples on every run.
hypothesis.settings.register_profile("jaxlm", deadline=None, derandomize=True, max_examples=25)
hypothesis.settings.load_profile("jaxlm")


@pytest.fixture
def standard_promotion() -> Iterator[None]:
    """For tests that update through optax, whose Adam raises a Python float to an int32 array."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module", autouse=True)
def _forget_programs() -> Iterator[None]:
    """Every compiled program maps memory, and a process that maps too often is aborted."""
    yield
    jax.clear_caches()


def pytest_ignore_collect(collection_path: pathlib.Path) -> bool | None:
    """Keeps the search for doctests away from the scripts beside the tests, which may need torch."""
    script = collection_path.suffix == ".py" and not collection_path.name.startswith("test_")
    return True if script and TESTS in collection_path.parents else None
