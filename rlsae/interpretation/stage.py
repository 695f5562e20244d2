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
from transformers import PreTrainedTokenizerBase

from rlsae.activations.store import ActivationStore
from rlsae.comparison.kinds import CHANGED, UNTESTED
from rlsae.compute import device
from rlsae.config import Interpretation
from rlsae.interpretation.ablation import COLUMNS, PROMPTS, ablation
from rlsae.interpretation.examples import Evidence, gather, top_windows
from rlsae.interpretation.map_directions import all_map_directions
from rlsae.models import load
from rlsae.progress import Progress, say
from rlsae.resumable import Stage
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.train import load_members
from rlsae.tuning.held_out import HeldOutPrompts, judged_by

KEY = ["role", "layer", "dictionary", "seed", "latent"]
MIN_COUNT = 5
"""Occurrences below which a token's mean activation says little."""
WEAK = 0.1
"""Share of the strongest token's mean activation below which a token is not named."""
MIN_HELD_OUT_FIRINGS = 10
"""Held-out firings below which a score says little."""


def build_interpretation(
    entry: Interpretation, out: Path, work: Path | None, comparison: Path,
    dictionaries: dict[tuple[str, int, str], Path], stores: dict[str, Path], base: Path, tuned: Path, tuned_weights: Path,
    corpus: Path, reward_file: Path | None,
) -> None:  # fmt: skip
    """Select latents of each policy × layer × dictionary (first seed), show where they fire, explain, score.

    Args:
        comparison: its artifact, for the selection; dictionaries, stores: as there.
        base, tuned: artifacts of the policies; tuned_weights: transformers folder of the one that is studied.
        corpus: corpus artifact of the tuning's prompts; reward_file: file or folder of its reward, where it has one.
    """
    inputs = {"comparison": comparison, "base": base, "tuned": tuned, "corpus": corpus}
    inputs |= {f"{role} activations": path for role, path in stores.items()}
    inputs |= {f"{role} layer {layer} {name}": path for (role, layer, name), path in dictionaries.items()}
    inputs |= {"reward": reward_file} if reward_file else {}
    settings = entry.settings()
    with Stage("interpretation", out, settings, inputs, work) as stage:
        where = device()
        model, tokenizer = load(base / "model", where)
        tuning, reward = judged_by(tuned, reward_file)
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
        levels = pd.read_parquet(comparison / "levels.parquet")
        ranks = {layer: int(levels["rank"][levels.layer == layer].max()) for layer in levels.layer.unique().tolist()}
        directions = all_map_directions(opened, ranks, model, tokenizer, reward)
        directions.to_parquet(stage.staging / "map_directions.parquet", index=False)
        policy, _ = load(tuned_weights, where)
        prompts = HeldOutPrompts.draw(corpus, tokenizer, policy, tuning, reward, PROMPTS)
        rows = []
        for (role, layer, name), folder in dictionaries.items():
            seed, path = min(load_members(folder).items())
            mine = table.query("role == @role and layer == @layer and dictionary == @name and seed == @seed")
            if role == "tuned" and entry.random_sets and mine.tag.isin(CHANGED).any():
                sae = SparseAutoencoder.load(path).to(where)
                rows.append(ablation(mine, policy, sae, opened[role].group.attrs["hook"], prompts, entry.random_sets))
                say(f"ablation: layer {layer}, {name}: {rows[-1]['reward_change']:.3f} of {rows[-1]['reward']:.3f}")
        ablations = pd.DataFrame(rows, columns=COLUMNS)
        ablations.to_parquet(stage.staging / "ablations.parquet", index=False)
        scored = latents_table.detection_auc.dropna()
        mean = float(scored.mean()) if len(scored) else None
        stage.publish(
            {"latents_explained": int((latents_table.explanation != "").sum()), "detection_auc": mean} | strongest(ablations)
        )


def strongest(ablations: pd.DataFrame) -> dict[str, Any]:
    """Metrics of the dictionary whose tagged latents cost most reward when they are ablated."""
    if ablations.empty:
        return {"ablation_reward_change": None, "ablation_random_quantile": None}
    row = ablations.sort_values("reward_change").iloc[0]
    return {"ablation_reward_change": float(row.reward_change), "ablation_random_quantile": float(row.random_quantile)}


def select(table: pd.DataFrame, count: int) -> pd.DataFrame:
    """Half those whose write changed most, half those whose write changed least, of the tested latents.

    Tagged ones come first, the replicated before the others; `selected_for` says why a latent is there.
    """
    tested = table[~table.tag.isin(UNTESTED)]
    tested = tested.assign(tagged=tested.tag.isin(CHANGED), again=tested.replicated.fillna(value=False).astype(bool))
    ranked = tested.sort_values(["again", "tagged", "write_change"], ascending=False, kind="stable")
    count = min(count, len(ranked))
    most, least = ranked.head(count - count // 2), ranked.tail(count // 2).iloc[::-1]
    reason = np.select([most.again, most.tagged], ["changed, replicated", "changed"], "largest of the others")
    chosen = pd.concat([most.assign(selected_for=reason), least.assign(selected_for="least changed")])
    return chosen.drop(columns=["tagged", "again"])


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
