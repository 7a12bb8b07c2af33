"""Images with labels, from disk or generated."""

from ickd.data.module import ImageData
from ickd.data.pixels import Batch
from ickd.data.segmentation import SegmentationBatch, SegmentationData
from ickd.data.writers import write_parquet

__all__ = ["Batch", "ImageData", "SegmentationBatch", "SegmentationData", "write_parquet"]
