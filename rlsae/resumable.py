"""How every stage survives a kill: a private work folder, its fingerprint and lock, and publication in one go.

Snakemake deletes the outputs of a job that fails, so partial state lives in an undeclared folder under `results/.work`.
A stage that starts finds there either nothing, or its own earlier state (same fingerprint: it continues), or the state
of other settings (it is wiped). Outputs are built in the work folder too and put into place at the end, manifest last.

A kill may come after that and before Snakemake has noted it, which then deletes the outputs as incomplete. So the work folder
keeps a second name (a hard link) of every file until a stage that reads the artifact starts, or the run ends: a stage that
finds itself finished puts its outputs back and does nothing else.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from rlsae.artifacts import (
    MANIFEST,
    PROVENANCE,
    Manifest,
    canonical_json,
    digest,
    input_digests,
    provenance,
    text_digest,
)
from rlsae.artifacts import write_atomically as write
from rlsae.errors import RlsaeError
from rlsae.progress import say

if TYPE_CHECKING:
    from torch import Tensor

WORK = ".work"
"""Folder in the results that mirrors them, with the work folder of each artifact."""
LOCK = "lock"
OUTPUTS = "outputs"
FINGERPRINT = "fingerprint.json"
FINISHED = "finished.json"
"""Manifest and provenance of outputs that are whole."""
SAVE_SECONDS = 60.0
"""Time between two partial states; `RLSAE_SAVE_SECONDS` overrides. It changes no result."""


class AlreadyFinished(Exception):  # noqa: N818 (no error)
    """The stage was finished before; its outputs are in place again, and nothing is left to do."""


class Stage:
    """One run of one stage: `with Stage(...) as stage: ...; stage.publish(metrics)`.

    Args:
        name: stage as named in manifests (`corpora`, `models`, ...).
        out: folder of the artifact.
        parameters: settings that shape the artifact, as plain JSON values without paths.
        inputs: label → artifact folder or file that it is made from.
        work: private folder for partial state; beside `out` by default.
        state_version: raise it when a stage changes the meaning of its partial state.
        keep_outputs: outputs that an earlier run has staged are partial state too: keep them.

    Raises:
        RlsaeError: an input is missing, or another process works on the same artifact.
        AlreadyFinished: on entry.
    """

    def __init__(
        self,
        name: str,
        out: Path,
        parameters: dict[str, Any],
        inputs: dict[str, Path],
        work: Path | None = None,
        state_version: int = 1,
        keep_outputs: bool = False,
    ) -> None:
        self.name, self.out, self.parameters = name, out, parameters
        self.inputs = input_digests(inputs)
        self.work = work or out.parent / f".{out.name}.work"
        self.keep_finished = work is not None and WORK in work.parts
        self.artifacts = list(inputs.values())
        self.keep_outputs = keep_outputs
        self.fingerprint = fingerprint(name, parameters, self.inputs, state_version)
        self.details: dict[str, Any] = {}
        """Goes to provenance.json."""

    def __enter__(self) -> Self:
        self._started = self._saved = time.monotonic()
        self._lock = hold(self.work / LOCK)
        claim(self.work, self.fingerprint)
        self.staging = self.work / OUTPUTS
        if (self.work / FINISHED).exists():
            self._put_back()
        if not self.keep_outputs:
            shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(exist_ok=True)
        for artifact in self.artifacts:
            forget(artifact)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def due(self) -> bool:
        """Whether it is time for a partial state; resets the clock when it is."""
        now = time.monotonic()
        if now - self._saved < float(os.environ.get("RLSAE_SAVE_SECONDS", SAVE_SECONDS)):
            return False
        self._saved = now
        return True

    def save_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Replace the partial state in one go."""
        from safetensors.torch import save_file

        temporary = self.work / "state.partial"
        contiguous = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
        save_file(contiguous, temporary, metadata={"values": json.dumps(values)})
        temporary.replace(self.work / "state.safetensors")

    def load_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of an earlier, unfinished run with the same fingerprint, if there is one.

        Raises:
            RlsaeError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self.work / "state.safetensors"
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
                values = json.loads(file.metadata()["values"])
        except (SafetensorError, TypeError, KeyError, ValueError) as error:
            raise RlsaeError(f"the partial state {path} is damaged: {error}; delete it to start the stage anew") from None
        say(f"{self.name}: continuing from the partial state in {self.work}")
        return tensors, values

    def publish(self, metrics: dict[str, Any], digests: Mapping[Path, str] | None = None) -> None:
        """Put everything staged into the artifact's folder, the manifest last, and delete the partial state.

        Args:
            digests: of staged files, as far as they are known.

        Raises:
            RlsaeError: the folder cannot be written.
        """
        outputs = {path.name: digest(path, digests) for path in sorted(self.staging.iterdir())}
        manifest = Manifest(self.name, self.parameters, self.inputs, outputs, metrics).to_json()
        seconds = time.monotonic() - self._started
        made = json.dumps(provenance(seconds, self.details), indent=1) + "\n"
        if self.keep_finished:
            write(self.work / FINISHED, json.dumps({"manifest": manifest, "provenance": made}))
        self._place(manifest, made)
        if self.keep_finished:
            for path in self.work.iterdir():
                if path.name not in (LOCK, FINGERPRINT, FINISHED, OUTPUTS):
                    _remove(path)
        else:
            (self.work / FINGERPRINT).unlink()  # what is half deleted is nobody's partial state
            shutil.rmtree(self.work)
        say(f"{self.name}: wrote {self.out} in {seconds:.1f} s")

    def _place(self, manifest: str, made: str) -> None:
        """Put outputs, provenance and manifest into the artifact's folder."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RlsaeError(f"cannot write {self.out}: {error.strerror}") from None
        (self.out / MANIFEST).unlink(missing_ok=True)
        for name in json.loads(manifest)["outputs"]:
            _remove(self.out / name)
            if self.keep_finished and _link(self.staging / name, self.out / name):
                continue
            self.keep_finished = False
            (self.staging / name).replace(self.out / name)
        write(self.out / PROVENANCE, made)
        write(self.out / MANIFEST, manifest)

    def _put_back(self) -> None:
        """
        Raises:
            AlreadyFinished: the outputs of an earlier run are whole, and in place again.
        """
        finished = json.loads((self.work / FINISHED).read_text(encoding="utf-8"))
        outputs = json.loads(finished["manifest"])["outputs"]
        if all((self.staging / name).exists() and digest(self.staging / name) == known for name, known in outputs.items()):
            self._place(finished["manifest"], finished["provenance"])
            say(f"{self.name}: was finished before; its outputs are in {self.out} again")
            self._lock.close()
            raise AlreadyFinished
        say(f"{self.name}: what was kept in {self.work} is not whole; making it anew")
        (self.work / FINISHED).unlink()
        shutil.rmtree(self.staging, ignore_errors=True)


def forget(artifact: Path) -> None:
    """Delete what was kept of a finished artifact. It has arrived: a stage that reads it starts, or the run is over."""
    for parent in artifact.parents:
        work = parent / WORK / artifact.relative_to(parent)
        if (work / FINISHED).exists():
            (work / FINISHED).unlink(missing_ok=True)
            shutil.rmtree(work, ignore_errors=True)


def forget_all(results: Path) -> None:
    """Delete what was kept of every finished artifact that is in place. Call it when nothing runs."""
    for path in list((results / WORK).rglob(FINISHED)):
        artifact = results / path.parent.relative_to(results / WORK)
        if (artifact / MANIFEST).exists():
            forget(artifact)


def fingerprint(stage: str, parameters: dict[str, Any], inputs: dict[str, str], state_version: int) -> str:
    """Identifies the work: equal fingerprints may continue each other's partial state."""
    return text_digest(canonical_json([stage, parameters, inputs, state_version]))


def claim(work: Path, mark: str) -> None:
    """Make the work folder ours: keep the state of the same fingerprint, wipe any other. Call with the lock held."""
    path = work / FINGERPRINT
    if path.exists() and path.read_text() == json.dumps(mark):
        return
    path.unlink(missing_ok=True)
    stale = [p for p in work.iterdir() if not p.name.endswith(LOCK)]
    if stale:
        say(f"wiping {work}: its partial state is of other settings or inputs, or incomplete")
    for entry in stale:
        _remove(entry)
    write(path, json.dumps(mark))


def hold(path: Path, *, shared: bool = False) -> IO[str]:
    """Lock a file until it is closed or the process dies, and write who holds it.

    Raises:
        RlsaeError: another process holds it: names its host, pid and start.
    """
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+", encoding="utf-8")
        except OSError as error:
            raise RlsaeError(f"cannot write {path.parent}: {error.strerror}") from None
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            holder = file.read().strip() or "a process that is just starting"
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise RlsaeError(f"cannot lock {path}: {error.strerror}") from None
            raise RlsaeError(f"{path.parent} is in use by {holder}; wait for it, or stop it first") from None
        try:
            same = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except FileNotFoundError:
            same = False
        if same:
            break
        file.close()  # the holder finished and removed its folder between our open and our lock
    if not shared:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {os.uname().nodename}, started {datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC")
        file.flush()
    return file


@contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Lock a file for a moment, waiting for whoever holds it."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _link(path: Path, target: Path) -> bool:
    """Give a file or all files of a folder a second name; False where the file system has no hard links."""
    try:
        if path.is_dir():
            shutil.copytree(path, target, copy_function=os.link)
        else:
            os.link(path, target)
    except OSError:
        _remove(target)
        return False
    return True


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
