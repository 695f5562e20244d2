"""Explanations and judgements of latents by a language model, beside those that need none.

Windows of a corpus are data: prompts hold them as JSON strings, and nothing that they or the model's answers say is done.
"""

from rlsae.interpretation.llm.explainer import LlmExplainer
from rlsae.interpretation.llm.judges import LlmDetection, LlmFuzzing
from rlsae.interpretation.llm.open import open_client
from rlsae.interpretation.llm.task import related

__all__ = ["LlmDetection", "LlmExplainer", "LlmFuzzing", "open_client", "related"]
