"""Train a second network on exported pseudo labels, with nothing but PyTorch, timm, NumPy and Pillow.

    afa pseudo-labels runs/voc --out labels
    python examples/second_stage.py --images VOC2012/JPEGImages --labels labels --val-masks VOC2012/SegmentationClass

Labels and masks are PNG files of class indices; 255 is ignored. Prints the mIoU on --val-masks and writes the weights.
"""

import argparse
from pathlib import Path

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
IGNORE = 255


class Pairs(Dataset[tuple[Tensor, Tensor]]):
    """Images and their label maps, found by name; with `crop`, random crops and flips."""

    def __init__(self, images: Path, labels: Path, crop: int | None = None) -> None:
        names = {path.relative_to(images).with_suffix(""): path for path in images.rglob("*") if path.is_file()}
        masks = sorted(labels.rglob("*.png"))
        self.pairs = [
            (names[own], path) for path in masks if (own := path.relative_to(labels).with_suffix("")) in names
        ]
        if not self.pairs:
            raise SystemExit(f"no label in {labels} has the name of an image in {images}")
        self.crop = crop

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image_path, label_path = self.pairs[index]
        image = torch.from_numpy(np.array(Image.open(image_path).convert("RGB"))).permute(2, 0, 1).float() / 255
        label = torch.from_numpy(np.array(Image.open(label_path))).long()
        image = (image - MEAN[:, None, None]) / STD[:, None, None]
        if self.crop is None:
            return image, label
        missing = [max(0, self.crop - side) for side in label.shape]
        image = F.pad(image, (0, missing[1], 0, missing[0]))
        label = F.pad(label, (0, missing[1], 0, missing[0]), value=IGNORE)
        top, left = (int(torch.randint(side - self.crop + 1, ())) for side in label.shape)
        window = (..., slice(top, top + self.crop), slice(left, left + self.crop))
        image, label = image[window], label[window]
        return (image.flip(-1), label.flip(-1)) if torch.rand(()) < 0.5 else (image, label)


class Network(nn.Module):
    """A timm backbone whose feature maps are brought to one size and classified."""

    def __init__(self, backbone: str, classes: int, pretrained: bool, width: int = 128) -> None:
        super().__init__()
        self.backbone = timm.create_model(backbone, features_only=True, pretrained=pretrained)
        self.project = nn.ModuleList(nn.Conv2d(count, width, 1) for count in self.backbone.feature_info.channels()[1:])
        self.classify = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, classes, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        maps = [project(features) for project, features in zip(self.project, self.backbone(images)[1:], strict=True)]
        size = maps[0].shape[2:]
        total = torch.stack([F.interpolate(one, size=size, mode="bilinear") for one in maps]).sum(0)
        logits: Tensor = F.interpolate(self.classify(total), size=images.shape[2:], mode="bilinear")
        return logits


@torch.inference_mode()
def mean_iou(network: nn.Module, pairs: Pairs, classes: int, device: str) -> float:
    """mIoU over the classes that occur in the masks or in the predictions."""
    network.eval()
    counts = torch.zeros(classes * classes, dtype=torch.long)
    for index in range(len(pairs)):
        image, mask = pairs[index]
        choice = network(image[None].to(device)).argmax(1)[0].cpu()
        known = mask != IGNORE
        counts += torch.bincount(mask[known] * classes + choice[known], minlength=classes * classes)
    table = counts.view(classes, classes).double()
    union = table.sum(0) + table.sum(1) - table.diag()
    return float((table.diag() / union)[union > 0].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--labels", type=Path, required=True, help="folder that `afa pseudo-labels` wrote")
    parser.add_argument("--val-masks", type=Path, help="folder of true masks to evaluate on; may be absent")
    parser.add_argument("--backbone", default="resnet18", help="a timm model with feature maps (default: resnet18)")
    parser.add_argument("--classes", type=int, default=21, help="number of classes with background (default: 21)")
    parser.add_argument("--random", action="store_true", help="random instead of pretrained weights")
    parser.add_argument("--iterations", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--crop", type=int, default=320, help="pixels; a multiple of 32")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--out", type=Path, default=Path("second_stage.pt"))
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pairs = Pairs(options.images, options.labels, options.crop)
    network = Network(options.backbone, options.classes, not options.random).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, options.iterations, power=0.9)
    loader = DataLoader(pairs, options.batch_size, shuffle=True, drop_last=len(pairs) > options.batch_size)
    iteration = 0
    while iteration < options.iterations:
        for images, labels in loader:
            network.train()
            loss = F.cross_entropy(network(images.to(device)), labels.to(device), ignore_index=IGNORE)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            iteration += 1
            if iteration % 50 == 0 or iteration == options.iterations:
                print(f"iteration {iteration}: loss {loss.item():.3f}", flush=True)
            if iteration == options.iterations:
                break
    torch.save(network.state_dict(), options.out)
    if options.val_masks is not None:
        score = mean_iou(network, Pairs(options.images, options.val_masks), options.classes, device)
        print(f"mIoU {score:.3f} on the images with masks in {options.val_masks}")


if __name__ == "__main__":
    main()
