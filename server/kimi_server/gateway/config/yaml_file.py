"""YAML files, restricted to what JSON has: no aliases, no other tags, no duplicate names. Their size is limited."""

from pathlib import Path
from typing import Any

import yaml

TAGS = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
MOST_BYTES = 4 << 20  # of a file; PyYAML takes seconds for one of this size


class SettingsError(Exception):
    """A file that cannot be used; the message is one sentence."""


class Loader(yaml.SafeLoader):
    """Refuses aliases, by which a small file can expand without bound, and duplicate names.

    A date without quotes is text, as in YAML 1.2, and `<<` is a name like any other.
    """

    yaml_constructors = {  # noqa: RUF012  # class attributes in PyYAML, too
        tag: construct for tag, construct in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in TAGS
    }
    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in found if tag in TAGS]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="an alias is not taken here, write its value out", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (yaml.YAMLError, RecursionError):
            raise
        except Exception as error:  # of any type: KeyError for `!!bool x`, ValueError for 5,000 digits
            problem = f"this value cannot be read ({type(error).__name__}), put it in quotes if it is text"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = set()
        for name, _ in node.value:
            if name.tag != "tag:yaml.org,2002:str":
                raise yaml.MarkedYAMLError(problem="a field's name is no text", problem_mark=name.start_mark)
            if name.value in names:
                raise yaml.MarkedYAMLError(problem="a field is given twice", problem_mark=name.start_mark)
            names.add(name.value)
        return super().construct_mapping(node, deep)


def read_bytes(path: Path) -> bytes:
    """The bytes of a file; raises SettingsError."""
    try:
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:  # a path with a NUL or with half of a surrogate pair
        raise SettingsError(f"{str(path)!a} cannot be read: {error}.") from None
    if len(content) > MOST_BYTES:
        raise SettingsError(f"{path} is larger than {MOST_BYTES} bytes: split it, or look for what made it grow.")
    return content


def parse(content: bytes, path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; raises SettingsError. Messages hold none of the content: it may be secret."""
    try:
        found = yaml.load(content, Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise SettingsError(f"{path} is not YAML: {error.problem or error.context}{at}.") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not YAML: {' '.join(str(error).split())}.") from None
    except RecursionError:
        raise SettingsError(f"{path} is nested too deeply.") from None
    if not isinstance(found, dict):
        raise SettingsError(f"{path} must hold a mapping of fields to values, not {type(found).__name__}.")
    return found
