"""Words and patches: which belongs to which, shown and measured."""

from filip_vl.alignment.attributes import exchanged_attributes
from filip_vl.alignment.maps import Alignment, align_tokens, alignment_map, attention_map
from filip_vl.alignment.metrics import (
    Grounding,
    GroundingMetrics,
    candidate_scores,
    pair_scores,
    patch_objects,
    scene_grounding,
    share_of_first,
)
from filip_vl.alignment.words import Word, caption_words, label_positions

__all__ = [
    "Alignment",
    "Grounding",
    "GroundingMetrics",
    "Word",
    "align_tokens",
    "alignment_map",
    "attention_map",
    "candidate_scores",
    "caption_words",
    "exchanged_attributes",
    "label_positions",
    "pair_scores",
    "patch_objects",
    "scene_grounding",
    "share_of_first",
]
