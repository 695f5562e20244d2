"""What Snakemake imports for every job stays light: no library that takes seconds or gigabytes to load."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {
    "torch",
    "transformers",
    "zarr",
    "numpy",
    "pandas",
    "scipy",
    "sklearn",
    "datasets",
    "trl",
    "matplotlib",
    "pyarrow",
    "numba",
}


def loaded(code):
    """Top-level modules in a fresh interpreter after some code."""
    code += "\nimport json, sys; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ | {"COLUMNS": "80"})
    return set(json.loads(result.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import rlsae",
        "import rlsae.expand, rlsae.layout, rlsae.status, rlsae.code_digest, rlsae.artifacts",
        "import rlsae.schema; rlsae.schema.schema_yaml()",
        "import rlsae.cli",
    ],
    ids=["the package", "what the rules use", "the schema", "the command line"],
)
def test_no_heavy_library_is_loaded(code):
    assert loaded(code) & HEAVY == set()


def test_reading_a_configuration_and_telling_its_state_loads_no_heavy_library(raw, tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    code = f"""if True:
        import os
        os.chdir({str(tmp_path)!r})
        from rlsae import code_digest, expand, layout, status
        config = expand.load("config.yaml")
        assert len(status.check(config)) > 5
        assert status.orphans(config) == []
        assert code_digest.code_digest("sae", "activations.extract")
    """
    assert loaded(code) & HEAVY == set()


def test_the_package_itself_imports_nothing_but_the_standard_library():
    outside = loaded("import rlsae") - loaded("") - set(sys.stdlib_module_names)
    assert {name for name in outside if not name.startswith("_")} == {"rlsae"}


def test_the_interpreter_names_no_heavy_library_among_the_times_of_an_import():
    command = [sys.executable, "-X", "importtime", "-c", "import rlsae.expand, rlsae.layout, rlsae.status"]
    times = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    names = {line.rpartition("|")[2].strip().split(".")[0] for line in times.splitlines()}
    assert "rlsae" in names
    assert names & HEAVY == set()
