"""Generated images: the embedded data set of the demo, and the stream its backbone is pretrained on.

shapes, textures, backgrounds    what can be drawn
scene                            how one image is put together
embedded                         the demo's data set, written to disk in VOC layout
pretraining                      the endless tagged stream, of other classes than the demo's
"""

from .embedded import CLASSES, make_dataset

__all__ = ["CLASSES", "make_dataset"]
