"""A chain of small artifacts up to the dictionaries, for their tests."""

from __future__ import annotations

from small_artifacts import dump, random_documents, tokens_of, write_policy, write_tokens
from small_dictionaries import entry_of

from rlsae.sae.dictionary import WEIGHTS
from rlsae.sae.train import build_dictionaries

LAYER = 1


def write_results(folder, model, tokenizer):
    """Results with a model, tokens (1,900, a quarter held out) and a dump of both layers in float32."""
    policy = write_policy(folder / "models" / "tiny", model, tokenizer)
    lengths = [5 + (11 * i) % 53 for i in range(61)]
    tokens = write_tokens(folder / "tokens" / "tiny.reviews", tokens_of(random_documents(lengths)))
    dump(folder / "activations" / "tiny.reviews" / "mlp", policy, tokens, dtype="float32", rows_per_part=256)
    return folder


def builder(results, folder):
    """Function of a name and settings: folder of the dictionaries of one layer of these results."""
    stored = results / "activations" / "tiny.reviews" / "mlp"

    def build(name="small", layer=LAYER, activations=stored, recipe=None, start=None, source=None, **changes):
        out = folder / "results" / "dictionaries" / name
        recipe = recipe or entry_of(**changes)
        weights, tokens = results / "models" / "tiny" / "model", results / "tokens" / "tiny.reviews"
        build_dictionaries(recipe, recipe.settings(), layer, out, None, activations, weights, tokens, start, source)
        return out

    return build


def weights_of(folder, seed=0):
    return (folder / f"saes/seed{seed}" / WEIGHTS).read_bytes()
