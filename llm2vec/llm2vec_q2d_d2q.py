"""Stage I: what a text's vector must bring forth of a text (EBQ2D and EBD2Q; paper section 3.1, Algorithm 1).

    anchor(x)   state of x's closing token, after the final norm                              [B, D]
    EBQ2D       [anchor(query) ; Embed(document)] -> decoder -> lm_head -> CE on the document
    EBD2Q       [anchor(document) ; Embed(query)] -> decoder -> lm_head -> CE on the query
    loss        alpha * CE_q2d + (1 - alpha) * CE_d2q                                         (Eq. 5)

The decoder sees the anchor at position 0, where a token's embedding would stand, and the text behind it: what it
knows of the other side, it knows from the anchor. Gradient flows through the anchors into the encoding pass.

That is the paper, and the default. Rival pre-stages differ in a few things, each a key, which go together freely:

    target       whose text: the counterpart; the text itself (RetroMAE, SimLM: q2q and d2d); both; or the rest behind a
                 cut, from what stands before it (q2r and d2r)
    bottleneck   one vector, or the states of all K pooled tokens, in order
    target_loss  ce: token by token. kl: token by token, not the token itself but what the frozen base expects there,
                 which reads the source and not its memory (LLM2Comp). bag: all tokens at once, in no order, and without
                 a decoder (LLaMA2Vec; `objectives/token_set.py`)
    decoder      shared: the weights in training. frozen: those that the run began with
    decoder_bos  whether a BOS takes position 0, which language models attend to whatever it holds, from the memory
    projection   what a memory becomes before it is decoded (`objectives/projection.py`)
    lm_weight    of the next-token loss of the source texts, in the same pass
    imitation_weight
                 of the mean squared difference of W mean(projected memory) + b, learnt, and a teacher's stored vector
                 of the text that is to be brought forth (LLM2Vec-Gen)
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm2vec.model.fused_layers import fuse, fused_decoders
from llm2vec.model.packed_attention import send
from llm2vec.model.packing import adapter_off, inner_decoder, packed_hidden_states
from llm2vec.model.pooling import embed, embedding_pass, pool_packed, states_of
from llm2vec.model.settings import EncoderSettings
from llm2vec.objectives.directions import Reconstruction, directions_of, first_of, last_of, woven_rows
from llm2vec.objectives.head import Head, language_head
from llm2vec.objectives.language_modelling import next_token_loss
from llm2vec.objectives.projection import Imitation, make_projection
from llm2vec.objectives.stage_one import StageOneObjective
from llm2vec.objectives.token_set import BAG_WEIGHT, token_set_loss, token_sets
from llm2vec.text.batches import targets_of
from llm2vec.text.templates import segments_of, template_named
from llm2vec.text.tokenization import RowTokenizer
from llm2vec.types import (
    AnchorProjection,
    Batch,
    Bottleneck,
    DecoderWeights,
    InstructedText,
    Output,
    Pass,
    PassKind,
    ReconstructionTarget,
    TargetLoss,
    TokenBatch,
    UserError,
)


class BidirectionalReconstruction(nn.Module, StageOneObjective):
    """The Stage I objective over a causal language model.

    Args:
        model: decoder with its language-model head; what of it requires gradients is trained.
        settings: how a text becomes its anchor.
        alpha: weight of what starts at the query: EBQ2D; 0 is the paper's OnlyD2Q, 1 its OnlyQ2D, and then the other
            pass is not run.
        target: what an anchor is to bring forth, as above.
        projection: what a memory becomes before the decoder sees it.
        bottleneck: what of a text is its memory: its `vector`, or the `states` of all pooled tokens.
        target_loss: `ce`, `kl` or `bag`, as above.
        decoder: whose weights decode. `frozen` are the base's below an adapter, else a copy, taken now.
        lm_weight: of the next-token loss of the source texts.
        decoder_bos: whether `bos_id` stands before the memory; None = where the decoder is frozen.
        imitation_weight: of the distance to a teacher's vectors, which the goal sides have as the fact `teacher`.
        teacher_width: numbers of such a vector.

    Example:
        >>> objective = BidirectionalReconstruction(model, settings, alpha=0.2)
        >>> objective(batch, objective.count(batch)).parts["loss"].backward()
    """

    model: PreTrainedModel
    keys = (
        "alpha", "target", "projection", "bottleneck", "target_loss", "decoder", "decoder_bos", "lm_weight",
        "trainable", "imitation_weight", "reconstruct_instruction", "reconstruction_probe", "bidirectional",
    )  # fmt: skip

    def __init__(
        self, model: PreTrainedModel, settings: EncoderSettings, alpha: float = 0.2,
        target: ReconstructionTarget = "counterpart", projection: AnchorProjection = "none", *,
        bottleneck: Bottleneck = "vector", target_loss: TargetLoss = "ce", decoder: DecoderWeights = "shared",
        decoder_bos: bool | None = None, lm_weight: float = 0.0, bos_id: int | None = None,
        imitation_weight: float = 0.0, teacher_width: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.model = model
        self.settings = settings
        self.bottleneck = bottleneck
        self.slots = 1  # of a memory
        if bottleneck == "states":
            segments = segments_of(str(settings.template), settings.pooling_mode)
            self.slots = sum(segment.pooled for segment in segments)
        self.target_loss = target_loss
        self.lm_weight = lm_weight
        self.directions = directions_of(target, settings.template)
        self.weights = [alpha, 1 - alpha] * (len(self.directions) // 2)
        self.projection = make_projection(projection, model)
        self.imitation_weight = imitation_weight
        if imitation_weight:
            assert teacher_width is not None, "vectors to imitate"
            self.imitation = Imitation(model.config.hidden_size, teacher_width, device=model.device)
        self.frozen = decoder == "frozen"
        self.bos_id = bos_id if (self.frozen if decoder_bos is None else decoder_bos) else None
        if self.frozen and not isinstance(self.decoder, PeftModel):
            self.copies = (copy.deepcopy(model).requires_grad_(False).train(),)
            fuse(inner_decoder(self.copies[0]), inner_decoder(model) in fused_decoders)
            if not lm_weight and not model.config.tie_word_embeddings:
                model.get_output_embeddings().requires_grad_(False)  # nobody reads it

    @classmethod
    def sides_of(cls, template: str | None, keys: Mapping[str, Any]) -> tuple[str, ...]:
        """The texts that its directions start from and end in."""
        directions = directions_of(keys["target"], template)
        return tuple(dict.fromkeys(side for d in directions for side in (d.source, d.goal)))

    @classmethod
    def check_rendering(cls, tokenizer: RowTokenizer, keys: Mapping[str, Any]) -> None:
        """Refuse `states` without a block of equal length behind every text, and a cut of what is written twice."""
        template = template_named(tokenizer.template)
        if keys.get("decoder_bos") and tokenizer.tokenizer.bos_token_id is None:
            raise UserError("decoder_bos is true, but the tokenizer has no BOS token; take it out.")
        if keys["bottleneck"] == "states":
            rows = tokenizer.rows([InstructedText("", t, side) for t in ("a", "a b c d") for side in tokenizer.sides])
            if len({sum(row.pooled) for row in rows}) > 1:
                raise UserError(
                    f"bottleneck is 'states', but template {tokenizer.template!r} pools as many tokens as a text has; "
                    f"use one with a block of its own, such as '{tokenizer.template}+memory_8'."
                )
        if keys["target"] == "next" and (template.asks or sum(s.kind == "text" for s in template.query) > 1):
            raise UserError(
                f"target is 'next', which template {tokenizer.template!r} does not serve: it writes a text twice, or "
                "asks for what follows; use another one."
            )

    @property
    def decoder(self) -> PreTrainedModel:
        """The model in training without its head."""
        decoder: PreTrainedModel = self.model.base_model  # type: ignore[assignment]
        return decoder

    @property
    def head(self) -> Head:
        """That of whoever decodes."""
        return language_head(self.decoding_model)

    @property
    def decoding_model(self) -> Any:
        """Whoever decodes, with its head: the model in training, its adapter off where it is `frozen`; or a copy."""
        return self.copies[0] if self.copies else self.model

    @property
    def weighted(self) -> dict[Reconstruction, float]:
        """The directions that are run, and their weights."""
        return {d: weight for d, weight in zip(self.directions, self.weights, strict=True) if weight > 0}

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """The texts that memories are taken of, what a teacher reads, and the texts that are decoded."""
        directions = self.weighted
        encoded = self._encoding({direction.source: batch[direction.source] for direction in directions})
        modelled = sum(sum(batch[side]["num_targets"]) for side in self._modelled())
        goals = [n for direction in directions for n in batch[direction.goal]["num_targets"]]
        if self.target_loss == "bag":
            return (encoded._replace(targets=modelled + self.slots * len(goals)),)
        reads_end = self.target_loss == "kl"
        before = self.slots - 1 + reads_end + (self.bos_id is not None)
        scored = sum(n + reads_end for n in goals if n)
        kind: PassKind = "frozen" if self.frozen else "trained"
        decoded = Pass(tuple(before + n for n in goals if n), "causal", targets=scored, kind=kind)
        encoded = encoded._replace(targets=modelled)
        if not reads_end:
            return encoded, decoded
        contexts = [n for d in directions for n in batch[d.source]["num_context"]]
        read = tuple(context + n for context, n in zip(contexts, goals, strict=True) if n)
        return encoded, Pass(read, "causal", targets=scored, kind="read"), decoded

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Terms of each direction: target tokens, one more a text under `kl`, texts under `bag`; anchors; and, where
        they are another number, target tokens; those of language modelling."""
        goals = {d.name: batch[d.goal]["num_targets"] for d in self.directions}
        counts = {name: sum(self._terms_of(n) for n in numbers) for name, numbers in goals.items()}
        counts["anchors"] = sum(len(batch[side]["lengths"]) for side in {d.source: None for d in self.weighted})
        if self.imitation_weight:
            counts["imitation"] = len(batch[self.directions[0].goal]["lengths"])
        if self.target_loss != "ce":
            counts["targets"] = sum(sum(batch[d.goal]["num_targets"]) for d in self.weighted)
        if self.lm_weight:
            counts["lm"] = sum(sum(batch[side]["num_predicted"]) for side in self._modelled())
        return {name: torch.tensor(float(number)) for name, number in counts.items()}

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """Loss parts of the sides that its directions name.

        Args:
            batch: the sides, packed.
            totals: terms of each direction in the whole optimiser step.

        Returns:
            `loss`, and detached `loss_q2d` and `loss_d2q` (or as the directions are called) where their direction has
            a weight, `loss_lm` and `loss_imitation`: these rows' shares of the step's means. Alike `anchor_norm` and
            `embedding_norm`, the mean lengths of what is decoded, before it is projected, and of the target tokens'
            embeddings.
        """
        directions = self.weighted
        sources = {direction.source: batch[direction.source] for direction in directions}
        goals = [batch[direction.goal] for direction in directions]
        target_N = torch.cat([targets_of(goal) for goal in goals])
        source_ids = torch.cat([side["input_ids"] for side in sources.values()])
        read_N = target_N if self.bos_id is None else torch.cat([target_N, target_N.new_full((1,), self.bos_id)])
        if self.frozen or self.target_loss == "bag":
            source_embeddings = self.model.get_input_embeddings()(source_ids)
            read_embeddings = self.token_embeddings(read_N)
        else:
            # One look-up for both passes, as its gradient is a table of the vocabulary's size.
            embeddings = self.model.get_input_embeddings()(torch.cat([source_ids, read_N]))
            source_embeddings, read_embeddings = embeddings.split([len(source_ids), len(read_N)])
        memories, lm = self._encode(sources, source_embeddings, totals)
        memory_BKD = torch.cat([memories[direction.source] for direction in directions])
        exact = torch.promote_types(memory_BKD.dtype, torch.float32)
        # Where the whole step has no target, a share of it is 0 and not 0 / 0.
        shares = [1 / totals[direction.name].to(target_N.device, exact).clamp_min(1) for direction in directions]
        if self.target_loss == "bag":
            losses = [
                token_set_loss(memories[d.source], self.head, token_sets(batch[d.goal]), share)
                for d, share in zip(directions, shares, strict=True)
            ]
            loss = BAG_WEIGHT * torch.stack([w * of for w, of in zip(directions.values(), losses, strict=True)]).sum()
        else:
            loss, losses = self._decoded(memory_BKD, target_N, read_embeddings, batch, shares)
        parts = {f"loss_{d.name}": of.detach() for d, of in zip(directions, losses, strict=True)}
        if lm is not None:
            loss, parts["loss_lm"] = loss + self.lm_weight * lm, lm.detach()
        if self.imitation_weight:
            apart = self._imitated(memories, batch) / totals["imitation"].to(loss)
            loss, parts["loss_imitation"] = loss + self.imitation_weight * apart, apart.detach()
        of_targets = totals.get("targets", torch.stack([totals[direction.name] for direction in directions]).sum())
        for name, vectors, total in (
            ("anchor_norm", torch.cat(list(memories.values())), totals["anchors"]),
            ("embedding_norm", read_embeddings[: len(target_N)].unsqueeze(1), of_targets),
        ):
            norms = vectors.detach().to(exact).norm(dim=2).mean(dim=1).sum()
            parts[name] = norms / total.to(norms).clamp_min(1)
        return Output({"loss": loss, **parts}, {})

    def encode(self, sides: Batch) -> dict[str, Tensor]:
        """The memories [texts, K, D] of each side's texts, not projected yet; one pass."""
        return self._encode(sides, None, {})[0]

    def decode(
        self, memory: Tensor, target_ND: Tensor, lengths: Sequence[int], *, reads_end: bool = False,
        bos_1D: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """States [N, D] that predict each target token (Eq. 3 and 4).

        A row holds its memory, whose last place predicts the first target token, and the target tokens behind it but
        for the last.

        Args:
            memory: [B, K, D], or [B, D] where it has one place; not projected yet.
            target_ND: embeddings of the rows' target tokens, row after row.
            lengths: number of target tokens of each row.
            reads_end: the last token is an input, too: one more state for each row with a target.
            bos_1D: embedding of what stands before a memory, if anything does; None = looked up without a gradient.
        """
        memory_BKD = memory if memory.dim() == 3 else memory.unsqueeze(1)
        rows, slots, _ = memory_BKD.shape
        memory_ND = self.projection(memory_BKD.flatten(0, 1)).to(target_ND.dtype)
        parts, of_parts = [memory_ND, target_ND], [[slots] * rows, list(lengths)]
        if self.bos_id is not None:
            if bos_1D is None:
                bos_1D = self.token_embeddings(torch.full((1,), self.bos_id, device=memory_ND.device))
            parts, of_parts = [bos_1D.expand(rows, -1), *parts], [[1] * rows, *of_parts]
        if not any(lengths):  # nothing to predict: the pass is run all the same, as other processes run theirs
            return self._run_decoder([slots], memory_ND[:slots])[:0]
        index, filled = woven_rows(of_parts, int(not reads_end))
        states_ND = self._run_decoder(filled, torch.cat(parts).index_select(0, *send([index], memory_ND.device)))
        read = [length + reads_end for length in lengths if length]
        if read == filled:
            return states_ND
        return states_ND.index_select(0, *send([last_of(filled, read)], states_ND.device))

    def _terms_of(self, num_targets: int) -> int:
        """Terms of a text with so many target tokens."""
        if self.target_loss == "bag":
            return int(num_targets > 0)
        return num_targets + (self.target_loss == "kl" and num_targets > 0)

    def _modelled(self) -> list[str]:
        """The sides whose texts are modelled too: each text in the first of its forms that is read."""
        if not self.lm_weight:
            return []
        return list({d.source.partition(":")[0]: d.source for d in reversed(self.weighted)}.values())

    def _encoding(self, sides: Mapping[str, TokenBatch]) -> Pass:
        """The pass that memories are taken of; of the sides only lengths are read."""
        run = embedding_pass(self.decoder, self.settings, sides)
        if self.lm_weight:  # which reads states that a shared prefix has once
            run = run._replace(prefixes=())
        return run._replace(closing_only=run.closing_only and self.bottleneck == "vector" and not self.lm_weight)

    def _encode(
        self, sides: Batch, embeddings: Tensor | None, totals: dict[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Memories of each side's texts; and the next-token loss, if it has a weight and totals are given."""
        if self.bottleneck == "vector" and not self.lm_weight:
            vectors = embed(self.decoder, self.settings, sides, embeddings)
            return {name: vectors_BD.unsqueeze(1) for name, vectors_BD in vectors.items()}, None
        states = states_of(self.decoder, self._encoding(sides), sides, embeddings)
        memories = {}
        for name, side in sides.items():
            if self.bottleneck == "states":
                places = side["pool_mask"].nonzero_static(size=len(side["lengths"]) * self.slots).squeeze(1)
                memories[name] = states[name].index_select(0, places).unflatten(0, (-1, self.slots))
            else:
                read = side["lengths"], side["pool_mask"], self.settings.pooling_mode
                memories[name] = pool_packed(states[name], *read).unsqueeze(1)
        if not self.lm_weight or not totals:
            return memories, None
        head = language_head(self.model)
        losses = [next_token_loss(states[side], head, sides[side], totals["lm"]) for side in self._modelled()]
        return memories, torch.stack(losses).sum()

    def _decoded(
        self, memory_BKD: Tensor, target_N: Tensor, read_ND: Tensor, batch: Batch, shares: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted loss of all directions, token by token; and each direction's, detached."""
        directions, divergence = self.weighted, self.target_loss == "kl"
        lengths = [batch[direction.goal]["num_targets"] for direction in directions]
        all_lengths = [length for of in lengths for length in of]
        teacher_ND = self._taught(target_N, batch, all_lengths) if divergence else None
        target_ND, bos_1D = read_ND.tensor_split([len(target_N)])
        states_ND = self.decode(memory_BKD, target_ND, all_lengths, reads_end=divergence, bos_1D=bos_1D)
        sizes = [sum(self._terms_of(length) for length in of) for of in lengths]
        weights = zip(directions.values(), shares, sizes, strict=True)
        weight_N = torch.cat([(weight * share).expand(size) for weight, share, size in weights])
        if teacher_ND is not None:
            loss, terms_N, _ = self.head.divergence(states_ND, teacher_ND, weight_N)
        else:
            loss, terms_N, _ = self.head.cross_entropy(states_ND, target_N, weight_N)
        return loss, [terms.sum() * share for terms, share in zip(terms_N.split(sizes), shares, strict=True)]

    def _imitated(self, memories: Mapping[str, Tensor], batch: Batch) -> Tensor:
        """Sum over these rows of their mean squared distance to the teacher's vectors, directions weighted."""
        apart = []
        for direction, weight in self.weighted.items():
            memory_BKD = memories[direction.source]
            told_BKD = self.projection(memory_BKD.flatten(0, 1)).view_as(memory_BKD)
            teacher_BW = batch[direction.goal]["facts"]["teacher"]
            apart.append(weight * self.imitation.distances(told_BKD.mean(dim=1), teacher_BW).sum())
        return torch.stack(apart).sum()

    @torch.no_grad()
    def _taught(self, target_N: Tensor, batch: Batch, lengths: Sequence[int]) -> Tensor:
        """The frozen base's states [N, D] over the targets, one more for each text, behind the sources themselves."""
        sources = [batch[direction.source] for direction in self.weighted]
        ids = [side["input_ids"] for side in sources]
        if not any(lengths):
            return self._run_decoder([1], self.token_embeddings(ids[0][:1]))[:0]
        whole, contexts = ([n for side in sources for n in side[name]] for name in ("lengths", "num_context"))
        place = torch.cat([first_of(whole, contexts), sum(whole) + torch.arange(len(target_N))])
        index, filled = woven_rows([contexts, lengths], 0)
        inputs = torch.cat([*ids, target_N]).index_select(0, *send([place[index]], target_N.device))
        states_ND = self._run_decoder(filled, self.token_embeddings(inputs))
        read = [length + 1 for length in lengths if length]
        return states_ND.index_select(0, *send([last_of(filled, read)], states_ND.device))

    @torch.no_grad()
    def token_embeddings(self, ids: Tensor) -> Tensor:
        """Embeddings without a gradient, by whoever decodes; texts hold no token that an adapter trains."""
        embeddings: Tensor = self.decoding_model.get_input_embeddings()(ids)
        return embeddings

    def _run_decoder(self, lengths: Sequence[int], inputs_ND: Tensor) -> Tensor:
        """States of the decoding pass; it is causal whatever the attention of the encoding pass."""
        with adapter_off(self.decoder) if self.frozen and not self.copies else nullcontext():
            return packed_hidden_states(self.decoding_model.base_model, "causal", lengths, inputs_ND)


#: The name under which the paper's release imports Stage I.
LLM2Vec_q2d_d2q = BidirectionalReconstruction
