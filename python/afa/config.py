"""The configuration tree of a run: what every YAML file and every dotted override may set.

One dataclass a section; a default is the published AFA setting on VOC 2012 (AFA, CVPR 2022) unless its
comment says otherwise. Ready files are in `configs/`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml

from afa.errors import UserError, did_you_mean


@dataclass
class DataConfig:
    """Where the images are and how a training crop is made."""

    root: str = "data/VOCdevkit/VOC2012"
    """Folder in VOC layout (JPEGImages, ImageSets/Segmentation, Annotations or tags.csv, SegmentationClass), as
    `afa prepare` completes it, or a folder of one's own pictures (docs/own_data.md)."""
    embedded: bool = False
    """Make the embedded data set at `root` when it is not there yet."""
    train_split: str = "train"
    val_split: str = "val"
    crop_size: int = 512
    """Side of the square training crop, pixels; a multiple of the token stride."""
    scale_range: tuple[float, float] = (0.5, 2.0)
    """Random resize of a training image before the crop."""
    flip: bool = True
    largest_side: int | None = None
    """Shrink pictures whose longer side has more pixels as they are read, for photographs of many megapixels; masks
    follow. null: never, as published."""
    bad_images: str = "refuse"
    """What to do with a file that can't be decoded: 'refuse' to start, or 'skip' its image; both name it."""
    workers: int = 2
    """Loader processes; 0 loads in the training process."""


@dataclass
class ModelConfig:
    """Backbone and heads."""

    backbone: str = "pvt_v2_b1"
    """Any timm name whose attention can be read."""
    backbone_args: dict[str, Any] = field(default_factory=dict)
    """Passed on to timm.create_model."""
    weights: str | None = "timm"
    """'timm' (downloads), 'bundled:<name>' (shipped in the package), a safetensors/pth path, or null for
    random."""
    output_stride: int = 16
    """Pixels a token of the last stage; reached by unstriding the last stages of a pyramid."""
    attention_blocks: int | None = None
    """How many of the last blocks give attention maps; null: all blocks of the last stage (plain ViT: 2)."""
    decoder: str = "mlp"
    """'mlp': all-MLP head over all levels; 'single': a head on the last level alone."""
    decoder_width: int = 256
    refine_iterations: int = 0
    """PAR on the decoder's class probabilities, inside the network, with gradients; 0: none, as published."""
    refine_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    refine_downscale: int = 2
    """That PAR works at 1/refine_downscale of the image size, and so do the logits that come out."""
    pooling: str = "max"
    """Global pooling before the classifier: 'max' (published) or 'mean'."""


@dataclass
class LabelConfig:
    """CAMs, walk and pseudo labels."""

    cam_scales: tuple[float, ...] = (1.0, 0.5, 1.5)
    cam_threshold: float = 0.45
    """Background score of plain CAM labels."""
    low: float = 0.35
    high: float = 0.55
    """Background scores: foreground above `high`, background below `low`, ignored between."""
    walk_radius: int = 8
    """Window of the walk and of the affinity loss, tokens (Chebyshev)."""
    walk_power: int = 2
    walk_steps: int = 1
    walk_eps: float = 0.1
    par_dilations: tuple[int, ...] = (1, 2, 4, 8, 12, 24)
    par_iterations: int = 10
    walk_par_iterations: int | None = None
    """PAR's iterations on walk labels, 0 for none; null: as many as par_iterations."""
    par_downscale: int = 2
    """PAR works at 1/par_downscale of the image size."""
    affinity_from_walk: bool = False
    """COCO: the affinity target switches to the walk label when the segmentation target does."""


@dataclass
class TrainConfig:
    """Schedule, losses and optimiser."""

    iterations: int = 20000
    batch_size: int = 4
    """Images one update learns from, over all processes together."""
    accumulate: int = 1
    """Pieces that a process works its images in, one after the other, to save memory: the same losses and gradients up
    to rounding, but for the decoder's batch norm, which knows one piece. Makes labels by a forward of their own."""
    classify_until: int = 2000
    """Only the classification loss before this iteration."""
    par_until: int = 6000
    """Segmentation learns from PAR labels before this iteration, from walk labels after."""
    weight_seg: float = 0.1
    weight_affinity: float = 0.1
    lr: float = 6e-5
    head_lr_factor: float = 10.0
    norm_lr_factor: float = 0.0
    """Learning-rate factor of the backbone's norm layers; 0 freezes them, as published."""
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 1500
    warmup_lr: float = 1e-6
    poly_power: float = 1.0
    seed: int = 0
    precision: str = "fp32"
    """'fp32', or autocast to 'bf16' or 'fp16', the latter with a loss scale that adapts."""
    label_precision: str = "same"
    """Of the forwards that only make labels: 'same' as precision, or 'auto': bf16 where the processor multiplies
    matrices of it in hardware."""
    clip_grad: float = 0.0
    """Largest 2-norm of all gradients together; 0: no limit, as published."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which is then what is measured and saved;
    0: none, as published. Checkpoints hold both."""
    compile: bool = False
    """torch.compile of all but the blocks whose attention is read."""
    sync_batch_norm: bool = True
    """The decoder's batch norm sees the images of all processes."""
    log_every: int = 10
    eval_every: int = 2000
    checkpoint_every: int = 2000
    keep_checkpoints: int = 2
    """The newest ones; the one before serves when the newest is damaged."""
    tensorboard: bool | None = None
    """Write scalars and pictures for TensorBoard; null: when the package is installed."""


@dataclass
class EvalConfig:
    """Measurement on the validation split."""

    scales: tuple[float, ...] = (1.0,)
    """Scales of the segmentation logits, each with its flip when `flip`."""
    flip: bool = False
    fusion: str = "max"
    """How the logits of scales and flips become one: 'max' (published) or 'mean'."""
    crf: bool = False
    """Dense CRF on the fused segmentation; needs the extra `crf`."""
    crf_workers: int | None = None
    """Processes of the CRF; null: one a core; 0: in the evaluating process."""
    crf_iterations: int = 10
    crf_gaussian: tuple[float, float] = (3.0, 3.0)
    """Standard deviation (pixels) and weight of the smoothness kernel."""
    crf_bilateral: tuple[float, float, float] = (64.0, 5.0, 4.0)
    """Standard deviations (pixels, 8-bit colour values) and weight of the appearance kernel."""
    batch_size: int = 1
    """Images of one size measured together."""
    report_images: int = 12
    """Images shown in the report, spread over the split; a third as many of the best and of the worst are added."""


@dataclass
class Config:
    """A whole run."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    labels: LabelConfig = field(default_factory=LabelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


SECTIONS = tuple(f.name for f in fields(Config))

# Generous upper limits: they catch typing errors before memory or processes run out.
MAX_WORKERS = 256
MAX_CROP_SIZE = 4096
MAX_BATCH_SIZE = 65536
MAX_DECODER_WIDTH = 8192
MAX_SCALE = 8
MAX_RESIZE = 16

READY = Path(__file__).parent / "configs"


def ready_names() -> list[str]:
    """Names of the configurations shipped with the package."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def resolve(name_or_path: str | Path) -> Path:
    """The YAML file meant by the name of a ready configuration, by a path, or by the folder of a run.

    Raises UserError naming the ready ones when there is no such file.
    """
    text = str(name_or_path)
    if text in ready_names():
        return READY / f"{text}.yaml"
    path = Path(name_or_path)
    if path.is_file():
        return path
    if (path / "config.yaml").is_file():
        return path / "config.yaml"
    raise UserError(
        f"there is no configuration '{text}': it is neither a file nor one of the ready names "
        f"{', '.join(ready_names())}{did_you_mean(text, ready_names())}"
    )


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply `section.key=value` overrides, and check every value's type and range.

    Raises UserError naming the key and the file or override it came from.
    """
    path = resolve(name_or_path)
    config = from_dict(_read_yaml(path), where=str(path))
    for override in overrides:
        apply_override(config, override)
    validate(config)
    return config


def from_dict(content: Any, *, where: str = "the configuration") -> Config:
    """A Config from nested mappings; what is not named keeps its default. Ranges are left to `validate`."""
    config = Config()
    if content is None:
        return config
    if not isinstance(content, dict):
        raise UserError(
            f"{where} must hold sections ({', '.join(SECTIONS)}) of key: value lines, got {_shown(content)}"
        )
    for section, values in content.items():
        if section not in SECTIONS:
            raise _unknown_key(str(section), where)
        if values is None:
            continue
        if not isinstance(values, dict):
            raise UserError(f"'{section}' in {where} must be a section of key: value lines, got {_shown(values)}")
        for name, value in values.items():
            _set(config, f"{section}.{name}", value, where)
    return config


def apply_override(config: Config, override: str) -> None:
    """Set one key from `section.key=value`, typed by the field: `train.iterations=100`,
    `labels.cam_scales=1,0.5`.

    Keys inside a mapping are reached by one more dot: `model.backbone_args.drop_path_rate=0.1`.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(
            f"'{override}' is no override: write section.key=value, such as train.iterations=100, without spaces"
        )
    text = text.strip()
    parts = key.split(".")
    hint = _hint(".".join(parts[:2]))
    if hint is None or (len(parts) > 2 and not _is_mapping(hint)):
        raise _unknown_key(key, "the command line")
    value: Any
    # A string field takes the text as it stands: a folder called 2012 or on must not become a number or a
    # truth.
    if _plain(hint) is str and not (_optional(hint) and text.lower() in ("null", "none", "~", "")):
        value = text
    elif _optional(hint) and text.lower() == "none":
        value = None
    else:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            value = text
    if len(parts) > 2:
        mapping: dict[str, Any] = getattr(getattr(config, parts[0]), parts[1])
        for part in parts[2:-1]:
            mapping = mapping.setdefault(part, {})
            if not isinstance(mapping, dict):
                raise UserError(f"'{key}' reaches into '{part}', which is a value and not a mapping")
        mapping[parts[-1]] = value
        return
    _set(config, key, value, "the command line")


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dictionaries, lists and scalars: what YAML and JSON can hold, and `from_dict` reads
    back."""
    return _plain_data(asdict(config))


def to_yaml(config: Config) -> str:
    """The whole configuration as YAML; `load_config` of it gives an equal Config."""
    return yaml.safe_dump(to_dict(config), sort_keys=False, default_flow_style=None, width=100)


def validate(config: Config) -> None:
    """Check every range before any work; raises UserError naming the key, what is allowed and what came."""
    data, model, labels, train, evaluation = (
        config.data,
        config.model,
        config.labels,
        config.train,
        config.eval,
    )

    def need(condition: bool, key: str, allowed: str, hint: str = "") -> None:
        if not condition:
            section, name = key.split(".")
            raise UserError(f"{key} must be {allowed}, got {_shown(getattr(getattr(config, section), name))}{hint}")

    def need_one_of(section: str, name: str, options: tuple[str, ...]) -> None:
        value = getattr(getattr(config, section), name)
        hint = did_you_mean(value, options)
        need(value in options, f"{section}.{name}", f"one of {', '.join(options)}", hint)

    need(bool(data.root), "data.root", "the path of a data folder")
    need(bool(data.train_split), "data.train_split", "the name of a split list")
    need(bool(data.val_split), "data.val_split", "the name of a split list")
    need(model.output_stride >= 1, "model.output_stride", "at least 1")
    stride = model.output_stride
    multiple = f"a positive multiple of model.output_stride ({stride}), such as"
    near = max(1, min(round(data.crop_size / stride), MAX_CROP_SIZE // stride)) * stride
    need(data.crop_size <= MAX_CROP_SIZE, "data.crop_size", f"at most {MAX_CROP_SIZE} pixels")
    need(data.crop_size > 0 and data.crop_size % stride == 0, "data.crop_size", f"{multiple} {near}")
    need(
        0 < data.scale_range[0] <= data.scale_range[1] <= MAX_RESIZE,
        "data.scale_range",
        f"two factors, 0 < smallest <= largest <= {MAX_RESIZE}",
    )
    need(data.largest_side is None or data.largest_side >= 32, "data.largest_side", "at least 32 pixels, or null")
    need_one_of("data", "bad_images", ("refuse", "skip"))
    need(0 <= data.workers <= MAX_WORKERS, "data.workers", f"0 (load in the training process) to {MAX_WORKERS}")

    need(bool(model.backbone), "model.backbone", "the name of a timm model")
    need(
        model.attention_blocks is None or model.attention_blocks >= 1,
        "model.attention_blocks",
        "1 or more, or null",
    )
    need_one_of("model", "decoder", ("mlp", "single"))
    need_one_of("model", "pooling", ("max", "mean"))
    width = f"at least 1 and at most {MAX_DECODER_WIDTH}"
    need(1 <= model.decoder_width <= MAX_DECODER_WIDTH, "model.decoder_width", width)
    need(model.refine_iterations >= 0, "model.refine_iterations", "0 or more")
    need(model.refine_downscale >= 1, "model.refine_downscale", "at least 1")

    for key in ("cam_scales", "scales"):
        section, scales = ("labels", labels.cam_scales) if key == "cam_scales" else ("eval", evaluation.scales)
        allowed = f"one or more factors above 0 and at most {MAX_SCALE}"
        need(bool(scales) and all(0 < s <= MAX_SCALE for s in scales), f"{section}.{key}", allowed)
    for key in ("cam_threshold", "low", "high"):
        need(0 < getattr(labels, key) < 1, f"labels.{key}", "between 0 and 1")
    need(labels.low <= labels.high, "labels.low", f"no larger than labels.high ({labels.high})")
    need(1 <= labels.walk_radius <= 63, "labels.walk_radius", "1 to 63 tokens")
    need(labels.walk_power >= 1, "labels.walk_power", "at least 1")
    need(labels.walk_steps >= 0, "labels.walk_steps", "0 or more")
    need(labels.walk_eps > 0, "labels.walk_eps", "above 0")
    for key, dilations in (
        ("model.refine_dilations", model.refine_dilations),
        ("labels.par_dilations", labels.par_dilations),
    ):
        need(bool(dilations) and min(dilations) >= 1, key, "one or more whole numbers of at least 1")
    need(labels.par_iterations >= 0, "labels.par_iterations", "0 or more")
    need((labels.walk_par_iterations or 0) >= 0, "labels.walk_par_iterations", "0 or more, or null")
    need(labels.par_downscale >= 1, "labels.par_downscale", "at least 1")

    for key in (
        *("iterations", "batch_size", "accumulate"),
        *("log_every", "eval_every", "checkpoint_every", "keep_checkpoints"),
    ):
        need(getattr(train, key) >= 1, f"train.{key}", "at least 1")
    need(train.batch_size <= MAX_BATCH_SIZE, "train.batch_size", f"at most {MAX_BATCH_SIZE}")
    for key in (
        "classify_until",
        "warmup",
        "seed",
        "weight_seg",
        "weight_affinity",
        "weight_decay",
        "clip_grad",
    ):
        need(getattr(train, key) >= 0, f"train.{key}", "0 or more")
    for key in ("head_lr_factor", "norm_lr_factor", "poly_power"):
        need(getattr(train, key) >= 0, f"train.{key}", "0 or more")
    need(train.seed < 2**63, "train.seed", "at most 2^63 - 1 (9223372036854775807)")
    for key in ("lr", "warmup_lr"):
        need(0 < getattr(train, key) <= 1, f"train.{key}", "above 0 and at most 1")
    after = f"above train.classify_until ({train.classify_until}), since the decoder learns only after that"
    need(train.iterations > train.classify_until, "train.iterations", after)
    need(train.warmup < train.iterations, "train.warmup", f"below train.iterations ({train.iterations})")
    need(
        train.par_until >= train.classify_until,
        "train.par_until",
        f"no smaller than train.classify_until ({train.classify_until})",
    )
    need(all(0 <= beta < 1 for beta in train.betas), "train.betas", "two numbers from 0 up to but without 1")
    need(0 <= train.ema < 1, "train.ema", "from 0 (none) up to but without 1, such as 0.999")
    need(
        train.batch_size % train.accumulate == 0,
        "train.accumulate",
        f"a divisor of train.batch_size ({train.batch_size})",
    )
    need_one_of("train", "precision", ("fp32", "bf16", "fp16"))
    need_one_of("train", "label_precision", ("same", "auto"))
    need_one_of("eval", "fusion", ("max", "mean"))
    need(evaluation.crf_workers is None or evaluation.crf_workers >= 0, "eval.crf_workers", "0 or more, or null")
    need(evaluation.crf_iterations >= 0, "eval.crf_iterations", "0 or more")
    for key, kernel in (("crf_gaussian", evaluation.crf_gaussian), ("crf_bilateral", evaluation.crf_bilateral)):
        allowed = "deviations above 0, then a weight of 0 or more"
        need(min(kernel[:-1]) > 0 and kernel[-1] >= 0, f"eval.{key}", allowed)
    need(evaluation.batch_size >= 1, "eval.batch_size", "at least 1")
    need(evaluation.report_images >= 0, "eval.report_images", "0 or more")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key written twice, which YAML itself would settle in silence."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag == "tag:yaml.org,2002:merge":
            continue  # <<: its keys give way to those written beside it
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str | int | float | bool | None):
            raise yaml.constructor.ConstructorError(None, None, "a key must be text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key '{key}' stands twice", key_node.start_mark)
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


def _all_keys() -> list[str]:
    return [f"{section.name}.{key}" for section in fields(Config) for key in _hints(section.name)]


def _hints(section: str) -> dict[str, Any]:
    return get_type_hints(get_type_hints(Config)[section])


def _hint(key: str) -> Any:
    """The declared type of `section.key`, or None when there is no such key."""
    section, _, name = key.partition(".")
    return _hints(section).get(name) if section in SECTIONS else None


def _optional(hint: Any) -> bool:
    return type(None) in get_args(hint) and get_origin(hint) in (Union, UnionType)


def _plain(hint: Any) -> Any:
    """The hint without `| None`."""
    return next(arg for arg in get_args(hint) if arg is not type(None)) if _optional(hint) else hint


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is dict


def _set(config: Config, key: str, value: Any, where: str) -> None:
    hint = _hint(key)
    if hint is None:
        raise _unknown_key(key, where)
    section, name = key.split(".")
    try:
        setattr(getattr(config, section), name, _coerce(value, hint))
    except ValueError:
        raise UserError(f"{key} in {where} must be {_describe(hint)}, got {_shown(value)}") from None


def _unknown_key(key: str, where: str) -> UserError:
    keys = _all_keys()
    leaf = key.rpartition(".")[2]
    twins = [known for known in keys if known.rpartition(".")[2] == leaf]
    if key in SECTIONS:
        return UserError(f"'{key}' in {where} is a section, not a key; set one of its keys, such as {_first(key)}")
    section = key.partition(".")[0]
    names = list(_hints(section)) if section in SECTIONS else [*SECTIONS, *keys]
    near = did_you_mean(leaf if section in SECTIONS else key, names)
    if twins:
        nearest = f"; did you mean '{twins[0]}'?"
    elif near and section in SECTIONS:
        nearest = near.replace("'", f"'{section}.", 1)
    elif near:
        nearest = near
    elif section in SECTIONS:
        nearest = f"; the keys of {section} are {', '.join(names)}"
    else:
        nearest = f"; the sections are {', '.join(SECTIONS)}"
    return UserError(f"unknown configuration key '{key}' in {where}{nearest}")


def _first(section: str) -> str:
    return f"{section}.{next(iter(_hints(section)))}"


def _coerce(value: Any, hint: Any) -> Any:
    """`value` as the declared type; ValueError when it is of another kind."""
    if _optional(hint):
        return None if value is None else _coerce(value, _plain(hint))
    if hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is int:
        number = _number(value)
        if number == int(number):
            return int(number)
    elif hint is float:
        return float(_number(value))
    elif hint is str:
        if isinstance(value, str):
            return value
    elif _is_mapping(hint):
        if isinstance(value, dict) and all(isinstance(key, str) for key in value):
            return value
    elif get_origin(hint) is tuple:
        items = value.split(",") if isinstance(value, str) else value
        items = list(items) if isinstance(items, list | tuple) else [items]
        kinds = get_args(hint)
        if kinds[-1] is Ellipsis:
            return tuple(_coerce(item, kinds[0]) for item in items)
        if len(items) == len(kinds):
            return tuple(_coerce(item, kind) for item, kind in zip(items, kinds, strict=True))
    else:
        raise TypeError(f"no rule for a configuration field of type {hint}")
    raise ValueError(value)


def _number(value: Any) -> int | float:
    """A finite number; text too, since YAML takes 6e-5, written without a point, for text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(value)
    if isinstance(value, int):
        return value
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(value)
    return number


def _describe(hint: Any) -> str:
    if _optional(hint):
        return f"{_describe(_plain(hint))} or null"
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        noun = "whole numbers" if kinds[0] is int else "numbers"
        return f"a list of {noun}" if kinds[-1] is Ellipsis else f"a list of {len(kinds)} {noun}"
    if _is_mapping(hint):
        return "a mapping with text keys"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[hint]


def _shown(value: Any) -> str:
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plain_data(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_data(item) for item in value]
    return value
