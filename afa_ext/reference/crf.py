"""Dense CRF, bilateral filter and dense energy loss in plain PyTorch: the permutohedral lattice, and exact sums.

`Lattice` follows "Fast High-Dimensional Filtering Using the Permutohedral Lattice" (Adams, Baek and Davis, 2010)
step by step; `exact_filter` is the sum over all pairs of pixels that it approximates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_bilateral_filter, check_dense_crf, check_dense_energy_loss


class Lattice:
    """The permutohedral lattice of one image.

    Args:
        features: [D, N], divided by their standard deviations; read as float32.
    """

    def __init__(self, features: Tensor) -> None:
        dims, pixels = features.shape
        self.dims, self.pixels = dims, pixels
        corners = dims + 1
        deviation = torch.tensor(math.sqrt(2 / 3) * corners, dtype=torch.float32)
        scale = [(1 / math.sqrt((i + 1) * (i + 2)) * deviation.double()).float() for i in range(dims)]
        # Onto the plane x_0 + ... + x_D = 0 (p. 5), in float32: rounding decides which vertices there are.
        scaled = [f * s for f, s in zip(features.float(), scale, strict=True)]
        elevated, total = [], torch.zeros(pixels, device=features.device)
        for j in range(dims, 0, -1):
            elevated.append(total - j * scaled[j - 1])
            total = total + scaled[j - 1]
        position = torch.stack([total, *elevated[::-1]])
        # The nearest vertex of remainder 0 (p. 9), and the order of the differences to it.
        cell = torch.round(torch.tensor(1 / corners, dtype=torch.float32) * position)
        rest = position - cell * corners
        earlier = torch.tril(torch.ones(corners, corners, device=features.device), -1).bool().unsqueeze(2)
        larger = rest.unsqueeze(0) > rest.unsqueeze(1)
        equal = rest.unsqueeze(0) == rest.unsqueeze(1)
        rank = (larger | (equal & earlier)).sum(1) + cell.sum(0).long()
        step = (rank < 0).long() - (rank > dims).long()
        rank, rest, cell = rank + step * corners, rest - step * corners, cell.long() + step
        # Barycentric coordinates (p. 10).
        ordered = torch.zeros_like(rest).scatter_(0, rank, rest * torch.tensor(1 / corners, dtype=torch.float32))
        below = ordered.flip(0)
        weight = below.clone()
        weight[1:] -= below[:-1]
        weight[0] += 1 - ordered[0]
        self.weight = weight.T  # [N, D + 1]
        # Vertex r: the r coordinates of the largest ranks are one cell lower, and all are raised by r.
        remainder = torch.arange(corners, device=features.device).view(-1, 1, 1)
        keys = (cell - (rank > dims - remainder).long()) * corners + remainder  # [D + 1, D + 1 coordinates, N]
        flat = keys.permute(2, 0, 1).reshape(-1, corners)
        self.keys, number = torch.unique(flat, dim=0, return_inverse=True)
        self.offset = number.view(pixels, corners)
        self.neighbors = [self._neighbors(axis) for axis in range(corners)]
        self.norm = self.apply(torch.ones(1, pixels, dtype=torch.float32, device=features.device))[0]

    def _neighbors(self, axis: int) -> tuple[Tensor, Tensor]:
        """Each vertex's neighbors along an axis; the number of vertices where there is none."""
        step = -torch.ones(self.dims + 1, dtype=torch.long, device=self.keys.device)
        step[axis] = self.dims
        count = len(self.keys)
        numbers = {tuple(key): n for n, key in enumerate(self.keys.tolist())}
        found = [[numbers.get(tuple(key), count) for key in (self.keys + sign * step).tolist()] for sign in (1, -1)]
        return torch.tensor(found[0], device=step.device), torch.tensor(found[1], device=step.device)

    def apply(self, values: Tensor, reverse: bool = False) -> Tensor:
        """[C, N]: splat, blur along each axis with weights 1/2, 1, 1/2, slice."""
        channels = values.shape[0]
        weight = self.weight.to(values.dtype)
        table = values.new_zeros(channels, len(self.keys) + 1)  # the last: a missing neighbor
        for corner in range(self.dims + 1):
            table = table.index_add(1, self.offset[:, corner], values * weight[:, corner])
        for up, down in reversed(self.neighbors) if reverse else self.neighbors:
            blurred = table[:, :-1] + 0.5 * (table[:, up] + table[:, down])
            table = torch.cat((blurred, table.new_zeros(channels, 1)), dim=1)
        gain = 1 / (1 + 2.0**-self.dims)
        return gain * (table[:, self.offset] * weight).sum(-1)

    def filter(self, values: Tensor, normalize: str | None) -> Tensor:
        """[C, N] with the normalization of `bilateral_filter`."""
        whole = self.norm.to(values.dtype) + 1e-20
        before = {"symmetric": whole.rsqrt(), "before": 1 / whole}.get(normalize or "", torch.ones_like(whole))
        after = {"symmetric": whole.rsqrt(), "after": 1 / whole}.get(normalize or "", torch.ones_like(whole))
        return self.apply(values * before) * after


def exact_filter(values: Tensor, features: Tensor) -> Tensor:
    """[C, N], [D, N]: ``sum_j exp(-|f_i - f_j|^2 / 2) values_j`` over all pairs, in float64."""
    points = features.double().T
    return values.double() @ torch.exp(-0.5 * torch.cdist(points, points).square())


def position_features(height: int, width: int, sigma_xy: float) -> Tensor:
    """[2, N]."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack((x, y)).flatten(1).float() / torch.tensor(sigma_xy, dtype=torch.float32)


def image_features(image: Tensor, sigma_xy: float, sigma_rgb: float) -> Tensor:
    """[3, H, W] -> [5, N]."""
    positions = position_features(image.shape[1], image.shape[2], sigma_xy).to(image.device)
    # On the same device: CUDA would multiply by the reciprocal of a number from the CPU.
    colors = image.flatten(1).float() / torch.tensor(sigma_rgb, dtype=torch.float32, device=image.device)
    return torch.cat((positions, colors))


def bilateral_filter(
    values: Tensor,
    features: Tensor | None = None,
    *,
    images: Tensor | None = None,
    sigma_xy: float | None = None,
    sigma_rgb: float | None = None,
    normalize: str | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.bilateral_filter`."""
    check_bilateral_filter(values, features, images, sigma_xy, sigma_rgb, normalize)
    wide = values if values.dtype == torch.float64 else values.float()
    out = []
    for b in range(values.shape[0]):
        if features is None:
            assert images is not None and sigma_xy is not None and sigma_rgb is not None
            own = image_features(images[b], sigma_xy, sigma_rgb)
        else:
            own = features[b].detach().flatten(1)
        out.append(Lattice(own).filter(wide[b].flatten(1), normalize).view(values.shape[1:]))
    return torch.stack(out).to(values.dtype) if out else values.clone()


def dense_crf(
    images: Tensor,
    probabilities: Tensor | None = None,
    *,
    unaries: Tensor | None = None,
    num_iter: int = 10,
    gaussian: Sequence[float] = (3, 3),
    bilateral: Sequence[float] = (64, 5, 4),
    compat: str | Tensor = "potts",
    class_mask: Tensor | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.dense_crf`."""
    scores, matrix = check_dense_crf(images, probabilities, unaries, num_iter, gaussian, bilateral, compat, class_mask)
    batch, classes, height, width = scores.shape
    out = torch.zeros(scores.shape, device=scores.device)
    smooth = Lattice(position_features(height, width, gaussian[0]).to(scores.device))
    for b in range(batch):
        edges = Lattice(image_features(images[b], bilateral[0], bilateral[1]))
        kept = torch.arange(classes) if class_mask is None else class_mask[b].nonzero().flatten().cpu()
        own = scores[b, kept].flatten(1).float()
        unary = own if probabilities is None else -own.clamp(min=1e-5).log()
        mixing = -torch.eye(len(kept), device=scores.device)
        if matrix is not None:
            mixing = ((matrix + matrix.T) / 2).float()[kept][:, kept]
        q = torch.softmax(-unary, dim=0)
        for _ in range(num_iter):
            filtered = gaussian[1] * smooth.filter(q, "symmetric") + bilateral[2] * edges.filter(q, "symmetric")
            q = torch.softmax(-unary - mixing @ filtered, dim=0)
        out[b, kept] = q.view(-1, height, width)
    return out


def dense_energy_loss(
    images: Tensor,
    probabilities: Tensor,
    *,
    sigma_rgb: float = 15,
    sigma_xy: float = 100,
    weight: float,
    regions: Tensor | None = None,
    gate: Tensor | None = None,
) -> Tensor:
    """Reference implementation of `afa_ext.dense_energy_loss`; its gradient is that of the loss itself, without
    the symmetry that the published one assumes."""
    check_dense_energy_loss(images, probabilities, sigma_rgb, sigma_xy, weight, regions, gate)
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    if regions is not None:
        wide = wide * regions.to(wide.dtype).unsqueeze(1)
    filtered = bilateral_filter(wide, images=images, sigma_xy=sigma_xy, sigma_rgb=sigma_rgb)
    if gate is not None:
        filtered = filtered * gate.to(wide.dtype).unsqueeze(1)
    return -weight / max(images.shape[0], 1) * (wide * filtered).sum()


class DenseEnergyLoss(nn.Module):
    """Reference implementation of `afa_ext.DenseEnergyLoss`, with the gradient of the loss itself."""

    def __init__(self, weight: float, sigma_rgb: float, sigma_xy: float, scale_factor: float) -> None:
        super().__init__()
        self.weight, self.sigma_rgb, self.sigma_xy, self.scale_factor = weight, sigma_rgb, sigma_xy, scale_factor

    def forward(self, images: Tensor, segmentations: Tensor, ROIs: Tensor, seg_label: Tensor | None = None) -> Tensor:
        def shrunken(t: Tensor) -> Tensor:
            return F.interpolate(t, scale_factor=self.scale_factor, recompute_scale_factor=True)

        small = F.interpolate(
            segmentations, scale_factor=self.scale_factor, mode="bilinear", recompute_scale_factor=True
        )
        regions = shrunken(ROIs.unsqueeze(1).to(small.dtype)).squeeze(1)
        gate = torch.ones_like(regions)
        if seg_label is not None:
            labeled = shrunken(seg_label.float()).squeeze(1).long() != 255
            gate = torch.where(labeled, (regions - small.detach().amax(1)).clamp(min=0), gate)
        return dense_energy_loss(
            shrunken(images.float()),
            small,
            sigma_rgb=self.sigma_rgb,
            sigma_xy=self.sigma_xy * self.scale_factor,
            weight=self.weight,
            regions=regions,
            gate=gate,
        ).reshape(1)
