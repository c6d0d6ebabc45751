"""The whole method on one page: AFA (CVPR 2022) trains a segmentation network from image-level tags.

python examples/minimal_train.py                               # six minutes on two CPU cores, with generated images
python examples/minimal_train.py --iterations 20 --images 40   # under a minute; too short for good scores

Training has three phases. First, the network learns only to predict the tags. Its classifier then gives class
activation maps (CAMs), which show roughly where each class is. In the second phase, CAMs refined by PAR are the labels
of the segmentation decoder, and of the affinity of token pairs, which is computed from the attention. In the third
phase, a random walk along this affinity changes the CAMs before PAR. The labels of each batch are made anew.

This is a small version: one image scale, a small backbone, short phases. `afa train` has the full recipe. The folder
--data can also be yours, in VOC layout: training reads only images and tags, evaluation also reads masks.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, cast

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import afa
import afa_ext
from afa.data import TaggedDataset
from afa.data.synthetic import make_dataset

CROP, BATCH = 96, 16
STRIDE = 8  # pixels per token
LR, HEAD_LR, WARMUP = 5e-4, 5e-3, 30
PAR_LABELS, WALK_LABELS = 0.45, 0.65  # fractions of the iterations after which the second and third phase start
LOSSES = {"tags": 1.0, "segmentation": 1.5, "affinity": 0.6}  # and their weights
LOW, HIGH = 0.25, 0.45  # background scores of training labels; pixels that they disagree on are ignored
BACKGROUND = 0.3  # background score of evaluation
RADIUS = 2  # of the walk, in tokens
DILATIONS = (1, 2, 4, 8, 12)  # of PAR


class Network(nn.Module):
    """A timm Transformer with a classifier, a segmentation decoder and an affinity head."""

    def __init__(self, num_classes: int, width: int = 96) -> None:
        super().__init__()
        channels = (32, 64, 128, 256)
        settings: dict[str, Any] = {"embed_dims": channels, "num_heads": (1, 2, 4, 8), "mlp_ratios": (4, 4, 4, 4)}
        self.backbone = cast(Any, timm.create_model("pvt_v2_b0", num_classes=0, **settings))
        self.backbone.load_state_dict(load_file(Path(afa.__file__).parent / "weights/pvt_v2_mini.safetensors"))
        for stage in self.backbone.stages[2:]:  # 8 pixels per token in the last stage instead of 32
            stage.downsample.proj.stride = (1, 1)
        self.classifier = nn.Conv2d(channels[-1], num_classes, 1, bias=False)
        self.levels = nn.ModuleList(nn.Conv2d(channel, width, 1) for channel in channels)
        self.fuse = nn.Sequential(nn.Conv2d(4 * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.predict = nn.Conv2d(width, num_classes + 1, 1)
        # Hooks record the queries and keys of the last stage's blocks, in pairs.
        attentions = [block.attn for block in self.backbone.stages[-1].blocks]
        self.heads = attentions[0].num_heads
        self.recorded: list[Tensor] = []
        for attention in attentions:
            attention.q.register_forward_hook(lambda _module, _args, out: self.recorded.append(out))
            attention.kv.register_forward_hook(lambda _module, _args, out: self.recorded.append(out.chunk(2, dim=2)[0]))
        maps = len(attentions) * self.heads
        self.affinity_weight = nn.Parameter(torch.full((maps,), 1 / maps))
        self.affinity_bias = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """uint8 images [B, 3, H, W] -> the features of the four stages, finest first."""
        self.recorded.clear()
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in ((124, 116, 104), (58, 57, 57)))
        features: list[Tensor] = self.backbone.forward_intermediates((images - mean) / std, intermediates_only=True)
        return features

    def classify(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Logits of the tags [B, C], and CAMs [B, C, h, w]: the same classifier, applied to each token."""
        pooled = features[-1].amax((2, 3), keepdim=True)
        return self.classifier(pooled).flatten(1), self.classifier(features[-1])

    def segment(self, features: list[Tensor]) -> Tensor:
        """Logits [B, C+1, H/4, W/4], background first."""
        size = features[0].shape[2:]
        levels = [resize(layer(level), size) for layer, level in zip(self.levels, features, strict=True)]
        return self.predict(self.fuse(torch.cat(levels, 1)))

    def affinity(self) -> Tensor:
        """Affinity [B, N, N] in (0, 1) of the N tokens of the last forward pass."""
        split = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in self.recorded]
        maps = torch.cat([q @ k.mT for q, k in zip(split[::2], split[1::2], strict=True)], 1)  # [B, K, N, N]
        # Raw attention logits have any scale. Published code uses them as they are.
        deviation, mean = torch.std_mean(maps, dim=(2, 3), keepdim=True)
        return afa_ext.affinity_from_attention((maps - mean) / deviation, self.affinity_weight, self.affinity_bias)


def resize(maps: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(maps, size=size, mode="bilinear", align_corners=False)


def normalize_cams(cams: Tensor, tags: Tensor, size: tuple[int, ...]) -> Tensor:
    """Enlarge CAMs to [B, C, H, W] and scale them to [0, 1]; 0 for classes that are not among the tags."""
    maps = resize(cams, size).relu() * tags[:, :, None, None]
    maps = maps - maps.amin((2, 3), keepdim=True)
    return maps / (maps.amax((2, 3), keepdim=True) + 1e-5)


def walk(cams: Tensor, affinity: Tensor, tags: Tensor, background: float) -> Tensor:
    """Random walk of CAMs [B, C, H, W] -> scores [B, C+1, h, w] of the tokens, background first."""
    tokens = resize(cams, tuple(side // STRIDE for side in cams.shape[2:]))
    return afa_ext.propagate_cams(tokens, affinity, tags, radius=RADIUS, background=background)


@torch.no_grad()
def make_labels(
    images: Tensor, cams: Tensor, affinity: Tensor, tags: Tensor, box: Tensor, walked: bool
) -> tuple[Tensor, Tensor]:
    """Labels of the pixels [B, H, W]: 0 background, class + 1, 255 ignored; and of the pairs of tokens [B, N, N].

    box: [B, 4], the part of each crop that is not padding.
    """
    cams = normalize_cams(cams, tags, images.shape[2:])
    labels = afa_ext.pseudo_labels(images, cams, tags, low=LOW, high=HIGH, box=box, dilations=DILATIONS)
    # Pairs are 0: different classes, 1: both background, 2: one class, 255: ignored. A token has the label of its
    # center.
    pairs = afa_ext.affinity_labels(labels, stride=STRIDE, offset=STRIDE // 2, radius=RADIUS, background=0)
    if walked:
        low, high = (walk(cams, affinity, tags, background) for background in (LOW, HIGH))
        labels = afa_ext.refine_labels(images, high, tags, low_scores=low, box=box, dilations=DILATIONS)
    return labels, pairs


def segmentation_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean of the cross entropies of background pixels and of pixels with a class."""
    entropy = F.cross_entropy(resize(logits, labels.shape[1:]), labels, ignore_index=255, reduction="none")
    groups = (labels == 0, (labels > 0) & (labels != 255))
    return torch.stack([(entropy * group).sum() / group.sum().clamp(min=1) for group in groups]).mean()


@torch.no_grad()
def evaluate(network: Network, dataset: TaggedDataset, device: torch.device) -> dict[str, float]:
    """mIoU of the labels, which use the images' tags, and of the segmentation, which does not."""
    network.eval()
    n = len(dataset.classes) + 1
    confusion: dict[str, Tensor] = {}
    for i in range(len(dataset)):
        sample = dataset[i]
        images, tags, mask = (sample[key][None].to(device) for key in ("image", "tags", "mask"))
        size = mask.shape[1:]
        features = network(images)
        cams = normalize_cams(network.classify(features)[1], tags, size)
        # With equal background scores, no pixel is ignored.
        par_label = afa_ext.pseudo_labels(images, cams, tags, low=BACKGROUND, high=BACKGROUND, dilations=DILATIONS)
        found = {
            "CAM": F.pad(cams, (0, 0, 0, 0, 1, 0), value=BACKGROUND).argmax(1),
            "walk": resize(walk(cams, network.affinity(), tags, BACKGROUND), size).argmax(1),
            "PAR label": par_label,
            "segmentation": resize(network.segment(features), size).argmax(1),
        }
        known = mask != 255
        for name, labels in found.items():
            counts = torch.bincount(mask[known] * n + labels[known], minlength=n * n).view(n, n)
            confusion[name] = confusion.get(name, 0) + counts
    scores = {}
    for name, counts in confusion.items():
        iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
        scores[name] = float(iou[counts.sum(1) > 0].mean())
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a segmentation network from image-level tags.")
    parser.add_argument("--iterations", type=int, default=400, help="number of weight updates (default: 400)")
    parser.add_argument("--images", type=int, default=800, help="number of training images to use (default: 800)")
    parser.add_argument(
        "--data", type=Path, default=Path("data/minimal"), help="folder, generated if it does not exist"
    )
    args = parser.parse_args()

    if not args.data.exists():
        make_dataset(args.data, train=args.images, val=max(16, args.images // 8))
    train = TaggedDataset(args.data, "train", train=True, crop_size=CROP, scale_range=(0.8, 1.25), with_mask=False)
    validation = TaggedDataset(args.data, "val", train=False, with_mask=True)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network(len(train.classes)).to(device).train()
    backbone = list(network.backbone.parameters())
    heads = [parameter for name, parameter in network.named_parameters() if not name.startswith("backbone.")]
    optimizer = torch.optim.AdamW([{"params": backbone, "lr": LR}, {"params": heads, "lr": HEAD_LR}])
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARMUP, 1) * (1 - i / args.iterations) ** 0.5
    )

    logged: list[Tensor] = []
    for iteration in range(args.iterations):
        chosen = rng.integers(min(args.images, len(train)), size=BATCH)
        samples = [train[int(i), (iteration, k)] for k, i in enumerate(chosen)]  # a random crop of each image
        batch = {key: torch.stack([sample[key] for sample in samples]).to(device) for key in ("image", "tags", "box")}
        images, tags = batch["image"], batch["tags"]
        phase = 1 + sum(iteration >= start * args.iterations for start in (PAR_LABELS, WALK_LABELS))

        features = network(images)
        tag_logits, cams = network.classify(features)
        losses = [F.multilabel_soft_margin_loss(tag_logits, tags)]
        if phase > 1:
            affinity = network.affinity()
            labels, pairs = make_labels(images, cams, affinity, tags, batch["box"], walked=phase == 3)
            losses.append(segmentation_loss(network.segment(features), labels))
            # The published weights, (0.5, 0.5, 0), do not distinguish background and objects.
            losses.append(afa_ext.affinity_loss(affinity, pairs, weights=(0.5, 0.25, 0.25)))
        loss = torch.stack([weight * value for weight, value in zip(LOSSES.values(), losses, strict=False)]).sum()
        optimizer.zero_grad()
        loss.backward()
        # When the segmentation loss starts, its gradients are much larger than those that Adam has averaged before.
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

        logged.append(torch.stack(losses).detach())
        if (iteration + 1) % max(1, args.iterations // 20) == 0:
            recent = torch.stack([values for values in logged if len(values) == len(losses)]).mean(0).tolist()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in zip(LOSSES, recent, strict=False))
            print(f"iteration {iteration + 1}, phase {phase}, losses: {shown}", flush=True)
            logged.clear()

    print(f"mIoU on {len(validation)} validation images:")
    for name, score in evaluate(network, validation, device).items():
        print(f"{name:<13}{score:.3f}")


if __name__ == "__main__":
    main()
