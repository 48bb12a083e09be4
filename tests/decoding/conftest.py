import contextlib

import jax.monitoring
import pytest

from tests.decoding import stubs


@pytest.fixture
def tokenizer():
    return stubs.Bytes()


@pytest.fixture
def compilations():
    """`with compilations() as names`: what XLA compiled meanwhile, or would have but for a cache on disk."""
    listening = []

    def listen(event, seconds, **details):
        if event == "/jax/core/compile/backend_compile_duration":
            for names in listening:
                names.append(details.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)

    @contextlib.contextmanager
    def watch():
        listening.append([])
        yield listening[-1]
        listening.pop()

    yield watch
    jax.monitoring.unregister_event_duration_listener(listen)
