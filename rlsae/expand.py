"""Read a configuration file: expand lists into families of entries, fill `${VARIABLE}`s, validate, explain mistakes."""

from __future__ import annotations

import difflib
import itertools
import json
import os
import re
import types
import typing
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from rlsae.config import SECTIONS, SLUG, Config, Entry
from rlsae.errors import RlsaeError

Raw = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """Refuses a key that is written twice; YAML would keep the last one silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(path: Path | str) -> Config:
    """Read and validate a YAML configuration file."""
    try:
        raw = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise RlsaeError(f"cannot read the configuration {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RlsaeError(f"{path} is not valid YAML: {error}") from None
    return parse_config(raw)


def parse_config(raw: Any) -> Config:
    """Validate a configuration given as plain values.

    Raises:
        RlsaeError: names every offending key, what was expected, and the nearest known key.
    """
    if not isinstance(raw, dict):
        raise RlsaeError(f"the configuration must be a mapping with the sections {', '.join(SECTIONS)}")
    try:
        return Config.model_validate(_fill_variables(_expand_all(raw)))
    except ValidationError as error:
        raise RlsaeError(explain(error, Config)) from None


# --- lists become families of entries ----------------------------------------------------------------------------


def _expand_all(raw: Raw) -> Raw:
    expanded = dict(raw)
    families: dict[str, dict[str, list[str]]] = {}
    for section in SECTIONS:
        if not isinstance(raw.get(section), dict):
            continue
        entries: Raw = {}
        families[section] = {}
        for name, entry in raw[section].items():
            members = _expand(section, str(name), entry, families) if isinstance(entry, dict) else {name: entry}
            for member in members:
                if member in entries:
                    raise RlsaeError(f"{section}.{member}: two entries expand to this name; rename one of them")
            entries |= members
            families[section][str(name)] = list(members)
        expanded[section] = entries
    return expanded


def _expand(section: str, name: str, entry: Raw, families: dict[str, dict[str, list[str]]]) -> dict[str, Raw]:
    """The members of one entry: one per combination of the values of its listed scalar fields."""
    kind = _entry_type(section, entry)
    if kind is None:
        return {name: entry}
    entry = dict(entry)
    for key, target in kind.marked("entry_of").items():
        if key in entry:
            entry[key] = _resolve_family(entry[key], families.get(target, {}), _takes_list(kind, key))
    listed = [k for k, v in entry.items() if isinstance(v, list) and k in kind.model_fields and not _takes_list(kind, k)]
    if not listed:
        return {name: entry}
    for key in listed:
        if not entry[key]:
            raise RlsaeError(f"{section}.{name}.{key}: an empty list expands to no entry; remove the key or give a value")
    members = {}
    for values in itertools.product(*(entry[key] for key in listed)):
        chosen = dict(zip(listed, values, strict=True))
        member = "-".join([name, *(f"{key.replace('_', '-')}-{_slug(value)}" for key, value in chosen.items())])
        if not re.fullmatch(SLUG, member):
            raise RlsaeError(
                f"{section}.{name}: its lists expand to the name {member!r}, which is no slug "
                "(lower-case letters, digits and single hyphens); write these members as entries of their own"
            )
        if member in members:
            raise RlsaeError(f"{section}.{name}: its lists expand to the name {member!r} twice")
        members[member] = entry | chosen
    return members


def _resolve_family(value: Any, families: dict[str, list[str]], takes_list: bool) -> Any:
    """Replace the name of an expanded entry by the names of its members; `name@step` keeps its step."""

    def members(name: Any) -> list[Any]:
        stem, at, step = str(name).partition("@")
        return [f"{m}{at}{step}" for m in families[stem]] if stem in families else [name]

    if isinstance(value, list):
        return [m for name in value for m in members(name)]
    found = members(value)
    return found if takes_list or len(found) > 1 else found[0]


def _entry_type(section: str, entry: Raw) -> type[Entry] | None:
    """The model of an entry, by its discriminator where the section has several; None if that cannot be told."""
    key, kinds = _kinds(section)
    return kinds.get(str(entry.get(key, "")) if key else "")


@cache
def _kinds(section: str) -> tuple[str | None, dict[str, type[Entry]]]:
    """The key that tells the entries of a section apart (`source`, `kind`, `method`), and the model of each of its values.

    Where there is one model, the key is None and the value empty; where the key has a default, that kind is also the one of
    the empty value.
    """
    (_, annotation) = typing.get_args(typing.get_type_hints(Config, include_extras=True)[section])
    options = _members(annotation)
    if len(options) == 1:
        return None, {"": options[0]}
    key = str(next(m.discriminator for m in typing.get_args(annotation) if isinstance(m, FieldInfo)))
    kinds = {tag: option for option in options for tag in typing.get_args(option.model_fields[key].annotation)}
    defaults = [option for option in options if not option.model_fields[key].is_required()]
    return key, kinds | ({"": defaults[0]} if defaults else {})


def _members(annotation: Any) -> list[Any]:
    if typing.get_origin(annotation) is typing.Annotated:
        return _members(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for option in typing.get_args(annotation) for m in _members(option)]
    return [annotation]


def _takes_list(kind: type[Entry], key: str) -> bool:
    return any(typing.get_origin(m) in (list, tuple) for m in _members(kind.model_fields[key].annotation))


def _slug(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, bool) or value is None else str(value)
    return text.replace(".", "p").replace("_", "-").replace("@", "-").lower()


# --- ${VARIABLE} -------------------------------------------------------------------------------------------------


def _fill_variables(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {k: _fill_variables(v, f"{key}.{k}" if key else str(k)) for k, v in value.items()}
    if isinstance(value, list):
        return [_fill_variables(v, key) for v in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise RlsaeError(f"{key}: the environment variable {match[1]} is not set; set it, or write the path out")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", fill, value)


# --- messages ----------------------------------------------------------------------------------------------------


def parse_settings(kind: Any, text: str) -> Any:
    """Parse an entry's settings given as JSON, as the rules pass them to `rlsae <verb> --settings`."""
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        raise RlsaeError("--settings: " + explain(error, kind)) from None


def explain(error: ValidationError, kind: Any) -> str:
    """One line per mistake: the key, what was found, what was expected."""
    lines = []
    for mistake in error.errors():
        location = [part for place, part in enumerate(mistake["loc"]) if not _is_variant(part, place, mistake)]
        key = ".".join(str(part) for part in location if part != "[key]")
        message = mistake["msg"].removeprefix("Value error, ")
        if mistake["type"] == "extra_forbidden":
            message = "unknown key" + _nearest(str(location[-1]), _known_keys(kind, mistake["loc"]))
        elif mistake["type"] == "string_pattern_mismatch":
            message = f"{mistake['input']!r} is no slug (lower-case letters, digits and single hyphens)"
        elif mistake["type"] in ("union_tag_invalid", "literal_error"):
            if "discriminator" in mistake["ctx"]:
                key += "." + mistake["ctx"]["discriminator"].strip("'")
            expected = mistake["ctx"].get("expected_tags") or mistake["ctx"]["expected"]
            if location[-1] == "layers":
                expected = "'all', a list of layers, a choice (by, order, count) or same_as"
            message = f"expected one of {expected}, found {mistake['ctx'].get('tag') or repr(mistake['input'])}"
        elif mistake["type"] == "union_tag_not_found":
            message = f"the key {mistake['ctx']['discriminator']} is missing"
        elif mistake["type"] == "missing":
            message = "the key is missing"
        elif "input" in mistake and not isinstance(mistake["input"], dict | BaseModel):
            message = f"{message[0].lower()}{message[1:]}, found {mistake['input']!r}"
        line = f"{key}: {message}" if key else message
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _is_variant(part: Any, place: int, mistake: Any) -> bool:
    """Whether a part of a location names a member of a union and not a key of the file."""
    if not isinstance(part, str):
        return False
    location = mistake["loc"]
    if place == 2 and location[0] in SECTIONS and part in _kinds(location[0])[1]:
        return True
    alone = place == 0 and len(location) > 1 and location[0] not in SECTIONS  # settings of one entry
    return part.startswith("<") or (alone and any(part in _kinds(section)[1] for section in SECTIONS))


def _known_keys(kind: Any, location: tuple[Any, ...]) -> list[str]:
    """The keys that stand beside an unknown one: walk from the outermost model to its parent."""
    options = _models(kind)
    for part in location[:-1]:
        if any(part in option.model_fields for option in options):
            options = [m for o in options if part in o.model_fields for m in _models(o.model_fields[part].annotation)]
        elif any(_has_tag(option, part) for option in options):
            options = [o for o in options if _has_tag(o, part)]
        elif str(part).startswith("<"):
            options = [o for o in options if ("same_as" in o.model_fields) == (part == "<same_as>")]
    return [key for option in options for key in option.model_fields]


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that an annotation admits, as themselves or as the values of a dict."""
    found: list[type[BaseModel]] = []
    for member in _members(annotation):
        if typing.get_origin(member) is dict:
            found += _models(typing.get_args(member)[1])
        elif isinstance(member, type) and issubclass(member, BaseModel):
            found.append(member)
    return found


def _has_tag(option: Any, tag: Any) -> bool:
    return any(tag in typing.get_args(f.annotation) for f in option.model_fields.values())


def _nearest(key: str, known: list[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known here: {', '.join(known)}"
