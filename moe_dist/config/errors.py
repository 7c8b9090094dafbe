"""One exception for everything a user can get wrong in a config, and the words it is told in."""

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

UNKNOWN = ("extra_forbidden", "invalid_key")
"""Pydantic's names for a key that the schema does not have, and for one that is not text."""

NOUNS = {
    "integer": ("an integer", "integers"),
    "number": ("a number", "numbers"),
    "string": ("text", "text"),
    "boolean": ("true or false", "switches"),
    "null": ("null", "nulls"),
    "object": ("a section", "sections"),
}
BOUNDS = {
    "exclusiveMinimum": "greater than",
    "minimum": "of at least",
    "exclusiveMaximum": "less than",
    "maximum": "at most",
    "minLength": "of length at least",
}


class ConfigError(ValueError):
    """A mistake in a config: names the key, the value and what would be valid."""


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """All problems of a pydantic error, one line a key: dotted key, value, what is valid."""
    schema = _without_references(root.model_json_schema())
    messages: dict[tuple[str, ...], str] = {}
    for problem in error.errors():
        path, node = _follow(problem, schema)
        messages.setdefault(path, _message(problem, path, node, schema))
    # Where a value may be a section or a word, pydantic complains of both: what it says of the keys inside is enough.
    inner = [path for path in messages if not any(path == other[: len(path)] != other for other in messages)]
    return "\n".join(messages[path] for path in inner)


def show(value: Any) -> str:
    """A value of a config as its YAML file has it, shortened."""
    text = {"None": "null", "True": "true", "False": "false"}.get(repr(value), repr(value))
    return text if len(text) <= 80 else f"{text[:60]} ... {text[-15:]}"


def _message(problem: Any, path: tuple[str, ...], node: Any, schema: Any) -> str:
    key, kind = ".".join(path), problem["type"]
    if kind in UNKNOWN:
        return f"{key}: unknown key; {_suggestion(path, node, schema)}"
    valid = "a finite number" if kind == "finite_number" else _description(node)
    if kind == "missing":
        return f"{key}: required, but not given; it should be {valid}"
    return f"{key}: {show(problem['input'])} is not valid; it should be {valid}"


def _without_references(schema: dict[str, Any]) -> Any:
    """The JSON schema with every $ref replaced by the section that it names."""

    def resolve(node: Any) -> Any:
        if isinstance(node, list):
            return [resolve(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return resolve(schema["$defs"][node["$ref"].split("/")[-1]])
        return {name: resolve(item) for name, item in node.items() if name != "$defs"}

    return resolve(schema)


def _follow(problem: Any, schema: Any) -> tuple[tuple[str, ...], Any]:
    """The path of a problem and its node in the schema; for an unknown key, the node of the section it stands in."""
    unknown = problem["type"] in UNKNOWN
    path, node = [], schema
    for part in problem["loc"][:-1] if unknown else problem["loc"]:
        child = _child(node, part)
        if child is not None:  # otherwise part is no key, but pydantic's name for a member of a union
            path.append(str(part))
            node = child
    return (*path, str(problem["loc"][-1])) if unknown else tuple(path), node


def _child(node: Any, part: int | str) -> Any:
    """The node of a key of a section, or of a place in a list; None if there is none."""
    if isinstance(part, str):
        return _keys(node).get(part)
    return next((_item(member, part) for member in _members(node) if member.get("type") == "array"), None)


def _item(array: Any, place: int) -> Any:
    return array["prefixItems"][place] if "prefixItems" in array else array["items"]


def _members(node: Any) -> Any:
    return node.get("anyOf", [node])


def _keys(node: Any) -> dict[str, Any]:
    """The keys of a section, also where it is one of several things that a key may hold."""
    return {name: child for member in _members(node) for name, child in member.get("properties", {}).items()}


def _description(node: Any) -> str:
    """What a node of the schema takes: `null or an integer greater than 0`."""
    choices = [choice for member in _members(node) for choice in _choices(member)]
    # Last what has an "and" or commas of its own.
    return either(sorted(choices, key=lambda choice: (choice != "null", choice.startswith("a section"))))


def _choices(member: Any, many: bool = False) -> list[str]:
    if "enum" in member or "const" in member:
        return [repr(value) for value in member.get("enum", [member.get("const")])]
    if "properties" in member:
        return [f"a section with {', '.join(member['properties'])}"]
    if member["type"] == "array":
        count = f"{len(member['prefixItems'])} " if "prefixItems" in member else ""
        return [f"a list of {count}{_choices(_item(member, 0), many=True)[0]}"]
    bounds = " and ".join(f"{words} {member[name]}" for name, words in BOUNDS.items() if name in member)
    return [f"{NOUNS[member['type']][many]} {bounds}".strip()]


def either(choices: list[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(choices[:-1]), choices[-1]]) if len(choices) > 1 else choices[0]


def _suggestion(path: tuple[str, ...], section: Any, schema: Any) -> str:
    siblings = [".".join([*path[:-1], name]) for name in _keys(section)]
    elsewhere = [key for key in _all_keys(schema) if "." in key]
    near = _near(path[-1], siblings) or _near(path[-1], elsewhere)
    return f"did you mean {either(near)}?" if near else f"valid keys here: {', '.join(_keys(section))}"


def _near(name: str, keys: list[str]) -> list[str]:
    """Up to three keys of this very name, else of its words (capacity_factor) or initials (lr), else spelt like it."""
    last = {key: key.split(".")[-1] for key in keys}
    exact = [key for key in keys if last[key] == name]
    similar = [key for key in keys if _shares_words(name, key) or name == _initials(last[key])]
    spelling = difflib.get_close_matches(name, last.values(), n=1, cutoff=0.7)
    return (exact or similar or [key for key in keys if last[key] in spelling])[:3]


def _shares_words(name: str, key: str) -> bool:
    """Whether all words of `name` are in the dotted key, not all of them in the names of its sections."""
    words, *parts = (set(part.split("_")) for part in (name, *reversed(key.split("."))))
    return words <= set().union(*parts) and bool(words & parts[0])


def _initials(name: str) -> str:
    return "".join(word[0] for word in name.split("_"))


def _all_keys(node: Any, path: tuple[str, ...] = ()) -> list[str]:
    """Every dotted key below a node, sections included."""
    keys = []
    for name, child in _keys(node).items():
        keys += [".".join((*path, name)), *_all_keys(child, (*path, name))]
    return keys
