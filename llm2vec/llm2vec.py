"""`LLM2Vec`: load an embedder, encode texts, save it. The API that users of upstream LLM2Vec have."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from llm2vec.files import alone_in
from llm2vec.hub import LoadingKeywords, asking_with, read_keywords, upload
from llm2vec.model.backbone import Backbone, hidden_states, load_backbone, load_tokenizer
from llm2vec.model.chain import Chain, open_chain
from llm2vec.model.checkpoint import record_of, save_checkpoint
from llm2vec.model.packed_attention import HUB_KERNELS, IN_HALF
from llm2vec.model.pooling import check_finite, embed_tokenised, pool, quantiser
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
from llm2vec.text.batches import batches_ahead, longest_first
from llm2vec.text.entries import as_instructed, check_encoding, instruction_of, texts_at_once, under
from llm2vec.text.probe_texts import probe_ids
from llm2vec.types import Attention, InstructedText, InstructionMask, PoolingMode, Precision, Texts, TextSide, UserError
from llm2vec.upstream import GONE, OF_DECODER, PAGE, batch_to_device, model_class, refuse_overrides, setting

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

logger = logging.getLogger(__name__)


class LLM2Vec(nn.Module):
    """A decoder with a template and a pooling mode.

        model = LLM2Vec.from_pretrained("output/stage_I", "output/stage_II")
        queries = model.encode([["Given a question, retrieve passages that answer it", "who wrote Emma?"]])
        documents = model.encode(["Emma is a novel by Jane Austen."])

    Args:
        model: the decoder without language-model head, plain or with an adapter on it.
        tokenizer: its tokenizer.
        pooling_mode: this and all below are the settings of `model.settings.EncoderSettings`. A `template` of None is
            inferred from the tokenizer, and said; an `attention` of None is what the model's config says, else causal.
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
        self.runs: tuple[dict[str, Any], ...] = ()  #: what `run.json` of each folder says that it was loaded from
        self.placed = False  #: whether it was loaded with a device map, so that `encode` leaves it where it is

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
            max_length: this, `doc_max_length`, `skip_instruction`, `template`, `instruction_join` and
                `instruction_mask` are those of `model.settings.EncoderSettings`.
            torch_dtype: of the weights; a torch dtype, its name, or "auto". Default float32. `dtype` is its newer name.
            device_map: as in transformers.
            attn_implementation: as in `types.AttnImplementation`.
            of_transformers: `token`, `cache_dir` and `local_files_only`, for all that is fetched; `revision` of the
                first argument; `quantization_config` of bitsandbytes, `max_memory`, `offload_folder`. Some more are
                taken and said to have no effect (`hub.LoadingKeywords`), among them `trust_remote_code`.

        Raises:
            TypeError: there is no such keyword.
            UserError: something is not found, does not fit, has no effect, or does not attend as asked.
        """
        if enable_bidirectional not in (None, True, False):
            raise UserError(f"enable_bidirectional is {enable_bidirectional!r}; True, False or None is needed.")
        of_weights = read_keywords(of_transformers, inspect.signature(cls.from_pretrained).parameters)
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
        chain, given = base_model_name_or_path, peft_model_name_or_path
        with asking_with(of_transformers):
            if not isinstance(chain, Chain):
                adapters = [given] if isinstance(given, str | Path) else given or ()
                chain = open_chain(str(chain), list(map(str, adapters)), of_transformers.get("revision"))
            elif given or of_transformers.get("revision"):
                raise UserError("peft_model_name_or_path: adapters are part of the chain; open it with them.")
            recorded = chain.settings or (UPSTREAMS_RULE if chain.adapters and not chain.outermost.run else {})
            parents = {"parent_adapters": chain.adapters[:-1] if chain.adapters and not merge_peft else None}
            settings = EncoderSettings(**{**recorded, **{k: v for k, v in chosen.items() if v is not None}, **parents})
            tokenizer = load_tokenizer(chain.tokenizer_folder)
            tokenizer.padding_side = "left"  # upstream's, whose callers read `hidden[:, -1]`
            model = load_backbone(
                chain,
                dtype=dtype if dtype is not None else torch_dtype,
                attn_implementation=attn_implementation,
                merge_last=merge_peft,
                of_weights={"device_map": device_map, **of_weights},
            )
        name = model.config._attn_implementation
        if name in HUB_KERNELS and next(model.parameters()).dtype == torch.float32:
            raise UserError(f"attn_implementation: {name} computes in half precision; set torch_dtype.")
        if getattr(model, "hf_device_map", None) is None and name in IN_HALF:
            model.to("cuda")  # type: ignore[arg-type]  # where `encode` would move it, and the only place this attention runs
        check_decoder(model, settings.attention)
        loaded = cls(model, tokenizer, **dataclasses.asdict(settings))
        loaded.placed, loaded.runs = device_map is not None, tuple(folder.run for folder in chain.folders)
        if recorded and loaded.settings == EncoderSettings(**{**recorded, **parents}):
            check_rendering(chain.outermost.path, chain.outermost.run.get("probe_ids"), loaded.row_tokenizer)
        return loaded.eval()  # torch's mode without dropout; no code is evaluated

    pooling_mode: PoolingMode = setting("pooling_mode")
    max_length: int = setting("max_length")
    doc_max_length: int | None = setting("doc_max_length")
    skip_instruction: bool = setting("skip_instruction")
    _get_model_class = staticmethod(model_class)

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        refuse_overrides(cls)

    def __getattr__(self, name: str) -> Any:
        if name in OF_DECODER:
            return getattr(self.model, name)
        if name in GONE:
            raise AttributeError(f"LLM2Vec has no {name}: {GONE[name]}; {PAGE}.")
        return super().__getattr__(name)

    @property
    def config(self) -> PretrainedConfig:
        """The decoder's configuration."""
        return self.model.config

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Embeddings [B, D] of a padded batch as `tokenize` makes it, in the model's dtype, not normalised. One that a
        tokenizer made, without `pool_mask`, is pooled over all its tokens, unless instructions are to be left out."""
        mask_BT = batch["attention_mask"]
        if "pool_mask" not in batch and self.skip_instruction:
            raise UserError("the batch has no `pool_mask`, so instructions cannot be left out; make it by `tokenize`.")
        # A family may count places from a row's beginning, and so from its padding.
        positions = None if mask_BT[:, 0].all() else (mask_BT.cumsum(dim=1) - 1).clamp(min=0)
        hidden_BTD = hidden_states(
            self.model, self.settings.attention, mask_BT, input_ids=batch["input_ids"], position_ids=positions
        )
        return pool(hidden_BTD, batch.get("pool_mask", mask_BT.bool()), self.settings.pooling_mode)

    def tokenize(self, texts: Texts, side: TextSide | None = None) -> dict[str, Tensor]:
        """The batch that `forward` takes, padded on the tokenizer's `padding_side`; arguments as in `encode`."""
        return self.row_tokenizer(as_instructed(texts, side))

    @torch.no_grad()
    def encode(
        self,
        sentences: Texts,
        batch_size: int = 32,
        show_progress_bar: bool = True,
        convert_to_numpy: bool = False,
        convert_to_tensor: bool = False,
        device: str | torch.device | None = None,
        side: TextSide | None = None,
        truncate_dim: int | None = None,
        normalize_embeddings: bool | None = None,
        precision: Precision = "float32",
    ) -> Tensor | np.ndarray[Any, np.dtype[Any]]:
        """Embed texts; a text's embedding does not depend on the others. The model is in evaluation mode afterwards.

        A subclass's own `tokenize` and `forward` are used, over padded rows.

        Args:
            sentences: texts, or [instruction, text] pairs; None for an instruction is none. A single string counts as
                a list of one. A whole number behind a pair, as in upstream's examples, says nothing; one entry with it
                may stand alone. Of a generator, `entries.TEXTS_KEPT` are kept at a time.
            batch_size: rows of 128 tokens a forward pass. Rows are sorted by length first, and longer or shorter ones
                go through in as many as make the same number of tokens.
            show_progress_bar: over the different texts.
            convert_to_numpy: return a numpy array instead of a tensor.
            convert_to_tensor: return a tensor, whatever `convert_to_numpy` says.
            device: where to compute; None = where the model is, or on a CUDA device where there is one and the model
                is on the CPU. A model loaded with a device map stays where it is.
            side: which of the template's forms the texts take, `query` or `document`; None = a text with an
                instruction is a query, one without a document. Both texts of a symmetric task are queries.
            truncate_dim: keep the first so many numbers of each vector, for a model that was trained to be cut
                (`matryoshka_dims`); None = all.
            normalize_embeddings: whether vectors have the length 1, after the cut; None = as the settings say.
            precision: `int8`, `uint8`, `binary` or `ubinary` give an array of the numbers that sentence-transformers'
                `quantize_embeddings` makes; the former two are spread over the range of these very texts.

        Returns:
            float32 on the CPU, [N, D], in the order given.

        Raises:
            UserError: an entry is neither a string nor an [instruction, text] pair, there is no such side or precision,
                `batch_size` is below 1, `truncate_dim` is not between 1 and the hidden size, or a vector is not finite.
        """
        quantise = None if precision == "float32" else quantiser(precision)
        hidden_size: int = self.model.config.hidden_size
        normalize = self.settings.normalize if normalize_embeddings is None else normalize_embeddings
        parts: list[Tensor] = []
        for part in texts_at_once(sentences):
            texts, device = check_encoding(part, batch_size, device, side, truncate_dim, hidden_size)
            place = {text: i for i, text in enumerate(dict.fromkeys(texts))}  # each different text is computed once
            different, target = list(place), self.eval()._place(device)  # torch's mode without dropout
            vectors = torch.zeros(len(place), truncate_dim or hidden_size)
            with tqdm(total=len(place), desc="Texts", disable=not show_progress_bar) as progress:
                for chosen, embedded in self._embedded(different, batch_size, target, side):
                    check_finite(embedded, [different[i].text for i in chosen])
                    kept = embedded[:, :truncate_dim]
                    if kept.shape[1] != vectors.shape[1]:  # a `forward` of one's own may end in other sizes
                        vectors = vectors.new_zeros(len(place), kept.shape[1])
                    vectors[chosen] = kept
                    progress.update(len(chosen))
            if normalize:
                vectors = F.normalize(vectors, dim=-1)
            parts.append(vectors if len(place) == len(texts) else vectors[[place[text] for text in texts]])
        vectors = parts[0] if len(parts) == 1 else torch.cat(parts)
        if quantise is not None:
            return quantise(vectors)
        return vectors.numpy() if convert_to_numpy and not convert_to_tensor else vectors

    def encode_query(self, sentences: Texts, instruction: str = "", *, task: str | None = None, **options: Any) -> Any:
        """Embed texts as queries under one instruction, or under the paper's for a `task` of MTEB.

        `sentences` and `options` are `encode`'s. A `UserError` where the paper has no instruction for the task; it
        names the nearest.
        """
        instruction = instruction if task is None else instruction_of(task)
        return self.encode(under(instruction, sentences), side="query", **options)

    def encode_document(self, sentences: Texts, **options: Any) -> Any:
        """Embed texts as documents, without an instruction; `options` are `encode`'s."""
        return self.encode(sentences, side="document", **options)

    @staticmethod
    def similarity(one: Any, other: Any) -> Tensor:
        """Cosines [N, M] of two sets of vectors, tensors or arrays [N, D] and [M, D]."""
        left, right = (F.normalize(torch.as_tensor(vectors).float(), dim=-1) for vectors in (one, other))
        return left @ right.T

    def save(self, output_path: str | Path, merge_before_save: bool = False, save_config: bool = True) -> None:
        """Write model (or adapter), tokenizer and settings to a folder that `from_pretrained` restores; and what the
        folders that it was loaded from record of its training.

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
        settings = self.settings if save_config else None
        self._write(Path(output_path), settings, record_of(self.runs, isinstance(self.model, PeftModel)))

    def push_to_hub(self, repo_id: str, private: bool = False) -> str:
        """Upload what `save` writes to a repository of the hub, made if missing; returns its address. The record of the
        training stays behind, as it names local paths. For other libraries, see `llm2vec export --push_to_hub`. A
        `UserError` where the hub refuses, or is out of reach.
        """
        with tempfile.TemporaryDirectory() as folder:
            self._write(Path(folder), self.settings, {})
            return upload(Path(folder), repo_id, private)

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

    def _write(self, folder: Path, settings: EncoderSettings | None, record: Mapping[str, Any]) -> None:
        run = {**record, "probe_ids": probe_ids(self.row_tokenizer)}
        with alone_in(folder, "save"):
            save_checkpoint(folder, self.model, self.tokenizer, settings, run)

    def _embedded(
        self, texts: Sequence[InstructedText], batch_size: int, device: torch.device, side: TextSide | None
    ) -> Iterator[tuple[list[int], Tensor]]:
        """Places of some of the texts and their embeddings [B, D], float32 on the CPU, until all were there."""
        if any(getattr(type(self), name) is not getattr(LLM2Vec, name) for name in ("tokenize", "forward")):
            order = longest_first(texts)
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                pairs = [[texts[i].instruction, texts[i].text] for i in chosen]
                padded = self.tokenize(pairs) if side is None else self.tokenize(pairs, side)
                yield chosen, self(batch_to_device(padded, device)).float().cpu()
            return
        for chosen, rows in batches_ahead(self.row_tokenizer, texts, batch_size):
            yield chosen, embed_tokenised(self.model, self.settings, rows, device)

    def _place(self, device: str | torch.device | None) -> torch.device:
        """Move the model to where it shall compute, and say where its inputs go."""
        if getattr(self.model, "hf_device_map", None) is None:  # else spread over several devices
            is_open = device is None and not self.placed and next(self.parameters()).device.type == "cpu"
            if is_open and torch.cuda.is_available():
                device = "cuda"
            if device is not None:
                self.to(device)
        # Its parameters, not its `weight`: under an adapter with tokens of its own that would be made anew.
        return next(self.model.get_input_embeddings().parameters()).device
