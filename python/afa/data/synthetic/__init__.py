"""Generated images: the embedded data set of the demo, and the stream for pretraining its backbone.

shapes, textures, backgrounds    the elements of an image
scene                            composition of one image
embedded                         the demo's data set, written to disk in VOC layout
pretraining                      the endless tagged stream, whose classes differ from the demo's
"""

from .embedded import CLASSES, make_dataset

__all__ = ["CLASSES", "make_dataset"]
