"""A stage survives a kill: partial state, lock, and publication in one go."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import pytest
import torch

from rlsae import resumable
from rlsae.artifacts import MANIFEST, PROVENANCE, Manifest, digest
from rlsae.cli import main
from rlsae.errors import RlsaeError
from rlsae.resumable import (
    FINGERPRINT,
    LOCK,
    WORK,
    AlreadyFinished,
    Stage,
    claim,
    fingerprint,
    forget_all,
    hold,
    waiting_lock,
)

SETTINGS = {"seed": 0}
HOLDER = """
import sys, time
from pathlib import Path
from rlsae.resumable import Stage

with Stage("corpora", Path(sys.argv[1]), {"seed": 0}, {}) as stage:
    (stage.work / "state").write_text("half done")
    print("holding", flush=True)
    time.sleep(600)
"""


def run(out, parameters=None, inputs=None, text="content", metrics=None, **options):
    """A whole stage that writes one file."""
    with Stage("corpora", out, parameters or SETTINGS, inputs or {}, **options) as stage:
        (stage.staging / "a.txt").write_text(text)
        stage.publish(metrics or {"documents": 1})


def fail(out, parameters=None, name="a.txt"):
    """A stage that fails after it has written one file."""
    with Stage("corpora", out, parameters or SETTINGS, {}) as stage:
        (stage.staging / name).write_text("half")
        raise ZeroDivisionError


@pytest.fixture
def out(tmp_path):
    return tmp_path / "results" / "corpora" / "reviews"


@pytest.fixture
def holder(out):
    """A process that holds the stage's lock and has saved some state."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "holding\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


# --- publication -------------------------------------------------------------------------------------------------


def test_a_published_artifact_has_its_outputs_manifest_and_provenance_and_no_work_folder(out, tmp_path):
    source = tmp_path / "reviews.txt"
    source.write_text("a review")
    run(out, {"seed": 3}, {"source": source}, metrics={"documents": 7})
    assert sorted(path.name for path in out.iterdir()) == ["a.txt", MANIFEST, PROVENANCE]
    assert [path.name for path in out.parent.iterdir()] == [out.name]
    assert Manifest.read(out) == Manifest(
        stage="corpora",
        parameters={"seed": 3},
        inputs={"file:source": digest(source)},
        outputs={"a.txt": digest(out / "a.txt")},
        metrics={"documents": 7},
    )


def test_a_folder_is_published_as_one_output(out):
    with Stage("models", out, SETTINGS, {}) as stage:
        (stage.staging / "model").mkdir()
        (stage.staging / "model" / "config.json").write_text("{}")
        stage.publish({})
    assert (out / "model" / "config.json").read_text() == "{}"
    assert Manifest.read(out).outputs == {"model": digest(out / "model")}


def test_equal_runs_give_equal_manifest_bytes(tmp_path):
    first, second = tmp_path / "x" / "corpora" / "a", tmp_path / "y" / "z" / "corpora" / "a"
    run(first)
    run(second, work=tmp_path / "elsewhere")
    assert (first / MANIFEST).read_bytes() == (second / MANIFEST).read_bytes()


def test_details_of_a_run_go_to_the_provenance_and_not_to_the_manifest(out):
    with Stage("corpora", out, SETTINGS, {}) as stage:
        stage.details["device"] = "cpu"
        stage.publish({})
    assert json.loads((out / PROVENANCE).read_text())["device"] == "cpu"
    assert "device" not in (out / MANIFEST).read_text()


def test_a_second_run_replaces_the_outputs_of_the_first(out):
    run(out, text="old")
    run(out, {"seed": 1}, text="new")
    assert (out / "a.txt").read_text() == "new"
    assert Manifest.read(out).parameters == {"seed": 1}


def test_the_manifest_is_written_last(out, monkeypatch):
    run(out, text="old")

    def killed(path, text):
        if path.name == MANIFEST:
            raise KeyboardInterrupt
        path.write_text(text)

    with Stage("corpora", out, SETTINGS, {}) as stage:
        (stage.staging / "a.txt").write_text("new")
        monkeypatch.setattr(resumable, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.publish({})
    assert (out / "a.txt").read_text() == "new"
    assert not (out / MANIFEST).exists()


def test_the_old_manifest_goes_before_the_first_output_is_replaced(out, monkeypatch):
    run(out, text="old")

    def killed(path):
        raise KeyboardInterrupt

    with Stage("corpora", out, SETTINGS, {}) as stage:
        (stage.staging / "a.txt").write_text("new")
        monkeypatch.setattr(resumable, "_remove", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.publish({})
    assert not (out / MANIFEST).exists()


def test_metrics_that_no_manifest_can_hold_leave_the_old_artifact_whole(out):
    run(out)
    with Stage("corpora", out, SETTINGS, {}) as stage, pytest.raises(ValueError, match="JSON"):
        stage.publish({"kl": float("nan")})
    assert Manifest.read(out).metrics == {"documents": 1}


def test_a_failing_stage_leaves_nothing_in_its_folder(out):
    with pytest.raises(ZeroDivisionError):
        fail(out)
    assert not out.exists()


def test_a_failing_stage_leaves_an_earlier_artifact_as_it_was(out):
    run(out, text="old")
    with pytest.raises(ZeroDivisionError):
        fail(out, {"seed": 1})
    assert (out / "a.txt").read_text() == "old"
    assert Manifest.read(out).parameters == SETTINGS


def test_what_a_failed_run_had_staged_is_not_published_by_the_next(out):
    with pytest.raises(ZeroDivisionError):
        fail(out, name="half.txt")
    run(out)
    assert not (out / "half.txt").exists()
    assert list(Manifest.read(out).outputs) == ["a.txt"]


def test_what_a_failed_run_had_staged_is_kept_where_it_is_partial_state_too(out):
    with pytest.raises(ZeroDivisionError):
        fail(out, name="half.txt")
    run(out, keep_outputs=True)
    assert list(Manifest.read(out).outputs) == ["a.txt", "half.txt"]


def test_what_was_staged_with_other_settings_is_never_kept(out):
    with pytest.raises(ZeroDivisionError):
        fail(out, name="half.txt")
    run(out, {"seed": 1}, keep_outputs=True)
    assert list(Manifest.read(out).outputs) == ["a.txt"]


def test_an_input_that_does_not_exist_is_refused_before_anything_is_written(out, tmp_path):
    with pytest.raises(RlsaeError, match=r"source: .*none\.txt does not exist"):
        run(out, inputs={"source": tmp_path / "none.txt"})
    assert list(tmp_path.iterdir()) == []


def test_a_work_folder_that_cannot_be_made_is_named(out, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RlsaeError, match=r"cannot write .*/file/work"):
        run(out, work=tmp_path / "file" / "work")


def test_a_folder_of_the_artifact_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RlsaeError, match=r"/file"):
        run(tmp_path / "file" / "reviews", work=tmp_path / "work")


# --- a kill between publication and Snakemake's note of it -------------------------------------------------------


@pytest.fixture
def work(tmp_path):
    """The work folder of `out` in a workflow."""
    return tmp_path / "results" / WORK / "corpora" / "reviews"


def refuse(*_):
    raise AssertionError("the stage was made anew")


def test_a_finished_stage_whose_outputs_were_deleted_puts_them_back_and_does_nothing_else(out, work):
    run(out, work=work)
    expected = {path.name: path.read_bytes() for path in out.iterdir()}
    shutil.rmtree(out)  # as Snakemake does with outputs that it counts as incomplete
    with pytest.raises(AlreadyFinished), Stage("corpora", out, SETTINGS, {}, work):
        refuse()
    assert {path.name: path.read_bytes() for path in out.iterdir()} == expected


def test_the_command_line_takes_a_finished_stage_as_a_success(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts.txt").write_text("one\ntwo\nthree\nfour\nfive\nsix\n")
    command = ["rlsae", "corpus", "--settings", '{"source": "file", "held_out": 0.5}', "--source", "texts.txt"]
    monkeypatch.setattr(sys, "argv", [*command, "--out", "results/corpora/x", "--work", "results/.work/corpora/x"])
    for _ in range(2):
        with suppress(SystemExit):
            main()
    assert "corpora: was finished before; its outputs are in results/corpora/x again" in capsys.readouterr().err


def test_no_byte_is_kept_twice(out, work):
    run(out, work=work)
    assert (out / "a.txt").samefile(work / "outputs" / "a.txt")


def test_where_files_cannot_have_two_names_they_are_moved(out, work, monkeypatch):
    monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "Operation not permitted")))
    run(out, work=work)
    assert (out / "a.txt").read_text() == "content"
    assert not work.exists()


def test_what_was_kept_of_other_settings_is_never_put_back(out, work):
    run(out, work=work, text="old")
    run(out, {"seed": 1}, work=work, text="new")
    assert (out / "a.txt").read_text() == "new"


def test_what_was_kept_and_is_damaged_is_made_anew(out, work):
    run(out, work=work)
    (work / "outputs" / "a.txt").write_text("damaged")
    run(out, work=work)
    assert (out / "a.txt").read_text() == "content"
    assert Manifest.read(out).outputs == {"a.txt": digest(out / "a.txt")}


def test_a_stage_that_reads_an_artifact_ends_its_keeping(out, work):
    run(out, work=work)
    run(out.parents[1] / "tokens" / "x", inputs={"corpus": out})
    assert not work.exists()
    run(out, work=work, text="made anew")
    assert (out / "a.txt").read_text() == "made anew"


def test_the_end_of_a_run_ends_the_keeping_of_what_is_in_place(out, work):
    run(out, work=work)
    other = out.with_name("other")
    run(other, work=work.with_name("other"))
    (other / MANIFEST).unlink()
    forget_all(out.parents[1])
    assert not work.exists()
    with pytest.raises(AlreadyFinished):
        run(other, work=work.with_name("other"))
    assert (other / "a.txt").read_text() == "content"


# --- partial state -----------------------------------------------------------------------------------------------


def test_a_stage_continues_the_state_of_the_same_fingerprint(out):
    tensors = {"weight": torch.randn(3, 4), "step": torch.tensor(7)}
    with Stage("corpora", out, SETTINGS, {}) as stage:
        assert stage.load_state() is None
        stage.save_state(tensors, {"losses": [0.1, 1 / 3]})
    with Stage("corpora", out, SETTINGS, {}) as stage:
        loaded, values = stage.load_state()
    assert values == {"losses": [0.1, 1 / 3]}
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_tensors_that_share_memory_or_are_transposed_are_saved_as_they_look(out):
    weight = torch.randn(3, 4)
    with Stage("corpora", out, SETTINGS, {}) as stage:
        stage.save_state({"a": weight, "b": weight, "c": weight.T}, {})
        loaded, _ = stage.load_state()
    assert torch.equal(loaded["a"], weight)
    assert torch.equal(loaded["b"], weight)
    assert torch.equal(loaded["c"], weight.T)


def test_a_later_state_replaces_an_earlier_one(out):
    with Stage("corpora", out, SETTINGS, {}) as stage:
        stage.save_state({"a": torch.zeros(1)}, {"step": 1})
        stage.save_state({"b": torch.ones(1)}, {"step": 2})
        loaded, values = stage.load_state()
    assert list(loaded) == ["b"]
    assert values == {"step": 2}


def test_a_kill_while_the_state_is_saved_leaves_the_state_before(out, monkeypatch):
    import safetensors.torch

    def killed(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    with Stage("corpora", out, SETTINGS, {}) as stage:
        stage.save_state({}, {"step": 1})
        monkeypatch.setattr(safetensors.torch, "save_file", killed)
        with pytest.raises(KeyboardInterrupt):
            stage.save_state({}, {"step": 2})
    with Stage("corpora", out, SETTINGS, {}) as stage:
        assert stage.load_state() == ({}, {"step": 1})


@pytest.mark.parametrize("change", ["parameters", "inputs", "state_version", "stage"])
def test_the_state_of_another_fingerprint_is_wiped(out, tmp_path, change):
    source = tmp_path / "source"
    source.write_text("old")
    with Stage("corpora", out, SETTINGS, {"source": source}) as stage:
        stage.save_state({}, {"step": 1})
        (stage.work / "shards").mkdir()
        (stage.work / "shards" / "0").write_text("shard")
    if change == "inputs":
        source.write_text("new")
    name = "models" if change == "stage" else "corpora"
    settings = {"seed": 1} if change == "parameters" else SETTINGS
    version = 2 if change == "state_version" else 1
    with Stage(name, out, settings, {"source": source}, state_version=version) as stage:
        assert stage.load_state() is None
        assert sorted(path.name for path in stage.work.iterdir()) == [FINGERPRINT, LOCK, "outputs"]


def test_an_unreadable_fingerprint_counts_as_another_one(tmp_path):
    (tmp_path / FINGERPRINT).write_text("")
    (tmp_path / "state").write_text("of whom?")
    claim(tmp_path, fingerprint("corpora", SETTINGS, {}, 1))
    assert [path.name for path in tmp_path.iterdir()] == [FINGERPRINT]


# --- locks -------------------------------------------------------------------------------------------------------


def test_a_stage_at_work_is_refused_to_others_with_the_name_of_its_holder(out, holder):
    with pytest.raises(RlsaeError) as caught:
        run(out)
    message = str(caught.value)
    assert f"is in use by process {holder.pid} on " in message
    assert "started 2" in message
    assert message.endswith("wait for it, or stop it first")


def test_the_state_of_a_killed_process_can_be_continued(out, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with Stage("corpora", out, SETTINGS, {}) as stage:
        assert (stage.work / "state").read_text() == "half done"
        stage.publish({})
    assert Manifest.read(out)


def test_a_refused_process_does_not_touch_the_state_of_the_holder(out, holder):
    with pytest.raises(RlsaeError, match="is in use by"):
        run(out, {"seed": 1})
    assert (out.parent / f".{out.name}.work" / "state").read_text() == "half done"


def test_a_stage_that_failed_lets_go_of_its_lock(out):
    with pytest.raises(ZeroDivisionError):
        fail(out)
    run(out)
    assert Manifest.read(out)


def test_a_lock_can_be_shared_but_then_not_be_held_alone(tmp_path):
    path = tmp_path / LOCK
    with hold(path, shared=True), hold(path, shared=True), pytest.raises(RlsaeError, match="is in use by"):
        hold(path)
    hold(path).close()


def test_a_lock_held_alone_is_not_shared(tmp_path):
    path = tmp_path / LOCK
    with hold(path), pytest.raises(RlsaeError, match="is in use by process"):
        hold(path, shared=True)


def test_a_lock_on_a_file_that_its_holder_has_deleted_is_taken_anew(tmp_path, monkeypatch):
    path = tmp_path / "work" / LOCK
    first = hold(path)
    flock, deleted = resumable.fcntl.flock, []

    def delete_once(file, mode):
        flock(file, mode)
        if not deleted:
            path.unlink()
            deleted.append(path)

    first.close()
    monkeypatch.setattr(resumable.fcntl, "flock", delete_once)
    second = hold(path)
    monkeypatch.setattr(resumable.fcntl, "flock", flock)
    with pytest.raises(RlsaeError, match="is in use by process"):
        hold(path)
    second.close()


def test_a_waiting_lock_lets_one_through_after_the_other(tmp_path):
    counter = tmp_path / "counter"
    counter.write_text("0")

    def count():
        for _ in range(50):
            with waiting_lock(tmp_path / LOCK):
                counter.write_text(str(int(counter.read_text()) + 1))

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter.read_text() == "200"


def test_a_partial_state_is_due_after_the_seconds_that_the_environment_says(out, monkeypatch):
    with Stage("corpora", out, SETTINGS, {}) as stage:
        monkeypatch.setenv("RLSAE_SAVE_SECONDS", "1e9")
        assert not stage.due()
        monkeypatch.setenv("RLSAE_SAVE_SECONDS", "0")
        assert stage.due()
