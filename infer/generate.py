"""Continues a prompt, answers a question, holds a conversation in the terminal, or writes from a source.

python -m infer.generate --model PATH --prompt "What is the capital of France?" --max-new-tokens 64
"""

import dataclasses
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import tyro

import jaxlm
from infer import session
from jaxlm import adapt
from jaxlm.config import Encoder, EncoderDecoder


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest tokens."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest."""
    typical_p: float = 1.0
    """Keep the tokens nearest to the entropy that together reach this probability."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens that stand in prompt or answer."""
    presence_penalty: float = 0.0
    """Lowers the logits of tokens that stand in the answer."""
    frequency_penalty: float = 0.0
    """Lowers them once for every time they stand there."""
    stop_strings: tuple[str, ...] = ()
    """The answer ends before the first of these."""


@dataclasses.dataclass(frozen=True)
class Speculating:
    """How tokens are drafted, to be verified several at a time."""

    drafter: str | None = None
    """What drafts: "lookup", "recycling", several joined by "+", "auto", ...; default none."""
    draft_model: str | None = None
    """A smaller model of the same vocabulary that drafts, in place of a drafter's name."""
    tree: int | None = None
    """Nodes of a drafted tree; default the drafter's own."""
    rule: str | None = None
    """When a drafted token is accepted; default "match", which changes no token."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Continues a prompt, answers a question, holds a conversation in the terminal, or writes from a source."""

    model: str
    """A Hugging Face directory, a GGUF file, or the id of a model on the hub."""
    prompt: str | None = None
    """The text, of an encoder-decoder its source; default standard input, or with --chat what is typed."""
    max_new_tokens: int = 256
    """The most tokens to generate; less where the model's context ends before."""
    chat: bool = False
    """A conversation in the terminal: an empty line ends it."""
    raw: bool = False
    """Continue the text as it is, without the chat template of an instruction-tuned model."""
    system: str | None = None
    """What the system message says, for models whose template has one."""
    language: str | None = None
    """The source's language, as the model's tokenizer calls it (fr_XX, fra_Latn), where it puts one around a text."""
    start: tuple[str, ...] = ()
    """The tokens that an encoder-decoder's text begins with, "</s> fra_Latn" say; default the model's own."""
    prefix: bool = False
    """All tokens of the prompt see each other, as a prefix language model was trained."""
    mode: Literal["decoder-only", "encoder-decoder"] | None = None
    """UniXcoder's: the mode's token stands before the prompt, whose tokens all see each other in the second."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Sampling)
    speculating: Annotated[Speculating, tyro.conf.arg(name="")] = dataclasses.field(default_factory=Speculating)
    seed: int = 0
    """The same seed gives the same text."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of weights and computation; default float32 on a CPU, bfloat16 on accelerators."""
    json: bool = False
    """Print one JSON object on the last line of standard output, and the text for people on standard error."""


def ask(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """The tokens of a conversation up to where the model is to answer; the template writes special tokens itself."""
    return tokenizer.encode(tokenizer.chat(messages), add_special=False)


def answer(model: jaxlm.Model, prompt: list[int], arguments: Arguments, drafter: str | jaxlm.Model | None,
           show: Callable[[str], None], state: Any = None) -> jaxlm.Generation:
    """One answer, shown as it comes; `state` is what the drafter kept of an earlier one."""
    start, before = None, len(prompt)
    if arguments.start:
        start = [(model.tokenizer.target or model.tokenizer).id(token) for token in arguments.start]
    if isinstance(model.config, EncoderDecoder):
        before = len(start or model.config.start)
    room = model.decoder.length - before
    if room < 1:
        text = "start" if isinstance(model.config, EncoderDecoder) else "prompt"
        raise ValueError(f"the {text} has {before} tokens, the model's context is {model.decoder.length}")
    if isinstance(model.config, EncoderDecoder):
        room = model.decoder.length - 1  # the start's other tokens count as new ones
    options = dataclasses.asdict(arguments.sampling)
    options["stop_strings"] = options["stop_strings"] or None
    return jaxlm.generate(model, [prompt], min(arguments.max_new_tokens, room), key=arguments.seed, drafter=drafter,
                          tree=arguments.speculating.tree, rule=arguments.speculating.rule, drafter_state=state,
                          start=start, prefix=arguments.prefix or arguments.mode == "encoder-decoder",
                          on_text=lambda pieces: show(pieces[0]), **options)


def statistics(result: jaxlm.Generation) -> str:
    """One line on how long it took."""
    seconds, speculation = result.seconds, result.speculation
    parts = [f"{result.prompt_tokens[0]} tokens in {seconds.prefill:.2f} s",
             f"{len(result.tokens[0])} out at {result.tokens_per_s:.1f} tokens/s"]
    if speculation is not None:
        touched = "" if speculation.experts is None else f" on {speculation.experts:.1f} experts"
        parts.append(f"{speculation.tokens_per_call[0]:.2f} per call of the model{touched}")
        if speculation.exact == "lossy":
            parts.append("lossy")
    return ", ".join([*parts, f"{seconds.compile:.1f} s compiling"])


def speculated(result: jaxlm.Generation, drafter: str | None) -> dict[str, Any] | None:
    """What speculation did, for JSON: `emitted` counts the calls that gave 1, 2, ... tokens; None for plain decoding."""
    if result.speculation is None:
        return None
    return {
        "drafter": drafter, "exact": result.speculation.exact, "calls": int(result.speculation.calls[0]),
        "tokens_per_call": float(result.speculation.tokens_per_call[0]), "emitted": result.speculation.emitted[0].tolist(),
        "sizes": {str(nodes): int(calls[0]) for nodes, calls in result.speculation.sizes.items()},
        "experts": result.speculation.experts,
    }


def converse(model: jaxlm.Model, arguments: Arguments, drafter: str | jaxlm.Model | None, console: Any) -> None:
    """Question and answer until an empty line."""
    if not model.tokenizer.has_chat_template:
        raise ValueError("this model has no chat template, so it cannot hold a conversation: leave out --chat")
    messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
    state = None
    while True:
        try:
            text = console.input("[bold]> [/bold]")
        except EOFError:
            return
        if not text.strip():
            return
        messages.append({"role": "user", "content": text})
        prompt = ask(model.tokenizer, messages)
        # An encoder-decoder's answer stands apart from its source.
        longest = model.config.encoder.length if isinstance(model.config, EncoderDecoder) else model.decoder.length - 1
        if len(prompt) > longest:
            console.print(f"[dim]the conversation has outgrown the model's context: it takes at most {longest} tokens[/dim]")
            return
        result = answer(model, prompt, arguments, drafter, partial(session.show, console), state)
        state = None if result.speculation is None else result.speculation.state
        messages.append({"role": "assistant", "content": result.text[0]})
        console.print(f"\n[dim]{statistics(result)}[/dim]")


def main(arguments: Arguments) -> None:
    """Loads the model and generates."""
    session.cache_compilations()
    console = session.console(arguments.json)
    if arguments.chat and (arguments.json or arguments.raw or arguments.prompt is not None):
        raise ValueError("--chat asks for its prompts, so it goes with none of --prompt, --raw and --json")
    speculating, dtype = arguments.speculating, None if arguments.dtype is None else jnp.dtype(arguments.dtype)
    if speculating.drafter is not None and speculating.draft_model is not None:
        raise ValueError("either --drafter or --draft-model drafts, not both")
    if arguments.prefix and arguments.mode == "decoder-only":
        raise ValueError("--prefix lets all tokens of the prompt see each other, and in --mode decoder-only none sees what "
                         "follows: give one of them, or --mode encoder-decoder")
    with console.status(f"loading {arguments.model}"):
        model = jaxlm.load(arguments.model, dtype=dtype)
    drafter: str | jaxlm.Model | None = speculating.drafter
    if speculating.draft_model is not None:
        with console.status(f"loading {speculating.draft_model}"):
            drafter = jaxlm.load(speculating.draft_model, dtype=dtype)
    if model.tokenizer is None:
        raise ValueError(f"{arguments.model} has no tokenizer, so it cannot take text")
    if arguments.language is not None:
        model = dataclasses.replace(model, tokenizer=model.tokenizer.in_language(arguments.language))
    if arguments.mode is not None:
        if arguments.chat or (model.tokenizer.has_chat_template and not arguments.raw):
            raise ValueError("--mode puts its token before a plain text, which a chat template makes no room for: give --raw, "
                             "and no --chat")
        model = dataclasses.replace(model, tokenizer=model.tokenizer.in_mode(arguments.mode))
    if isinstance(model.config, Encoder) and (arguments.prefix or arguments.mode is not None):
        model = adapt.to_decoder(model)
    if arguments.chat:
        converse(model, arguments, drafter, console)
        return
    text = sys.stdin.read() if arguments.prompt is None else arguments.prompt
    if model.tokenizer.has_chat_template and not arguments.raw:
        messages = [{"role": "system", "content": arguments.system}] if arguments.system else []
        prompt = ask(model.tokenizer, [*messages, {"role": "user", "content": text}])
    elif arguments.system:
        raise ValueError("--system needs a model with a chat template, and no --raw")
    else:
        prompt = model.tokenizer.encode(text)
    result = answer(model, prompt, arguments, drafter, partial(session.show, console))
    console.print(f"\n[dim]{statistics(result)}[/dim]")
    session.finish({
        "tokens": result.tokens[0].tolist(), "text": result.text[0], "finish": result.finish[0],
        "prompt_tokens": result.prompt_tokens[0], "compile_s": result.seconds.compile,
        "prefill_s": result.seconds.prefill, "decode_s": result.seconds.decode, "tokens_per_s": result.tokens_per_s,
        "speculation": speculated(result, speculating.draft_model or speculating.drafter),
    }, arguments.json)


if __name__ == "__main__":
    with session.errors():
        main(tyro.cli(Arguments, description=__doc__))
