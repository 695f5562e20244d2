"""The plant: what is planted is what the truth says, and the test of write changes finds it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from rlsae.activations.store import ActivationStore
from rlsae.artifacts import MANIFEST, Manifest
from rlsae.cli.app import app
from rlsae.cli.plant import plant as plant_verb
from rlsae.comparison.linear_map import fit_linear_maps
from rlsae.comparison.paired_rows import PairedRows
from rlsae.comparison.tags import tag_pair
from rlsae.comparison.write_change import write_changes
from rlsae.plants.plant import ANGLES, Plant, Truth, draw_truth, read_truth, turn, unit, write_plant, write_recovery_plant
from rlsae.plants.score import score
from rlsae.verification import verify

CPU = torch.device("cpu")
SMALL = Plant(channels=48, directions=96, documents=256, document_rows=64, densities=(0.02, 0.08))
SMALL = replace(SMALL, added=2, removed=2, rotated=2, rescaled=1)
"""Twice as many directions as channels, of which 16 change: fewer than channels, and one linear map could be all changes."""


def angles(a_KD, b_KD):
    """Degrees between rows."""
    cosine_K = (a_KD * b_KD).sum(1) / np.linalg.norm(a_KD, axis=1) / np.linalg.norm(b_KD, axis=1)
    return np.degrees(np.arccos(np.clip(cosine_K, -1, 1)))


class Oracle:
    """A dictionary of the known directions, whose code is the sparsest that explains the rows (FISTA: Beck, Teboulle 2009)."""

    activation = None
    reads = "own"

    def __init__(self, vectors_KD):
        self.W_KD = self.W_dec_FD = torch.from_numpy(vectors_KD).float()
        self.b_dec_D = torch.zeros(vectors_KD.shape[1])
        self.step = 1 / float(torch.linalg.matrix_norm(self.W_KD, 2)) ** 2

    def parts(self):
        return {"base": self.W_dec_FD, "tuned": self.W_dec_FD}

    def encode(self, acts_BD, penalty=0.05, steps=25):
        code_BK = ahead_BK = torch.zeros(len(acts_BD), len(self.W_KD))
        for step in range(steps):
            slope_BK = (ahead_BK @ self.W_KD - acts_BD) @ self.W_KD.T + penalty
            before_BK, code_BK = code_BK, (ahead_BK - self.step * slope_BK).relu()
            ahead_BK = code_BK + step / (step + 3) * (code_BK - before_BK)
        return code_BK * (code_BK > 0.2) * (self.W_KD.norm(dim=1) > 0)

    def directions(self):
        return torch.nn.functional.normalize(self.W_KD, dim=1)


def find_changes(folder, plant):
    """Score of a plant, changes by role, rank of the linear map and tags, all with oracle dictionaries."""
    write_plant(plant, folder)
    truth = read_truth(folder)
    rows = PairedRows(*(ActivationStore(folder / "activations" / role) for role in ("base", "tuned")), layer=0)
    saes = {"base": Oracle(truth.base_KD), "tuned": Oracle(truth.tuned_KD)}
    found, rank = write_changes(saes, rows, fit_linear_maps(rows, CPU), CPU)
    tags, _ = tag_pair(found)
    latents = pd.concat([pd.DataFrame({"role": role, "tag": tags[role].tag}) for role in tags], ignore_index=True)
    decoders = {role: sae.directions().numpy() for role, sae in saes.items()}
    return score(truth, latents, decoders), found, rank, latents


# --- what is planted ---------------------------------------------------------------------------------------------


def test_a_turn_has_its_angle_and_keeps_the_length():
    rng = np.random.default_rng(0)
    vectors_KD = 3 * unit(rng.normal(size=(5, 20)))
    turned_KD = turn(vectors_KD, np.array([0.0, 15, 60, 90, 180]), rng)
    assert angles(vectors_KD, turned_KD) == pytest.approx([0, 15, 60, 90, 180], abs=1e-4)
    assert np.linalg.norm(turned_KD, axis=1) == pytest.approx(np.full(5, 3.0))


def test_the_truth_holds_the_planted_numbers_of_each_kind():
    table = draw_truth(Plant()).table
    expected = {"unchanged": 212, "rotated": 20, "added": 8, "removed": 8, "rescaled": 8}
    assert table.kind.value_counts().to_dict() == expected
    assert table[table.kind == "rotated"].angle.value_counts().to_dict() == dict.fromkeys(ANGLES, 4)
    assert table[table.kind == "rescaled"].factor.value_counts().to_dict() == {2.0: 4, 0.5: 4}
    assert table.density.between(0.005, 0.08).all()


def test_directions_become_what_the_truth_says():
    truth = draw_truth(replace(Plant(), drift=0.0))
    kind = truth.table.kind.to_numpy()
    assert (truth.base_KD[kind == "added"] == 0).all()
    assert (truth.tuned_KD[kind == "removed"] == 0).all()
    np.testing.assert_allclose(truth.tuned_KD[kind == "unchanged"], truth.base_KD[kind == "unchanged"])
    turned = kind == "rotated"
    assert angles(truth.base_KD[turned], truth.tuned_KD[turned]) == pytest.approx(truth.table.angle[turned].to_numpy())
    scaled = kind == "rescaled"
    np.testing.assert_allclose(truth.tuned_KD[scaled], truth.base_KD[scaled] * truth.table.factor[scaled].to_numpy()[:, None])


def test_every_direction_drifts_by_an_angle_up_to_the_largest():
    truth = draw_truth(replace(Plant(), drift=15.0).without_changes())
    moved = angles(truth.base_KD, truth.tuned_KD)
    assert moved.max() < 15
    assert np.median(moved) == pytest.approx(7.5, abs=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Folder of a plant whose rows tell the amplitude of every direction; not to be written to."""
    folder = tmp_path_factory.mktemp("plant")
    write_plant(replace(SMALL, channels=128, linear_share=0.2, noise=0.01), folder)
    return folder


def rows_of(folder, role):
    store = ActivationStore(folder / "activations" / role)
    return store.read(0, 0, store.rows).astype(np.float64)


def test_both_stores_are_whole_and_hold_the_same_tokens(planted):
    for role in ("base", "tuned"):
        assert Manifest.read(planted / "activations" / role).stage == "activations"
        problems, _ = verify(planted / "activations" / role)
        assert problems == []
    base, tuned = (ActivationStore(planted / "activations" / role) for role in ("base", "tuned"))
    np.testing.assert_array_equal(base.start, tuned.start)
    assert base.rows == 256 * 64
    assert base.held_out.mean() == pytest.approx(0.1, abs=0.01)


def test_rows_are_sums_of_the_directions_in_the_truth(planted):
    truth = read_truth(planted)
    for role, vectors_KD in (("base", truth.base_KD), ("tuned", truth.tuned_KD)):
        acts_ND = rows_of(planted, role)
        left_ND = acts_ND - acts_ND @ np.linalg.pinv(vectors_KD) @ vectors_KD
        assert left_ND.var() < 0.005 * acts_ND.var()


def test_directions_fire_as_often_as_the_truth_says(planted):
    truth = read_truth(planted)
    present = (truth.table.kind != "added").to_numpy()
    amplitude_NK = rows_of(planted, "base") @ np.linalg.pinv(truth.base_KD)
    density = (amplitude_NK > 0.25).mean(0)[present]
    assert np.corrcoef(density, truth.table.density[present])[0, 1] > 0.9
    assert density.mean() == pytest.approx(truth.table.density[present].mean(), rel=0.15)


def test_tokens_of_one_document_are_more_alike_than_those_of_two(planted):
    truth = read_truth(planted)
    fires_TBK = (rows_of(planted, "base") @ np.linalg.pinv(truth.base_KD) > 0.25).reshape(256, 64, -1)
    density_K = fires_TBK.mean((0, 1))
    independent_K = density_K * (1 - density_K) / 64
    present = density_K > 0
    assert (fires_TBK.mean(1).var(0)[present] / independent_K[present]).mean() > 2


def test_the_linear_map_moves_the_wanted_share_of_the_variance(tmp_path):
    plant = replace(SMALL, linear_share=0.2, drift=0.0, noise=0.0).without_changes()
    write_plant(plant, tmp_path)
    base_ND, tuned_ND = rows_of(tmp_path, "base"), rows_of(tmp_path, "tuned")
    assert (tuned_ND - base_ND).var(0).sum() / base_ND.var(0).sum() == pytest.approx(0.2, rel=0.05)


def test_a_seed_gives_one_plant_and_another_seed_another(tmp_path):
    plant = replace(SMALL, documents=32)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_plant(replace(plant, seed=seed), tmp_path / name)
    first, again, other = ((tmp_path / name / "activations/tuned" / MANIFEST).read_bytes() for name in "abc")
    assert first == again != other


def test_the_plant_to_recover_has_three_directions_per_row_and_one_model(tmp_path):
    write_recovery_plant(tmp_path, documents=64)
    truth = read_truth(tmp_path)
    assert truth.base_KD.shape == (256, 64)
    assert set(truth.table.kind) == {"unchanged"}
    assert np.linalg.norm(truth.base_KD, axis=1) == pytest.approx(np.ones(256))
    # Directions are nearly orthogonal, amplitudes have mean square 13/12: 3 directions per row on average.
    assert (rows_of(tmp_path, "base") ** 2).sum(1).mean() == pytest.approx(3 * 13 / 12, rel=0.1)
    assert not (tmp_path / "activations" / "tuned").exists()


# --- what is found -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drift", "linear_share"), [(3.0, 0.0), (15.0, 0.0), (3.0, 0.1)], ids=["at rest", "moving bulk", "shared linear map"]
)
def test_every_planted_change_is_found_with_its_kind_and_little_else(tmp_path, drift, linear_share):
    plant = replace(SMALL, drift=drift, linear_share=linear_share, linear_rank=2)
    (result, table), _, rank, _ = find_changes(tmp_path, plant)
    assert result.coverage == result.recall == result.recall_covered == 1
    assert result.false_discovery <= 0.05
    assert result.kind_accuracy >= 0.9
    assert table[table.kind == "unchanged"].covered.all()
    assert rank == (2 if linear_share else 0)


def test_rows_as_they_are_drown_in_a_shared_linear_map_and_aligned_rows_do_not(tmp_path):
    _, found, _, _ = find_changes(tmp_path, replace(SMALL, linear_share=0.1, linear_rank=2).without_changes())
    for change in found.values():
        assert np.nanmedian(change.change_raw) > 0.2
        assert np.nanmedian(change.change) < 0.1


@pytest.mark.parametrize(("drift", "linear_share"), [(3.0, 0.0), (15.0, 0.0), (3.0, 0.1)])
def test_drift_noise_and_a_shared_map_alone_give_no_tags(tmp_path, drift, linear_share):
    plant = replace(SMALL, drift=drift, linear_share=linear_share).without_changes()
    (result, _), _, _, latents = find_changes(tmp_path, plant)
    assert result.tagged == 0
    assert (latents.tag == "unchanged").mean() > 0.95


def test_changes_are_measured_at_their_true_size(tmp_path):
    _, found, _, _ = find_changes(tmp_path, replace(SMALL, drift=0.0))
    truth = read_truth(tmp_path)
    present = (truth.table.kind != "added").to_numpy()
    difference = np.linalg.norm(truth.tuned_KD - truth.base_KD, axis=1)[present]
    assert found["base"].change[present] == pytest.approx(difference, abs=0.12)
    turned = (truth.table.kind == "rotated").to_numpy()
    assert found["base"].angle[turned] == pytest.approx(truth.table.angle[turned].to_numpy(), abs=8)


# --- how it is scored --------------------------------------------------------------------------------------------


def small_truth():
    """Four axes: the second is removed, the third turned towards the fourth channel, the fourth turned by 15 degrees."""
    rows = [("unchanged", 0, 1.0), ("removed", 0, 0.0), ("rotated", 90, 1.0), ("rotated", 15, 1.0)]
    table = pd.DataFrame(rows, columns=["kind", "angle", "factor"]).assign(direction=range(4), density=0.05)
    base_KD = np.eye(6)[:4]
    tuned_KD = np.stack([np.eye(6)[0], np.zeros(6), np.eye(6)[4], base_KD[3]])
    return Truth(table, base_KD, tuned_KD)


def scored(base, tuned):
    """Scores of dictionaries whose latents are the six axes, with these tags."""
    latents = pd.DataFrame({"role": ["base"] * 6 + ["tuned"] * 6, "tag": base + tuned})
    return score(small_truth(), latents, {"base": np.eye(6), "tuned": np.eye(6)})


def test_a_change_is_found_by_a_tagged_latent_of_either_dictionary():
    still = ["unchanged"] * 6
    result, table = scored([*still[:1], "removed", *still[:4]], still)
    assert (result.recall, result.coverage, result.recall_covered) == (0.5, 1, 0.5)
    assert table.found.tolist() == [False, True, False, False]
    result, _ = scored(still, [*still[:4], "rotated", "unchanged"])
    assert result.recall == 0.5


def test_small_rotations_may_be_missed_and_tagging_them_is_not_false():
    still = ["unchanged"] * 6
    result, _ = scored(["unchanged", "removed", "rotated", "rotated", "unchanged", "unchanged"], still)
    assert (result.recall, result.false_discovery, result.kind_accuracy) == (1, 0, 1)


def test_tags_of_latents_that_no_change_touches_are_false_discoveries():
    still = ["unchanged"] * 6
    result, _ = scored(["rotated", "rescaled", "unchanged", "unchanged", "unchanged", "rotated"], still)
    assert result.false_discovery == pytest.approx(2 / 3)
    assert result.kind_accuracy == 0
    assert result.tagged == pytest.approx(3 / 12)


def test_what_no_tested_latent_sees_is_not_covered():
    unseen = ["unchanged", "untestable", "rotated", "unchanged", "dead", "dead"]
    result, table = scored(unseen, ["unchanged", "dead", "dead", "unchanged", "dead", "dead"])
    assert table.covered.tolist() == [True, False, True, True]
    assert (result.coverage, result.recall, result.recall_covered) == (0.5, 0.5, 1)


# --- the verb ----------------------------------------------------------------------------------------------------


def run(*options):
    assert plant_verb.__name__ in {command.callback.__name__ for command in app.registered_commands}
    return CliRunner().invoke(app, ["plant", *map(str, options)])


def test_the_verb_writes_two_stores_and_the_truth(tmp_path):
    assert run("--out", tmp_path, "--documents", 32, "--seed", 3, "--drift", 5).exit_code == 0
    truth, expected = read_truth(tmp_path), draw_truth(Plant(3, documents=32, drift=5.0))
    np.testing.assert_array_equal(truth.base_KD, expected.base_KD)
    assert ActivationStore(tmp_path / "activations" / "tuned").rows == 3200


def test_the_verb_plants_a_null_or_a_single_model_on_request(tmp_path):
    assert run("--out", tmp_path / "null", "--documents", 16, "--null").exit_code == 0
    assert set(read_truth(tmp_path / "null").table.kind) == {"unchanged"}
    assert run("--out", tmp_path / "one", "--documents", 16, "--recovery").exit_code == 0
    assert [path.name for path in (tmp_path / "one" / "activations").iterdir()] == ["base"]


def test_a_folder_that_holds_a_plant_is_not_overwritten(tmp_path):
    (tmp_path / "activations").mkdir()
    result = run("--out", tmp_path)
    assert result.exit_code == 1
    assert "holds a plant already; choose another --out or delete it" in str(result.exception)
