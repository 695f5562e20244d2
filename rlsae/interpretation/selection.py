"""Which latents of a dictionary are explained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from rlsae.comparison.kinds import CHANGED, UNTESTED
from rlsae.errors import RlsaeError

CHANGED_SHARE, REWARD_SHARE = 0.5, 0.25
"""Of the latents explained, those whose write changed most, and those that go most with the reward; the rest changed least."""


def select(table: pd.DataFrame, count: int, listed: Sequence[int] = ()) -> pd.DataFrame:
    """Of the tested latents, those that changed most, those that go with the reward, and those that changed least.

    Tagged ones come first, the replicated before the others; `selected_for` says why a latent is there.

    Args:
        table: `latent tag replicated write_change reward_correlation reward_gradient` of one dictionary.
        listed: latents that are there in any case.

    Raises:
        RlsaeError: a listed latent is not in the dictionary.
    """
    if unknown := sorted(set(listed) - set(table.latent)):
        raise RlsaeError(f"interpretation.listed: latent {unknown[0]}; this dictionary has latents 0 to {table.latent.max()}")
    tested = table[~table.tag.isin(UNTESTED)]
    tested = tested.assign(tagged=tested.tag.isin(CHANGED), again=tested.replicated.fillna(value=False).astype(bool))
    by_change = tested.sort_values(["again", "tagged", "write_change"], ascending=False, kind="stable")
    link = "reward_correlation" if tested.reward_gradient.isna().all() else "reward_gradient"
    by_reward = tested.sort_values(link, key=abs, ascending=False, kind="stable")
    reason: dict[int, str] = dict.fromkeys(listed, "listed")
    for latents, share, why in (
        (by_change.latent, CHANGED_SHARE, "largest of the others"),
        (by_reward.latent[by_reward[link].notna()], CHANGED_SHARE + REWARD_SHARE, "goes with the reward"),
        (by_change.latent[::-1], 1, "least changed"),
    ):
        wanted = min(len(listed) + round(share * count), len(set(tested.latent) | set(listed)))
        for latent in latents:
            if len(reason) >= wanted:
                break
            reason.setdefault(int(latent), why)
    for latent, again in zip(by_change.latent[by_change.tagged], by_change.again[by_change.tagged], strict=True):
        if reason.get(int(latent), "listed") != "listed":
            reason[int(latent)] = "changed, replicated" if again else "changed"
    chosen = table.set_index("latent").loc[list(reason)].reset_index()
    return chosen.assign(selected_for=list(reason.values()))


def listed_latents(listed: Mapping[str, Sequence[int]], known: Sequence[str]) -> dict[str, list[int]]:
    """
    Raises:
        RlsaeError: latents are listed for a layer or dictionary that the study does not have.
    """
    if unknown := sorted(set(listed) - set(known)):
        raise RlsaeError(f"interpretation.listed: {unknown[0]!r}; this study has {', '.join(sorted(set(known)))}")
    return {name: list(latents) for name, latents in listed.items()}
