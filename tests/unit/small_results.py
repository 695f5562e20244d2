"""A chain of small artifacts up to the activations, for the tests of the dictionaries."""

from __future__ import annotations

from small_artifacts import dump, random_documents, tokens_of, write_policy, write_tokens


def write_results(folder, model, tokenizer):
    """Results with a model, tokens (1,900, a quarter held out) and a dump of both layers in float32."""
    policy = write_policy(folder / "models" / "tiny", model, tokenizer)
    lengths = [5 + (11 * i) % 53 for i in range(61)]
    tokens = write_tokens(folder / "tokens" / "tiny.reviews", tokens_of(random_documents(lengths)))
    dump(folder / "activations" / "tiny.reviews" / "mlp", policy, tokens, dtype="float32", rows_per_part=256)
    return folder
