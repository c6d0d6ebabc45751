"""Every setting of a run: its type, range, default and meaning.

One model per section; a default is the published AFA setting on VOC 2012 (AFA, CVPR 2022) unless its description says
otherwise. docs/recipe.md lists where the recipes differ from the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

PAR_DILATIONS = (1, 2, 4, 8, 12, 24)
"""The published dilations of PAR."""


def _number(value: Any) -> int | float:
    """A finite number; text too, since YAML reads 6e-5, written without a point, as text."""
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = value if isinstance(value, int) else float(value)
        except ValueError:
            number = math.nan
        if math.isfinite(number):
            return number
    raise PydanticCustomError("number", "a number")


def _whole(value: Any) -> int:
    try:
        number = _number(value)
    except PydanticCustomError:
        number = 0.5
    if number != int(number):
        raise PydanticCustomError("whole", "a whole number")
    return int(number)


def _items(value: Any) -> Any:
    """A list from a list, from text separated by commas, or from one value."""
    if isinstance(value, str):
        return tuple(value.split(","))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# The range stands before the validator: only then does it reach the JSON schema. Upper limits are generous: they catch
# typing errors before memory or processes run out.
INT, FLOAT, LIST = BeforeValidator(_whole), BeforeValidator(_number), BeforeValidator(_items)
Float = Annotated[float, FLOAT]
Positive = Annotated[int, Field(ge=1), INT]
Count = Annotated[int, Field(ge=0), INT]
Pixels = Annotated[int, Field(ge=32), INT]
NonNegative = Annotated[float, Field(ge=0), FLOAT]
Score = Annotated[float, Field(gt=0, lt=1), FLOAT]
Scale = Annotated[float, Field(gt=0, le=8), FLOAT]
Resize = Annotated[float, Field(gt=0, le=16), FLOAT]
Decay = Annotated[float, Field(ge=0, lt=1), FLOAT]
Scales = Annotated[tuple[Scale, ...], Field(min_length=1), LIST]
Dilations = Annotated[tuple[Positive, ...], Field(min_length=1), LIST]
Text = Annotated[StrictStr, Field(min_length=1)]


class Section(BaseModel):
    """Settings that belong together; the text under each is its description."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DataConfig(Section):
    """Where the images are and how a training crop is made."""

    root: Text = "data/VOCdevkit/VOC2012"
    """Folder in VOC layout (JPEGImages, ImageSets/Segmentation, Annotations or tags.csv, SegmentationClass), as
    `afa prepare` completes it, or a folder of your own pictures (docs/own_data.md)."""
    embedded: StrictBool = False
    """Make the embedded data set at `root` when it does not exist yet."""
    train_split: Text = "train"
    """Name of the list of training images."""
    val_split: Text = "val"
    """Name of the list of validation images."""
    crop_size: Annotated[int, Field(ge=1, le=4096), INT] = 512
    """Side of the square training crop in pixels; a multiple of model.output_stride."""
    scale_range: Annotated[tuple[Resize, Resize], LIST] = (0.5, 2.0)
    """Smallest and largest factor of the random resize before the crop."""
    flip: StrictBool = True
    """Mirror half of the training crops."""
    largest_side: Pixels | None = None
    """Shrink pictures whose longer side has more pixels as they are read, for photographs of many megapixels; masks
    follow. null: never, as published."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """What to do with a file that can't be decoded: 'refuse' to start, or 'skip' its image. Both report the file."""
    workers: Annotated[int, Field(ge=0, le=256), INT] = 2
    """Loader processes; 0 loads in the training process."""


class ModelConfig(Section):
    """Backbone and heads."""

    backbone: Text = "pvt_v2_b1"
    """Any timm model whose attention can be read."""
    backbone_args: dict[StrictStr, Any] = {}
    """Arguments for timm.create_model, such as drop_path_rate."""
    weights: StrictStr | None = "timm"
    """'timm' (downloads), 'bundled:<name>' (shipped in the package), the path of a safetensors or pth file, or null for
    random weights."""
    output_stride: Positive = 16
    """Pixels per token of the last stage, reached by removing the stride of a pyramid's last stages."""
    attention_blocks: Positive | None = None
    """How many of the last blocks give attention maps; null: all blocks of the last stage (plain ViT: 2)."""
    decoder: Literal["mlp", "single"] = "mlp"
    """'mlp': all-MLP head over all levels; 'single': a head on the last level only."""
    decoder_width: Annotated[int, Field(ge=1, le=8192), INT] = 256
    """Channels of the decoder."""
    refine_iterations: Count = 0
    """Iterations of PAR on the decoder's class probabilities, inside the network, with gradients; 0: none, as
    published."""
    refine_dilations: Dilations = PAR_DILATIONS
    """Dilations of that PAR."""
    refine_downscale: Positive = 2
    """That PAR works at 1/refine_downscale of the image size, and so do the logits that come out."""
    pooling: Literal["max", "mean"] = "max"
    """Global pooling before the classifier; 'max' is published."""


class LabelConfig(Section):
    """CAMs, affinity walk and pseudo labels."""

    cam_scales: Scales = (1.0, 0.5, 1.5)
    """Image scales over which CAMs are summed, each with its mirror image."""
    cam_threshold: Score = 0.45
    """Background score at which evaluation scores the CAM and the PAR label."""
    walk_threshold: Score = 0.35
    """Background score at which evaluation scores the walked CAM."""
    low: Score = 0.35
    """Lower background score: a pixel that is background even against it is labeled background."""
    high: Score = 0.55
    """Higher background score: a pixel that is foreground even against it is labeled with its class. What lies between
    the two scores is ignored."""
    walk_radius: Annotated[int, Field(ge=1, le=63), INT] = 8
    """Radius (Chebyshev) of the window of the walk and of the affinity loss, in tokens."""
    walk_power: Positive = 2
    """Exponent of the affinity before it is normalized."""
    walk_steps: Count = 1
    """Steps of the walk."""
    walk_eps: Annotated[float, Field(gt=0), FLOAT] = 0.1
    """Added to the column sums of the affinity."""
    walk_scale: Scale = 1.0
    """Image scale whose affinity evaluation walks with; training walks with that of the largest CAM scale."""
    par_dilations: Dilations = PAR_DILATIONS
    """Dilations of PAR."""
    par_iterations: Count = 10
    """Iterations of PAR."""
    walk_par_iterations: Count | None = None
    """Iterations of PAR on walk labels, 0 for none; null: as many as par_iterations."""
    par_downscale: Positive = 2
    """PAR works at 1/par_downscale of the image size."""
    affinity_from_walk: StrictBool = False
    """Switch the affinity target to the walk label when the segmentation target switches (published for COCO only)."""


class TrainConfig(Section):
    """Schedule, losses and optimizer."""

    iterations: Positive = 20000
    """Updates of the weights."""
    batch_size: Annotated[int, Field(ge=1, le=65536), INT] = 4
    """Images per update, over all processes together."""
    accumulate: Positive = 1
    """Micro-batches that a process splits its images into, to save memory: the same losses and gradients up to
    rounding, except for the decoder's batch norm, which sees one micro-batch. Labels then need an extra forward."""
    classify_until: Count = 2000
    """Last iteration, counted from 0, of the phase with only the classification loss."""
    par_until: Count = 6000
    """Last iteration, counted from 0, at which the segmentation learns from PAR labels; after it, from walk labels."""
    weight_seg: NonNegative = 0.1
    """Weight of the segmentation loss."""
    weight_affinity: NonNegative = 0.1
    """Weight of the affinity loss."""
    lr: Annotated[float, Field(gt=0, le=1), FLOAT] = 6e-5
    """Learning rate of the backbone."""
    head_lr_factor: NonNegative = 10.0
    """Factor of the learning rate for classifier, decoder and affinity head."""
    norm_lr_factor: NonNegative = 0.0
    """Factor of the learning rate for the backbone's norm layers; 0 freezes them, as published."""
    weight_decay: NonNegative = 0.01
    """AdamW's weight decay; the backbone's norm layers have none."""
    betas: Annotated[tuple[Decay, Decay], LIST] = (0.9, 0.999)
    """AdamW's decay rates of the first and the second moment."""
    warmup: Count = 1500
    """Iterations over which the learning rate rises linearly."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1), FLOAT] = 1e-6
    """Factor of the learning rate at iteration 0."""
    poly_power: NonNegative = 1.0
    """Power of the polynomial decay of the learning rate."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), INT] = 0
    """Seed of all random numbers."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """'fp32'; 'tf32': float32 whose matrix products run on a GPU's TF32 units; or autocast to 'bf16' or 'fp16', the
    latter with an adaptive loss scale."""
    label_precision: Literal["same", "auto"] = "same"
    """Of the forwards that only make labels: 'same' as precision, or 'auto': bf16 where the processor multiplies
    matrices of it in hardware."""
    clip_grad: NonNegative = 0.0
    """Maximum 2-norm of all gradients together; 0: no limit, as published."""
    ema: Decay = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999, which is then evaluated and saved; 0: none,
    as published. Checkpoints hold both."""
    compile: StrictBool = False
    """Use torch.compile, except on blocks whose attention is read."""
    sync_batch_norm: StrictBool = True
    """The decoder's batch norm sees the images of all processes."""
    log_every: Positive = 10
    """Iterations between two lines of the log."""
    eval_every: Positive = 2000
    """Iterations between two evaluations on the validation split."""
    keep_best: Literal["cam", "walk", "par", "seg"] | None = None
    """Save the weights of the evaluation with the best mIoU of this row in place of the last ones. null: the last.
    Choosing a checkpoint by validation masks uses them for training; the paper's 63.85 is iteration 18,000 of 20,000,
    chosen in this way."""
    checkpoint_every: Positive = 2000
    """Iterations between two checkpoints."""
    keep_checkpoints: Positive = 2
    """How many of the newest checkpoints to keep; an older one serves when the newest is damaged."""
    tensorboard: StrictBool | None = None
    """Write scalars and pictures for TensorBoard; null: if the package is installed."""


class EvalConfig(Section):
    """Evaluation on the validation split."""

    longer_side: Pixels | None = None
    """Resize images so that their longer side has this many pixels before the network sees them; scores are brought
    back to full size. null: no resize. The published multi-scale test uses 512."""
    scales: Scales = (1.0,)
    """Scales of the segmentation logits."""
    flip: StrictBool = False
    """Average the logits of every scale with those of its mirror image."""
    fusion: Literal["max", "mean"] = "max"
    """How the logits of several scales become one; 'max' is published."""
    crf: StrictBool = False
    """Dense CRF on the fused segmentation; needs the extra `crf`."""
    crf_workers: Count | None = None
    """Processes of the CRF; null: one per core; 0: in the evaluating process."""
    crf_iterations: Count = 10
    """Mean-field iterations."""
    crf_gaussian: Annotated[tuple[Float, Float], LIST] = (3.0, 3.0)
    """Standard deviation (pixels) and weight of the smoothness kernel."""
    crf_bilateral: Annotated[tuple[Float, Float, Float], LIST] = (64.0, 5.0, 4.0)
    """Standard deviations (pixels, 8-bit color values) and weight of the appearance kernel."""
    batch_size: Positive = 1
    """Images of one size evaluated together."""
    report_images: Count = 12
    """Images shown in the report, spread over the split; a third as many of the best and of the worst are added."""


class Config(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", title="Configuration of afa train")

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    labels: LabelConfig = Field(default_factory=LabelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """(key, what it must be) of every setting that does not fit the others."""
        data, labels, train, evaluation = self.data, self.labels, self.train, self.eval
        stride = self.model.output_stride
        if data.crop_size % stride:
            near = max(1, min(round(data.crop_size / stride), 4096 // stride)) * stride
            yield "data.crop_size", f"a positive multiple of model.output_stride ({stride}), such as {near}"
        if data.scale_range[0] > data.scale_range[1]:
            yield "data.scale_range", "two factors, 0 < smallest <= largest <= 16"
        if labels.low > labels.high:
            yield "labels.low", f"no larger than labels.high ({labels.high})"
        if train.par_until < train.classify_until:
            yield "train.par_until", f"no smaller than train.classify_until ({train.classify_until})"
        if train.iterations <= train.classify_until:
            reason = "since the decoder learns only after that"
            yield "train.iterations", f"above train.classify_until ({train.classify_until}), {reason}"
        if train.warmup >= train.iterations:
            yield "train.warmup", f"below train.iterations ({train.iterations})"
        if train.batch_size % train.accumulate:
            yield "train.accumulate", f"a divisor of train.batch_size ({train.batch_size})"
        for name in ("crf_gaussian", "crf_bilateral"):
            kernel = getattr(evaluation, name)
            if min(kernel[:-1]) <= 0 or kernel[-1] < 0:
                yield f"eval.{name}", "deviations above 0, then a weight of 0 or more"

    def notes(self) -> list[str]:
        """Sentences on settings that are valid but rarely meant."""
        train, radius = self.train, self.labels.walk_radius
        found = []
        if train.iterations == train.classify_until + 1:
            found.append("train.iterations ends with train.classify_until, so no iteration trains the decoder")
        elif train.par_until >= train.iterations - 1:
            found.append(
                f"there is no walk phase, because train.par_until ({train.par_until}) is not below the last of "
                f"train.iterations ({train.iterations}): the segmentation learns only from PAR labels"
            )
        side = self.data.crop_size // self.model.output_stride
        share = _window_share(radius, side)
        if share > _WIDE_WINDOW:
            found.append(
                f"the window of labels.walk_radius={radius} holds {share:.0%} of a crop's {side} x {side} tokens, so "
                f"the walk is hardly local; the published radius is a quarter of the side, here {max(1, side // 4)}"
            )
        return found


_WIDE_WINDOW = 0.8


def _window_share(radius: int, side: int) -> float:
    """Share of a square grid that a token's window covers, the mean over all tokens."""
    inside = sum(min(side - 1, i + radius) - max(0, i - radius) + 1 for i in range(side))
    return (inside / side**2) ** 2


SECTIONS = tuple(Config.model_fields)


def section_fields(section: str) -> dict[str, Any]:
    """Name -> pydantic field of a section."""
    kind: Any = Config.model_fields[section].annotation
    fields: dict[str, Any] = kind.model_fields
    return fields


def all_keys() -> list[str]:
    """Every key as section.name."""
    return [f"{section}.{name}" for section in SECTIONS for name in section_fields(section)]
