"""Whether an explanation has to do with the task of the tuning, as a language model sees it (arXiv 2310.08164)."""

from __future__ import annotations

import re

from rlsae.interpretation.llm.client import Client, LlmError, ask, spoken
from rlsae.interpretation.llm.text import prompt, quoted


def related(client: Client, explanation_text: str, task: str) -> int | str:
    """1 if an explained feature is related to a task, 0 if not; a status where the model does not say.

    Args:
        task: as the question names it: `sentiment`.
    """
    if not explanation_text.strip():
        return "there is no explanation"
    filled = prompt("task", explanation=quoted(explanation_text), task=task)
    try:
        return ask(client, filled, prompt("remind_digit"), read_digit)
    except LlmError as error:
        return error.status


def read_digit(answer: str) -> int | None:
    """The 0 or 1 that an answer consists of; None where it is something else."""
    found = re.fullmatch(r"\W*([01])\W*", spoken(answer) or "")
    return int(found[1]) if found else None
