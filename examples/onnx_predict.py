"""Segment a photograph with an exported model. Needs only onnxruntime and Pillow, with NumPy, not this package.

afa export runs/demo --to onnx
python examples/onnx_predict.py runs/demo/model.onnx photo.jpg mask.png
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

model, photo, mask = sys.argv[1:]
session = onnxruntime.InferenceSession(model)
about = session.get_modelmeta().custom_metadata_map
step, least = int(about["multiple_of"]), int(about["least_side"])
image = Image.open(photo).convert("RGB")
size = image.size
scale = int(about["longer_side"]) / max(size) if "longer_side" in about else 1
image = image.resize([max(least, round(scale * side / step) * step) for side in size])
scores, tags = session.run(None, {"image": np.asarray(image).transpose(2, 0, 1)[None]})
labels = scores[0].argmax(0).astype(np.uint8)
Image.fromarray(labels).resize(size, Image.Resampling.NEAREST).save(mask)
print(", ".join(json.loads(about["classes"])[index] for index in np.unique(labels)))
