"""Explainers that need no language model: each says in words what makes a latent fire, and predicts where it will.

Adding one is adding a file with a function of the evidence, and its name here.
"""

from __future__ import annotations

from rlsae.interpretation.explainers import lexicon, logit_lens, ngram, tokens
from rlsae.interpretation.explanation import Explainer

EXPLAINERS: dict[str, Explainer] = {
    "tokens": tokens.explain,
    "ngram": ngram.explain,
    "lexicon": lexicon.explain,
    "logit_lens": logit_lens.explain,
}
"""By their names in the configuration; `ensemble` is made of these."""
