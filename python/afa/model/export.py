"""A trained model as one program for other software: an ONNX file or a torch.export file.

The program contains the preprocessing and PAR of the decoder in plain operators, so it needs neither this package nor
timm. Batch and image size are free.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.export import Dim

from afa.errors import UserError
from afa.files import atomic_path
from afa.model.network import AFANet
from afa_ext.reference.par import par_refine

OPSET = 20
INPUT, OUTPUTS = "image", ("scores", "tags")
TOLERANCE = 1e-3
"""Largest accepted difference from the model."""
LEAST_SIDE, LARGEST_SIDE = 64, 8192


class Program(nn.Module):
    """The network from images to scores, in float32."""

    def __init__(self, model: AFANet) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """RGB uint8 [B, 3, H, W] -> class scores (logits) [B, C+1, H, W], background first, and tag probabilities
        [B, C]."""
        out = self.model(self.model.normalize(image), want=("class", "seg"))
        assert out.seg_logits is not None and out.class_logits is not None
        scores = F.interpolate(out.seg_logits, size=image.shape[2:], mode="bilinear", align_corners=False)
        return scores, out.class_logits.sigmoid()


@dataclass
class Exporter:
    """Exports a model. The model must not be used for training afterwards: its PAR becomes plain PyTorch."""

    model: AFANet
    classes: Sequence[str]
    """Foreground classes."""
    longer_side: int | None = None
    """eval.longer_side of the run, which the file's user must know: the program doesn't resize its input."""

    def __post_init__(self) -> None:
        self.model.par_refine = par_refine
        self.program = Program(self.model).eval()

    @property
    def multiple_of(self) -> int:
        """Sides of the images must be multiples of this: the patch of a plain ViT, 1 for a pyramid."""
        return 1 if self.model.backbone.pyramid else self.model.stride

    def metadata(self) -> dict[str, str]:
        """What a user of the file needs to know."""
        return {
            "classes": json.dumps(["background", *self.classes]),
            "input": f"{INPUT}: RGB, uint8 [batch, 3, height, width]; the model normalizes it",
            "outputs": f"{OUTPUTS[0]}: logits [batch, {len(self.classes) + 1}, height, width]; "
            f"{OUTPUTS[1]}: probabilities [batch, {len(self.classes)}] that the image contains each class",
            "multiple_of": str(self.multiple_of),
            "least_side": str(self._least_side()),
            **({"longer_side": str(self.longer_side)} if self.longer_side else {}),
        }

    def to_torch(self, path: Path) -> float:
        """Write a torch.export program; returns the largest difference from the model over three sizes."""
        example, shapes = self._example()
        with torch.no_grad():
            exported = torch.export.export(self.program, (example,), dynamic_shapes=shapes)
        run = exported.module()
        difference = self._check(lambda image: tuple(run(image)))
        with atomic_path(path) as temporary, temporary.open("wb") as file, warnings.catch_warnings():
            # torch warns that PAR's constants are parts of one tensor. They are on the CPU and are saved correctly.
            warnings.filterwarnings("ignore", message="No complete tensor found")
            torch.export.save(exported, file, extra_files={"afa.json": json.dumps(self.metadata())})
        return difference

    def to_onnx(self, path: Path) -> float:
        """Write an ONNX file; returns the largest difference of onnxruntime's result from the model over three
        sizes."""
        import onnxruntime

        example, shapes = self._example()
        with torch.no_grad():
            exported = torch.onnx.export(
                self.program,
                (example,),
                dynamo=True,
                dynamic_shapes=shapes,
                input_names=[INPUT],
                output_names=OUTPUTS,
                opset_version=OPSET,
                verbose=False,
            )
        assert exported is not None
        exported.model.metadata_props.update(self.metadata())
        with atomic_path(path) as temporary:
            exported.save(str(temporary))
            session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
            return self._check(
                lambda image: tuple(torch.from_numpy(x) for x in session.run(None, {INPUT: image.numpy()}))
            )

    def _least_side(self) -> int:
        return math.ceil(LEAST_SIDE / self.multiple_of) * self.multiple_of

    def _example(self) -> tuple[Tensor, Any]:
        step = self.multiple_of
        least, most = self._least_side() // step, LARGEST_SIDE // step
        sides = [Dim(name, min=least, max=most) for name in ("height", "width")]
        image = torch.zeros(2, 3, (least + 3) * step, (least + 5) * step, dtype=torch.uint8)
        return image, ({0: Dim("batch", min=1, max=1024), 2: step * sides[0], 3: step * sides[1]},)

    @torch.no_grad()
    def _check(self, run: Any) -> float:
        """UserError if the exported program differs from the model on one of three sizes."""
        step, least = self.multiple_of, self._least_side()
        random = torch.Generator().manual_seed(0)
        worst = 0.0
        for batch, height, width in ((1, least, least + step), (2, least + 7 * step, least), (1, 5 * least, 4 * least)):
            coarse = torch.rand(batch, 3, 9, 9, generator=random) * 255
            image = F.interpolate(coarse, size=(height, width), mode="bilinear").to(torch.uint8)
            for got, expected in zip(run(image), self.program(image), strict=True):
                worst = max(worst, float((got - expected).abs().max()))
        if not worst <= TOLERANCE:
            raise UserError(
                f"the exported program differs from the model by {worst:.2g}, more than {TOLERANCE:g}; please report "
                "this with the versions of torch, onnxscript and onnxruntime"
            )
        return worst
