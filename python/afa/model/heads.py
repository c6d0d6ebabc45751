"""Heads on the backbone: segmentation decoders and the affinity head."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import afa_ext


class MLPDecoder(nn.Module):
    """All-MLP segmentation head: one linear layer per level, upsampling to the finest level, concatenation, a fusing
    1x1 convolution, prediction.

    The implementation reorders these steps without changing the result: the fusing convolution is linear, so it
    commutes with concatenation and upsampling. Each level's linear layer and its slice of the fusing weights are
    multiplied into one small matrix, which is applied at the level's own resolution; the results are upsampled and
    added. With four levels this needs about a tenth of the multiplications and no [B, 4*width, h, w] map.
    """

    def __init__(
        self, channels: Sequence[int], reductions: Sequence[int], num_outputs: int, width: int, dropout: float = 0.1
    ) -> None:
        """channels, reductions: of the levels, finest first; a reduction is the number of pixels per position."""
        super().__init__()
        self.reductions = tuple(reductions)
        self.linears = nn.ModuleList(nn.Linear(channel, width) for channel in channels)
        self.fuse = nn.Conv2d(width * len(channels), width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.predict = nn.Conv2d(width, num_outputs, 1)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: one [B, channels[i], h_i, w_i] per level, finest first -> logits [B, num_outputs, h_0, w_0]."""
        slices = self.fuse.weight.flatten(1).chunk(len(self.linears), dim=1)
        by_grid: dict[int, Tensor] = {}
        for level, reduction, linear, part in zip(maps, self.reductions, self.linears, slices, strict=True):
            assert isinstance(linear, nn.Linear)
            weight, bias = part @ linear.weight, part @ linear.bias
            out = F.conv2d(level, weight[:, :, None, None], bias)
            # Levels without a stride share a grid: they are added first and upsampled once.
            by_grid[reduction] = by_grid[reduction] + out if reduction in by_grid else out
        fused, *others = by_grid.values()
        for out in others:
            fused = fused + F.interpolate(out, size=fused.shape[2:], mode="bilinear", align_corners=False)
        return self.predict(self.dropout(F.relu(self.norm(fused))))


class SingleDecoder(nn.Module):
    """A head on the last level only: 3x3 convolution, norm, ReLU, dropout, prediction."""

    def __init__(
        self, channels: Sequence[int], reductions: Sequence[int], num_outputs: int, width: int, dropout: float = 0.1
    ) -> None:
        """channels, reductions: as for MLPDecoder."""
        super().__init__()
        self.fuse = nn.Conv2d(channels[-1], width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.predict = nn.Conv2d(width, num_outputs, 1)
        _init(self)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """maps: as for MLPDecoder -> logits [B, num_outputs, h, w] on the last level's grid."""
        return self.predict(self.dropout(F.relu(self.norm(self.fuse(maps[-1])))))


def refine_along_colors(
    logits: Tensor,
    images: Tensor,
    *,
    iterations: int,
    dilations: Sequence[int],
    downscale: int,
    par_refine: Callable[..., Tensor] = afa_ext.par_refine,
) -> Tensor:
    """The decoder's optional last step, enabled by model.refine_iterations: PAR (AFA, CVPR 2022, section 3.3) on class
    probabilities, which aligns coarse class boundaries with edges in the image.

    logits [B, C, h, w], images [B, 3, H, W] in any range, as PAR uses only differences -> logits
    [B, C, H//downscale, W//downscale], differentiable with respect to `logits`. Runs in float32, even under autocast.
    """
    size = [max(1, side // downscale) for side in images.shape[2:]]
    with torch.autocast(images.device.type, enabled=False):
        small, maps = (
            F.interpolate(x.float(), size=size, mode="bilinear", align_corners=False) for x in (images, logits)
        )
        refined = par_refine(small, maps.softmax(1), dilations=dilations, num_iter=iterations)
        return refined.clamp_min(1e-6).log()


class AffinityHead(nn.Module):
    """Affinity of token pairs, A = sigmoid(sum_k weight_k (S_k + S_k^T) + bias): a 1x1 convolution over the
    symmetrized attention maps S (AFA, CVPR 2022, affinity from attention). Equal to `afa_ext.affinity_from_attention`
    of S = q k^T, but computed from q and k.

    The initial weights give the mean over maps of the scaled attention logits, so that similar tokens start with a
    high affinity.

    standardized: each map S_k + S_k^T is shifted and scaled to mean 0 and standard deviation 1 over the pairs of an
    image before it is weighted. The head then doesn't depend on the size of the logits, which differs between
    backbones, maps and image scales.
    """

    def __init__(self, maps: int, head_dim: int, *, standardized: bool = False) -> None:
        super().__init__()
        self.standardized = standardized
        self.weight = nn.Parameter(torch.full((maps,), 2 / maps if standardized else head_dim**-0.5 / (2 * maps)))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """queries, keys [B, K, N, d] -> [B, N, N].

        sum_k weight_k S_k is one product of the weighted queries of all heads with the keys of all heads, so the K
        maps of N x N are never stored.
        """
        batch, maps, tokens, dim = queries.shape
        queries, keys = queries.float(), keys.float()
        with torch.autocast(queries.device.type, enabled=False):
            weight, bias = self.weight.expand(batch, -1), self.bias.expand(batch)
            if self.standardized:
                mean, deviation = _symmetric_moments(queries, keys)
                weight = weight / deviation.clamp(min=1e-6)
                bias = bias - (weight * mean).sum(1)
            left = (queries * weight[:, :, None, None]).transpose(1, 2).reshape(batch, tokens, maps * dim)
            right = keys.permute(0, 1, 3, 2).reshape(batch, maps * dim, tokens)
            mixed = left @ right
            return torch.sigmoid(mixed + mixed.transpose(1, 2) + bias[:, None, None])


def _symmetric_moments(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation [B, K] over all pairs of S + S^T, where S = q k^T, from queries, keys [B, K, N, d].

    They follow from d x d matrices of moments, so the N x N maps are not needed: the mean of S_ij^2 is
    tr(E[q q^T] E[k k^T]), and that of S_ij S_ji is tr(E[q k^T] E[q k^T]).
    """
    tokens = queries.shape[2]
    own = queries.transpose(2, 3) @ queries / tokens, keys.transpose(2, 3) @ keys / tokens
    cross = queries.transpose(2, 3) @ keys / tokens
    mean = 2 * (queries.mean(2) * keys.mean(2)).sum(2)
    square = 2 * (own[0] * own[1]).sum((2, 3)) + 2 * (cross * cross.transpose(2, 3)).sum((2, 3))
    return mean, (square - mean.square()).clamp(min=0).sqrt()


DECODERS = {"mlp": MLPDecoder, "single": SingleDecoder}


def _init(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    if hasattr(module, "predict"):
        nn.init.normal_(module.predict.weight, std=0.01)  # type: ignore[union-attr, arg-type]
