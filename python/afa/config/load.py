"""Reading settings from YAML files and `section.key=value` overrides; every problem is reported at once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from afa.config.schema import SECTIONS, Config, all_keys, section_fields
from afa.errors import UserError, did_you_mean
from afa.run import CONFIG

READY = Path(__file__).parent / "ready"
_COMMAND_LINE = "on the command line"
RETIRED = {"eval.crf_workers"}
"""Settings that no longer exist. Files of older runs contain them, so they are ignored there."""

Values = dict[str, dict[str, Any]]
"""Section -> name -> value as given by the user."""


def ready_names() -> list[str]:
    """Names of the configurations shipped with the package."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def resolve(name_or_path: str | Path) -> Path:
    """The YAML file for the name of a built-in configuration, a path, or the folder of a run.

    Raises UserError with the built-in names if there is no such file.
    """
    text = str(name_or_path)
    if text in ready_names():
        return READY / f"{text}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if (path / CONFIG).is_file():
        return path / CONFIG
    raise UserError(
        f"no such configuration: '{text}'; give a YAML file, a run's folder or one of "
        f"{', '.join(ready_names())}{did_you_mean(text, ready_names())}"
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply `section.key=value` overrides.

    Raises one UserError that lists every wrong key and value: where it was set, what was expected, and what was given.
    """
    path = resolve(name_or_path)
    reading = _Reading()
    reading.add_file(_read_yaml(path), f"in {path}")
    for override in overrides:
        reading.add_override(override)
    return reading.config()


def from_dict(content: Any, *, where: str = "in the configuration") -> Config:
    """Create a Config from nested mappings; missing keys get their defaults. Raises UserError like `load_config`."""
    reading = _Reading()
    reading.add_file(content, where)
    return reading.config()


def with_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return a copy with `section.key=value` overrides applied. Raises UserError like `load_config`."""
    reading = _Reading()
    reading.add_file(to_dict(config), "in the configuration")
    for override in overrides:
        reading.add_override(override)
    return reading.config()


def validate(config: Config) -> None:
    """Check every value, its range, and its consistency with other values. Raises UserError like `load_config`.

    Only needed for a Config that was changed in Python; the functions above return valid ones.
    """
    with_overrides(config, [])


def to_dict(config: Config) -> dict[str, Any]:
    """Convert to nested dictionaries, lists and scalars for YAML or JSON; `from_dict` is the inverse."""
    return config.model_dump(mode="json", warnings=False)


def to_yaml(config: Config) -> str:
    """The complete configuration as YAML; `load_config` reads it back."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def json_schema() -> str:
    """The JSON schema of the YAML files, for completion and checks in editors."""

    def one_line(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                key: " ".join(value.split()) if key == "description" and isinstance(value, str) else one_line(value)
                for key, value in node.items()
            }
        return [one_line(item) for item in node] if isinstance(node, list) else node

    return json.dumps(one_line(Config.model_json_schema()), indent=2)


class _Reading:
    """Values from files and overrides, where each was set, and the problems found so far."""

    def __init__(self) -> None:
        self.values: Values = {}
        self.where: dict[str, str] = {}
        self.problems: list[str] = []

    def add_file(self, content: Any, where: str) -> None:
        if content is None:
            return
        if not isinstance(content, dict):
            expected = f"sections ({', '.join(SECTIONS)}) of key: value lines"
            raise UserError(f"{where.removeprefix('in ')} must contain {expected}, got {_shown(content)}")
        for section, values in content.items():
            if section not in SECTIONS:
                self.problems.append(_unknown_key(str(section), where))
            elif isinstance(values, dict):
                for name, value in values.items():
                    self._set(f"{section}.{name}", value, where)
            elif values is not None:
                self.problems.append(f"'{section}' {where} must be a section of key: value lines, got {_shown(values)}")

    def add_override(self, override: str) -> None:
        """Apply `train.iterations=100` or `labels.cam_scales=1,0.5`. A further dot selects a key of a mapping:
        `model.backbone_args.drop_path_rate=0.1`."""
        key, equals, text = (part.strip() for part in override.partition("="))
        if not equals or not key:
            self.problems.append(
                f"invalid override '{override}': write section.key=value without spaces, such as train.iterations=100"
            )
            return
        section, name, *inner = [*key.split("."), ""][: max(2, len(key.split(".")))]
        schema = _schema(section, name)
        if schema is None or (inner and schema.get("type") != "object"):
            self.problems.append(_unknown_key(key, _COMMAND_LINE))
        elif inner:
            mapping = self.values.setdefault(section, {}).setdefault(name, {})
            for part in inner[:-1]:
                mapping = mapping.setdefault(part, {}) if isinstance(mapping, dict) else mapping
            if not isinstance(mapping, dict):
                self.problems.append(f"invalid key '{key}': its parent is not a mapping")
                return
            mapping[inner[-1]] = _parse(text, schema)
        else:
            self._set(key, _parse(text, schema), _COMMAND_LINE)

    def config(self) -> Config:
        """Return the validated configuration, or raise UserError with every problem."""
        config: Config | None = None
        try:
            config = Config.model_validate(self.values)
        except ValidationError as error:
            keys = dict.fromkeys(".".join(map(str, item["loc"][:2])) for item in error.errors(include_url=False))
            self.problems += [self._wrong(key, _expected(key)) for key in keys]
        if config is not None and not self.problems:
            self.problems += [self._wrong(key, expected, config) for key, expected in config.conflicts()]
            if not self.problems:
                return config
        count = len(self.problems)
        raise UserError((f"{count} settings are wrong: " if count > 1 else "") + "; ".join(self.problems))

    def _set(self, key: str, value: Any, where: str) -> None:
        section, _, name = key.partition(".")
        if key in RETIRED and where != _COMMAND_LINE:
            return
        if _schema(section, name) is None:
            self.problems.append(_unknown_key(key, where))
            return
        self.values.setdefault(section, {})[name] = value
        self.where[key] = where

    def _wrong(self, key: str, expected: str, config: Config | None = None) -> str:
        section, name = key.split(".")
        value = self.values[section][name] if config is None else getattr(getattr(config, section), name)
        where = f" {self.where[key]}" if key in self.where else ""
        options = (_schema(section, name) or {}).get("enum", [])
        hint = did_you_mean(value, options) if isinstance(value, str) else ""
        return f"{key}{where} must be {expected}, got {_shown(value)}{hint}"


def _parse(text: str, schema: Mapping[str, Any]) -> Any:
    """Parse the value of an override according to the type of its field."""
    kinds = schema.get("anyOf", [schema])
    optional = any(kind.get("type") == "null" for kind in kinds)
    if optional and text.lower() in ("null", "none", "~", ""):
        return None
    # A string field takes the text unchanged: a folder called 2012 or on must not become a number or a Boolean.
    if kinds[0].get("type") == "string":
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _schema(section: str, name: str) -> dict[str, Any] | None:
    """The JSON schema of one key, or None for an unknown key."""
    if section not in SECTIONS or name not in section_fields(section):
        return None
    kind: Any = Config.model_fields[section].annotation
    found: dict[str, Any] = kind.model_json_schema()["properties"][name]
    return found


def _expected(key: str) -> str:
    section, _, name = key.partition(".")
    schema = _schema(section, name)
    assert schema is not None
    return _described(schema)


def _described(schema: Mapping[str, Any]) -> str:
    """Describe the values that a JSON schema allows."""
    if "anyOf" in schema:
        return " or ".join("null" if kind.get("type") == "null" else _described(kind) for kind in schema["anyOf"])
    if "const" in schema:
        return f"'{schema['const']}'"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    kind = schema["type"]
    if kind == "array":
        items = schema.get("prefixItems")
        if items:
            return f"a list of {len(items)} {_plural(items[0])}"
        return f"a list of {_plural(schema['items'])}" + (", at least one" if schema.get("minItems") else "")
    if kind == "string":
        return "text" if "minLength" not in schema else "text that is not empty"
    if kind in ("integer", "number"):
        return ("a whole number" if kind == "integer" else "a number") + _range(schema)
    return {"boolean": "true or false", "object": "a mapping with text keys"}[kind]


def _plural(schema: Mapping[str, Any]) -> str:
    return ("whole numbers" if schema["type"] == "integer" else "numbers") + _range(schema)


def _range(schema: Mapping[str, Any]) -> str:
    """The range of a number, as the end of a description."""
    low, above = schema.get("minimum"), schema.get("exclusiveMinimum")
    high, below = schema.get("maximum"), schema.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low:g} to {high}"
    if low is not None and below is not None:
        return f" in [{low:g}, {below:g})"
    if above is not None and below is not None:
        return f" between {above:g} and {below:g}"
    if above is not None:
        return f" above {above:g}" + (f" and at most {high:g}" if high is not None else "")
    if low is not None:
        return f" of {low:g} or more" if low == 0 else f" of at least {low:g}"
    return ""


def _unknown_key(key: str, where: str) -> str:
    keys = all_keys()
    section, leaf = key.partition(".")[0], key.rpartition(".")[2]
    if key in SECTIONS:
        first = next(iter(section_fields(key)))
        return f"'{key}' {where} is a section, not a key; set one of its keys, such as {key}.{first}"
    if (parent := ".".join(key.split(".")[:2])) in keys and parent != key:
        return f"unknown configuration key '{key}' {where}: {parent} is not a mapping"
    namesakes = [known for known in keys if known.rpartition(".")[2] == leaf]
    names = list(section_fields(section)) if section in SECTIONS else [*SECTIONS, *keys]
    near = did_you_mean(leaf if section in SECTIONS else key, names)
    if namesakes:
        nearest = f"; did you mean '{namesakes[0]}'?"
    elif near:
        nearest = near.replace("'", f"'{section}.", 1) if section in SECTIONS else near
    elif section in SECTIONS:
        nearest = f"; the keys of {section} are {', '.join(names)}"
    else:
        nearest = f"; the sections are {', '.join(SECTIONS)}"
    return f"unknown configuration key '{key}' {where}{nearest}"


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


class _Loader(yaml.SafeLoader):
    """SafeLoader that rejects duplicate keys instead of silently using the last one."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # keys of the mapping itself override those merged by <<
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"duplicate key '{key}'", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _read_yaml(path: Path) -> Any:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the configuration {path} can't be read as UTF-8 text: {error}") from error
    try:
        return yaml.load(text, Loader=_Loader)  # a SafeLoader: no object is built from the file
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"the configuration {path} is not valid YAML{line}: {problem}") from error
