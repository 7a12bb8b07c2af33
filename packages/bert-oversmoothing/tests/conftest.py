"""Paths and builders that several test files share."""

from pathlib import Path

import pytest
import torch

from tenfold.pytest_plugin import check_annotations

check_annotations("tenfold", "bert_oversmoothing")


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference arrays; its README says what they are."""
    return Path(__file__).parent / "reference"


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name)`: a random model of a family, three blocks of width 32, and a batch for it.

    The texts have 9, 6 and 3 real tokens; images have none to spare. Every parameter is moved, so
    that gains, offsets and scales are nobody's defaults.
    """
    return _tiny


def _tiny(name: str, attention: str | None = None):
    import transformers as hf

    text = {
        "vocab_size": 50,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 24,
        "pad_token_id": 0,
    }
    image = {key: text[key] for key in list(text)[1:5]} | {"image_size": 24, "patch_size": 8}
    relative = {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]}
    pieces = {"position_buckets": 4, "share_att_key": True, "norm_rel_ebd": "layer_norm"}
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    config = {
        "bert": lambda: hf.BertConfig(**text),
        "bert-decoder": lambda: hf.BertConfig(**text, is_decoder=True),
        "roberta": lambda: hf.RobertaConfig(**text),
        "xlm-roberta": lambda: hf.XLMRobertaConfig(**text),
        "camembert": lambda: hf.CamembertConfig(**text),
        "electra": lambda: hf.ElectraConfig(**text, embedding_size=16),
        "deberta": lambda: hf.DebertaConfig(**text, **relative),
        "deberta-v2": lambda: hf.DebertaV2Config(**text, **relative, **pieces),
        "deberta-v2-conv": lambda: hf.DebertaV2Config(
            **text, **relative, **pieces, conv_kernel_size=3
        ),
        "albert": lambda: hf.AlbertConfig(**text, embedding_size=16),
        "albert-groups": lambda: hf.AlbertConfig(
            **(text | {"num_hidden_layers": 4}),
            embedding_size=16,
            num_hidden_groups=2,
            inner_group_num=2,
        ),
        "distilbert": lambda: hf.DistilBertConfig(
            vocab_size=50, dim=32, n_layers=3, n_heads=4, hidden_dim=48, pad_token_id=0
        ),
        "mpnet": lambda: hf.MPNetConfig(**text),
        "modernbert": lambda: hf.ModernBertConfig(**text, **tokens, local_attention=4),
        "vit": lambda: hf.ViTConfig(**image),
        "deit": lambda: hf.DeiTConfig(**image),
        "dinov2": lambda: hf.Dinov2Config(
            **{key: value for key, value in image.items() if key != "intermediate_size"}
        ),
        "dinov2-swiglu": lambda: hf.Dinov2Config(
            **{key: value for key, value in image.items() if key != "intermediate_size"},
            use_swiglu_ffn=True,
        ),
        "beit": lambda: hf.BeitConfig(**image, use_relative_position_bias=True),
        "beit-plain": lambda: hf.BeitConfig(
            **image, layer_scale_init_value=0.0, use_mean_pooling=False
        ),
        "clip_vision_model": lambda: hf.CLIPVisionConfig(**image),
    }[name]()
    config._attn_implementation = attention  # None: SDPA where the family has it
    torch.manual_seed(0)
    model = hf.AutoModel.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    if hasattr(config, "image_size"):
        return model.eval(), {"pixel_values": torch.randn(3, 3, 24, 24)}
    mask = torch.arange(9) < torch.tensor([9, 6, 3])[:, None]
    ids = torch.randint(3, 50, (3, 9)) * mask
    return model.eval(), {"input_ids": ids, "attention_mask": mask.long()}


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    """`tokenizer_folder(kind)`: a saved tokenizer of "bert" (pieces) or "roberta" (byte pairs)."""
    folders = {}

    def build(kind: str) -> Path:
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            _tokenizer(kind).save_pretrained(folders[kind])
        return folders[kind]

    return build


def _tokenizer(kind: str):
    import string

    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    if kind == "bert":
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
        words = ("the", "a", "cat", "dog", "sat", "on", "mat", "##s", "##ed", "who", "what", "is")
        marks = (*string.printable.strip(), *(f"##{each}" for each in string.ascii_lowercase))
        ids = {
            word: number for number, word in enumerate(dict.fromkeys((*special, *words, *marks)))
        }
        backend = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
        backend.normalizer = normalizers.BertNormalizer()
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
        return hf.BertTokenizerFast(tokenizer_object=backend)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<s>", "<pad>", "</s>", "<unk>", *alphabet, "Ġt", "Ġth", "Ġthe", "at", "<mask>"]
    ids = {token: number for number, token in enumerate(tokens)}
    merges = [("Ġ", "t"), ("Ġt", "h"), ("Ġth", "e"), ("a", "t")]
    backend = Tokenizer(models.BPE(ids, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos": "<s>", "eos": "</s>", "cls": "<s>", "sep": "</s>", "pad": "<pad>"}
    special = {f"{name}_token": token for name, token in names.items()}
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **special,
        unk_token="<unk>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


@pytest.fixture(scope="session")
def word_tokenizer():
    """`word_tokenizer(special=True)`: the words w4 to w49, between [CLS] and [SEP]."""
    return _word_tokenizer


def _word_tokenizer(special: bool = True, **options):
    import transformers as hf
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{n}" for n in range(4, 50))]
    vocabulary = {word: n for n, word in enumerate(names)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    roles = dict(zip(("pad", "unk", "cls", "sep"), names, strict=False))
    options |= {f"{role}_token": name for role, name in roles.items()}
    return hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)
