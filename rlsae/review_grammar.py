"""A grammar of short movie reviews: enough syntax for a language model to learn, polarity that is known.

Every polar word stands in VADER's lexicon, so that the lexicon reward sees exactly what the grammar meant.
"""

from __future__ import annotations

import re

import numpy as np
import pandas as pd

from rlsae.errors import RlsaeError

GOOD = (
    "amazing beautiful brilliant charming clever delightful excellent fantastic fine fun funny good great "
    "impressive interesting lovely nice perfect pleasant smart strong superb terrific warm wonderful fascinating "
    "gentle"
).split()
BAD = (
    "annoying awful bad boring confusing cruel disappointing dreadful dull empty foolish horrible lame lazy mad "
    "nasty poor sad miserable stupid terrible tragic ugly unpleasant weak worthless pathetic tired"
).split()
LIKED = "admired adored appreciated enjoyed liked loved praised recommended".split()
HATED = "criticized despised rejected disliked hated regretted resented".split()
GOOD_WORDS, BAD_WORDS = {*GOOD, *LIKED}, {*BAD, *HATED}

WORDS = {
    "film": "film movie picture story drama musical mystery western sequel remake feature saga".split(),
    "part": "acting plot script ending music dialogue opening editing casting lighting pacing camera".split(),
    "who": "actor actress director writer producer cast crew narrator".split(),
    "hero": "doctor farmer sailor teacher soldier lawyer painter pilot detective dancer nurse singer".split(),
    "place": "paris|london|a village|the city|the desert|an island|the mountains|a harbor|the station|tokyo".split("|"),
    "name": "anna boris clara david elena frank greta henry iris james karen louis maria oscar paula simon".split(),
    "verb": "follows leaves finds meets watches remembers visits forgets calls chases paints teaches".split(),
    "thing": "letter train house garden photograph secret map river bridge violin radio boat".split(),
    "when": "last night|on sunday|with my sister|at the cinema|years ago|on a plane|after work|in the morning".split("|"),
    "very": "really very quite rather utterly simply".split(),
    "number": "two three four five six seven eight nine ten".split(),
}

OPENINGS = (
    "i watched this {adj} {film} {when} .",
    "we saw this {adj} and {adj} {film} {when} .",
    "this is a {adj} {film} about a {adj} {hero} in {place} .",
    "{name} portrays a {adj} {hero} who {verb} a {adj} {hero} .",
    "what a {adj} , {adj} {film} !",
    "the {film} opens in {place} with a {adj} {thing} .",
    "after {number} {adj} years , {name} returns to {place} .",
    "my {adj} neighbor {name} {felt} this {adj} {film} .",
    "nobody told me that this {film} was so {adj} .",
    "here is a {adj} {film} with a {adj} {part} .",
)
MIDDLES = (
    "the {part} is {adj} and the {part} is {adj} .",
    "the {who} gives a {very} {adj} performance .",
    "the {adj} {hero} {verb} the {adj} {thing} near {place} .",
    "a {adj} {hero} {verb} {name} , and then {name} {verb} the {thing} .",
    "{name} is {adj} and {adj} as the {hero} .",
    "i {felt} the {adj} {part} , but the {part} was {other} .",
    "although the {part} seems {other} , the {part} is {very} {adj} .",
    "it has {number} {adj} scenes with a {adj} {thing} .",
    "when the {hero} {verb} the {thing} , the {part} becomes {adj} .",
    "the {adj} {who} and the {adj} {who} {felt} every scene .",
    "between {place} and {place} , the {film} grows {adj} and {adj} .",
    "one {adj} {thing} , one {adj} {hero} , and a {adj} {part} .",
    "because of the {adj} {part} , i {felt} the {film} .",
    "is the {part} {adj} ? indeed , {very} {adj} .",
    "{adj} {part} , {adj} {part} , {adj} {part} .",
    "i {felt} the {part} , {felt} the {part} and {felt} the {who} .",
)
VERDICTS = (
    "i {felt} it .",
    "overall , a {very} {adj} {film} .",
    "in the end it is a {adj} and {adj} {film} .",
    "{number} stars for this {adj} , {adj} {film} .",
    "my family {felt} the {adj} {film} too .",
    "so {adj} that i {felt} every {adj} minute .",
    "the ending is {adj} and {adj} .",
    "you will remember the {adj} {thing} .",
)


def write_reviews(count: int, rng: np.random.Generator) -> pd.DataFrame:
    """Write distinct reviews of 2–4 sentences; columns `text` and `label` (1 good, -1 bad, 0 mixed).

    Raises:
        RlsaeError: the grammar does not hold so many.
    """
    texts: dict[str, int] = {}
    for _ in range(20 * count):
        if len(texts) == count:
            break
        label = int(rng.choice([1, -1, 0], p=[0.4, 0.4, 0.2]))
        sentences = [OPENINGS, *[MIDDLES] * int(rng.integers(0, 3)), VERDICTS]
        text = " ".join(_fill(str(rng.choice(templates)), label, rng) for templates in sentences)
        texts.setdefault(text, label)
    if len(texts) < count:
        raise RlsaeError(f"documents: the grammar could not write {count} distinct reviews; ask for fewer")
    return pd.DataFrame({"text": list(texts), "label": np.fromiter(texts.values(), dtype=np.int8)})


def write_contrasts(count: int, rng: np.random.Generator) -> list[tuple[str, str, str]]:
    """Distinct openings of reviews, each with two continuations: the first has more good words than the second.

    Every slot is good or bad by chance, and both continuations fill the same templates, so that neither a single word nor
    the number of words tells which is which.

    Raises:
        RlsaeError: the grammar does not hold so many.
    """
    contrasts: dict[str, tuple[str, str, str]] = {}
    for _ in range(20 * count):
        if len(contrasts) == count:
            break
        opening = _fill(str(rng.choice(OPENINGS)), 0, rng)
        rest = " ".join(str(rng.choice(templates)) for templates in (MIDDLES, VERDICTS))
        better, worse = sorted((" " + _fill(rest, 0, rng) for _ in range(2)), key=polarity, reverse=True)
        if polarity(better) > polarity(worse):
            contrasts.setdefault(opening, (opening, better, worse))
    if len(contrasts) < count:
        raise RlsaeError(f"documents: the grammar could not write {count} distinct pairs; ask for fewer")
    return list(contrasts.values())


def polarity(text: str) -> int:
    """Good words less bad words."""
    words = text.split()
    return sum((word in GOOD_WORDS) - (word in BAD_WORDS) for word in words)


def _fill(template: str, label: int, rng: np.random.Generator) -> str:
    def word(match: re.Match[str]) -> str:
        slot = match[1]
        good = label > 0 or (label == 0 and rng.random() < 0.5)
        if slot == "other":
            good = not good
        if slot in ("adj", "other"):
            options = GOOD if good else BAD
        elif slot == "felt":
            options = LIKED if good else HATED
        else:
            options = WORDS[slot]
        return options[rng.integers(len(options))]

    return re.sub(r"\ba (?=[aeiou])", "an ", re.sub(r"\{(\w+)\}", word, template))
