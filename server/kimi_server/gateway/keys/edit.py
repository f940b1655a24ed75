"""Changes in the text of a file of keys that leave the rest of it, comments too, as it is.

PyYAML says where each part of a document stands, and parts are replaced in the text. What comes of it is read again: a
file that would say anything else than what was asked for raises SettingsError and is not used.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from kimi_server.gateway.config.fields import build
from kimi_server.gateway.config.yaml_file import Loader, SettingsError
from kimi_server.gateway.keys.keys_file import Key, KeysFile, parse_keys

Fields = Mapping[str, Any]  # of a key, without its sha256; a limit of None is none


def add(text: str, entry: Fields, path: Path) -> str:
    """The text with a further key; an empty text becomes a new file, with a secret for the cache salts."""
    new = build(Key, entry, path)
    if not text.strip():
        secret = _text(secrets.token_urlsafe(24))
        return _checked(f"cache_salt_secret: {secret}\nkeys:\n- {_inline(entry)}\n", [new], None, path)
    known, sequence = _read(text, path)
    if any(key.id == entry["id"] for key in known.keys):
        raise SettingsError(f"{path} has a key {entry['id']!r} already: choose another id, or revoke that one first.")
    end = _end(sequence.value[-1])
    if sequence.flow_style:
        added = f", {_inline(entry)}"
    else:
        end = _end_of_line(text, end)
        added = f"\n{' ' * _column(text, sequence.start_mark.index)}- {_inline(entry)}"
    return _checked(text[:end] + added + text[end:], [*known.keys, new], known, path)


def revoke(text: str, key_id: str, path: Path) -> str:
    """The text without that key."""
    known, sequence = _read(text, path)
    at = _index(known, key_id, path)
    left = [key for key in known.keys if key.id != key_id]
    if not left:
        raise SettingsError(f"{key_id!r} is the last key of {path}, which needs one: add another first.")
    items = sequence.value
    if not sequence.flow_style:
        begin, end = _begin_of_line(text, items[at].start_mark.index), _end_of_line(text, _end(items[at])) + 1
    elif at + 1 < len(items):
        begin, end = items[at].start_mark.index, items[at + 1].start_mark.index
    else:
        begin, end = _end(items[at - 1]), _end(items[at])
    return _checked(text[:begin] + text[end:], left, known, path)


def limit(text: str, key_id: str, fields: Fields, path: Path) -> str:
    """The text with these fields of that key changed or, where they were not there, added."""
    known, sequence = _read(text, path)
    at = _index(known, key_id, path)
    wanted = list(known.keys)
    wanted[at] = build(Key, {**dataclasses.asdict(wanted[at]), **fields}, path)
    for name, value in fields.items():
        _, sequence = _read(text, path)
        entry = sequence.value[at]
        found = next((node for key, node in entry.value if key.value == name), None)
        if found is not None:
            text = text[: found.start_mark.index] + _text(value) + text[_end(found) :]
        elif value is not None:
            end = _end(entry.value[-1][1])
            between = ", " if entry.flow_style else "\n" + " " * _column(text, entry.start_mark.index)
            end = end if entry.flow_style else _end_of_line(text, end)
            text = text[:end] + f"{between}{name}: {_text(value)}" + text[end:]
    return _checked(text, wanted, known, path)


def _read(text: str, path: Path) -> tuple[KeysFile, yaml.SequenceNode]:
    """What a file says, and where its list of keys stands."""
    known = parse_keys(text.encode(), path)
    document = yaml.compose(text, Loader)
    return known, next(node for name, node in document.value if name.value == "keys")


def _checked(text: str, wanted: list[Key], before: KeysFile | None, path: Path) -> str:
    """The text, where it has these keys and all else of the file before."""
    try:
        found = parse_keys(text.encode(), path)
    except SettingsError as error:
        raise SettingsError(f"{path} is written in a way that cannot be changed here ({error}): edit it.") from None
    if list(found.keys) != wanted or (before and found.cache_salt_secret != before.cache_salt_secret):
        raise SettingsError(f"{path} is written in a way that cannot be changed here: edit it with an editor.")
    return text


def _index(known: KeysFile, key_id: str, path: Path) -> int:
    ids = [key.id for key in known.keys]
    if key_id not in ids:
        raise SettingsError(f"{path} has no key {key_id!r}: it has {', '.join(map(repr, ids))}.")
    return ids.index(key_id)


def _text(value: Any) -> str:
    """A value as JSON, which is YAML where no letter is written as two halves of a surrogate pair."""
    return json.dumps(value, ensure_ascii=False)


def _inline(entry: Fields) -> str:
    """`{id: "a", sha256: "..."}`"""
    return "{" + ", ".join(f"{name}: {_text(value)}" for name, value in entry.items()) + "}"


def _end(node: yaml.Node) -> int:
    """Where a node ends; PyYAML lets one of several lines end where the next begins, behind comments."""
    if isinstance(node, yaml.MappingNode) and not node.flow_style:
        return _end(node.value[-1][1])
    return int(node.end_mark.index)


def _begin_of_line(text: str, index: int) -> int:
    return text.rfind("\n", 0, index) + 1


def _end_of_line(text: str, index: int) -> int:
    """Of the line feed, or of the text."""
    found = text.find("\n", index)
    return len(text) if found < 0 else found


def _column(text: str, index: int) -> int:
    return index - _begin_of_line(text, index)
