"""Stage `interpretation`: explain latents of base and tuned by the tokens at which they fire.

The explanation is drawn from training documents and scored on held-out ones: how well does the mean activation of a row's
token tell the rows at which the latent fires from the others (area under the ROC curve)?
`latents.parquet` has a row per explained latent, `explanations.parquet` one per latent × explainer × judge,
`examples.parquet` one per window.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlsae.activations.store import ActivationStore
from rlsae.interpretation.examples import Evidence, gather, top_windows
from rlsae.progress import Progress
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members

KEY = ["role", "layer", "dictionary", "seed", "latent"]
MIN_COUNT = 5
"""Occurrences below which a token's mean activation says little."""
WEAK = 0.1
"""Share of the strongest token's mean activation below which a token is not named."""
MIN_HELD_OUT_FIRINGS = 10
"""Held-out firings below which a score says little."""


def build_interpretation(
    settings: dict[str, Any], out: Path, work: Path | None, comparison: Path,
    dictionaries: dict[tuple[str, int, str], Path], stores: dict[str, Path], model: Path,
) -> None:  # fmt: skip
    """Select latents of each policy × layer × dictionary (first seed), show where they fire, explain, score.

    Args:
        settings: `latents`, `examples`, `window`, `top_tokens` of the study.
        comparison: its artifact, for the selection; dictionaries, stores: as there.
        model: artifact of the base model, for the tokenizer.
    """
    inputs = {"comparison": comparison} | {f"{role} activations": path for role, path in stores.items()}
    inputs |= {f"{role} layer {layer} {name}": path for (role, layer, name), path in dictionaries.items()}
    with Stage("interpretation", out, settings, inputs, work) as stage:
        tokenizer = AutoTokenizer.from_pretrained(model / "model", local_files_only=True)
        table = pd.read_parquet(comparison / "latents.parquet")
        opened = {role: ActivationStore(path) for role, path in stores.items()}
        explained: list[dict[str, Any]] = []
        examples: list[dict[str, Any]] = []
        progress = Progress("explain", len(dictionaries), "dictionaries")
        for (role, layer, name), folder in dictionaries.items():
            seed, path = min(load_members(folder).items())
            mine = table.query("role == @role and layer == @layer and dictionary == @name and seed == @seed")
            selection = select(mine, settings["latents"])
            latents = selection.latent.to_numpy(np.int64)
            store = opened[role]
            evidence = gather(SparseAutoencoder.load(path), store, layer, latents)
            for s, (latent, reason) in enumerate(zip(latents, selection.selected_for, strict=True)):
                key = dict(zip(KEY, (role, layer, name, seed, int(latent)), strict=True))
                tokens = top_tokens(evidence, s, settings["top_tokens"])
                score, status = (
                    detection_auc(evidence, s, store) if tokens else (float("nan"), "no token fires it often enough")
                )
                explained.append(
                    {
                        **key,
                        "selected_for": reason,
                        "explanation": "fires on " + " ".join(f"‹{tokenizer.decode([t])}›" for t in tokens) if tokens else "",
                        "detection_auc": score,
                        "status": status,
                    }
                )
                examples += _windows(key, evidence, s, store, settings, tokenizer)
            progress.update()
        latents_table = pd.DataFrame(explained, columns=[*KEY, "selected_for", "explanation", "detection_auc", "status"])
        latents_table.to_parquet(stage.staging / "latents.parquet", index=False)
        explanations = latents_table[[*KEY, "explanation", "status"]].assign(
            explainer="tokens", judge="detection_auc", score=latents_table.detection_auc
        )
        explanations.to_parquet(stage.staging / "explanations.parquet", index=False)
        columns = [*KEY, "rank", "document", "held_out", "peak", "tokens", "activations"]
        pd.DataFrame(examples, columns=columns).to_parquet(stage.staging / "examples.parquet", index=False)
        scored = latents_table.detection_auc.dropna()
        mean = float(scored.mean()) if len(scored) else None
        stage.publish({"latents_explained": int((latents_table.explanation != "").sum()), "detection_auc": mean})


def select(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Half the least, half the best matched latents that fire often enough to be scored; `selected_for` says which."""
    alive = table[(table.firings >= MIN_HELD_OUT_FIRINGS) & table.match_cosine_decoder.notna()].sort_values(
        ["match_cosine_decoder", "latent"], kind="stable"
    )
    count = min(count, len(alive))
    least, best = alive.head(count - count // 2), alive.tail(count // 2).iloc[::-1]
    return pd.concat([least.assign(selected_for="least matched"), best.assign(selected_for="best matched")])


def top_tokens(evidence: Evidence, s: int, count: int) -> list[int]:
    """Tokens at which a latent fires most strongly on average: often enough seen, and not weak beside the first."""
    mean_V = np.where(evidence.token_count_V >= MIN_COUNT, evidence.token_mean_SV[s], 0)
    order = np.argsort(-mean_V, kind="stable")[:count]
    return [int(token) for token in order if mean_V[token] > WEAK * mean_V[order[0]]]


def detection_auc(evidence: Evidence, s: int, store: ActivationStore) -> tuple[float, str]:
    """Score of the token explanation on held-out rows; nan with a status where it cannot be scored."""
    held_out = store.held_out_rows()
    fires = evidence.row_acts_NS[held_out, s] > 0
    if fires.sum() < MIN_HELD_OUT_FIRINGS or fires.all():
        return float("nan"), f"fires on {int(fires.sum())} of {len(fires)} held-out rows: not scored"
    predicted: NDArray[np.float64] = evidence.token_mean_SV[s][store.group["token"][:][held_out]]
    return float(roc_auc_score(fires, predicted)), "scored"


def _windows(
    key: dict[str, Any],
    evidence: Evidence,
    s: int,
    store: ActivationStore,
    settings: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    acts_N = evidence.row_acts_NS[:, s]
    token = store.group["token"]
    return [
        {
            **key,
            "rank": rank,
            "document": document,
            "held_out": bool(store.held_out[document]),
            "peak": peak - first,
            "tokens": [tokenizer.decode([int(t)]) for t in token[first:last]],
            "activations": acts_N[first:last].tolist(),
        }
        for rank, (document, first, last, peak) in enumerate(
            top_windows(acts_N, store, settings["examples"], settings["window"])
        )
    ]
