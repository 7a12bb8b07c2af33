"""The model: both towers, the tokens of images and captions, the temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from filip_vl.convert import ConversionReport, Converted, fit_state, read_checkpoint
from filip_vl.hub import ModelFolder, read_folder, write_folder
from filip_vl.model.config import FilipConfig, get_config
from filip_vl.model.tokens import (
    FilipOutput,
    TokenBatch,
    check_ends,
    check_finite,
    crop_to_longest,
    first_end,
)
from filip_vl.model.vision import VisionTower
from filip_vl.tokenizers import Tokenizer, check_vocabulary
from filip_vl.tokenizers import from_json as tokenizer_from_json
from tenfold.attention import Transformer
from tenfold.checkpoint import compare_keys
from tenfold.errors import UserError

INITIAL_LOG_SCALE = math.log(1 / 0.07)


class FilipModel(nn.Module):
    """FILIP's two towers: images and captions as token vectors in a joint space.

    Every parameter has the name and shape that it has in OpenAI's CLIP.

    Source: Yao et al., "FILIP: Fine-grained Interactive Language-Image Pre-Training", ICLR 2022,
    section 3.1; initial values as CLIP's.

    Example:
        >>> model = FilipModel.from_pretrained("my-model")
        >>> images, texts = model.encode_image(pixels), model.encode_text(["a photo of a dog."])
        >>> images.normalized()[0] @ texts.normalized()[0].T  # similarity of patches and words

    Args:
        config: sizes and options.

    Attributes:
        config: the same.
        gradient_checkpointing: whether blocks keep only their input for the backward pass.
        check_finite: whether tokens that are not finite raise FloatingPointError; None checks in
            eval mode.
    """

    def __init__(self, config: FilipConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.check_finite: bool | None = None
        self._tokenizer: Tokenizer | None = None
        width, embed = config.text_width, config.embed_dim
        self.visual = VisionTower(config)
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=config.token_std)
        self.positional_embedding = nn.Parameter(torch.randn(config.context_length, width) * 0.01)
        self.transformer = Transformer(width, config.text_layers, config.text_heads, config.act)
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, embed) * width**-0.5)
        self.register_parameter(
            "text_projection_bias", nn.Parameter(torch.zeros(embed)) if config.proj_bias else None
        )
        self.logit_scale = nn.Parameter(torch.tensor(INITIAL_LOG_SCALE))

    # ------------------------------------------------------------------------- where it comes from

    @classmethod
    def from_config(
        cls, name: str, *, tokenizer: Tokenizer | None = None, **overrides: Any
    ) -> FilipModel:
        """A new model of a named configuration.

        >>> model = FilipModel.from_config("filip_tiny", tokenizer=WordTokenizer.train(captions))

        Args:
            name: one of `filip_vl.model.CONFIGS`.
            tokenizer: of the captions; the vocabulary has its size, unless `overrides` say more.
            overrides: fields that differ.

        Raises:
            UserError: no such name, or a tokenizer of another vocabulary.
            ValueError: no such field, or values that do not go together.
        """
        if tokenizer is not None:
            ids = {"vocab_size": tokenizer.vocab_size, "end_id": tokenizer.end_id}
            overrides = ids | overrides
        model = cls(get_config(name, **overrides))
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_clip(
        cls,
        path: str | Path,
        *,
        source: str = "auto",
        embed_dim: int | Literal["keep"] = "keep",
        image_size: int | None = None,
        tokenizer: Tokenizer | None = None,
        **fields: Any,
    ) -> FilipModel:
        """A model that starts from published weights of CLIP or of DeCLIP's FILIP.

        >>> model = FilipModel.from_clip("ViT-B-32.pt", embed_dim=256)

        Args:
            path: see `filip_vl.convert.read_checkpoint`.
            source: "openai", "open_clip", "hf-clip", "declip-filip"; "auto" looks at the content.
            embed_dim: joint width; where it is not that of the file the projections start anew.
            image_size: height and width in training, if not those of the file.
            tokenizer: of the captions, such as `BPETokenizer` of the released merges.
            fields: of the configuration, such as act, vision_heads, text_heads, include_cls.

        Raises:
            UserError: the file cannot be read, a key of a tower is missing, or the tokenizer has
                another vocabulary.
            ValueError: no such field, or values that do not go together.
        """
        found = read_checkpoint(path, source, **fields)
        model, _ = cls.from_converted(found, embed_dim=embed_dim)
        if image_size is not None:
            model.set_image_size(image_size)
        model.tokenizer = tokenizer
        return model

    @classmethod
    def from_converted(
        cls, found: Converted, *, embed_dim: int | Literal["keep"] = "keep"
    ) -> tuple[FilipModel, ConversionReport]:
        """As `from_clip`, of what `read_checkpoint` gave; with a report on all keys.

        Raises:
            UserError: a key of a tower is missing or does not fit, or "keep" without projections.
            ValueError: no such field, or values that do not go together.
        """
        fields = found.fields if embed_dim == "keep" else found.fields | {"embed_dim": embed_dim}
        if "embed_dim" not in fields:
            raise UserError("the checkpoint has no projections", fix="give embed_dim, such as 256")
        config = FilipConfig.from_dict(fields)
        with torch.device("meta"):
            wanted = cls(config).state_dict()
        state, report = fit_state(found, wanted)
        model = cls(config)
        model.load_state_dict(model.state_dict() | state)
        return model, report

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        image_size: int | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
    ) -> FilipModel:
        """The model of a folder of `save_pretrained` or of the Hub, in eval mode on the CPU.

        Args:
            name: a folder, or "user/name" on the Hub.
            image_size: height and width, if not those of the training; positions are interpolated.
            revision: branch, tag or commit on the Hub.
            token: for a private repository.
            cache_dir: where downloads are kept, huggingface_hub's place if left out.

        Raises:
            UserError: no such folder or repository, or it holds no model of filip-vl.
        """
        content = read_folder(name, revision=revision, token=token, cache_dir=cache_dir)
        try:
            config = FilipConfig.from_dict(content.config)
        except (TypeError, ValueError) as error:
            raise UserError(f"config.json: {error}", where=str(name)) from error
        with torch.device("meta"):
            model = cls(config)
        fit = compare_keys(content.state, model.state_dict())
        if not fit.fits:
            raise UserError(f"the weights do not fit: {fit.summary()}", where=str(name))
        model.load_state_dict(content.state, assign=True)
        if content.tokenizer is not None:
            model.tokenizer = tokenizer_from_json(content.tokenizer)
        if image_size is not None:
            model.set_image_size(image_size)
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder: model.safetensors, config.json and the tokenizer's JSON.

        Args:
            folder: made if need be.
        """
        tokenizer = None if self.tokenizer is None else self.tokenizer.to_json()
        write_folder(folder, ModelFolder(self.state_dict(), self.config.to_dict(), tokenizer))

    # ---------------------------------------------------------------------------------- settings

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Turns captions into ids; None where captions come as ids."""
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: Tokenizer | None) -> None:
        """Takes a tokenizer whose ids are those of the model.

        Raises:
            UserError: it has another number of ids, or another end.
        """
        if tokenizer is not None:
            check_vocabulary(tokenizer, self.config.vocab_size)
            if tokenizer.end_id != self.config.end:
                raise UserError(
                    f"captions end with id {tokenizer.end_id} for the tokenizer, with "
                    f"{self.config.end} for the network"
                )
        self._tokenizer = tokenizer

    def set_vocabulary(self, tokenizer: Tokenizer) -> None:
        """Take a tokenizer with other ids; their embeddings begin anew if their number differs.

        Args:
            tokenizer: of the captions from here on.
        """
        size, end = tokenizer.vocab_size, tokenizer.end_id
        if size != self.config.vocab_size:
            old = self.token_embedding.weight
            self.token_embedding = nn.Embedding(size, old.shape[1]).to(old)
            nn.init.normal_(self.token_embedding.weight, std=self.config.token_std)
        self.config = replace(self.config, vocab_size=size, end_id=end)
        self._tokenizer = tokenizer

    def set_image_size(self, image_size: int) -> None:
        """Train and encode at another size: positions are interpolated, the class token's kept.

        Args:
            image_size: height and width in pixels.

        Raises:
            ValueError: no multiple of the patch.
        """
        self.config = replace(self.config, image_size=image_size)
        self.visual.set_grid(self.config.grid)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Put the temperature's parameter back into its bounds, after a step of the optimiser."""
        self.logit_scale.clamp_(self.config.min_log_scale, self.config.max_log_scale)

    def log_scale(self) -> Float[Tensor, ""]:
        """Logarithm of 1 / temperature, the parameter held in its bounds.

        The gradient is that of the unbounded parameter, or it could not come back from a bound.
        """
        config, free = self.config, self.logit_scale
        bounded = free.detach().clamp(config.min_log_scale, config.max_log_scale)
        return free + (bounded - free.detach())

    def scale(self) -> Float[Tensor, ""]:
        """1 / temperature, the exponential of `log_scale`."""
        return self.log_scale().exp()

    # ---------------------------------------------------------------------------------- encoding

    def forward(
        self,
        pixels: Float[Tensor, "images 3 height width"],
        ids: Int64[Tensor, "texts length"],
    ) -> FilipOutput:
        """Both towers and the temperature: what the loss needs.

        Args:
            pixels: see `encode_image`.
            ids: see `encode_text`.

        Raises:
            ValueError: as `encode_image` and `encode_text`.
            FloatingPointError: as there.
        """
        return FilipOutput(self.encode_image(pixels), self.encode_text(ids), self.log_scale())

    def encode_image(self, pixels: Float[Tensor, "batch 3 height width"]) -> TokenBatch:
        """Tokens of images: `image_tokens`, or `image_vectors` where the model is a pooled one.

        Args:
            pixels: normalised with CLIP's mean and deviation; sides are multiples of the patch.

        Raises:
            ValueError: a size that is no multiple of the patch.
            FloatingPointError: tokens that are not finite, where `check_finite` says so.
        """
        return self.image_vectors(pixels) if self.config.pooled else self.image_tokens(pixels)

    def encode_text(self, text: Sequence[str] | Int64[Tensor, "batch length"]) -> TokenBatch:
        """Tokens of captions: `text_tokens`, or `text_vectors` where the model is a pooled one.

        Args:
            text: captions, or their ids, padded behind the end with any id.

        Raises:
            ValueError: captions without a tokenizer, a caption of ids that has no end or is longer
                than the context.
            FloatingPointError: tokens that are not finite, where `check_finite` says so.
        """
        return self.text_vectors(text) if self.config.pooled else self.text_tokens(text)

    def image_tokens(self, pixels: Float[Tensor, "batch 3 height width"]) -> TokenBatch:
        """A token for each patch, row by row; before them the class token with `include_cls`."""
        cls, patches = self.visual(pixels, self.gradient_checkpointing)
        tokens = torch.cat([cls[:, None], patches], 1) if self.config.include_cls else patches
        grid = None if self.config.learned_tokens else self.visual.grid_of(pixels)
        return self._checked(TokenBatch(tokens, _all_of(tokens), grid), "image")

    def image_vectors(self, pixels: Float[Tensor, "batch 3 height width"]) -> TokenBatch:
        """One token for each image, the class token: CLIP's vector."""
        tokens = self.visual(pixels, self.gradient_checkpointing).cls[:, None]
        return self._checked(TokenBatch(tokens, _all_of(tokens)), "image")

    def text_tokens(self, text: Sequence[str] | Int64[Tensor, "batch length"]) -> TokenBatch:
        """A token for each id; start to first end count, less what `drop_bos`, `drop_eos` say."""
        ids, strings = self._ids(text)
        tokens, ends = self._text_tower(ids)
        position = torch.arange(ids.shape[1], device=ids.device)
        last = ends[:, None] - int(self.config.drop_eos)
        mask = (position >= int(self.config.drop_bos)) & (position <= last)
        return self._checked(TokenBatch(tokens, mask, strings=strings), "text")

    def text_vectors(self, text: Sequence[str] | Int64[Tensor, "batch length"]) -> TokenBatch:
        """One token for each caption, its first end: CLIP's vector."""
        tokens, ends = self._text_tower(self._ids(text)[0])
        tokens = tokens.gather(1, ends[:, None, None].expand(-1, 1, tokens.shape[2]))
        return self._checked(TokenBatch(tokens, _all_of(tokens)), "text")

    def _ids(
        self, text: Sequence[str] | Int64[Tensor, "batch length"]
    ) -> tuple[Int64[Tensor, "batch length"], list[list[str]] | None]:
        """Ids of captions, and what stands at their positions where that is known."""
        if isinstance(text, Tensor):
            return text, None
        if self.tokenizer is None:
            raise ValueError("captions need a tokenizer: set model.tokenizer, or give ids")
        context, texts = self.config.context_length, list(text)
        ids = crop_to_longest(self.tokenizer.encode(texts, context).ids, self.config.end)
        strings = [self.tokenizer.tokens(caption, context) for caption in texts]
        return ids.to(self.text_projection.device), strings

    def _text_tower(
        self, ids: Int64[Tensor, "batch length"]
    ) -> tuple[Float[Tensor, "batch length embed"], Int64[Tensor, " batch"]]:
        """Projected tokens of all positions, and the position of each first end."""
        length, context = ids.shape[1], self.config.context_length
        if length > context:
            raise ValueError(f"captions of {length} ids are longer than the context of {context}")
        # what depends on values stops a graph from being captured
        if not (torch.compiler.is_compiling() or ids.is_meta):
            check_ends(ids, self.config.end)
        x = self.token_embedding(ids) + self.positional_embedding[:length]
        x = self.transformer(x, causal=True, checkpointing=self.gradient_checkpointing)
        x = self.ln_final(x) @ self.text_projection
        if self.text_projection_bias is not None:
            x = x + self.text_projection_bias
        return x, first_end(ids, self.config.end)

    def _checked(self, batch: TokenBatch, tower: str) -> TokenBatch:
        wanted = not self.training if self.check_finite is None else self.check_finite
        if wanted and not (torch.compiler.is_compiling() or batch.tokens.is_meta):
            check_finite(batch, tower)
        return batch


def _all_of(tokens: Float[Tensor, "batch tokens embed"]) -> Bool[Tensor, "batch tokens"]:
    return torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
