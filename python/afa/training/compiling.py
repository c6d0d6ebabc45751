"""torch.compile where it can be had: every part of the network but those whose attention is read."""

from __future__ import annotations

import torch
from torch import nn

from afa.model.network import AFANet

BACKEND = "inductor"
RECOMPILE_LIMIT = 64
"""CAM scales, their mirror images and forwards without gradients each are a variant of the same code."""


def compile_network(model: AFANet) -> list[str]:
    """Compile parts of the network in place; returns their names. Tensors and their names stay as they are.

    The hooks that read queries and keys live for one forward and a compiled module would not call them. So a module
    that holds such an attention is entered, and its other children compiled: of a pyramid all stages but the last,
    whose blocks keep their attention and have compiled MLPs; of a plain ViT all blocks but the last ones.
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
            # Single layers gain nothing.
            module.compile(backend=BACKEND)
            compiled.append(path)

    visit(model.backbone.net, "backbone.net")
    visit(model.decoder, "decoder")
    return compiled
