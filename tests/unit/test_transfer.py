"""What a dictionary is worth to the other model: on its rows, and inside it."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from small_artifacts import dump, random_documents, tiny_model, tokens_of, write_policy, write_tokens
from small_dictionaries import CPU, autoencoder
from small_models import perturbed

from rlsae.activations.store import ActivationStore
from rlsae.comparison.transfer import squared_errors, transfer
from rlsae.sae.evaluate import held_out_quality, recovered

LAYER = 1
ROLES = ("base", "tuned")
SCORES = {"fvu": "on", "ce_recovered": "in", "kl_recovered": "in"}


@pytest.fixture(scope="module")
def chain(tokenizer, tmp_path_factory):
    """Tokens, and by role the weights, the stored rows and two dictionaries that know the directions of its rows."""
    results = tmp_path_factory.mktemp("transfer") / "results"
    base = tiny_model("gpt2", vocabulary=len(tokenizer))
    tokens = write_tokens(results / "tokens" / "tiny.reviews", tokens_of(random_documents([5 + i % 20 for i in range(60)])))
    found = {"tokens": tokens, "weights": {}, "stores": {}, "folders": {}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RLSAE_DEVICE", "cpu")
        for role, model in {"base": base, "tuned": perturbed(base, 0, scale=0.5)}.items():
            policy = write_policy(results / "policies" / role, model, tokenizer)
            store = ActivationStore(dump(results / "activations" / role, policy, tokens, dtype="float32"))
            found |= {"weights": found["weights"] | {role: policy / "model"}, "stores": found["stores"] | {role: store}}
            for seed in (0, 1):
                folder = results / "dictionaries" / role / f"seed{seed}"
                reader(store, seed).save(folder)
                found["folders"][role, LAYER, "small", seed] = folder
    return found


def reader(store, seed):
    """A dictionary of the mean and the largest principal components of the rows, one more with each seed."""
    rows_ND = store.acts(LAYER)[:].astype(float)
    mean_D = rows_ND.mean(0)
    components_KD = np.linalg.svd(rows_ND - mean_D, full_matrices=False)[2][: 8 + seed]
    W_dec_FD = np.concatenate([components_KD, -components_KD])
    return autoencoder(W_dec_FD.T, -W_dec_FD @ mean_D, W_dec_FD, mean_D)


@pytest.fixture(scope="module")
def found(chain):
    return transfer(chain["folders"], chain["stores"], chain["weights"], chain["tokens"], CPU)


def expected(chain, role, policy, seed):
    """Scores of one dictionary with one policy, by the functions of the dictionaries' own stage."""
    store = chain["stores"][policy]
    sae = reader(chain["stores"][role], seed)
    inside = recovered([sae], chain["weights"][policy], chain["tokens"], LAYER, "mlp", CPU)[0]
    return {"fvu": held_out_quality(sae, store, LAYER, CPU)[0]["fvu"], **inside}


@pytest.mark.parametrize(("role", "policy"), list(itertools.product(ROLES, repeat=2)))
def test_every_score_is_that_of_the_dictionarys_own_stage_with_the_rows_and_the_model_of_the_policy(chain, found, role, policy):
    each = [expected(chain, role, policy, seed) for seed in (0, 1)]
    values = {row["measure"]: row["value"] for row in found.aggregates}
    suffix = "" if role == policy else "_other"
    for score, where in SCORES.items():
        by_seed = [found.by_seed.loc[(LAYER, "small", seed, role), score + suffix] for seed in (0, 1)]
        assert by_seed == pytest.approx([scores[score] for scores in each], abs=1e-6)
        assert values[f"{score}_{role}_{where}_{policy}"] == pytest.approx(np.mean(by_seed))


def test_a_dictionary_misses_more_of_the_other_policys_rows(found):
    assert (found.by_seed.fvu_other > 1.1 * found.by_seed.fvu).all()


def test_there_is_a_row_per_score_dictionary_and_policy_with_an_interval_around_the_value(found):
    rows = pd.DataFrame(found.aggregates)
    assert sorted(rows.measure) == sorted(
        f"{score}_{role}_{where}_{policy}" for score, where in SCORES.items() for role in ROLES for policy in ROLES
    )
    assert ((rows.ci_low < rows.value) & (rows.value < rows.ci_high)).all()
    assert (rows.ci_high - rows.ci_low)[rows.measure.str.startswith("fvu")].max() < 0.2


def test_the_squares_of_a_document_are_those_of_its_held_out_rows(chain):
    store, sae = chain["stores"]["tuned"], reader(chain["stores"]["base"], 0)
    held_out, document_N = store.held_out_rows(), store.group["document"][:]
    acts_ND = torch.from_numpy(store.acts(LAYER)[:][held_out])
    error_N = (sae.decode(sae.encode(acts_ND)) - acts_ND).double().square().sum(1).numpy()
    spread_N = (acts_ND.double() - acts_ND.double().mean(0)).square().sum(1).numpy()
    variance_M, error_SM = squared_errors([sae], store, LAYER, CPU)
    documents = np.unique(document_N[held_out])
    assert len(documents) == len(variance_M) == 15
    for number, document in enumerate(documents):
        rows = document_N[held_out] == document
        assert variance_M[number] == pytest.approx(spread_N[rows].sum())
        assert error_SM[0, number] == pytest.approx(error_N[rows].sum(), rel=1e-5)


def test_a_score_that_is_not_finite_is_none_in_the_manifest(found):
    row = {"layer": 1, "dictionary": "small", "measure": "ce_recovered_base_in_tuned", "value": np.inf}
    row |= {"ci_low": 0.0, "ci_high": np.inf}
    figures = type(found)([row], found.by_seed).figures(1, "small")
    assert figures == {"ce_recovered_base_in_tuned": None, "ce_recovered_base_in_tuned_ci95": None}
    assert found.figures(1, "big") == {}
