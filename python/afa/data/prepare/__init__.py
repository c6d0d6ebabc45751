"""`afa prepare`: makes a downloaded data set ready to train on, or looks through a folder of one's own pictures.

One module a data set. Each checks what is there, names what is missing and where it is to be had, and writes only what
is not written yet: run again after a stop or a further download, it goes on.
"""

from afa.data.prepare.coco import prepare_coco
from afa.data.prepare.own import prepare_own
from afa.data.prepare.voc import prepare_voc

__all__ = ["prepare_coco", "prepare_own", "prepare_voc"]
