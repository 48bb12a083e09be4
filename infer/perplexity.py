"""How well a model predicts a text: nats per token, bits per byte, perplexity.

python -m infer.perplexity --model PATH --text FILE
"""

import math
import pathlib
import time
from collections.abc import Sequence
from typing import Annotated, Literal

import jax.numpy as jnp
import tyro

import jaxlm
from infer import session
from jaxlm.config import EncoderDecoder


def score(model: jaxlm.Model, texts: Sequence[Sequence[int]], window: int, stride: int, batch: int) -> tuple[float, int]:
    """The nats of all texts together, and of how many tokens: all but the first of each text, where no BOS stands before it.

    Args:
      texts: tokens, without special ones.
      window, stride, batch: see `main`.
    """
    # A model that was trained with BOS in front sees it in front of every window; it is neither scored nor counted.
    tokenizer = model.tokenizer
    first = [tokenizer.bos_id] if tokenizer.encode("a")[:1] == [tokenizer.bos_id] else []
    stride = min(stride, window - len(first))
    windows = []
    for tokens in texts:
        # Each token is scored once, in the first window that holds it with something before it.
        done = 1 - len(first)
        for start in range(0, len(tokens), stride):
            some = list(tokens[start:start + window - len(first)])
            fresh = start + len(some) - max(done, start + 1 - len(first))
            if fresh > 0:
                windows.append((first + some, fresh))
                done = start + len(some)
    nats, scored = 0.0, 0
    for place in range(0, len(windows), batch):
        group = windows[place:place + batch]
        for (_, fresh), scores in zip(group, jaxlm.score(model, [some for some, _ in group]), strict=True):
            nats -= float(scores[-fresh:].astype("float64").sum())
            scored += fresh
    return nats, scored


def main(model: str, text: pathlib.Path, window: int | None = None, stride: int | None = None, limit: int | None = None,
         batch: int = 1, dtype: Literal["float32", "bfloat16", "float16"] | None = None,
         as_json: Annotated[bool, tyro.conf.arg(name="json")] = False) -> None:
    """Scores a text in windows that overlap by window - stride tokens; overlapped tokens are context and counted once.

    Args:
      model: a Hugging Face directory, a GGUF file, or the id of a model on the hub.
      text: a UTF-8 file.
      window: tokens scored at once, at most the model's context; default 1024 or the context.
      stride: tokens from one window to the next; default the window, so that each starts without context.
      limit: score only the first so many tokens.
      batch: windows scored side by side.
      dtype: of weights and computation; default float32 on a CPU, bfloat16 on accelerators.
      as_json: print one JSON object on the last line of standard output.
    """
    session.cache_compilations()
    console = session.console(as_json)
    content = text.read_text(encoding="utf-8")
    with console.status(f"loading {model}"):
        loaded = jaxlm.load(model, dtype=None if dtype is None else jnp.dtype(dtype))
    if loaded.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, so it cannot take text")
    if isinstance(loaded.config, EncoderDecoder):
        raise ValueError(f"{model} is an encoder-decoder, whose text is scored given a source: jaxlm.score(model, texts, "
                         "sources=...) takes both, this program only texts")
    context = loaded.decoder.length
    window = min(1024, context) if window is None else window
    stride = window if stride is None else stride
    if not 1 <= stride <= window <= context or window < 2:
        raise ValueError(f"it must hold that 1 <= stride ({stride}) <= window ({window}) <= the context ({context}), and "
                         "window >= 2")
    if batch < 1 or (limit is not None and limit < 2):
        raise ValueError(f"batch must be at least 1 and limit at least 2, got {batch} and {limit}")
    tokenizer = loaded.tokenizer
    tokens = tokenizer.encode(content, add_special=False, parse_special=False)[:limit]
    if len(tokens) < 2:
        raise ValueError(f"{text} has {len(tokens)} tokens; a score needs two")
    began = time.perf_counter()
    nats, scored = score(loaded, [tokens], window, stride, batch)
    seconds = time.perf_counter() - began
    # Bytes of the tokens read: with a limit, those of the text that they are.
    size = len(content.encode()) if limit is None else len(tokenizer.decode(tokens).encode())
    result = {
        "tokens": len(tokens), "scored": scored, "bytes": size, "nats_per_token": nats / scored,
        "bits_per_byte": nats / scored * len(tokens) / size / math.log(2), "perplexity": math.exp(nats / scored),
        "tokens_per_s": len(tokens) / seconds, "seconds": seconds,
    }
    console.print(f"{result['nats_per_token']:.4f} nats per token, perplexity {result['perplexity']:.3f}, "
                  f"{result['bits_per_byte']:.4f} bits per byte over {scored} tokens ({size} bytes), "
                  f"{result['tokens_per_s']:.0f} tokens/s")
    session.finish(result, as_json)


if __name__ == "__main__":
    with session.errors():
        tyro.cli(main, description=__doc__)
