"""Dictionaries go both ways: SAELens loads every kind that is exported, and folders of the peers are read as they mean them."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.external import load_external
from rlsae.sae.train import _adam
from tests.interop import peers
from tests.unit.small_dictionaries import DICTIONARY_LEARNING, ENTRIES, member_of, random_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not peers.PYTHON.exists(), reason=peers.MISSING)]
CHANNELS, LATENTS, ROWS = 32, 128, 256

READ_BY_SAELENS = """
import json, sys
from safetensors.torch import load_file, save_file
from sae_lens import SAE
folder = sys.argv[1]
rows = load_file(f"{folder}/rows.safetensors")["rows"]
found = {}
for name in sys.argv[2:]:
    sae = SAE.load_from_disk(f"{folder}/{name}")
    latents = sae.encode(rows)
    found |= {f"{name}.latents": latents.contiguous(), f"{name}.decoded": sae.decode(latents).contiguous()}
save_file({name: tensor.detach() for name, tensor in found.items()}, f"{folder}/found.safetensors")
print(json.dumps({name: SAE.load_from_disk(f"{folder}/{name}").cfg.metadata.to_dict() for name in sys.argv[2:]}, default=str))
"""

WRITTEN_BY_SAELENS = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.registry import get_sae_class
folder, kind = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
sae_class, config_class = get_sae_class(kind)
options = {"k": 8} if kind == "topk" else {}
sae = sae_class(config_class(d_in=32, d_sae=128, apply_b_dec_to_input=True, **options))
for parameter in sae.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
rows = load_file(f"{folder}/rows.safetensors")["rows"]
sae.save_model(f"{folder}/{kind}")
latents = sae.encode(rows)
save_file({"latents": latents.detach().contiguous(), "decoded": sae.decode(latents).detach()}, f"{folder}/found.safetensors")
print(json.dumps("done"))
"""

WRITTEN_BY_DICTIONARY_LEARNING = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from dictionary_learning import dictionary
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k
folder, kind = sys.argv[1], sys.argv[2]
torch.manual_seed(0)
options = {"AutoEncoderTopK": {"k": 8}, "BatchTopKSAE": {"k": 8}, "MatryoshkaBatchTopKSAE": {"k": 8, "group_sizes": [32, 96]}}
homes = (dictionary, top_k, batch_top_k, matryoshka_batch_top_k)
sae_class = next(getattr(home, kind) for home in homes if hasattr(home, kind))
sae = sae_class(32, 128, **options.get(kind, {}))
for parameter in sae.parameters():
    parameter.data += 0.1 * torch.randn_like(parameter)
if hasattr(sae, "threshold") and sae.threshold.ndim == 0:
    sae.threshold.fill_(0.4)
rows = load_file(f"{folder}/rows.safetensors")["rows"]
Path(f"{folder}/{kind}").mkdir()
torch.save(sae.state_dict(), f"{folder}/{kind}/ae.pt")
Path(f"{folder}/{kind}/config.json").write_text(json.dumps({"trainer": {"dict_class": kind, **options.get(kind, {})}}))
latents = sae.encode(rows)
save_file({"latents": latents.detach(), "decoded": sae.decode(latents).detach()}, f"{folder}/found.safetensors")
print(json.dumps("done"))
"""

WRITTEN_BY_SPARSIFY = """
import json, sys, torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder
from sparsify.config import SparseCoderConfig
folder = sys.argv[1]
torch.manual_seed(0)
sae = SparseCoder(32, SparseCoderConfig(num_latents=128, k=8))
sae.b_dec.data += 0.1 * torch.randn_like(sae.b_dec)
rows = load_file(f"{folder}/rows.safetensors")["rows"]
sae.save_to_disk(f"{folder}/sparsify")
encoded = sae.encode(rows)
latents = torch.zeros(len(rows), 128).scatter_(1, encoded.top_indices, encoded.top_acts.detach())
decoded = sae.decode(encoded.top_acts, encoded.top_indices)
save_file({"latents": latents, "decoded": decoded.detach()}, f"{folder}/found.safetensors")
print(json.dumps("done"))
"""


@pytest.fixture(scope="module")
def rows_BD():
    """Raw rows, neither centred nor of unit scale."""
    return 3 * random_rows(ROWS, CHANNELS, seed=5) + 2 * random_rows(1, CHANNELS, seed=6)


@pytest.fixture
def folder(tmp_path, rows_BD):
    save_file({"rows": rows_BD}, tmp_path / "rows.safetensors")
    return tmp_path


def trained(architecture, rows_BD, **changes):
    """An exported dictionary after some steps on centred and scaled rows."""
    mean_D, scale = rows_BD.mean(0), 1 / 3
    member = member_of(architecture, CHANNELS, LATENTS, batch_rows=ROWS, **changes)
    optimizer = _adam(member.parameters(), 0.01)
    with torch.no_grad():
        for _ in range(50):
            member.backward((rows_BD - mean_D) * scale)
            optimizer.step()
            member.constrain()
    return member.export().reading_raw_rows(mean_D, scale)


def assert_same(sae, rows_BD, latents_BF, decoded_BD):
    assert torch.count_nonzero(latents_BF) > ROWS
    torch.testing.assert_close(sae.encode(rows_BD), latents_BF, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae.decode(latents_BF), decoded_BD, rtol=1e-4, atol=1e-4)


def test_saelens_computes_what_every_exported_architecture_computes(folder, rows_BD):
    saes = {architecture: trained(architecture, rows_BD) for architecture in ENTRIES}
    # A crosscoder is an autoencoder of the rows of two models side by side: here of 16 channels each.
    saes |= {f"crosscoder-{name}": trained(name, rows_BD, reads="both") for name in ("relu", "topk", "batchtopk")}
    for name, sae in saes.items():
        sae.save(folder / name, torch.full((LATENTS,), 0.01))
    peers.run(READ_BY_SAELENS, folder, *saes)
    found = load_file(folder / "found.safetensors")
    for name, sae in saes.items():
        assert_same(sae, rows_BD, found[f"{name}.latents"], found[f"{name}.decoded"])


def test_saelens_keeps_where_a_dictionary_comes_from(folder, rows_BD):
    origin = {"model_name": "tiny", "hook_name": "gpt_neox.layers.1.mlp", "rlsae": {"seed": 3, "layer": 1}}
    sae = trained("topk", rows_BD)
    SparseAutoencoder(sae.W_enc_DF, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, origin, sae.activation).save(folder / "topk")
    assert peers.run(READ_BY_SAELENS, folder, "topk")["topk"].items() >= origin.items()


@pytest.mark.parametrize("kind", ["standard", "topk", "jumprelu", "gated"])
def test_a_dictionary_that_saelens_saved_is_read_as_it_computes(folder, rows_BD, kind):
    peers.run(WRITTEN_BY_SAELENS, folder, kind)
    found = load_file(folder / "found.safetensors")
    assert_same(load_external(folder / kind), rows_BD, found["latents"], found["decoded"])


@pytest.mark.parametrize("kind", DICTIONARY_LEARNING)
def test_a_dictionary_that_dictionary_learning_saved_is_read_as_it_computes(folder, rows_BD, kind):
    peers.run(WRITTEN_BY_DICTIONARY_LEARNING, folder, kind)
    found = load_file(folder / "found.safetensors")
    assert_same(load_external(folder / kind), rows_BD, found["latents"], found["decoded"])


def test_a_dictionary_that_sparsify_saved_is_read_as_it_computes(folder, rows_BD):
    peers.run(WRITTEN_BY_SPARSIFY, folder)
    found = load_file(folder / "found.safetensors")
    assert_same(load_external(folder / "sparsify"), rows_BD, found["latents"], found["decoded"])
