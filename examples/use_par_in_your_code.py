"""Three ways to refine soft masks with PAR. Needs only afa_ext, NumPy and Pillow.

python examples/use_par_in_your_code.py photo.jpg    # without a photograph: a generated image
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from afa_ext import PAR, par_affinity, par_propagate, par_refine

if len(sys.argv) > 1:
    image = Image.open(sys.argv[1]).convert("RGB")
    image.thumbnail((512, 512))
else:
    noise = np.random.default_rng(0).integers(90, 140, (240, 320, 3), np.uint8)
    image = Image.fromarray(noise)
    ImageDraw.Draw(image).polygon([(160, 30), (235, 90), (205, 200), (110, 210), (90, 85)], fill=(200, 60, 40))
pixels = np.array(image)
images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255  # [1, 3, H, W]

# The rough masks [1, 2, h, w] would come from your network. Here, they are a blob in the middle, and the rest.
y, x = torch.meshgrid(torch.linspace(-1, 1, 15), torch.linspace(-1, 1, 20), indexing="ij")
blob = torch.exp(-3 * (x**2 + y**2))
masks = torch.stack([1 - blob, blob])[None]

# 1. The module, as in published code.
par = PAR(num_iter=10, dilations=[1, 2, 4, 8, 12, 24])
refined = par(images, masks)  # [1, 2, H, W]: masks of another size are resized to the image

# 2. The function, which has more options. It is differentiable in the masks.
same = par_refine(images, masks, num_iter=10)

# 3. Two steps: the affinity depends only on the image, so that several sets of masks can share it.
weights = par_affinity(images)
enlarged = F.interpolate(masks, size=images.shape[2:], mode="bilinear", align_corners=True)
also = par_propagate(weights, enlarged, num_iter=10)
print(f"largest differences: {(refined - same).abs().max():.1e}, {(refined - also).abs().max():.1e}")

for name, scores in (("before.png", enlarged), ("after.png", refined)):
    # PAR scales all maps by the same factor, so compare them with each other instead of with a threshold.
    background = (scores.argmax(1)[0] == 0).numpy()
    picture = np.where(background[..., None], pixels // 3, pixels)
    Image.fromarray(picture).save(name)
    print(f"{name}: the mask covers {1 - background.mean():.0%} of the image")
