"""`afa prepare`: prepare a downloaded data set for training, or check a folder of the user's own images.

There is one module per data set. Each checks the existing files, lists missing ones with their download locations, and
writes only new files, so it can be run again after an interruption or another download.
"""

from afa.data.prepare.coco import prepare_coco
from afa.data.prepare.own import prepare_own
from afa.data.prepare.voc import prepare_voc

__all__ = ["prepare_coco", "prepare_own", "prepare_voc"]
