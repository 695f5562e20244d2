"""A dump of activations: how its parts come together, and how it survives a kill."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from small_artifacts import random_documents, read_json, rows_of, tokens_of, write_policy, write_tokens
from small_dumps import HALF_ULP, LENGTHS, PARTS, Dump

from rlsae import resumable
from rlsae.activations import extract as module
from rlsae.activations.extract import join, mark
from rlsae.activations.store import STORE, ActivationStore
from rlsae.artifacts import MANIFEST, digest
from rlsae.errors import RlsaeError
from rlsae.resumable import OUTPUTS, AlreadyFinished


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


def test_a_finished_dump_that_was_deleted_as_incomplete_is_put_back_without_computing(new_dump, computed, tmp_path):
    dump = new_dump()
    dump.work = tmp_path / ".work" / "activations" / "mlp" / "survey"
    expected = digest(dump.parts().publish())
    stamps = [dump.stamp(number).read_bytes() for number in range(PARTS)]
    shutil.rmtree(dump.out)
    shutil.rmtree(dump.stamps)
    computed.clear()
    assert [dump.part(number).read_bytes() for number in range(PARTS)] == stamps
    with pytest.raises(AlreadyFinished):
        dump.publish()
    assert digest(dump.out) == expected
    assert computed == []


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
