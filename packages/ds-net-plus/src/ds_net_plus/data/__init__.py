"""Images: the paper's data sets from disk, one's own, and the generated default."""

from ds_net_plus.data.detection import DetectionBatch, VOCData
from ds_net_plus.data.module import Batch, ImageData
from ds_net_plus.data.transforms import normalisation
from ds_net_plus.data.voc import VOC_CLASSES, read_voc, write_voc
from ds_net_plus.data.writers import write_cifar10, write_parquet

__all__ = [
    "VOC_CLASSES",
    "Batch",
    "DetectionBatch",
    "ImageData",
    "VOCData",
    "normalisation",
    "read_voc",
    "write_cifar10",
    "write_parquet",
    "write_voc",
]
