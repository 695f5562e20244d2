"""Explain the selected latents of one dictionary, and judge what is said on held-out windows. Shapes: N rows, S latents."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from rlsae.activations.store import ActivationStore
from rlsae.interpretation.evidence import Evidence
from rlsae.interpretation.examples import top_windows
from rlsae.interpretation.explainers import EXPLAINERS
from rlsae.interpretation.explainers.ensemble import combine
from rlsae.interpretation.explanation import Explainer, Explanation, Judge, Score
from rlsae.interpretation.failures import failures
from rlsae.interpretation.judges import JUDGES, judged
from rlsae.interpretation.labels import Kind, Labelled, kinds_of
from rlsae.interpretation.logit_lens import raised_and_lowered
from rlsae.interpretation.positions import Positions, Vocabulary
from rlsae.interpretation.windows import Cuts, Window, draw, fired_at
from rlsae.sae.dictionary import SparseAutoencoder

MAX_ROWS = 1 << 18
"""Rows of training documents, from the first on, from which explanations are drawn."""
SHUFFLED = 3
"""Latents per dictionary that are explained once more with their activations shuffled among rows."""
ENSEMBLE = "ensemble"
BINS = 30
"""Of the histogram of a latent's activations, from 0 to its largest."""
FROM_SELECTION = ["latent", "selected_for", "reward_correlation", "reward_gradient", "task_tagged", "task_effect"]


@dataclass(frozen=True)
class Text:
    """The documents of a study's stores, which are the same for both models, with what explainers need of them."""

    positions: Positions
    cuts: Cuts
    vocabulary: Vocabulary
    training_N: NDArray[np.bool_]
    """Rows that explanations are drawn from."""
    rows: Positions
    """These."""
    kinds: dict[str, Kind]
    labels: dict[str, Labelled]

    @classmethod
    def of(cls, store: ActivationStore, window: int, vocabulary: Vocabulary) -> Text:
        positions = Positions.of_store(store)
        training_N = ~store.held_out_rows()
        training_N &= np.cumsum(training_N) <= MAX_ROWS
        rows, kinds = positions[training_N], kinds_of(vocabulary)
        labels = Labelled.by_kind(kinds, rows)
        return cls(positions, Cuts.of(store, window), vocabulary, training_N, rows, kinds, labels)

    def windows(self, numbers: NDArray[np.int64], acts_N: NDArray[np.float32]) -> list[Window]:
        """Windows by number, with a latent's activations at all rows."""
        return [self._window(int(number), acts_N) for number in numbers]

    def _window(self, number: int, acts_N: NDArray[np.float32]) -> Window:
        rows = slice(int(self.cuts.first_W[number]), int(self.cuts.last_W[number]))
        ids = self.positions.token_N[rows]
        return Window(
            document=int(self.cuts.document_W[number]),
            held_out=bool(self.cuts.held_out_W[number]),
            tokens=tuple(self.vocabulary.texts[token] for token in ids),
            ids=ids,
            acts=acts_N[rows],
            position=int(self.positions.place_N[rows.start]),
            before=int(self.positions.before_N[rows.start]),
        )

    def both_sides(
        self, acts_N: NDArray[np.float32], held_out: bool, count: int, seed: int
    ) -> tuple[list[Window], list[Window]]:
        """Windows in which a latent fires and in which it does not, of training or of held-out documents."""
        near = fired_at(self.cuts, acts_N, self.training_N)
        active, silent = draw(self.cuts, acts_N, held_out, count, near, seed)
        return self.windows(active, acts_N), self.windows(silent, acts_N)


@dataclass
class Findings:
    """Rows of the tables of the interpretation."""

    latents: list[dict[str, Any]] = field(default_factory=list)
    explanations: list[dict[str, Any]] = field(default_factory=list)
    examples: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """How much is drawn and by whom it is judged."""

    judged_windows: int
    examples: int
    window: int
    further_explainers: Mapping[str, Explainer]
    further_judges: Mapping[str, Judge]
    """With a language model; they judge any explanation that has a text."""


def explain_dictionary(
    key: dict[str, Any],
    selection: pd.DataFrame,
    sae: SparseAutoencoder,
    row_acts_NS: NDArray[np.float32],
    own: ActivationStore,
    other: ActivationStore,
    text: Text,
    model: PreTrainedModel,
    settings: Settings,
    found: Findings,
) -> None:
    """Add the rows of one dictionary's selected latents.

    Args:
        key: `role` to `seed`.
        row_acts_NS: activation of the selected latents at every row.
        own, other: stores of the dictionary's model and of the other one; model: whose unembedding is the logit lens.
    """
    said: list[dict[str, Explanation]] = []
    held_out: list[tuple[list[Window], list[Window]]] = []
    raised_SK, lowered_SK = raised_and_lowered(model, sae.W_dec_FD[torch.tensor(selection.latent.to_numpy(np.int64))])
    for s, row in enumerate(selection.to_dict("records")):
        acts_N = np.ascontiguousarray(row_acts_NS[:, s])
        evidence = evidence_of(text, acts_N, raised_SK[s], lowered_SK[s], settings.judged_windows, seed=s)
        explanations = explain(evidence, settings.further_explainers)
        windows = text.both_sides(acts_N, True, settings.judged_windows, seed=s)
        said.append(explanations)
        held_out.append(windows)
        scores = _judge(found, {**key, "latent": row["latent"]}, explanations, windows, settings, control="")
        best = explanations[ENSEMBLE]
        found.latents.append(
            {
                **key,
                **{column: row[column] for column in FROM_SELECTION},
                "explanation": best.text,
                "detection_auc": scores[ENSEMBLE, "detection"].value,
                "status": scores[ENSEMBLE, "detection"].status,
                "raises": text.vocabulary.named(raised_SK[s]),
                "lowers": text.vocabulary.named(lowered_SK[s]),
                "histogram": np.histogram(acts_N[acts_N > 0], BINS, (0, acts_N.max(initial=0) or 1))[0].tolist(),
            }
        )
        found.examples += examples({**key, "latent": row["latent"]}, sae, acts_N, own, other, text, settings)
        found.failures += ({**key, "latent": row["latent"], **failure} for failure in failures(explanations, *windows))
    for s, row in enumerate(selection.to_dict("records")):
        if len(said) > 1:
            _judge(found, {**key, "latent": row["latent"]}, said[s - 1], held_out[s], settings, control="other_latent")
    rng = np.random.default_rng(0)
    for s, row in list(enumerate(selection.to_dict("records")))[:SHUFFLED]:
        acts_N = rng.permutation(row_acts_NS[:, s])
        evidence = evidence_of(text, acts_N, raised_SK[s], lowered_SK[s], settings.judged_windows, seed=s)
        windows = text.both_sides(acts_N, True, settings.judged_windows, seed=s)
        explanations = explain(evidence, {})
        _judge(found, {**key, "latent": row["latent"]}, explanations, windows, settings, control="shuffled")


def evidence_of(
    text: Text,
    acts_N: NDArray[np.float32],
    raised: NDArray[np.int64],
    lowered: NDArray[np.int64],
    windows: int,
    seed: int,
) -> Evidence:
    """What explainers see of a latent with these activations at all rows."""
    active, silent = text.both_sides(acts_N, False, windows, seed)
    training_acts_N = acts_N[text.training_N]
    return Evidence(text.rows, text.kinds, text.labels, training_acts_N, active, silent, raised, lowered, text.vocabulary)


def explain(evidence: Evidence, further: Mapping[str, Explainer]) -> dict[str, Explanation]:
    """What every explainer says."""
    said = {name: explainer(evidence) for name, explainer in EXPLAINERS.items()}
    said[ENSEMBLE] = combine(said, evidence)
    said |= {name: explainer(evidence) for name, explainer in further.items()}
    return {name: replace(one, predict=_remembered(one.predict)) if one.predict else one for name, one in said.items()}


def _remembered(predict: Callable[[Window], Any]) -> Callable[[Window], Any]:
    """Judges ask for the same windows one after the other."""
    known: dict[tuple[int, int], Any] = {}

    @functools.wraps(predict)
    def remembered(window: Window) -> Any:
        place = window.document, window.position
        if place not in known:
            known[place] = predict(window)
        return known[place]

    return remembered


def _judge(
    found: Findings,
    key: dict[str, Any],
    said: Mapping[str, Explanation],
    windows: tuple[list[Window], list[Window]],
    settings: Settings,
    control: str,
) -> dict[tuple[str, str], Score]:
    """Add a row for each explainer and judge; returns the scores."""
    scores = {}
    for explainer, explanation in said.items():
        # A language model is asked for minutes, and so about few.
        asked = not control and explainer in {ENSEMBLE, *settings.further_explainers}
        further = settings.further_judges if asked else {}
        for judge in [*JUDGES, *further]:
            if judge in further:
                score = further[judge](explanation, *windows, key["latent"])
            else:
                score = judged(JUDGES[judge], explanation, *windows, key["latent"])
            scores[explainer, judge] = score
            found.explanations.append(
                {
                    **key,
                    "explainer": explainer,
                    "judge": judge,
                    "control": control,
                    "explanation": explanation.text,
                    "score": score.value,
                    "ci_low": score.low,
                    "ci_high": score.high,
                    "status": score.status,
                }
            )
    return scores


def examples(
    key: dict[str, Any],
    sae: SparseAutoencoder,
    acts_N: NDArray[np.float32],
    own: ActivationStore,
    other: ActivationStore,
    text: Text,
    settings: Settings,
) -> list[dict[str, Any]]:
    """The strongest windows of a latent, with what it reads in the rows of the other model at the same tokens."""
    rows = []
    latent = key["latent"]
    for rank, (document, first, last, peak) in enumerate(top_windows(acts_N, own, settings.examples, settings.window)):
        acts_TD = torch.from_numpy(other.read(key["layer"], first, last)).to(sae.W_dec_FD)
        rows.append(
            {
                **key,
                "rank": rank,
                "document": document,
                "held_out": bool(own.held_out[document]),
                "peak": peak - first,
                "tokens": [text.vocabulary.texts[token] for token in text.positions.token_N[first:last]],
                "activations": acts_N[first:last].tolist(),
                "activations_other": sae.encode(acts_TD)[:, latent].tolist(),
            }
        )
    return rows
