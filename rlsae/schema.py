"""The JSON schema of the configuration, generated from `rlsae.config`."""

from __future__ import annotations

from typing import Any

import yaml

from rlsae.config import SECTIONS, Config

HEADER = "# Generated from rlsae/config/ by `rlsae schema`. Do not edit.\n"


def schema() -> dict[str, Any]:
    """JSON schema (draft 2020-12) of a configuration file; a scalar of an entry may also be a list, which is expanded."""
    content = Config.model_json_schema()
    for definition in content["$defs"].values():
        for field in definition.get("properties", {}).values():
            field.pop("file", None)
            field.pop("entry_of", None)
    for section in SECTIONS:
        content["properties"][section]["additionalProperties"] = False
        for definition in _entries(content, content["properties"][section]):
            for key, field in definition["properties"].items():
                if not _takes_list(field, content) and "const" not in field:
                    shared = {k: field.pop(k) for k in ("title", "description", "default") if k in field}
                    definition["properties"][key] = shared | {"anyOf": [dict(field), {"type": "array", "items": dict(field)}]}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **content}


def schema_yaml() -> str:
    """The schema as it stands in `workflow/schemas/config.schema.yaml`."""
    return HEADER + yaml.dump(schema(), Dumper=_Plain, sort_keys=False, allow_unicode=True, width=120)


class _Plain(yaml.SafeDumper):
    """Writes repeated values out instead of as aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _entries(content: dict[str, Any], section: dict[str, Any]) -> list[dict[str, Any]]:
    """The definitions of a section's entries."""
    values = next(iter(section["patternProperties"].values()))
    options = values.get("oneOf", [values])
    return [content["$defs"][option["$ref"].split("/")[-1]] for option in options]


def _takes_list(field: dict[str, Any], content: dict[str, Any]) -> bool:
    options = field.get("anyOf", []) + field.get("oneOf", []) + [field]
    resolved = [content["$defs"][o["$ref"].split("/")[-1]] if "$ref" in o else o for o in options]
    return any(option.get("type") in ("array", "object") for option in resolved)
