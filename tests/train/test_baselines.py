import gzip
import math

import pytest

from train import baselines

TEXTS = ["the cat sat on the mat", "the bat sat on the hat; naïve", "a cat and a bat"]
HELD_OUT = ["the rat sat on a cat", "§ unseen"]


def slow(texts, held_out, order, discount=0.75):
    """Kneser-Ney by its definition, one byte at a time."""
    def grams(text, n):
        padded = bytes(order - 1) + text.encode()
        return [padded[i - n + 1:i + 1] for i in range(order - 1, len(padded))]

    highest = [gram for text in texts for gram in grams(text, order)]
    kinds = {order: {gram: highest.count(gram) for gram in highest}}
    for n in range(order - 1, 0, -1):
        kinds[n] = {}
        for longer in kinds[n + 1]:
            kinds[n][longer[1:]] = kinds[n].get(longer[1:], 0) + 1

    def share(gram):
        if not gram:
            return 1 / 256
        mine = {other: count for other, count in kinds[len(gram)].items() if other[:-1] == gram[:-1]}
        total = sum(mine.values())
        if not total:
            return share(gram[1:])
        return max(mine.get(gram, 0) - discount, 0) / total + discount * len(mine) / total * share(gram[1:])

    logs = [math.log2(share(gram)) for text in held_out for gram in grams(text, order)]
    return -sum(logs) / len(logs)


@pytest.mark.parametrize("order", [1, 2, 5])
def test_n_grams_against_their_definition(order):
    assert baselines.kneser_ney(TEXTS, HELD_OUT, order) == pytest.approx(slow(TEXTS, HELD_OUT, order), rel=1e-12)


def test_n_grams_are_a_distribution():
    # After ASCII text nearly all of it is on ASCII, what is left on the 128 bytes above.
    shares = sum(2**-baselines.kneser_ney(TEXTS[:1], [chr(i)], 3) for i in range(128))
    unseen = 2**-baselines.kneser_ney(TEXTS[:1], ["\x7f"], 3)
    assert shares + 128 * unseen == pytest.approx(1.0)


def test_compressors():
    found = baselines.compressors(TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["gzip"] == 8 * sum(len(gzip.compress(text.encode(), 9)) for text in TEXTS) / size
    assert baselines.compressors(["abc" * 10_000])["xz"] < 0.1


def test_errors():
    with pytest.raises(ValueError, match="1 to 7 bytes, got 8"):
        baselines.kneser_ney(TEXTS, HELD_OUT, 8)
    with pytest.raises(ValueError, match="one of the two is empty"):
        baselines.kneser_ney(TEXTS, [])
    with pytest.raises(ValueError, match="nothing to compress"):
        baselines.compressors([""])
