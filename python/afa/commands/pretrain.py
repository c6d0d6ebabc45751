"""Pretrain the small bundled backbone with image-level tags on a stream of generated images.

    python -m afa.commands.pretrain --out python/afa/weights/pvt_v2_mini.safetensors    # about an hour on 2 cores
    python -m afa.commands.pretrain --out pvt.safetensors --images 4000000 --workers 14    # a GPU with many cores

The demo uses these weights in place of ImageNet weights. They encode edges, textures and outlines, but none of the
demo's classes, shapes, textures or backgrounds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from afa.data.synthetic.pretraining import TAGS, TaggedStream, draw_tagged
from afa.data.synthetic.shapes import PRETRAIN_SHAPES
from afa.data.synthetic.textures import PRETRAIN_TEXTURES
from afa.files import atomic_path, write_text
from afa.model.backbone import Backbone

BACKBONE = "pvt_v2_b0"
BACKBONE_ARGS: dict[str, tuple[int, ...]] = {
    "embed_dims": (32, 64, 128, 256),
    "num_heads": (1, 2, 4, 8),
    "mlp_ratios": (4, 4, 4, 4),
}
SAVE_EVERY = 120.0
"""Seconds between evaluations; the state is saved after each."""
HELD_OUT = 1024
"""Number of held-out images for the evaluation, generated separately from the stream."""


class Tagger(nn.Module):
    """The backbone at output stride 16 and a 1×1 classifier; pooling is the mean of max and average pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone(BACKBONE, {**BACKBONE_ARGS, "drop_path_rate": 0.05}, output_stride=16)
        self.head = nn.Conv2d(self.backbone.channels[-1], len(TAGS), 1)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, H, W] uint8 -> tag logits [B, len(TAGS)]."""
        scores = self.head(self.backbone(self.backbone.normalization(images)).maps[-1])
        return 0.5 * (scores.amax((2, 3)) + scores.mean((2, 3)))


def tag_losses(logits: Tensor, tags: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropies of outlines and textures; the target probability is split evenly among an image's tags.

    From random weights this learns many times faster than one binary loss per tag, which is dominated by absent tags
    (compare Mahajan et al., ECCV 2018, section 3).
    """
    groups = (len(PRETRAIN_SHAPES), len(PRETRAIN_TEXTURES))
    outlines, textures = (
        F.cross_entropy(part, target / target.sum(1, keepdim=True).clamp(min=1))
        for part, target in zip(logits.split(groups, 1), tags.split(groups, 1), strict=True)
    )
    return outlines, textures


@torch.no_grad()
def mean_average_precision(model: nn.Module, images: Tensor, tags: Tensor, batch: int = 64) -> dict[str, float]:
    """Mean average precision over the tags; images [N, 3, H, W] uint8, tags [N, T]."""
    from sklearn.metrics import average_precision_score

    model.eval()
    logits = torch.cat([model(chunk) for chunk in images.split(batch)])
    model.train()
    split = len(PRETRAIN_SHAPES)
    return {
        name: round(float(average_precision_score(tags[:, part].numpy(), logits[:, part].cpu().numpy())), 4)
        for name, part in (("outlines", np.s_[:split]), ("textures", np.s_[split:]))
    }


_CARD = """# {name}

A {backbone} of timm's with `{args}`: {parameters:.2f} million parameters, in half precision under timm's own names.

**What it is for.** A start for the embedded demo and for tests, where no ImageNet weights can be fetched. It has never
seen a photograph: use timm's ImageNet weights for real images.

**What it was trained on.** Image-level tags alone, on endlessly generated images
(`afa.data.synthetic.pretraining`): {tags} tags ({shapes} outlines and {textures} textures), one to three objects an
image, on generated backgrounds. No mask, box or count was used. None of the outlines, textures, background generators
or photographs of the demo's data set occur.

**How.** `make pretrain`: {images} images of {crop} × {crop} pixels served (each drawn image about three times, with
another crop, flip and channel order), batch {batch_size}, AdamW {lr}, {seconds} s on {device}. Mean average precision
on {held_out:,} held-out generated images of the hardest kind: textures {mean_average_precision[textures]:.3f}, outlines
{mean_average_precision[outlines]:.3f}.

**Licence.** That of this package; every image was drawn by its own code.
"""


def write_card(weights: Path, facts: dict[str, Any], parameters: int) -> None:
    """Write the model card next to the weights. facts: entries describing the pretraining run."""
    text = _CARD.format(
        name=weights.stem,
        backbone=BACKBONE,
        args=BACKBONE_ARGS,
        parameters=parameters / 1e6,
        shapes=len(PRETRAIN_SHAPES),
        textures=len(PRETRAIN_TEXTURES),
        held_out=HELD_OUT,
        **facts,
    )
    write_text(weights.with_suffix(".md"), text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the safetensors file to write")
    parser.add_argument("--images", type=int, default=200_000, help="images to train on (default: %(default)s)")
    parser.add_argument(
        "--minutes",
        type=float,
        default=math.inf,
        help="end the schedule after this many minutes, even with fewer images",
    )
    parser.add_argument("--crop", type=int, default=80, help="image side, pixels (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--workers", type=int, default=1, help="processes that generate images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def _save(model: Tagger, out: Path, facts: dict[str, Any]) -> None:
    """Atomically write the backbone in half precision with timm's parameter names, without the classifier."""
    state = {k: v.detach().half().contiguous().cpu() for k, v in model.backbone.net.state_dict().items()}
    metadata = {
        "backbone": BACKBONE,
        "backbone_args": json.dumps(BACKBONE_ARGS),
        "pretraining": json.dumps(facts),
    }
    with atomic_path(out) as temporary:
        save_file(state, temporary, metadata)


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    torch.manual_seed(args.seed)
    model = Tagger().to(memory_format=torch.channels_last).to(args.device)
    held_out = [draw_tagged(np.random.default_rng([args.seed, 10**6, i]), args.crop) for i in range(HELD_OUT)]
    test_images = torch.from_numpy(np.stack([image for image, _ in held_out])).permute(0, 3, 1, 2).to(args.device)
    test_tags = torch.from_numpy(np.stack([tags for _, tags in held_out]))

    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    )
    stream = TaggedStream(args.crop, args.seed)
    loader = DataLoader(stream, args.batch_size, num_workers=args.workers, prefetch_factor=8 if args.workers else None)

    # The training state is saved next to the weights during the run, so that a killed run can resume.
    state_file = args.out.with_suffix(".state")
    seen, step, running, before = 0, 0, float("nan"), 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        seen, step, running, before = state["seen"], state["step"], state["running"], state["seconds"]
        stream.difficulty = state["difficulty"]
        stream.seed = args.seed + step
        print(f"resuming from {state_file} after {seen} images")

    start = last_save = time.monotonic()
    bar = tqdm(total=args.images, initial=seen, unit="img", smoothing=0.02)
    for images, tags in loader:
        elapsed = before + time.monotonic() - start
        progress = max(seen / args.images, elapsed / (60 * args.minutes))
        if progress >= 1:
            break
        lr = args.lr * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = lr
        outlines, textures = tag_losses(model(images.to(args.device)), tags.to(args.device))
        loss = outlines + textures
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        seen, step = seen + len(images), step + 1
        if step % 10 == 0:
            value = float(textures.detach())
            running = value if math.isnan(running) else 0.9 * running + 0.1 * value
            # Adapt the difficulty to the texture loss: harder while it is low, easier when it rises.
            stream.difficulty += 0.01 if running < 1.1 else -0.005 if running > 1.5 else 0.0
            bar.update(seen - bar.n)
            bar.set_postfix(textures=f"{running:.2f}", difficulty=f"{stream.difficulty:.2f}", lr=f"{lr:.1e}")
        if time.monotonic() - last_save > SAVE_EVERY:
            last_save = time.monotonic()
            score = mean_average_precision(model, test_images, test_tags)
            _save(model, args.out, {"images": seen, "mean_average_precision": score})
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "seen": seen, "step": step}
            state |= {"running": running, "seconds": elapsed, "difficulty": stream.difficulty}
            with atomic_path(state_file) as temporary:
                torch.save(state, temporary)
            tqdm.write(f"{elapsed / 60:.0f} min, {seen} images, difficulty {stream.difficulty:.2f}, precision {score}")
    bar.close()
    facts: dict[str, Any] = {
        "images": seen,
        "seconds": round(before + time.monotonic() - start),
        "mean_average_precision": mean_average_precision(model, test_images, test_tags),
        "tags": len(TAGS),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU cores",
        **{key: getattr(args, key) for key in ("crop", "batch_size", "lr", "weight_decay", "seed")},
    }
    _save(model, args.out, facts)
    state_file.unlink(missing_ok=True)
    write_card(args.out, facts, sum(p.numel() for p in model.backbone.parameters()))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
