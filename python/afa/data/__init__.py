"""Datasets, data loaders and data checks."""

from afa.data.classes import COCO_CLASSES, VOC_CLASSES
from afa.data.dataset import TaggedDataset, check_dataset, open_dataset
from afa.data.loaders import Batches, eval_loader, share, train_loader

__all__ = [
    "COCO_CLASSES",
    "VOC_CLASSES",
    "Batches",
    "TaggedDataset",
    "check_dataset",
    "eval_loader",
    "open_dataset",
    "share",
    "train_loader",
]
