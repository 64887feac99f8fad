"""`LLM2Vec`: load an embedder, encode texts, save it. The API that users of upstream LLM2Vec have."""

from __future__ import annotations

import dataclasses
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm2vec.hub import LoadingKeywords, asking_with, read_keywords
from llm2vec.model.backbone import Backbone, hidden_states, load_backbone, load_tokenizer
from llm2vec.model.chain import Chain, open_chain
from llm2vec.model.checkpoint import save_checkpoint
from llm2vec.model.pooling import check_finite, embed, pool
from llm2vec.model.proofs import check_decoder
from llm2vec.model.settings import (
    UPSTREAMS_RULE,
    EncoderSettings,
    check_rendering,
    row_tokenizer,
    set_attention,
    with_template,
)
from llm2vec.model.stock_form import stock_model
from llm2vec.text.batches import pack_rows
from llm2vec.text.entries import as_instructed, check_encoding
from llm2vec.text.probe_texts import probe_ids
from llm2vec.text.tokenization import Row
from llm2vec.types import Attention, InstructedText, InstructionMask, PoolingMode, TextSide, UserError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)

#: What `encode` counts as a row of its batch size. A pass over many more tokens falls out of a CPU's caches, and a
#: batch of long rows out of a GPU's memory.
TOKENS_PER_ROW = 128

#: Batches that `encode` tokenises ahead of the model.
ROWS_AHEAD = 8


class LLM2Vec(nn.Module):
    """A decoder with a template and a pooling mode.

        model = LLM2Vec.from_pretrained("output/stage_I", "output/stage_II")
        queries = model.encode([["Given a question, retrieve passages that answer it", "who wrote Emma?"]])
        documents = model.encode(["Emma is a novel by Jane Austen."])

    Args:
        model: the decoder without language-model head, plain or with an adapter on it.
        tokenizer: its tokenizer.
        pooling_mode: this and the other settings are those of `model.settings.EncoderSettings`.
        max_length: most tokens of a row.
        doc_max_length: most tokens of the text alone.
        skip_instruction: whether the instruction is left out of the pooled positions.
        template: key of `templates.TEMPLATES`; None is inferred from the tokenizer, and said.
        instruction_join: what stands between instruction and text.
        attention: `causal` or `bidirectional`; None = what the model's own config says, causal if nothing.
        normalize: whether `encode` returns unit vectors.
        parent_adapters: the adapters merged into the base below this model's own.
        instruction_mask: how the instruction is left out; `counted` for a model of upstream LLM2Vec.

    Attributes:
        placed: whether the model was loaded with a device map, so that `encode` leaves it where it is.
    """

    def __init__(
        self,
        model: Backbone,
        tokenizer: PreTrainedTokenizerBase,
        pooling_mode: str = "mean",
        max_length: int = 512,
        doc_max_length: int | None = None,
        skip_instruction: bool = True,
        *,
        template: str | None = None,
        instruction_join: str = " ",
        attention: Attention | None = None,
        normalize: bool = False,
        parent_adapters: Sequence[str] | None = None,
        instruction_mask: InstructionMask = "offsets",
    ) -> None:
        super().__init__()
        if attention is None:
            said = getattr(model.config, "is_causal", None)
            attention = "bidirectional" if said is False else "causal"
            if said is None:
                logger.warning("attention: none is set, so it is causal; LLM2Vec's own models need `bidirectional`.")
        settings = EncoderSettings(
            pooling_mode=pooling_mode,  # type: ignore[arg-type]
            max_length=max_length,
            doc_max_length=doc_max_length,
            skip_instruction=skip_instruction,
            template=template,
            instruction_join=instruction_join,
            attention=attention,
            normalize=normalize,
            parent_adapters=None if parent_adapters is None else tuple(parent_adapters),
            instruction_mask=instruction_mask,
        )
        set_attention(model.config, attention)  # so that a call of `model` by itself attends as `encode` does
        self.model = model
        self.tokenizer = tokenizer
        self.settings = with_template(settings, tokenizer)
        self.row_tokenizer = row_tokenizer(tokenizer, self.settings)
        self.placed = False

    @classmethod
    def from_pretrained(
        cls,
        base_model_name_or_path: str | Path | Chain,
        peft_model_name_or_path: str | Path | Sequence[str | Path] | None = None,
        merge_peft: bool = False,
        enable_bidirectional: bool | None = None,
        *,
        pooling_mode: str | None = None,
        max_length: int | None = None,
        doc_max_length: int | None = None,
        skip_instruction: bool | None = None,
        template: str | None = None,
        instruction_join: str | None = None,
        instruction_mask: InstructionMask | None = None,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        attn_implementation: str | None = None,
        **of_transformers: Unpack[LoadingKeywords],
    ) -> LLM2Vec:
        """Load a model, put its adapters on, and prove that it attends as its settings say.

        Settings left at None come from `llm2vec_config.json` of the outermost folder that has one (the last adapter
        first, the base last), else from `EncoderSettings`. So a folder of this project needs no further argument. One
        whose file has upstream's keys alone, or an adapter without any file of ours, is pooled by upstream's count.

        Args:
            base_model_name_or_path: a model, or an adapter folder (then its recorded base is loaded below it); or both
                with all adapters, where `open_chain` has opened them already.
            peft_model_name_or_path: one adapter, or all of them in order, innermost first; all but the last are
                merged.
            merge_peft: merge the last adapter as well.
            enable_bidirectional: attention; upstream's default, True, where nothing is recorded.
            pooling_mode: `last` (also `eos_token`, `last_token`), `mean`, `weighted_mean`, `first` (`bos_token`).
            max_length: most tokens of a row, template included.
            doc_max_length: most tokens of the text alone.
            skip_instruction: whether mean pooling leaves out the instruction.
            template: key of `templates.TEMPLATES`.
            instruction_join: what stands between instruction and text.
            instruction_mask: how the instruction is left out of mean pooling, `offsets` or `counted`.
            torch_dtype: of the weights; a torch dtype, its name, or "auto". Default float32.
            dtype: the same, under its newer name.
            device_map: as in transformers.
            attn_implementation: `eager`, `sdpa` or `flash_attention_2`.
            of_transformers: `token`, `cache_dir` and `local_files_only`, for all that is fetched; `revision` of the
                first argument; `quantization_config` of bitsandbytes, `max_memory`, `offload_folder`. Some more are
                taken and said to have no effect (`hub.LoadingKeywords`), among them `trust_remote_code`.

        Raises:
            TypeError: there is no such keyword.
            UserError: something is not found, does not fit, has no effect, or does not attend as asked.
        """
        of_weights = read_keywords(of_transformers, inspect.signature(cls.from_pretrained).parameters)
        chain = base_model_name_or_path
        if not isinstance(chain, Chain):
            given = peft_model_name_or_path
            adapters = [given] if isinstance(given, str | Path) else given or ()
            with asking_with(of_transformers):
                chain = open_chain(str(chain), list(map(str, adapters)), of_transformers.get("revision"))
        elif peft_model_name_or_path or of_transformers.get("revision"):
            raise UserError("peft_model_name_or_path: adapters and revision are the chain's; open it with them.")
        recorded = chain.settings or (UPSTREAMS_RULE if chain.adapters and not chain.outermost.run else {})
        chosen = {
            "pooling_mode": pooling_mode,
            "max_length": max_length,
            "doc_max_length": doc_max_length,
            "skip_instruction": skip_instruction,
            "template": template,
            "instruction_join": instruction_join,
            "instruction_mask": instruction_mask,
            "attention": {None: None, True: "bidirectional", False: "causal"}[enable_bidirectional],
        }
        parents = {"parent_adapters": chain.adapters[:-1] if chain.adapters and not merge_peft else None}
        settings = EncoderSettings(**{**recorded, **{k: v for k, v in chosen.items() if v is not None}, **parents})
        with asking_with(of_transformers):
            tokenizer = load_tokenizer(chain.tokenizer_folder)
            model = load_backbone(
                chain,
                dtype=dtype if dtype is not None else torch_dtype,
                attn_implementation=attn_implementation,
                device_map=device_map,
                merge_last=merge_peft,
                of_weights=of_weights,
            )
        if device_map is None and model.config._attn_implementation == "flash_attention_2":
            model.to("cuda")  # type: ignore[arg-type]  # where `encode` would move it, and the only place this attention runs
        check_decoder(model, settings.attention)
        loaded = cls(model, tokenizer, **dataclasses.asdict(settings))
        loaded.placed = device_map is not None
        if recorded and loaded.settings == EncoderSettings(**{**recorded, **parents}):
            check_rendering(chain.outermost.path, chain.outermost.run.get("probe_ids"), loaded.row_tokenizer)
        return loaded.eval()  # torch's mode without dropout; no code is evaluated

    @property
    def config(self) -> PretrainedConfig:
        """The decoder's configuration."""
        return self.model.config

    @property
    def pooling_mode(self) -> PoolingMode:
        """As in the settings; chosen when the model is loaded."""
        return self.settings.pooling_mode

    @property
    def max_length(self) -> int:
        """As in the settings; chosen when the model is loaded."""
        return self.settings.max_length

    @property
    def doc_max_length(self) -> int | None:
        """As in the settings; chosen when the model is loaded."""
        return self.settings.doc_max_length

    @property
    def skip_instruction(self) -> bool:
        """As in the settings; chosen when the model is loaded."""
        return self.settings.skip_instruction

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of a padded batch as `tokenize` makes it, in the model's dtype, not normalised."""
        hidden_BTD = hidden_states(
            self.model, self.settings.attention, batch["attention_mask"], input_ids=batch["input_ids"]
        )
        return pool(hidden_BTD, batch["pool_mask"], self.settings.pooling_mode)

    def tokenize(
        self, texts: str | Sequence[str] | Sequence[Sequence[str]], side: TextSide | None = None
    ) -> dict[str, Tensor]:
        """Texts, or [instruction, text] pairs, to the batch that `forward` takes; arguments as in `encode`."""
        return self.row_tokenizer(as_instructed(texts, side))

    @torch.no_grad()
    def encode(
        self,
        sentences: str | Sequence[str] | Sequence[Sequence[str]],
        batch_size: int = 32,
        show_progress_bar: bool = True,
        convert_to_numpy: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        side: TextSide | None = None,
        truncate_dim: int | None = None,
    ) -> Tensor | np.ndarray[Any, np.dtype[np.float32]]:
        """Embed texts; a text's embedding does not depend on the others. The model is in evaluation mode afterwards.

        Args:
            sentences: texts, or [instruction, text] pairs, in a list or an array; a single string counts as a list of
                one. A whole number behind a pair, as in upstream's examples, says nothing; one entry with it may stand
                alone.
            batch_size: rows of 128 tokens a forward pass. Rows are sorted by length first, and longer or shorter ones
                go through in as many as make the same number of tokens.
            show_progress_bar: over the different texts.
            convert_to_numpy: return a numpy array instead of a tensor.
            convert_to_tensor: return a tensor, whatever `convert_to_numpy` says.
            device: where to compute; None = a CUDA device where there is one, else where the model is. A model
                loaded with a device map stays where it is.
            side: which of the template's forms the texts take, `query` or `document`; None = a text with an
                instruction is a query, one without a document. Both texts of a symmetric task are queries.
            truncate_dim: keep the first so many numbers of each vector, for a model that was trained to be cut
                (`matryoshka_dims`); None = all.

        Returns:
            float32 on the CPU, [N, D], in the order given; unit vectors (after the cut) only if the settings say
            `normalize`.

        Raises:
            UserError: an entry is neither a string nor an [instruction, text] pair, there is no such side,
                `batch_size` is below 1, `truncate_dim` is not between 1 and the hidden size, or a vector is not finite.
        """
        hidden_size: int = self.model.config.hidden_size
        texts, device = check_encoding(sentences, batch_size, device, side, truncate_dim, hidden_size)
        place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # each different text is computed once
        different, target = list(place), self._place(device)
        self.eval()
        vectors = torch.zeros(len(place), truncate_dim or hidden_size)
        with tqdm(total=len(place), desc="Texts", disable=not show_progress_bar) as progress:
            for chosen, rows in self._tokenize_ahead(different, batch_size * ROWS_AHEAD):
                for batch in token_batches([len(row.ids) for row in rows], batch_size * TOKENS_PER_ROW):
                    embedded = self._embed_rows([rows[i] for i in batch], target)
                    check_finite(embedded, [different[chosen[i]].text for i in batch])
                    vectors[[chosen[i] for i in batch]] = embedded[:, :truncate_dim]
                    progress.update(len(batch))
        if self.settings.normalize:
            vectors = F.normalize(vectors, dim=-1)
        if len(place) < len(texts):
            vectors = vectors[[place[text] for text in texts]]
        return vectors.numpy() if convert_to_numpy and not convert_to_tensor else vectors

    def save(self, output_path: str | Path, merge_before_save: bool = False, save_config: bool = True) -> None:
        """Write model (or adapter), tokenizer and settings to a folder that `from_pretrained` restores.

        Args:
            output_path: folder, made if missing.
            merge_before_save: merge the adapter first, also in memory, and write a full model.
            save_config: write `llm2vec_config.json`.
        """
        if merge_before_save and isinstance(self.model, PeftModel):
            self.model = self.model.merge_and_unload()
            # Where transformers loaded an adapter itself, it would save as if that were not merged but still there.
            self.model._hf_peft_config_loaded = False
            self.model._weight_conversions = None  # type: ignore[assignment]
            self.settings = dataclasses.replace(self.settings, parent_adapters=None)
        run = {"probe_ids": probe_ids(self.row_tokenizer)}
        save_checkpoint(Path(output_path), self.model, self.tokenizer, self.settings if save_config else None, run)

    def as_sentence_transformer(self, instructions: Mapping[str, str] | None = None) -> SentenceTransformer:
        """A `SentenceTransformer` of the same weights, to encode, evaluate or train with its library.

        Weights are shared: what one trains, the other has. Texts must be stripped by the caller; vectors are unit
        vectors. The model's config is set to this encoder's attention.

        Args:
            instructions: prompts to have by name, beside `query` and `document`: name -> instruction.

        Raises:
            UserError: sentence-transformers is not installed, or has no words for the template or the pooling.
        """
        return stock_model(self.model, self.row_tokenizer, self.settings, instructions or {}).model

    def _tokenize_ahead(self, texts: Sequence[InstructedText], at_once: int) -> Iterator[tuple[list[int], list[Row]]]:
        """Texts, longest first, in slabs of `at_once`: their indices and rows; the next slab is tokenised meanwhile."""
        order = sorted(range(len(texts)), key=lambda i: -len(texts[i].instruction) - len(texts[i].text))
        slabs = [order[start : start + at_once] for start in range(0, len(order), at_once)]
        with ThreadPoolExecutor(max_workers=1) as background:
            pending = [background.submit(self.row_tokenizer.rows, [texts[i] for i in slab]) for slab in slabs[:1]]
            for number, slab in enumerate(slabs):
                rows = pending.pop().result()
                if number + 1 < len(slabs):
                    following = [texts[i] for i in slabs[number + 1]]
                    pending.append(background.submit(self.row_tokenizer.rows, following))
                yield slab, rows

    def _embed_rows(self, rows: Sequence[Row], device: torch.device) -> Tensor:
        """Embeddings [B, D] of tokenised rows, float32 on the CPU."""
        batch = pack_rows(rows)
        for name in ("input_ids", "pool_mask", "target_mask"):
            batch[name] = batch[name].to(device)
        return embed(self.model, self.settings, {"text": batch})["text"].float().cpu()

    def _place(self, device: str | torch.device | None) -> torch.device:
        """Move the model to where it shall compute, and say where its inputs go."""
        if getattr(self.model, "hf_device_map", None) is None:  # else spread over several devices
            if device is None and not self.placed and torch.cuda.is_available():
                device = "cuda"
            if device is not None:
                self.to(device)
        # Its parameters, not its `weight`: under an adapter with tokens of its own that would be made anew.
        return next(self.model.get_input_embeddings().parameters()).device


def token_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Row indices, longest rows first, in batches of at most `max_tokens` tokens (at least a row)."""
    batches: list[list[int]] = []
    filled = max_tokens
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if filled + lengths[i] > max_tokens:
            batches.append([])
            filled = 0
        batches[-1].append(i)
        filled += lengths[i]
    return batches
