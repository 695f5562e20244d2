"""What every entry of a configuration is made of: names, paths, references, and settings that shape an artifact."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

SLUG = r"[a-z0-9]+(-[a-z0-9]+)*"
Slug = Annotated[str, Field(pattern=f"^{SLUG}$")]
Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
IS_PATH = Field(json_schema_extra={"file": True})
"""Metadata of a path on this machine: never part of a manifest; the file's digest is."""


def without_braces(path: str | None) -> str | None:
    """A path as it is.

    Raises:
        ValueError: it holds braces.
    """
    if path and ("{" in path or "}" in path):
        raise ValueError("braces in a path would be wildcards to Snakemake; rename it, or give a link to it")
    return path


FilePath = Annotated[str, IS_PATH, AfterValidator(without_braces)]
OptionalPath = Annotated[str | None, IS_PATH, AfterValidator(without_braces)]


def reference(section: str) -> Any:
    """Metadata of a field that names an entry of `section`."""
    return Field(json_schema_extra={"entry_of": section})


CorpusName = Annotated[Slug, reference("corpora")]
ModelName = Annotated[Slug, reference("models")]
LlmName = Annotated[Slug | None, reference("llms")]
RewardName = Annotated[Slug, reference("rewards")]
TuningOrCheckpoint = Annotated[str, Field(pattern=rf"^{SLUG}(@[1-9]\d*)?$"), reference("tunings")]
ActivationName = Annotated[Slug, reference("activations")]
DictionaryNames = Annotated[list[Slug], Field(min_length=1), reference("dictionaries")]

RESERVED = {"index", "paper"}


class Entry(BaseModel):
    """One named entry of a section. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, values: Any) -> Any:
        for key, value in values.items() if isinstance(values, dict) else ():
            if isinstance(value, bool) and key in cls.model_fields and cls.model_fields[key].annotation is not bool:
                raise ValueError(f"{key}: expected no truth value, found {str(value).lower()}")
        return values

    @classmethod
    def marked(cls, mark: str) -> dict[str, Any]:
        """Fields marked as `file` (a path on this machine) or `entry_of` (a reference), with the mark's value."""
        extras = {name: field.json_schema_extra for name, field in cls.model_fields.items()}
        return {name: extra[mark] for name, extra in extras.items() if isinstance(extra, dict) and mark in extra}

    def settings(self) -> dict[str, Any]:
        """What shapes the artifact, as plain JSON values: every field but the paths of this machine."""
        plain = self.model_dump(mode="json", exclude=set(self.marked("file")))
        return plain | {name: getattr(self, name).settings() for name in plain if isinstance(getattr(self, name), Entry)}
