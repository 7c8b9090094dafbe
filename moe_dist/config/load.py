"""YAML file + dotted overrides -> checked Config."""

import difflib
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from moe_dist.config.checks import check
from moe_dist.config.errors import ConfigError, explain
from moe_dist.config.schema import Config


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice: plain YAML takes the last and says nothing."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        for place, (key, _) in enumerate(node.value):
            if key.value in names[:place]:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value!r} is given twice", key.start_mark)
        return super().construct_mapping(node, deep)


def load_config(path: str | Path, overrides: list[str] | None = None, num_ranks: int | None = None) -> Config:
    """Read a YAML file, apply `key.subkey=value` overrides, and check everything.

    Args:
        path: the YAML file.
        overrides: dotted overrides, their values in YAML syntax.
        num_ranks: ranks of the run; by default the fewest that the `parallel` section needs.

    Raises:
        ConfigError: naming each wrong key, its value and what is valid.
    """
    tree = read_yaml(Path(path))
    for override in overrides or []:
        apply_override(tree, override)
    return build_config(tree, num_ranks)


def build_config(tree: dict[str, Any], num_ranks: int | None = None) -> Config:
    """A checked Config from nested dictionaries. Raises ConfigError."""
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(explain(error, Config)) from None
    check(config, num_ranks)
    return config


def dump_config(config: Config) -> str:
    """The whole resolved config as YAML that load_config reads back to an equal Config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError if there is no such file, or it is not a mapping."""
    if not path.is_file():
        raise ConfigError(f"CONFIG: there is no file {str(path)!r}{_near_files(path)}")
    try:
        with path.open(encoding="utf-8") as file:
            tree = yaml.load(file, _Loader)
    except OSError as error:
        raise ConfigError(f"CONFIG: cannot read {str(path)!r} ({error.strerror}); it must be readable") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not text, or no such day
        raise ConfigError(f"CONFIG: {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"CONFIG: {str(path)!r} holds a {type(tree).__name__}; it should hold sections of keys")
    return tree


def _near_files(path: Path) -> str:
    folder = path.parent if path.parent.is_dir() else Path("configs")
    names = sorted(p.name for p in folder.glob("*.yaml")) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    if near:
        return f"; did you mean {str(folder / near[0])!r}?"
    return f"; {str(folder)!r} holds {', '.join(names)}" if names else ""


def apply_override(tree: dict[str, Any], override: str) -> None:
    """Set the key of a dotted override `section.key=value`. Raises ConfigError."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise ConfigError(f"{override!r}: an override has the form section.key=value, such as parallel.expert=2")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"{key}: {text!r} is not valid YAML") from None
    set_key(tree, key, value)


def set_key(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key of nested dictionaries, and make the sections above it that are not there."""
    *sections, last = key.strip().split(".")
    for name in sections:
        if not isinstance(tree.get(name), dict):  # absent, or an empty section in the file
            tree[name] = {}
        tree = tree[name]
    tree[last] = value
