"""The figure of a dictionaries artifact."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from rlsae.sae.figures import save

DENSITY = {0: np.array([0.0, 0.0, 1e-7, 0.1, 0.2]), 3: np.array([0.0, 1e-2, 0.1, 0.2, 1.0])}
CURVES = pd.DataFrame([{"seed": s, "step": t, "mse": 1 / t, "l1": 1.0, "l0": 9 / t} for s in DENSITY for t in (1, 2, 3)])


@pytest.fixture
def drawn(tmp_path):
    """Function of densities and curves: the figure as text."""

    def draw(curves, name="figures"):
        save(tmp_path / name, DENSITY, curves)
        return (tmp_path / name / "training.svg").read_text()

    return draw


def test_densities_and_both_curves_are_drawn_and_what_never_fires_is_counted(drawn):
    text = drawn(CURVES)
    assert "Latents that never fire: 2 (seed 0), 1 (seed 3)" in text
    assert text.count('id="axes_') == 3
    assert "L0 (active latents per row)" in text


def test_an_autoencoder_that_was_not_trained_here_has_densities_alone(drawn):
    assert drawn(CURVES[:0]).count('id="axes_') == 1


def test_equal_data_give_equal_bytes(drawn):
    assert drawn(CURVES) == drawn(CURVES, "again")
