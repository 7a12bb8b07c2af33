"""Zero-shot classification with the paper's prompts.

>>> classifier = ZeroShotClassifier(model, "cifar10", "cifar10")
>>> classifier.scores(pixels).argmax(1)
"""

from filip_vl.zeroshot.classifier import TopClasses, ZeroShotClassifier
from filip_vl.zeroshot.prompts import (
    CaptionPrompt,
    PromptTable,
    RetrievalPrompts,
    class_sets,
    compose,
    prompt_names,
    prompt_table,
    read_classes,
    read_templates,
    retrieval_prompts,
)

__all__ = [
    "CaptionPrompt",
    "PromptTable",
    "RetrievalPrompts",
    "TopClasses",
    "ZeroShotClassifier",
    "class_sets",
    "compose",
    "prompt_names",
    "prompt_table",
    "read_classes",
    "read_templates",
    "retrieval_prompts",
]
