"""A dump of activations: the rows that are stored, and the numbers that are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_artifacts import dump, random_documents, rows_of, tokens_of, write_policy, write_tokens
from small_dumps import HALF_ULP, LENGTHS, Dump

from rlsae.activations import extract as module
from rlsae.activations.store import ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.errors import RlsaeError

MODULES = {
    "gpt_neox": ("gpt_neox.layers.{}", "mlp", "attention"),
    "gpt_neo": ("transformer.h.{}", "mlp", "attn"),
    "gpt2": ("transformer.h.{}", "mlp", "attn"),
    "llama": ("model.layers.{}", "mlp", "self_attn"),
    "gemma": ("model.layers.{}", "mlp", "self_attn"),
    "qwen2": ("model.layers.{}", "mlp", "self_attn"),
}
"""Where each family keeps its blocks, MLPs and attentions, as transformers names them."""


@pytest.fixture(autouse=True)
def on_the_cpu_in_small_batches(monkeypatch):
    monkeypatch.setenv("RLSAE_DEVICE", "cpu")
    monkeypatch.setattr(module, "BATCH_TOKENS", 96)


@pytest.fixture
def tokens(tmp_path):
    return write_tokens(tmp_path / "tokens" / "tiny.reviews", tokens_of(random_documents(LENGTHS)))


@pytest.fixture
def policy(random_model, tokenizer, tmp_path):
    return write_policy(tmp_path / "models" / "tiny", random_model("gpt_neox"), tokenizer)


@pytest.fixture
def new_dump(tmp_path, policy, tokens):
    """Function of a name and settings: a dump that has not begun."""
    return lambda name="mlp", **settings: Dump(tmp_path, policy, tokens, name, **settings)


@torch.no_grad()
def hooked(model, tokens, path, drop_positions=0):
    """Rows of one module by a plain forward hook, one document without padding at a time."""
    kept = []

    def keep(module, arguments, output):
        acts_BTD = output[0] if isinstance(output, tuple) else output
        kept.append(acts_BTD[0, drop_positions:].double().numpy())

    handle = model.get_submodule(path).register_forward_hook(keep)
    for document in range(len(tokens.held_out)):
        model(input_ids=torch.from_numpy(tokens.ids(document).astype(np.int64))[None])
    handle.remove()
    return np.concatenate(kept)


# --- what is stored ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["mlp", "attention", "block"])
@pytest.mark.parametrize("family", MODULES)
def test_rows_are_what_a_hook_sees_document_by_document(random_model, tokenizer, tokens, tmp_path, family, hook):
    model = random_model(family)
    out = dump(tmp_path / "a", write_policy(tmp_path / "m", model, tokenizer), tokens, hook=hook)
    block, mlp, attention = MODULES[family]
    for layer in range(2):
        path = block.format(layer) + {"mlp": f".{mlp}", "attention": f".{attention}", "block": ""}[hook]
        expected = hooked(model, Tokens.open(tokens), path)
        rows = rows_of(out, layer)
        assert rows.dtype == np.float16
        assert np.abs(expected).max() > 0.1
        np.testing.assert_allclose(rows.astype(np.float64), expected, rtol=2 * HALF_ULP, atol=1e-5)
        assert ActivationStore(out).group.attrs["modules"][str(layer)] == path


def test_float32_rows_keep_the_precision_of_the_model(new_dump, policy, tokens, random_model):
    out = new_dump(dtype="float32").parts().publish()
    expected = hooked(random_model("gpt_neox"), Tokens.open(tokens), "gpt_neox.layers.1.mlp")
    assert rows_of(out, 1).dtype == np.float32
    np.testing.assert_allclose(rows_of(out, 1), expected, rtol=1e-4, atol=1e-5)


def test_only_the_asked_layers_are_stored_and_they_are_those_of_the_whole_model(new_dump):
    whole, one = new_dump("whole").parts().publish(), new_dump("one", layers=[0]).parts().publish()
    assert ActivationStore(one).layers == [0]
    assert ActivationStore(whole).layers == [0, 1]
    assert np.array_equal(rows_of(one, 0), rows_of(whole, 0))


def test_dropped_positions_are_seen_by_the_model_and_not_stored(random_model, tokenizer, tmp_path, policy):
    dropping = tokens_of(random_documents(LENGTHS), drop_positions=2)
    out = dump(tmp_path / "a", policy, write_tokens(tmp_path / "tokens" / "dropping", dropping))
    store, metrics = ActivationStore(out), Manifest.read(out).metrics
    assert store.rows == metrics["rows"] == sum(max(0, length - 2) for length in LENGTHS)
    assert metrics["dropped_rows"] == sum(min(2, length) for length in LENGTHS)
    position, document = store.group["position"][:], store.group["document"][:]
    assert position.min() == 2
    assert [dropping.ids(d)[p] for d, p in zip(document, position, strict=True)] == store.group["token"][:].tolist()
    expected = hooked(random_model("gpt_neox"), dropping, "gpt_neox.layers.1.mlp", drop_positions=2)
    np.testing.assert_allclose(store.acts(1)[:].astype(np.float64), expected, rtol=2 * HALF_ULP, atol=1e-5)


def test_rows_beyond_the_asked_number_are_not_stored(new_dump):
    whole, short = new_dump("whole").parts().publish(), new_dump("short", rows=100).parts([0, 1]).publish()
    assert ActivationStore(short).rows == Manifest.read(short).metrics["rows"] == 100
    assert np.array_equal(rows_of(short, 1)[:64], rows_of(whole, 1)[:64])
    np.testing.assert_allclose(rows_of(short, 1), rows_of(whole, 1)[:100], rtol=2 * HALF_ULP, atol=1e-5)


def test_the_manifest_counts_what_is_stored(new_dump):
    out = new_dump().parts().publish()
    manifest = Manifest.read(out)
    assert manifest.inputs.keys() == {"models/tiny", "tokens/tiny.reviews"}
    size = sum(path.stat().st_size for path in (out / "store").rglob("*") if path.is_file())
    assert manifest.metrics == {
        "documents": len(LENGTHS),
        "rows": sum(LENGTHS),
        "dropped_rows": 0,
        "layers": [0, 1],
        "channels": 32,
        "bytes": size,
    }


@pytest.mark.parametrize(("checkpoint", "name"), [(None, "tiny"), (12, "tiny@12")])
def test_a_store_says_which_policy_and_tokens_it_is_of(new_dump, policy, tokens, checkpoint, name):
    out = new_dump(checkpoint=checkpoint).parts().publish()
    attributes = dict(ActivationStore(out).group.attrs)
    assert attributes["policy"] == name
    assert attributes["hook"] == "mlp"
    assert attributes["inputs"] == Manifest.read(out).inputs
    assert attributes["inputs"] == {
        "models/tiny": digest(policy / MANIFEST),
        "tokens/tiny.reviews": digest(tokens / MANIFEST),
    }


def test_the_statistics_are_part_of_the_published_store(new_dump):
    store = ActivationStore(new_dump().parts().publish())
    mean, second_moment = store.statistics(1)
    rows = store.acts(1)[:].astype(np.float64)
    np.testing.assert_allclose(mean, rows.mean(0))
    np.testing.assert_allclose(second_moment, (rows**2).mean(0))


def test_a_layer_that_the_model_does_not_have_is_refused_with_those_it_has(new_dump):
    with pytest.raises(RlsaeError, match="layers: layer 5 is asked for, the model has layers 0 to 1"):
        new_dump(layers=[0, 5]).part(0)


# --- numbers that cannot be stored -------------------------------------------------------------------------------


@pytest.fixture
def faulty(random_model, tokenizer, tokens, tmp_path):
    """Function of a value and settings: a dump of a model whose second MLP puts out this value in one channel."""

    def with_value(value, **settings):
        model = random_model("gpt_neox")
        with torch.no_grad():
            model.get_submodule("gpt_neox.layers.1.mlp.dense_4h_to_h").bias[3] = value
        return Dump(tmp_path, write_policy(tmp_path / "faulty", model, tokenizer), tokens, **settings)

    return with_value


@pytest.mark.filterwarnings("error")
def test_a_value_beyond_float16_is_refused_with_its_layer_and_the_remedy(faulty):
    with pytest.raises(RlsaeError, match=r"layer 1, row 0: a value beyond 65,504 .*; set `dtype: float32`"):
        faulty(1e5).part(0)


def test_a_value_beyond_float16_fits_float32(faulty):
    out = faulty(-1e5, dtype="float32").parts().publish()
    assert np.abs(rows_of(out, 1)[:, 3] + 1e5).max() < 100


def test_the_largest_values_of_float16_are_stored(faulty):
    out = faulty(60_000.0).parts().publish()
    assert np.isfinite(rows_of(out, 1)).all()


@pytest.mark.parametrize(("value", "dtype"), [("nan", "float16"), ("nan", "float32"), ("inf", "float32"), ("-inf", "float32")])
def test_values_that_are_not_finite_are_refused_with_their_layer(faulty, value, dtype):
    with pytest.raises(RlsaeError, match="layer 1, row 0: the model put out values that are not finite; check its weights"):
        faulty(float(value), dtype=dtype).part(0)


@pytest.mark.parametrize("value", ["inf", "-inf"])
def test_in_float16_an_infinite_value_is_told_as_one_that_does_not_fit(faulty, value):
    with pytest.raises(RlsaeError, match="layer 1, row 0: a value beyond 65,504 or an infinite one does not fit float16"):
        faulty(float(value)).part(0)


def test_a_part_that_was_refused_is_not_stamped_and_not_published(faulty):
    started = faulty(float("nan"))
    with pytest.raises(RlsaeError, match="not finite"):
        started.part(0)
    assert not started.stamps.exists()
    with pytest.raises(RlsaeError, match="layer 0: the shard from row 0 on is missing"):
        started.publish()
