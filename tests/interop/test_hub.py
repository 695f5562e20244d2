"""SAELens loads from an exported folder as from a repository of the hub, whose files are those of the folder."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.sae.dictionary import SparseAutoencoder
from rlsae.sae.hub import export
from tests.interop import peers
from tests.unit.small_dictionaries import ENTRIES, member_of, random_rows

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not peers.PYTHON.exists(), reason=peers.MISSING)]
CHANNELS, LATENTS = 8, 32
SCORES = dict.fromkeys(["fvu", "l0", "dead_share", "ce_recovered", "kl_recovered"], 0.5)

READ_BY_SAELENS = """
import json, sys
from pathlib import Path
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file, save_file
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders
repository, rows = sys.argv[1], load_file(sys.argv[2])["rows"]
def download(repo_id, filename, **options):
    assert repo_id == "somebody/saes"
    if not Path(repository, filename).exists():
        raise EntryNotFoundError(filename)
    return str(Path(repository, filename))
pretrained_sae_loaders.hf_hub_download = download
found, names = {}, sys.argv[3:]
for number, name in enumerate(names):
    sae, config, sparsity = SAE.from_pretrained_with_cfg_and_sparsity("somebody/saes", name)
    found |= {f"{number}.latents": sae.encode(rows).detach().contiguous(), f"{number}.sparsity": sparsity}
save_file(found, sys.argv[2])
print(json.dumps([SAE.from_pretrained("somebody/saes", name).cfg.metadata.hook_name for name in names]))
"""


def test_saelens_loads_every_architecture_from_the_exported_folder(tmp_path):
    rows_BD, folders, saes = random_rows(64, CHANNELS), [], []
    for architecture in ENTRIES:
        facts = {"seed": 0, "layer": 1, "settings": {}, "activations": "sha256:ac"}
        metadata = {"model_name": "tiny", "hook_name": "gpt_neox.layers.1.mlp", "training_architecture": architecture}
        trained = member_of(architecture, CHANNELS, LATENTS).export()
        tensors = trained.W_enc_DF, trained.b_enc_F, trained.W_dec_FD, trained.b_dec_D
        saes.append(SparseAutoencoder(*tensors, metadata | {"rlsae": facts}, trained.activation))
        folders.append(tmp_path / "dictionaries" / architecture)
        saes[-1].save(folders[-1] / "saes" / "seed0", torch.full((LATENTS,), 0.01))
        manifest = Manifest("dictionaries", {}, {}, {"saes": digest(folders[-1] / "saes")}, {"seed0": SCORES})
        (folders[-1] / MANIFEST).write_text(manifest.to_json())
    names = export(folders, tmp_path / "hub")
    save_file({"rows": rows_BD}, tmp_path / "rows.safetensors")
    hooks = peers.run(READ_BY_SAELENS, tmp_path / "hub", tmp_path / "rows.safetensors", *names)
    assert hooks == ["gpt_neox.layers.1.mlp"] * len(ENTRIES)
    found = load_file(tmp_path / "rows.safetensors")
    for number, sae in enumerate(saes):
        torch.testing.assert_close(found[f"{number}.latents"], sae.encode(rows_BD), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[f"{number}.sparsity"], torch.full((LATENTS,), -2.0))
