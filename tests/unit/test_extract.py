"""A dump of activations: what is stored, how its parts come together, and how it survives a kill."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from small_artifacts import DUMP, dump, random_documents, read_json, rows_of, tokens_of, write_policy, write_tokens

from rlsae import resumable
from rlsae.activations import extract as module
from rlsae.activations.extract import consolidate, extract_part, join, mark
from rlsae.activations.store import STORE, ActivationStore
from rlsae.activations.tokens import Tokens
from rlsae.artifacts import MANIFEST, Manifest, digest
from rlsae.errors import RlsaeError
from rlsae.resumable import OUTPUTS

LENGTHS = [12, 1, 30, 7, 3, 22, 64, 2, 9, 17, 5, 40, 1, 28, 11, 6, 33]
"""291 tokens: with parts of 64 rows four whole parts and a shorter one, whose edges cut documents."""
PARTS = 5
HALF_ULP = 2**-11

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


class Dump:
    """A dump whose parts are run one by one."""

    def __init__(self, tmp_path, policy, tokens, name="mlp", **settings):
        self.settings, self.policy, self.tokens = DUMP | settings, policy, tokens
        self.out = tmp_path / "activations" / name / "survey"
        self.work = tmp_path / "work" / name
        self.stamps = tmp_path / "stamps" / name

    def stamp(self, number):
        return self.stamps / f"part-{number}.json"

    def part(self, number):
        stamp, weights = self.stamp(number), self.policy / "model"
        extract_part(self.settings, number, stamp, self.work, self.policy, weights, self.tokens)
        return stamp

    def parts(self, numbers=range(PARTS)):
        for number in numbers:
            self.part(number)
        return self

    def publish(self):
        stamps = [self.stamp(number) for number in range(PARTS)]
        consolidate(self.settings, self.out, self.work, self.policy, self.tokens, stamps)
        return self.out


@pytest.fixture
def new_dump(tmp_path, policy, tokens):
    """Function of a name and settings: a dump that has not begun."""
    return lambda name="mlp", **settings: Dump(tmp_path, policy, tokens, name, **settings)


@pytest.fixture
def computed(monkeypatch):
    """The first rows of the shards that were computed; `computed.fail_at` is the number of the one that fails."""
    original = module.Capture.rows

    class Computed(list):
        fail_at = None

    shards = Computed()

    def counted(self, tokens, first, stop, *buffers):
        if len(shards) == shards.fail_at:
            raise KeyboardInterrupt
        shards.append(first)
        return original(self, tokens, first, stop, *buffers)

    monkeypatch.setattr(module.Capture, "rows", counted)
    return shards


def shard_path(work, layer, number):
    return work / OUTPUTS / STORE / f"layer/{layer}/acts/c/{number}/0"


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


# --- parts -------------------------------------------------------------------------------------------------------


def test_parts_run_in_any_order_give_equal_bytes(new_dump, tmp_path):
    forward = new_dump("a").parts().publish()
    backward = new_dump("b").parts(reversed(range(PARTS))).publish()
    assert digest(forward / "store") == digest(backward / "store")
    assert (forward / MANIFEST).read_bytes() == (backward / MANIFEST).read_bytes()


def test_many_parts_give_the_rows_of_one_part(new_dump):
    many = new_dump("many").parts().publish()
    one = new_dump("one", rows_per_part=64 * 5).parts([0]).publish()
    assert digest(many / "store") == digest(one / "store")


def test_parts_of_another_length_give_the_same_rows_to_the_last_digit_of_float16(new_dump):
    short, long = new_dump("short").parts().publish(), new_dump("long", rows_per_part=512).parts([0]).publish()
    for layer in range(2):
        np.testing.assert_allclose(rows_of(short, layer), rows_of(long, layer), rtol=2 * HALF_ULP, atol=1e-5)


def test_a_part_is_stamped_with_the_rows_of_its_shards(new_dump):
    started = new_dump()
    assert read_json(started.part(0)) == {"rows": [[0, 64]]}
    assert read_json(started.part(4)) == {"rows": [[256, 291]]}


def test_a_part_behind_the_end_of_the_corpus_is_done_without_rows(new_dump, computed):
    assert read_json(new_dump().part(7)) == {"rows": []}
    assert computed == []


def test_a_part_that_is_run_again_computes_nothing(new_dump, computed):
    started = new_dump().parts([1])
    started.part(1)
    assert computed == [64]


def test_a_dump_without_any_part_is_not_published(new_dump):
    waiting = new_dump()
    with pytest.raises(RlsaeError, match="holds no parts of this dump; run this stage again: all parts will be recomputed"):
        waiting.publish()
    assert not waiting.out.exists()


# --- kills and damage --------------------------------------------------------------------------------------------


def test_a_part_that_was_killed_goes_on_with_its_missing_shards_and_ends_with_equal_bytes(new_dump, computed):
    settings = {"rows_per_part": 320}
    whole = new_dump("whole", **settings).parts([0]).publish()
    assert computed == [0, 64, 128, 192, 256]
    computed.clear()
    computed.fail_at = 2
    killed = new_dump("killed", **settings)
    with pytest.raises(KeyboardInterrupt):
        killed.part(0)
    assert not killed.stamps.exists()
    computed.fail_at = None
    killed.part(0)
    assert computed == [0, 64, 128, 192, 256]
    assert digest(killed.publish() / "store") == digest(whole / "store")
    assert (killed.out / MANIFEST).read_bytes() == (whole / MANIFEST).read_bytes()


@pytest.mark.parametrize("left", [lambda content: content[:9], lambda content: b""], ids=["half", "empty"])
def test_a_shard_that_was_only_half_written_is_written_again(new_dump, left):
    whole = new_dump("whole").parts().publish()
    killed = new_dump("killed").parts([0, 1])
    (killed.work / "done" / "64").unlink()
    path = shard_path(killed.work, layer=1, number=1)
    path.write_bytes(left(path.read_bytes()))
    assert digest(killed.parts().publish() / "store") == digest(whole / "store")


def test_the_temporary_file_of_a_write_that_was_killed_is_not_published(new_dump):
    whole = new_dump("whole").parts().publish()
    killed = new_dump("killed").parts([0])
    path = shard_path(killed.work, layer=1, number=1)
    path.parent.mkdir()
    path.with_suffix(".5f0e3c.partial").write_bytes(b"half")  # as zarr names it
    assert digest(killed.parts().publish() / "store") == digest(whole / "store")


def test_a_part_that_never_ran_is_missed_with_layer_and_row(new_dump):
    started = new_dump().parts([0, 1, 3, 4])
    with pytest.raises(RlsaeError, match="layer 0: the shard from row 128 on is missing or damaged"):
        started.publish()
    assert not (started.out / MANIFEST).exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    ],
    ids=["deleted", "cut off", "one bit"],
)
def test_a_damaged_shard_is_refused_with_layer_and_row_and_only_it_is_computed_again(new_dump, computed, damage):
    whole = new_dump("whole").parts().publish()
    started = new_dump().parts()
    path = shard_path(started.work, layer=1, number=3)
    damage(path)
    with pytest.raises(RlsaeError, match="layer 1: the shard from row 192 on is missing or damaged") as caught:
        started.publish()
    assert str(path) in str(caught.value)
    assert "run this stage again" in str(caught.value)
    computed.clear()
    started.parts()
    assert computed == [192]
    assert digest(started.publish() / "store") == digest(whole / "store")


def test_only_the_part_of_a_damaged_shard_loses_its_stamp_so_that_a_workflow_runs_it_again(new_dump):
    started = new_dump().parts()
    shard_path(started.work, layer=0, number=3).unlink()
    with pytest.raises(RlsaeError, match="from row 192"):
        started.publish()
    assert [started.stamp(number).exists() for number in range(PARTS)] == [True, True, True, False, True]


def test_all_parts_lose_their_stamps_when_what_they_wrote_is_gone(new_dump):
    started = new_dump().parts()
    shutil.rmtree(started.work)
    with pytest.raises(RlsaeError, match="run this stage again"):
        started.publish()
    assert not list(started.stamps.iterdir())


def test_a_publication_that_was_killed_before_its_manifest_can_be_repeated(new_dump, monkeypatch):
    whole = new_dump("whole").parts().publish()
    killed = new_dump("killed").parts()

    def kill(path, text):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(resumable, "write", kill)
        with pytest.raises(KeyboardInterrupt):
            killed.publish()
    assert not (killed.out / MANIFEST).exists()
    shutil.rmtree(killed.out)  # as Snakemake does with what a failed job leaves
    try:
        killed.publish()
    except RlsaeError:  # it may ask for the parts once more
        killed.parts().publish()
    assert digest(killed.out / "store") == digest(whole / "store")


def test_nothing_is_left_behind_by_a_finished_dump(new_dump):
    started = new_dump().parts()
    out = started.publish()
    assert not started.work.exists()
    assert {path.name for path in out.iterdir()} == {"store", MANIFEST, "provenance.json"}


# --- several processes on one dump -------------------------------------------------------------------------------


def alive(started, **changes):
    """What a running part of the dump holds, perhaps with other settings."""
    return join(started.work, mark(started.settings | changes, started.policy, started.tokens))


def test_parts_of_other_settings_are_refused_while_one_is_alive(new_dump):
    started = new_dump().parts([0])
    with alive(started), pytest.raises(RlsaeError, match="in use by parts of other settings; stop them first"):
        new_dump(dtype="float32").part(0)
    started.parts([1, 2, 3, 4]).publish()


def test_parts_of_other_settings_start_anew_when_none_is_alive(new_dump, computed):
    new_dump().parts([0, 1])
    other = new_dump(hook="block").parts()
    assert computed == [0, 64, 0, 64, 128, 192, 256]
    assert ActivationStore(other.publish()).group.attrs["modules"]["0"] == "gpt_neox.layers.0"


def test_parts_of_another_policy_start_anew(new_dump, computed, random_model, tokenizer, tmp_path):
    new_dump().parts([0])
    other = write_policy(tmp_path / "policies" / "tiny.ppo", random_model("gpt2"), tokenizer)
    changed = new_dump()
    changed.policy = other
    changed.parts()
    assert computed == [0, 0, 64, 128, 192, 256]


def test_other_parts_of_the_same_dump_may_run_side_by_side(new_dump, computed):
    started = new_dump()
    started.work.mkdir(parents=True)
    with alive(started):
        started.parts()
    assert computed == [0, 64, 128, 192, 256]


def test_one_part_is_not_run_twice_at_a_time(new_dump, monkeypatch):
    started, original = new_dump(), module.Capture.rows

    def while_it_runs(*arguments):
        monkeypatch.setattr(module.Capture, "rows", original)
        with pytest.raises(RlsaeError, match=r"in use by process \d+ on .*; wait for it, or stop it first"):
            started.part(0)
        return original(*arguments)

    monkeypatch.setattr(module.Capture, "rows", while_it_runs)
    started.parts().publish()


def test_a_dump_is_not_published_while_a_part_is_at_work(new_dump):
    started = new_dump().parts()
    with alive(started), pytest.raises(RlsaeError, match=r"is in use by .*; wait for it, or stop it first"):
        started.publish()
    assert started.publish().exists()


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
