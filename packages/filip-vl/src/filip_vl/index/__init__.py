"""A token index: built out of core, searched by a prefilter and exact scoring."""

from filip_vl.index.build import build_index
from filip_vl.index.compress import keep_tokens
from filip_vl.index.items import Item, scene_images
from filip_vl.index.meta import Dtype, Extent, IndexFormat, checkpoint_hash
from filip_vl.index.queries import Query, QueryWord, image_query, text_query
from filip_vl.index.search import CANDIDATES, MOST_CANDIDATES, Hit, TokenIndex, recall_of

__all__ = [
    "CANDIDATES",
    "MOST_CANDIDATES",
    "Dtype",
    "Extent",
    "Hit",
    "IndexFormat",
    "Item",
    "Query",
    "QueryWord",
    "TokenIndex",
    "build_index",
    "checkpoint_hash",
    "image_query",
    "keep_tokens",
    "recall_of",
    "scene_images",
    "text_query",
]
