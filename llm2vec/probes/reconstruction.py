"""What a Stage I model makes of an anchor: the text on the other side, generated, or scored token by token.

The anchor of a text (the state of its closing token) stands at position 0, where a token's embedding would, and the
decoder goes on behind it (paper Eq. 3 and 4): a document from a query (EBQ2D), a query from a document (EBD2Q). The
end of a text is no target in Stage I, so a model learns none: a generated text runs on to the limit, unless the base
brings a habit of ending along.

    reconstructor = load_reconstructor(ModelChoice("output/stage_I/..."))
    reconstructor.generate([text_of_side("document", "Emma is a novel by Jane Austen.")], max_new_tokens=16)

Run by `llm2vec reconstruct`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import GenerationConfig

from llm2vec.choice import ModelChoice
from llm2vec.llm2vec_q2d_d2q import BidirectionalReconstruction
from llm2vec.model.backbone import default_device, ends_of, load_backbone, load_tokenizer
from llm2vec.model.chain import Chain, open_chain
from llm2vec.model.checkpoint import read_beside, weights_beside
from llm2vec.model.proofs import check_attention, check_decoder
from llm2vec.model.settings import SETTINGS_FILE, EncoderSettings, check_rendering, row_tokenizer, with_template
from llm2vec.objectives.head import check_head
from llm2vec.objectives.losses import CrossEntropy
from llm2vec.text.batches import pack_rows
from llm2vec.text.tokenization import Row, RowTokenizer
from llm2vec.types import InstructedText, TextSide, UserError, in_one_sentence


class Sampling(NamedTuple):
    """How tokens are drawn; from torch's generator, so its seed decides them."""

    temperature: float = 1.0  #: what the logits are divided by
    #: share of the probability that the likeliest tokens hold together; no others are drawn.
    top_p: float = 0.95
    num: int = 1  #: texts drawn from each anchor


class ScoredToken(NamedTuple):
    """A token of a true text: what it adds to the text, and its -log p in nats given the anchor and those before."""

    text: str
    loss: float


class Reconstructor:
    """Generates and scores texts from anchors: `objective` makes and decodes them, `tokenizer` renders texts."""

    def __init__(self, objective: BidirectionalReconstruction, tokenizer: RowTokenizer) -> None:
        self.objective = objective.eval()  # torch's mode without dropout
        self.tokenizer = tokenizer

    @torch.no_grad()
    def generate(
        self, texts: Sequence[InstructedText], max_new_tokens: int, sampling: Sampling | None = None
    ) -> list[list[str]]:
        """The texts that the decoder writes behind each text's anchor, without blanks around them; all at once.

        A text ends after `max_new_tokens` where it does not end by itself. For each there is one, of the likeliest
        tokens, or `sampling.num` that are drawn.
        """
        model = self.objective.decoding_model
        tokenizer = self.tokenizer.tokenizer
        drawn = {} if sampling is None else {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        num = 1 if sampling is None else sampling.num
        memory_BKD = embed_rows(self.objective, self.tokenizer.rows(texts))
        memory_BKD = self.objective.projection(memory_BKD.flatten(0, 1)).view_as(memory_BKD)
        if self.objective.bos_id is not None:
            bos_B = torch.full((len(memory_BKD),), self.objective.bos_id, device=memory_BKD.device)
            memory_BKD = torch.cat([self.objective.token_embeddings(bos_B).unsqueeze(1), memory_BKD], dim=1)
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=sampling is not None,
            num_return_sequences=num,
            # The model's and the tokenizer's EOS, and the closing token of the template.
            eos_token_id=sorted({*ends_of(model), tokenizer.eos_token_id, self.tokenizer.closing_token_id} - {None}),
            pad_token_id=tokenizer.pad_token_id,
            **drawn,
        )
        ids = model.generate(
            inputs_embeds=memory_BKD,
            attention_mask=torch.ones(memory_BKD.shape[:2], dtype=torch.long, device=memory_BKD.device),
            generation_config=config,
            is_causal=True,  # whatever the attention of the encoding pass
        )
        decoded = [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        return [decoded[i : i + num] for i in range(0, len(decoded), num)]

    @torch.no_grad()
    def score(self, text: InstructedText, target: InstructedText) -> list[ScoredToken]:
        """The loss of each token of `target` behind the anchor of `text`; a longer one is cut as in training."""
        source, goal = self.tokenizer.rows([text, target])
        ids = target_ids(goal)
        losses = score_targets(self.objective, embed_rows(self.objective, [source]), [ids]).terms.tolist()
        return [ScoredToken(*pair) for pair in zip(self._pieces(ids), losses, strict=True)]

    def _pieces(self, ids: list[int]) -> list[str]:
        """What each token adds to the text; a letter of several tokens comes with its last one."""
        pieces, length = [], 0
        for i in range(len(ids)):
            text = str(self.tokenizer.tokenizer.decode(ids[: i + 1]))
            unfinished = text.endswith("\N{REPLACEMENT CHARACTER}") and i < len(ids) - 1
            pieces.append("" if unfinished else text[length:])
            length = length if unfinished else len(text)
        return pieces


def load_reconstructor(model: ModelChoice, device: str | torch.device | None = None) -> Reconstructor:
    """Load a checkpoint with its head: a Stage I folder, or adapters, merged, on one; to a CUDA device, if there is
    one.

    A `UserError` where it has no settings or no head, or was trained to another objective; or does not load, or not
    onto the device.
    """
    chain = open_chain(model.base, model.adapters)
    outermost = chain.outermost
    if not outermost.settings:
        raise UserError(f"{outermost.path}: there is no {SETTINGS_FILE}, so how its anchors are made is not known.")
    # What an anchor stands for was learnt in Stage I: in the base, or in an adapter on it.
    of_stage_one = [f for f in chain.folders if f.run.get("config", {}).get("stage") == "stage_I"]
    learnt_in = of_stage_one[-1] if of_stage_one else chain.folders[0]
    trained = learnt_in.run.get("config", {})
    if trained.get("objective") == "token_set" or trained.get("target_loss") == "bag":
        raise UserError(f"{learnt_in.path}: trained to token sets (target_loss 'bag'), which are not decoded.")
    tokenizer = load_tokenizer(chain.tokenizer_folder)
    settings = with_template(EncoderSettings(**outermost.settings), tokenizer)
    rows = row_tokenizer(tokenizer, settings, reconstruct_instruction=trained.get("reconstruct_instruction", False))
    check_rendering(outermost.path, outermost.run.get("probe_ids"), rows)
    place = device or default_device()
    loaded = _on_device(chain, model, place)
    learnt = {key: trained[key] for key in ("target", "projection", "bottleneck") if key in trained}
    is_frozen, has_bos = trained.get("decoder") == "frozen", trained.get("decoder_bos")
    learnt |= {"decoder_bos": is_frozen if has_bos is None else has_bos, "bos_id": tokenizer.bos_token_id}
    objective = BidirectionalReconstruction(loaded, settings, **learnt)
    read_beside(Path(learnt_in.path), weights_beside(objective), unread="imitation")
    if is_frozen:
        parent = learnt_in.run["parent"]
        try:
            decoding = _on_device(open_chain(parent["model_name_or_path"], parent["adapters"]), model, place)
        except UserError as error:
            raise UserError(f"{learnt_in.path}: it is decoded by what it was trained from, and {error}") from error
        objective.copies, objective.frozen = (decoding.eval(),), True  # the same mode
    check_decoder(objective.decoder, settings.attention)
    check_attention(objective.decoder, "causal")  # of the pass that decodes
    check_head(loaded)
    return Reconstructor(objective, rows)


def _on_device(chain: Chain, model: ModelChoice, place: str | torch.device) -> Any:
    """A chain's model with its head."""
    loaded: Any = load_backbone(chain, dtype=model.torch_dtype, with_lm_head=True)
    refused = (RuntimeError, AssertionError)  # no such device, none of this torch, or too small a one
    with in_one_sentence(lambda why: f"device is {str(place)!r}, where the model cannot be put: {why}", refused):
        loaded.to(place)
    # Of the folder's habits of generating, only its ends: `generate` would fill in its temperature and penalties.
    loaded.generation_config = GenerationConfig(eos_token_id=loaded.generation_config.eos_token_id)
    return loaded


def text_of_side(side: TextSide, text: str, instruction: str = "") -> InstructedText:
    """A text as a row of its side; the instruction is the queries'."""
    return InstructedText(instruction if side == "query" else "", text, side)


def target_ids(row: Row) -> list[int]:
    """The tokens of a row that are reconstructed."""
    return [token for token, wanted in zip(row.ids, row.target, strict=True) if wanted]


def embed_rows(objective: BidirectionalReconstruction, rows: Sequence[Row]) -> Tensor:
    """Anchors [B, K, D] of tokenised texts, where the model is and in its dtype; one pass."""
    device = next(objective.decoder.get_input_embeddings().parameters()).device
    side = send_to_device(pack_rows(rows), device)
    return objective.encode({"text": side})["text"]


def score_targets(
    objective: BidirectionalReconstruction, anchor: Tensor, targets: Sequence[Sequence[int]]
) -> CrossEntropy:
    """Loss and hit of each target token, row after row, as the training step computes them; one pass.

    `anchor` is one a row, [B, K, D] or [B, D]; `targets` are the token ids of each row.
    """
    target_N = torch.tensor([token for ids in targets for token in ids], device=anchor.device)
    states_ND = objective.decode(anchor, objective.token_embeddings(target_N), [len(ids) for ids in targets])
    ones_N = torch.ones_like(target_N, dtype=torch.float32)
    return objective.head.cross_entropy(states_ND, target_N, ones_N)
