"""Maximal update parametrisation: hyperparameters found with a narrow model serve a wide one of the same kind.

Matrices within blocks start with a variance of 1 / inputs everywhere in jaxlm, and embeddings with one that does not depend on
the width. What is left to do is here: rates, the logits' scale and attention's.
"""

import dataclasses
import math

from jaxlm import config, model
from jaxlm.params import paths

Multipliers = tuple[tuple[str, float], ...]


def scaled(cfg: config.Decoder, base: config.Decoder) -> tuple[config.Decoder, Multipliers]:
    """A model that learns as its base does, and the learning rates to go with it, for Adam and its like.

    Matrices within blocks have their rate divided by how many times the base's inputs theirs are; logits are divided by how
    many times as wide the model is; scores are divided by the head's width, with a factor that makes them the base's where the
    heads are as wide. Weights decay at the same pace at every width.

    Args:
      base: the model that the hyperparameters are for: the same in all but widths and numbers of heads.

    Returns:
      The model to train in place of cfg, and `jaxlm.training.optimizer.Optimizer.multipliers`.

    Raises:
      ValueError: for models whose weights differ in more than size; names the first.

    Reference: Yang et al. 2022, table 8 and section 4, https://arxiv.org/abs/2203.03466. Departs from it where the head has
    weights of its own: they start with a variance of 1 / inputs too, which makes the first logits of wide models smaller.
    """
    ours, theirs = (paths(model.spec(one)) for one in (cfg, base))
    other = next((path for path in [*ours, *theirs] if path not in ours or path not in theirs), None)
    if other is None:
        other = next((path for path, param in ours.items() if param.axes != theirs[path].axes), None)
    if other is not None or cfg.stack.layers != base.stack.layers:
        raise ValueError(f"the base has to be the same kind of model, of other widths: they differ in {other or 'layers'}")
    multipliers = []
    for path, param in ours.items():
        if "/blocks/" in path and param.inputs:
            more = math.prod(param.shape[axis] / theirs[path].shape[axis] for axis in param.inputs)
            if more != 1:
                multipliers.append((path, 1 / more))
    blocks = [_block(one, reference) for one, reference in zip(cfg.stack.blocks(), base.stack.blocks(), strict=True)]
    head = dataclasses.replace(cfg.head, scale=cfg.head.scale * base.width / cfg.width)
    return dataclasses.replace(cfg, stack=config.stack_of(blocks), head=head), tuple(multipliers)


def _block(block: config.Block, base: config.Block) -> config.Block:
    one, width = block.attention, base.attention.head_width
    scale = width**-0.5 if base.attention.scale is None else base.attention.scale
    attention = dataclasses.replace(one, scale=scale * width / one.head_width)
    return dataclasses.replace(block, attention=attention)
