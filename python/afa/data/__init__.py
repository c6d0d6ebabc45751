"""Data: datasets, loaders, and the check before long work."""

from afa.data.classes import COCO_CLASSES, VOC_CLASSES
from afa.data.loaders import Batches, eval_loader, share, train_loader
from afa.data.voc import VOCDataset, check_dataset, open_dataset

__all__ = [
    "COCO_CLASSES",
    "VOC_CLASSES",
    "Batches",
    "VOCDataset",
    "check_dataset",
    "eval_loader",
    "open_dataset",
    "share",
    "train_loader",
]
