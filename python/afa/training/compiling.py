"""torch.compile for all parts of the network except those that provide attention maps."""

from __future__ import annotations

import torch
from torch import nn

from afa.model.network import AFANet

BACKEND = "inductor"
RECOMPILE_LIMIT = 64
"""Each CAM scale, flip and no-grad mode is a separate compilation of the same code."""


def compile_network(model: AFANet) -> list[str]:
    """Compile parts of the network in place and return their names. Parameters and their names don't change.

    Compiled modules would not call the per-forward hooks that capture queries and keys. A module that contains such an
    attention is therefore not compiled itself; its other children are. For a pyramid, these are all stages except the
    last, and the MLPs of the last stage; for a plain ViT, all blocks except the last ones.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    paths = [f"backbone.net.{path}" for path in model.backbone.attention_paths]
    compiled: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        if path in paths:
            return
        holds = any(inside.startswith(path + ".") for inside in paths)
        if holds or isinstance(module, nn.ModuleList | nn.Sequential):
            for name, child in module.named_children():
                visit(child, f"{path}.{name}")
        elif any(True for _ in module.parameters()) and any(True for _ in module.children()):
            # Compiling single layers has no benefit.
            module.compile(backend=BACKEND)
            compiled.append(path)

    visit(model.backbone.net, "backbone.net")
    visit(model.decoder, "decoder")
    return compiled
