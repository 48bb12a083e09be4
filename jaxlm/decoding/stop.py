"""Stop strings as a byte automaton over tokens, so that the compiled loop sees them without a host.

Knuth-Morris-Pratt over the strings' bytes gives a table [states, 256]; running every token's bytes through it gives the table
[states, V] that the loop indexes. A string is found wherever its bytes appear in the output, across tokens or inside one.
"""

from collections.abc import Mapping, Sequence

import flax.struct
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

STATES = 32  # tables are padded to multiples of it, so that few shapes are compiled


@flax.struct.dataclass
class Automaton:
    """Attributes:
      step: int32 [states, V], the state after a token.
      found: bool [states].
      start: int32 [B], each row's first state.
    """

    step: Int[Array, "states V"]
    found: Bool[Array, " states"]
    start: Int[Array, "B"]


def byte_table(strings: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho-Corasick: (next state [states, 256], found [states]); once found, found for good.

    Example:
      >>> table, found = byte_table([b"ab"])
      >>> state = 0
      >>> for byte in b"xaab": state = table[state, byte]
      >>> bool(found[state])
      True
    """
    children: list[dict[int, int]] = [{}]
    found = [False]
    for string in strings:
        node = 0
        for byte in string:
            if byte not in children[node]:
                children[node][byte] = len(children)
                children.append({})
                found.append(False)
            node = children[node][byte]
        found[node] = True
    table = np.zeros((len(children), 256), np.int32)
    fallback = [0] * len(children)
    queue = list(children[0].values())
    for byte, child in children[0].items():
        table[0, byte] = child
    for node in queue:
        table[node] = table[fallback[node]]
        found[node] = found[node] or found[fallback[node]]
        for byte, child in children[node].items():
            fallback[child] = table[fallback[node], byte]
            table[node, byte] = child
            queue.append(child)
    ends = np.array(found)
    table[ends] = np.flatnonzero(ends)[:, None]
    return table, ends


def token_table(table: np.ndarray, token_bytes: Sequence[bytes]) -> np.ndarray:
    """The state after a whole token: int32 [states, V]."""
    order = sorted(range(len(token_bytes)), key=lambda i: -len(token_bytes[i]))
    lengths = np.array([len(token_bytes[i]) for i in order])
    flat = np.frombuffer(b"".join(token_bytes[i] for i in order), np.uint8)
    offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    state = np.repeat(np.arange(len(table), dtype=np.int32)[:, None], len(order), axis=1)
    for place in range(int(lengths[0]) if len(lengths) else 0):
        live = int(np.searchsorted(-lengths, -place, side="left"))  # tokens longer than `place` come first
        state[:, :live] = table[state[:, :live], flat[offsets[:live] + place][None, :]]
    out = np.empty_like(state)
    out[:, order] = state
    return out


def automaton(stops: Sequence[Sequence[str]], token_bytes: Sequence[bytes], vocabulary: int,
              special: Mapping[str, int] | None = None) -> Automaton:
    """One automaton for rows with stop strings of their own: a part of the states for each distinct list.

    Args:
      stops: per row.
      token_bytes: what each id adds to the text; ids from there to `vocabulary` add nothing.
      special: ids of the special tokens among the stop strings: without bytes in a text, found all the same by rows that ask.

    Raises:
      ValueError: for an empty stop string.
    """
    if any(not string for row in stops for string in row):
        raise ValueError("a stop string must not be empty")
    token_bytes = [*token_bytes[:vocabulary], *[b""] * (vocabulary - len(token_bytes))]
    steps, founds, starts, size = [], [], {}, 0
    for row in stops:
        if tuple(row) in starts:
            continue
        table, found = byte_table([string.encode() for string in row])
        starts[tuple(row)] = size
        spoken = list(token_bytes)
        for string in row:
            if string in (special or {}):
                spoken[special[string]] = string.encode()
        steps.append(token_table(table, spoken) + size)
        founds.append(found)
        size += len(found)
    pad = -size % STATES
    step = np.concatenate([*steps, np.zeros((pad, vocabulary), np.int32)])
    found = np.concatenate([*founds, np.zeros(pad, bool)])
    return Automaton(jnp.asarray(step), jnp.asarray(found), jnp.asarray([starts[tuple(row)] for row in stops], jnp.int32))
