"""All probes of one study, as tables."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlsae.config.probes import Probes
from rlsae.corpora import DOCUMENTS, PAIRS
from rlsae.interpretation.probes.components import COLUMNS as COMPONENT_COLUMNS
from rlsae.interpretation.probes.components import principal_components
from rlsae.interpretation.probes.features import Features, all_features
from rlsae.interpretation.probes.overlap import lift
from rlsae.interpretation.probes.probe import COLUMNS, PREDICTIONS, logistic_probes, ridge_probes
from rlsae.interpretation.probes.spans import response_spans
from rlsae.interpretation.probes.triple_file import read_triples
from rlsae.interpretation.probes.triples import COLUMNS as TRIPLE_COLUMNS
from rlsae.interpretation.probes.triples import Triples, build_triples
from rlsae.models import Hook, context_limit
from rlsae.progress import say
from rlsae.sae.dictionary import SparseAutoencoder

OVERLAP = [
    "layer", "by", "rows", "rows_high", "latents", "tagged", "share_tagged_high", "share_all_high", "share_tagged_low",
    "share_all_low", "lift_high", "lift_low", "odds_ratio", "ci_low", "ci_high", "p", "p_fisher", "status",
]  # fmt: skip


@dataclass(frozen=True)
class ProbeTables:
    """What the probes of a study found."""

    triples: pd.DataFrame
    probes: pd.DataFrame
    predictions: pd.DataFrame
    """Held-out ridge predictions: `PREDICTIONS` of `probe.py`."""
    overlap: pd.DataFrame
    """`lift` by layer and by what says that a reward is high: the `probe` (tuned_sae on the lexicon) or the `lexicon`."""
    components: pd.DataFrame
    """`principal_components` of what the logistic probe reads of tuned_sae; empty without preference pairs."""
    metrics: dict[str, Any]
    """`probe_tau` of tuned_sae on the lexicon and `probe_tau_ci95`, None where nothing is scored; `probe_triples`,
    `probe_split_triples` (with a word of several tokens)."""

    @classmethod
    def empty(cls) -> ProbeTables:
        """Of a study that wants no probes."""
        triples, probes, predictions, overlap, components = (
            pd.DataFrame(columns=columns) for columns in (TRIPLE_COLUMNS, COLUMNS, PREDICTIONS, OVERLAP, COMPONENT_COLUMNS)
        )
        return cls(triples, probes, predictions, overlap, components, {"probe_tau": None, "probe_tau_ci95": None})


def build_probes(
    entry: Probes,
    *,
    corpus: Path,
    tokenizer: PreTrainedTokenizerBase,
    base: PreTrainedModel,
    tuned: PreTrainedModel,
    hook: Hook,
    saes: Mapping[tuple[str, int], SparseAutoencoder],
    polarity: dict[str, float],
    file: Path | None = None,
    tagged: Mapping[int, NDArray[np.bool_]] | None = None,
) -> ProbeTables:
    """Probe the latents of base and tuned model.

    Args:
        corpus: corpus artifact of documents or preference pairs; held-out ones alone give contexts and pairs.
        base, tuned: on `rlsae.compute.device()`.
        saes: dictionaries by role and layer, both roles of each layer.
        polarity: the lexicon of the reward, lower-cased words.
        file: triples of one's own.
        tagged: which latents of the tuned dictionary are held to be about the reward [F], by layer, for `overlap`.

    Raises:
        RlsaeError: the file of triples is at fault. A corpus that gives too few is a row with its status.
    """
    limit = min(context_limit(base), context_limit(tuned))
    models = (base, tuned, hook, saes, entry.seed)
    pairs = pd.read_parquet(corpus / PAIRS) if (corpus / PAIRS).exists() else None
    if file is not None:
        triples = read_triples(entry, file, polarity, tokenizer, limit)
    else:
        documents = pd.read_parquet(corpus / DOCUMENTS) if pairs is None else pairs.assign(text=pairs.prompt + pairs.chosen)
        triples = build_triples(entry, documents, polarity, tokenizer, limit)
    say(f"probes: {len(triples.table)} triples, {triples.split} with a word of several tokens")
    features: Features = all_features(triples.spans, *models) if len(triples.table) else {}
    table, predictions = ridge_probes(features, triples.table, entry.seed)
    tables, components = [table], pd.DataFrame(columns=COMPONENT_COLUMNS)
    if pairs is not None:
        held, spans = response_spans(tokenizer, pairs[pairs.held_out].head(entry.triples), limit)
        of_pairs: Features = all_features(spans, *models) if spans else {}
        tables.append(logistic_probes(of_pairs, held.prompt.tolist(), entry.seed))
        if of_pairs:
            components = principal_components(of_pairs["tuned_sae"])
    overlap = _overlap(features, predictions, saes, tagged) if tagged and len(predictions) else pd.DataFrame(columns=OVERLAP)
    return ProbeTables(
        triples.table[TRIPLE_COLUMNS],
        pd.concat(tables, ignore_index=True)[COLUMNS],
        predictions,
        overlap,
        components,
        _metrics(table, triples),
    )


def _overlap(
    features: Features,
    predictions: pd.DataFrame,
    saes: Mapping[tuple[str, int], SparseAutoencoder],
    tagged: Mapping[int, NDArray[np.bool_]],
) -> pd.DataFrame:
    mine = predictions.query("features == 'tuned_sae' and target == 'lexicon'")
    active = np.delete(features["tuned_sae"] > 0, np.s_[2::3], axis=0)
    rows, first = [], 0
    for layer in sorted({layer for _, layer in saes}):
        columns = slice(first, first := first + saes["tuned", layer].latents)
        for by, values in (("probe", mine.prediction), ("lexicon", mine.polarity)):
            if layer in tagged and len(mine):
                found = lift(values.to_numpy(float), active[:, columns], tagged[layer], mine.group.tolist())
                rows.append({"layer": layer, "by": by, **found})
    return pd.DataFrame(rows)


def _metrics(probes: pd.DataFrame, triples: Triples) -> dict[str, Any]:
    row = probes.query("features == 'tuned_sae' and target == 'lexicon' and metric == 'tau'").iloc[0]
    scored = bool(np.isfinite(row.value))
    return {
        "probe_tau": float(row.value) if scored else None,
        "probe_tau_ci95": [float(row.ci_low), float(row.ci_high)] if scored else None,
        "probe_triples": len(triples.table),
        "probe_split_triples": triples.split,
    }
