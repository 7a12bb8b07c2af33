"""Pairs of image and caption: readers, transforms, batches, filters."""

from filip_vl.data.augmenting import augment_captions
from filip_vl.data.batches import PairBatch, PairCollate, PairItem, PairItems, positives
from filip_vl.data.decoding import ParquetCell, TarMember, read_source
from filip_vl.data.filtering import FilterReport, FilterRules, filter_pairs
from filip_vl.data.folder import read_class_captions, read_class_folders, read_images
from filip_vl.data.jsonl import read_jsonl
from filip_vl.data.karpathy import read_karpathy
from filip_vl.data.labelled import ZERO_SHOT_SETS, read_labelled
from filip_vl.data.memory import pairs_in_memory
from filip_vl.data.module import FilipDataModule
from filip_vl.data.pairs import Pairs, Record, merge_images
from filip_vl.data.parquet import parquet_cells, read_parquet
from filip_vl.data.plugins import load_callable
from filip_vl.data.rewriting import filter_file, write_kept
from filip_vl.data.shapes import shape_pairs
from filip_vl.data.shards import expand_shards, read_shards
from filip_vl.data.sources import Location, read_any, read_split
from filip_vl.data.table import read_table
from filip_vl.data.transforms import eval_transform, train_transform
from filip_vl.data.writers import write_jsonl, write_shapes, write_shards, write_table

__all__ = [
    "ZERO_SHOT_SETS",
    "FilipDataModule",
    "FilterReport",
    "FilterRules",
    "Location",
    "PairBatch",
    "PairCollate",
    "PairItem",
    "PairItems",
    "Pairs",
    "ParquetCell",
    "Record",
    "TarMember",
    "augment_captions",
    "eval_transform",
    "expand_shards",
    "filter_file",
    "filter_pairs",
    "load_callable",
    "merge_images",
    "pairs_in_memory",
    "parquet_cells",
    "positives",
    "read_any",
    "read_class_captions",
    "read_class_folders",
    "read_images",
    "read_jsonl",
    "read_karpathy",
    "read_labelled",
    "read_parquet",
    "read_shards",
    "read_source",
    "read_split",
    "read_table",
    "shape_pairs",
    "train_transform",
    "write_jsonl",
    "write_kept",
    "write_shapes",
    "write_shards",
    "write_table",
]
