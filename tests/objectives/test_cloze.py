"""Prompts with a mask in place of the answer, and what the answers' logits say."""

import jax
import numpy as np
import pytest

from jaxlm.objectives import told
from jaxlm.objectives.cloze import Cloze, classify

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize(("objective", "document", "place"), [
    (Cloze(9, edges=(7, 8)), [7, 1, 2, 3, 8], 3), (Cloze(9), [1, 2], 1), (Cloze(9, anchor=5), [5, 1, 5, 4, 6, 2], 3),
    (told(Cloze(9, 5, (3, 4)), (8,)), [1, 5, 4, 8], 2)])
def test_the_answer_alone_is_hidden_and_asked(objective, document, place):
    made = objective.example(np.array(document), RANDOM)
    shown = [9 if i == place else token for i, token in enumerate(document)]
    assert made.tokens.tolist() == shown and made.targets.tolist() == document
    assert made.weights.tolist() == [float(i == place) for i in range(len(document))] and made.prefix == len(document)


@pytest.mark.parametrize(("objective", "document", "says"), [
    (Cloze(9, 5), [1, 2, 3], "no answer behind the token 5"), (Cloze(9, 5), [1, 5], "no answer behind"),
    (Cloze(9, edges=(7, 8)), [7, 8], "has no answer$"), (Cloze(9, answers=(3, 4)), [1, 2], r"token 2, and answers are \(3")])
def test_documents_without_an_answer(objective, document, says):
    with pytest.raises(ValueError, match=says):
        objective.example(np.array(document), RANDOM)


def test_labels_share_what_their_tokens_have():
    logits = RANDOM.normal(size=(2, 3, 11)).astype(np.float32)
    found = jax.jit(lambda logits: classify(logits, [4, (1, 2, 9), [0]]))(logits)
    shares = np.exp(np.asarray(logits, np.float64))
    want = np.stack([shares[..., 4], shares[..., [1, 2, 9]].sum(-1), shares[..., 0]], axis=-1)
    np.testing.assert_allclose(found, np.log(want / want.sum(-1, keepdims=True)), rtol=1e-5, atol=1e-6)
