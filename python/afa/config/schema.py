"""All settings of a run: type, range, default and description.

There is one model per section. Defaults are the published AFA settings for VOC 2012 (AFA, CVPR 2022) unless the
description says otherwise. docs/recipe.md lists how the recipes differ from the published ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, StrictStr
from pydantic_core import PydanticCustomError

PAR_DILATIONS = (1, 2, 4, 8, 12, 24)
"""The published dilations of PAR."""
_NARROWEST = 0.5
"""Smallest standard deviation of the CRF, in pixels or color values; photos leave the lattice's range with 0.1."""


def _number(value: Any) -> int | float:
    """Parse a finite number. Accepts text too, because YAML reads 6e-5 (without a decimal point) as text."""
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
    """Convert a list, comma-separated text or a single value to a tuple."""
    if isinstance(value, str):
        return tuple(value.split(","))
    return tuple(value) if isinstance(value, list | tuple) else (value,)


# The range must come before the validator to appear in the JSON schema. Upper limits are generous; they catch typos
# before memory or processes run out.
INT, FLOAT, LIST = BeforeValidator(_whole), BeforeValidator(_number), BeforeValidator(_items)
Float = Annotated[float, FLOAT]
Positive = Annotated[int, Field(ge=1), INT]
Count = Annotated[int, Field(ge=0), INT]
Pixels = Annotated[int, Field(ge=32), INT]
NonNegative = Annotated[float, Field(ge=0), FLOAT]
Deviation = Annotated[float, Field(ge=1), FLOAT]
Score = Annotated[float, Field(gt=0, lt=1), FLOAT]
Scale = Annotated[float, Field(gt=0, le=8), FLOAT]
Resize = Annotated[float, Field(gt=0, le=16), FLOAT]
Decay = Annotated[float, Field(ge=0, lt=1), FLOAT]
Scales = Annotated[tuple[Scale, ...], Field(min_length=1), LIST]
Dilations = Annotated[tuple[Positive, ...], Field(min_length=1), LIST]
Text = Annotated[StrictStr, Field(min_length=1)]


class Section(BaseModel):
    """A group of settings; the docstring of each is its description in the schema."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)


class DataConfig(Section):
    """Location of the images, and the random training crop."""

    root: Text = "data/VOCdevkit/VOC2012"
    """Folder in VOC layout (JPEGImages, ImageSets/Segmentation, Annotations or tags.csv, SegmentationClass), prepared
    by `afa prepare`, or a folder of your own images (docs/own_data.md)."""
    embedded: StrictBool = False
    """Generate the demo data set at `root` if it does not exist yet."""
    train_split: Text = "train"
    """Name of the list of training images."""
    val_split: Text = "val"
    """Name of the list of validation images."""
    crop_size: Annotated[int, Field(ge=1, le=4096), INT] = 512
    """Side of the square training crop in pixels; a multiple of model.output_stride."""
    scale_range: Annotated[tuple[Resize, Resize], LIST] = (0.5, 2.0)
    """Smallest and largest factor of the random resize before the crop."""
    flip: StrictBool = True
    """Flip training crops horizontally with probability 0.5."""
    largest_side: Pixels | None = None
    """Maximum length of an image's longer side in pixels. Larger images, such as photos of many megapixels, are shrunk
    when loaded, together with their masks. null: no limit, as published."""
    bad_images: Literal["refuse", "skip"] = "refuse"
    """What to do if a file can't be decoded: 'refuse' to start, or 'skip' its image. Both report the file."""
    workers: Annotated[int, Field(ge=0, le=256), INT] = 2
    """Number of loader processes; 0: load in the training process."""


class ModelConfig(Section):
    """Backbone and heads."""

    backbone: Text = "pvt_v2_b1"
    """Name of a timm model with global attention (docs/backbones.md)."""
    backbone_args: dict[StrictStr, Any] = {}
    """Arguments for timm.create_model, such as drop_path_rate."""
    weights: StrictStr | None = "timm"
    """'timm' (downloaded), 'bundled:<name>' (shipped with the package), the path of a safetensors or pth file, or null
    for random weights."""
    output_stride: Positive = 16
    """Pixels per token in the last stage; the strides of a pyramid's last stages are removed to reach it."""
    attention_blocks: Positive | None = None
    """Number of last blocks that provide attention maps; null: all blocks of the last stage (plain ViT: 2)."""
    freeze: Annotated[Annotated[int, Field(ge=0), INT] | Literal["all"], Field(union_mode="left_to_right")] = 0
    """Number of first Transformer blocks to freeze, together with everything before them, or 'all' for the whole
    backbone. Frozen parts take no memory for gradients and have no drop path. 0: train everything, as published."""
    decoder: Literal["mlp", "single"] = "mlp"
    """'mlp': all-MLP head over all levels; 'single': a head on the last level only."""
    decoder_width: Annotated[int, Field(ge=1, le=8192), INT] = 256
    """Number of decoder channels."""
    refine_iterations: Count = 0
    """Iterations of a differentiable PAR layer inside the network, applied to the decoder's class probabilities; 0: no
    such layer, as published."""
    refine_dilations: Dilations = PAR_DILATIONS
    """Dilations of the PAR layer."""
    refine_downscale: Positive = 2
    """The PAR layer and its output logits have 1/refine_downscale of the image size."""
    affinity_logits: Literal["raw", "standardized"] = "raw"
    """'raw': the affinity head weights the attention logits as they are, as published; 'standardized': each map is
    first shifted and scaled to mean 0 and standard deviation 1 over the pairs of an image."""
    pooling: Literal["max", "mean"] = "max"
    """Global pooling before the classifier; the published method uses 'max'."""


class LabelConfig(Section):
    """CAMs, random walk and pseudo labels."""

    cam_scales: Scales = (1.0, 0.5, 1.5)
    """Image scales over which CAMs are summed; each includes the horizontal flip."""
    cam_threshold: Annotated[Score | Literal["auto"], Field(union_mode="left_to_right")] = 0.45
    """Background score for evaluating the CAM and the PAR label. 'auto': the score at which the two labels of training
    images agree best, which needs no masks."""
    walk_threshold: Score = 0.35
    """Background score for evaluating the CAM after the walk."""
    low: Score = 0.35
    """Lower background score: a pixel is labeled background if background wins with this score."""
    high: Score = 0.55
    """Higher background score: a pixel gets its class if the class wins against this score. All other pixels are
    ignored."""
    walk_radius: Annotated[int, Field(ge=1, le=63), INT] = 8
    """Chebyshev radius in tokens of the window for the walk and the affinity loss."""
    walk_power: Positive = 2
    """Exponent applied to the affinity before normalization."""
    walk_steps: Count = 1
    """Number of steps of the walk."""
    walk_eps: Annotated[float, Field(gt=0), FLOAT] = 0.1
    """Added to the column sums of the affinity."""
    walk_weight: Annotated[float, Field(gt=0, le=1), FLOAT] = 1.0
    """Weight of the walked scores; the scores before the walk have the rest. Below 1 this is a lazy random walk, which
    stays at its token with the remaining probability. 1: as published."""
    walk_scale: Scale = 1.0
    """Image scale of the affinity for the walk in evaluation; training uses the largest CAM scale."""
    par_dilations: Dilations = PAR_DILATIONS
    """Dilations of PAR."""
    par_iterations: Count = 10
    """Iterations of PAR."""
    walk_par_iterations: Count | None = None
    """Iterations of PAR on walk labels; 0: none; null: same as par_iterations."""
    par_downscale: Positive = 2
    """PAR works at 1/par_downscale of the image size."""
    affinity_sampling: Literal["corner", "center"] = "corner"
    """Pixel of a token whose label is the token's label in the affinity loss: 'corner', as published, or 'center',
    which the walk samples."""
    affinity_from_walk: StrictBool = False
    """Use the walk label as the affinity target once the segmentation target switches to it (published for COCO
    only).
    """


class TrainConfig(Section):
    """Schedule, losses and optimizer."""

    iterations: Positive = 20000
    """Number of weight updates."""
    batch_size: Annotated[int, Field(ge=1, le=65536), INT] = 4
    """Number of images per update, over all processes."""
    accumulate: Positive = 1
    """Number of micro-batches per process and update, to save memory. Losses and gradients are the same up to rounding,
    except that the decoder's batch norm sees one micro-batch. Labels then need an extra forward pass."""
    classify_until: Count = 2000
    """Last iteration (counted from 0) of the phase with only the classification loss."""
    par_until: Count = 6000
    """Last iteration (counted from 0) in which the segmentation learns from PAR labels; afterwards it learns from walk
    labels."""
    weight_seg: NonNegative = 0.1
    """Weight of the segmentation loss."""
    weight_affinity: NonNegative = 0.1
    """Weight of the affinity loss."""
    energy_weight: NonNegative = 0.0
    """Weight of the dense energy loss of the segmentation ("On Regularized Losses for Weakly-supervised CNN
    Segmentation", 2018), which is low where pixels that are near and of similar color have the same class. 0: off, as
    in the main results of AFA. Its regularized variant has 0.01 (configuration voc_energy)."""
    energy_sigma_rgb: Deviation = 15.0
    """Standard deviation of the dense energy loss in 8-bit color values."""
    energy_sigma_xy: Deviation = 100.0
    """Standard deviation of the dense energy loss in pixels of the crop."""
    energy_scale: Annotated[float, Field(ge=0.0625, le=1), FLOAT] = 0.5
    """Scale of the crop at which the dense energy loss is computed."""
    affinity_object_share: Annotated[float, Field(ge=0, le=1), FLOAT] | None = None
    """Share of pairs of tokens of one object in the affinity loss of pairs of the same class; pairs of background
    tokens have the rest. null: in proportion to their number, as published; nearly all of them are then pairs of
    background."""
    lr: Annotated[float, Field(gt=0, le=1), FLOAT] = 6e-5
    """Learning rate of the backbone."""
    head_lr_factor: NonNegative = 10.0
    """Learning rate factor for classifier, decoder and affinity head."""
    norm_lr_factor: NonNegative = 0.0
    """Learning rate factor for the backbone's norm layers; 0 freezes them, as published."""
    weight_decay: NonNegative = 0.01
    """Weight decay of AdamW; not applied to the backbone's norm layers."""
    betas: Annotated[tuple[Decay, Decay], LIST] = (0.9, 0.999)
    """Decay rates of AdamW's first and second moments."""
    warmup: Count = 1500
    """Number of iterations of linear learning rate warmup."""
    warmup_ratio: Annotated[float, Field(ge=0, le=1), FLOAT] = 1e-6
    """Learning rate factor at iteration 0."""
    poly_power: NonNegative = 1.0
    """Power of the polynomial decay of the learning rate."""
    seed: Annotated[int, Field(ge=0, le=2**63 - 1), INT] = 0
    """Seed of all random numbers."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """'fp32'; 'tf32' (float32 with TF32 matrix products on the GPU); or autocast to 'bf16' or 'fp16' (with dynamic loss
    scaling)."""
    label_precision: Literal["same", "auto"] = "same"
    """Precision of the forward passes that only make labels: 'same' as precision, or 'auto': bf16 if the processor has
    hardware support for bf16 matrix products."""
    clip_grad: NonNegative = 0.0
    """Maximum 2-norm of the gradients of all parameters; 0: no clipping, as published."""
    ema: Decay = 0.0
    """Decay of an exponential moving average of the weights, such as 0.999. If set, the average is evaluated and saved;
    checkpoints contain both. 0: none, as published."""
    compile: StrictBool = False
    """Use torch.compile, except on the blocks that provide attention maps."""
    sync_batch_norm: StrictBool = True
    """Synchronize the decoder's batch norm over all processes."""
    log_every: Positive = 10
    """Number of iterations between log entries."""
    eval_every: Positive = 2000
    """Number of iterations between evaluations on the validation split."""
    keep_best: Literal["cam", "walk", "par", "seg"] | None = None
    """Save the weights with the best validation mIoU of this row instead of the last weights. null: the last. Selecting
    a checkpoint this way uses the validation masks for training. The paper's 63.85 was selected this way (iteration
    18,000 of 20,000)."""
    checkpoint_every: Positive = 2000
    """Number of iterations between checkpoints."""
    keep_checkpoints: Positive = 2
    """Number of recent checkpoints to keep; an older one is used if the newest is damaged."""
    tensorboard: StrictBool | None = None
    """Write scalars and images for TensorBoard; null: only if the package is installed."""


class EvalConfig(Section):
    """Evaluation on the validation split."""

    longer_side: Pixels | None = None
    """Resize images so that their longer side has this many pixels; scores are resized back to the original size. null:
    no resize. The published multi-scale test uses 512."""
    scales: Scales = (1.0,)
    """Image scales of the segmentation logits."""
    flip: StrictBool = False
    """Average the logits of each scale with those of the horizontally flipped image."""
    fusion: Literal["max", "mean"] = "max"
    """How to fuse the logits of several scales; the published method uses 'max'."""
    crf: StrictBool = False
    """Apply a dense CRF to the fused segmentation, on the device of the model."""
    crf_preset: Literal["afa", "toco", "dupl", "excel", "psa", "irn"] = "afa"
    """Settings of the CRF, one of afa_ext.CRF_PRESETS. 'afa': the published multi-scale test, 10 iterations, a
    smoothness kernel of 3 pixels and weight 3, an appearance kernel of 64 pixels, 5 color values and weight 4. All
    have 10 iterations; the kernels of 'toco' and 'dupl' are 1 pixel, weight 1 and 121 pixels, 5, weight 4; those of
    'excel' 1, 3 and 67, 3, 4; of 'psa' 3, 3 and 80, 13, 10; of 'irn' 3, 3 and 50, 5, 10."""
    crf_iterations: Count | None = None
    """Number of mean-field iterations; null: that of the preset."""
    crf_gaussian: Annotated[tuple[Float, Float], LIST] | None = None
    """Standard deviation (pixels) and weight of the smoothness kernel; null: those of the preset."""
    crf_bilateral: Annotated[tuple[Float, Float, Float], LIST] | None = None
    """Standard deviations (pixels, 8-bit color values) and weight of the appearance kernel; null: those of the
    preset."""
    batch_size: Positive = 1
    """Maximum batch size; only images of equal size share a batch."""
    diagnostic_images: Count = 200
    """Number of images, evenly spaced over the split, for the diagnostics of walk, affinity and background scores; 0:
    none. They need masks."""
    report_images: Count = 12
    """Number of images in the report, evenly spaced over the split. One third as many are added for the best images and
    for the worst."""


class Config(BaseModel):
    """All settings of a run."""

    model_config = ConfigDict(extra="forbid", title="Configuration of afa train")

    data: DataConfig = Field(default_factory=DataConfig)
    model: ModelConfig = Field(default_factory=ModelConfig)
    labels: LabelConfig = Field(default_factory=LabelConfig)
    train: TrainConfig = Field(default_factory=TrainConfig)
    eval: EvalConfig = Field(default_factory=EvalConfig)

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Yield (key, expected value) for every setting that conflicts with others."""
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
            reason = "because the decoder trains only after it"
            yield "train.iterations", f"above train.classify_until ({train.classify_until}), {reason}"
        if train.warmup >= train.iterations:
            yield "train.warmup", f"below train.iterations ({train.iterations})"
        if train.batch_size % train.accumulate:
            yield "train.accumulate", f"a divisor of train.batch_size ({train.batch_size})"
        for name in ("crf_gaussian", "crf_bilateral"):
            kernel = getattr(evaluation, name)
            if kernel is not None and (min(kernel[:-1]) < _NARROWEST or kernel[-1] < 0):
                yield f"eval.{name}", f"deviations of at least {_NARROWEST}, then a weight of 0 or more"

    def notes(self) -> list[str]:
        """Warnings about settings that are valid but rarely intended."""
        train, radius = self.train, self.labels.walk_radius
        found = []
        if train.iterations == train.classify_until + 1:
            found.append("train.iterations ends with train.classify_until, so no iteration trains the decoder")
        elif train.par_until >= train.iterations - 1:
            found.append(
                f"there is no walk phase, because train.par_until ({train.par_until}) is not below the last iteration "
                f"of train.iterations ({train.iterations}); the segmentation learns only from PAR labels"
            )
        side = self.data.crop_size // self.model.output_stride
        share = _window_share(radius, side)
        if share > _WIDE_WINDOW:
            found.append(
                f"the window of labels.walk_radius={radius} covers {share:.0%} of a crop's {side} x {side} tokens, so "
                f"the walk is hardly local; the published radius is a quarter of the side, here {max(1, side // 4)}"
            )
        return found


_WIDE_WINDOW = 0.8


def _window_share(radius: int, side: int) -> float:
    """Share of a square token grid that a token's window covers, averaged over all tokens."""
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
