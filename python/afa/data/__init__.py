"""Data in PASCAL VOC layout: datasets, loaders, and the check before long work."""

from afa.data.voc import VOC_CLASSES, VOCDataset, check_dataset, eval_loader, train_loader

__all__ = ["VOC_CLASSES", "VOCDataset", "check_dataset", "eval_loader", "train_loader"]
