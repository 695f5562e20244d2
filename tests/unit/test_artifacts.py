"""Digests, manifests and provenance."""

from __future__ import annotations

import hashlib
import json

import pytest

from rlsae.artifacts import (
    LIBRARIES,
    MANIFEST,
    Manifest,
    artifact_id,
    canonical_json,
    digest,
    input_digests,
    provenance,
    write_atomically,
)
from rlsae.errors import RlsaeError


def manifest(**changes):
    values = {"stage": "corpora", "parameters": {"seed": 0}, "inputs": {}, "outputs": {}, "metrics": {"documents": 3}}
    return Manifest(**values | changes)


def artifact(folder, **changes):
    folder.mkdir(parents=True)
    (folder / MANIFEST).write_text(manifest(**changes).to_json())
    return folder


def test_equal_values_give_equal_json_whatever_the_order_of_their_keys():
    assert canonical_json({"b": [1, None], "a": "ä"}) == '{"a":"ä","b":[1,null]}'
    assert canonical_json({"a": "ä", "b": [1, None]}) == '{"a":"ä","b":[1,null]}'


def test_the_digest_of_a_file_is_the_sha256_of_its_content(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"content")
    assert digest(path) == "sha256:" + hashlib.sha256(b"content").hexdigest()


def folder_with(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return folder


def test_the_digest_of_a_folder_does_not_depend_on_where_it_lies(tmp_path):
    files = {"a": "1", "sub/b": "2"}
    first, second = folder_with(tmp_path / "x", files), folder_with(tmp_path / "y", dict(reversed(files.items())))
    assert digest(first) == digest(second)


@pytest.mark.parametrize(
    "files",
    [{"a": "1", "sub/b": "3"}, {"a": "1", "sub/c": "2"}, {"a": "1", "b": "2"}, {"a": "1"}, {"a": "2", "sub/b": "1"}],
    ids=["content", "name", "place", "missing", "swapped"],
)
def test_the_digest_of_a_folder_depends_on_names_and_contents(tmp_path, files):
    before = digest(folder_with(tmp_path / "x", {"a": "1", "sub/b": "2"}))
    assert digest(folder_with(tmp_path / "y", files)) != before


def test_the_time_stamp_that_snakemake_leaves_in_a_folder_does_not_change_its_digest(tmp_path):
    before = digest(folder_with(tmp_path, {"a": "1"}))
    assert digest(folder_with(tmp_path, {".snakemake_timestamp": "", "sub/.snakemake_timestamp": ""})) == before


def test_a_manifest_reads_back_as_it_was_written(tmp_path):
    written = manifest(inputs={"models/tiny": "sha256:0"}, metrics={"kl": 0.1, "none": None})
    folder = artifact(tmp_path / "a", inputs=written.inputs, metrics=written.metrics)
    assert Manifest.read(folder) == written


def test_the_bytes_of_a_manifest_do_not_depend_on_the_order_of_its_keys():
    assert manifest(metrics={"a": 1, "b": 2}).to_json() == manifest(metrics={"b": 2, "a": 1}).to_json()


def test_a_manifest_holds_no_number_that_json_does_not_know():
    with pytest.raises(ValueError, match="JSON"):
        manifest(metrics={"kl": float("nan")}).to_json()


def test_a_folder_without_a_manifest_is_no_finished_artifact(tmp_path):
    with pytest.raises(RlsaeError, match=r"is no finished artifact: it has no manifest\.json; run the stage"):
        Manifest.read(tmp_path)


def test_a_manifest_that_is_no_json_is_named(tmp_path):
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(RlsaeError, match=r"manifest\.json is not valid JSON; delete it and rerun"):
        Manifest.read(tmp_path)


def test_a_manifest_of_another_schema_is_refused_with_both_numbers(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps({"schema": 2}))
    with pytest.raises(RlsaeError, match="has schema 2; this version of rlsae reads schema 1"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize("content", [[], {"schema": 1, "stage": "corpora"}], ids=["a list", "keys missing"])
def test_json_that_is_no_manifest_is_named(tmp_path, content):
    (tmp_path / MANIFEST).write_text(json.dumps(content))
    with pytest.raises(RlsaeError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_an_artifact_has_the_same_name_wherever_the_results_lie(tmp_path):
    assert artifact_id(tmp_path / "results" / "models" / "tiny", "models") == "models/tiny"
    assert artifact_id(tmp_path / "models" / "results" / "models" / "tiny", "models") == "models/tiny"


def test_an_artifact_outside_a_folder_of_its_stage_has_the_name_of_its_own_folder(tmp_path):
    assert artifact_id(tmp_path / "somewhere", "models") == "somewhere"


def test_an_artifact_given_as_input_is_named_by_stage_and_digested_by_its_manifest(tmp_path):
    folder = artifact(tmp_path / "results" / "corpora" / "reviews")
    (folder / "documents.parquet").write_text("not read")
    assert input_digests({"corpus": folder}) == {"corpora/reviews": digest(folder / MANIFEST)}


def test_a_file_given_as_input_is_named_by_its_label_and_digested_by_its_content(tmp_path):
    path = tmp_path / "words.tsv"
    path.write_text("good\t1")
    assert input_digests({"reward": path}) == {"file:reward": digest(path)}


def test_a_folder_that_is_no_artifact_is_digested_by_all_it_holds(tmp_path):
    folder = folder_with(tmp_path / "gpt2", {"config.json": "{}"})
    before = input_digests({"model": folder})
    folder_with(folder, {"model.safetensors": "weights"})
    after = input_digests({"model": folder})
    assert list(before) == list(after) == ["file:model"]
    assert before != after


def test_an_input_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(RlsaeError, match=r"corpus: .*/none does not exist"):
        input_digests({"corpus": tmp_path / "none"})


def test_a_text_file_is_replaced_whole(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    write_atomically(path, "new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_text_that_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "\ud800")
    assert path.read_text() == "old"


def test_the_provenance_tells_versions_and_time_and_what_the_stage_adds():
    told = json.loads(json.dumps(provenance(1.234, {"device": "cpu"})))
    assert set(told["libraries"]) == set(LIBRARIES)
    assert told["wall_seconds"] == 1.23
    assert told["device"] == "cpu"
    assert told["peak_memory_mb"] > 1
