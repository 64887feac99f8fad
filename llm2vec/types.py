"""The words the whole package speaks: texts, rows, batches, modes, and what an objective promises.

Nothing here imports anything else of the package. Shapes are written as suffixes: B rows, T tokens, D hidden
size, V vocabulary, N documents of a gathered pool.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, NamedTuple, NotRequired, Protocol, TypeAlias, TypedDict, get_args

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from torch.nn import Parameter
    from transformers import PreTrainedModel

#: The stages of training.
Stage = Literal["stage_I", "stage_II", "lm", "simcse", "mntp"]
#: How a mean leaves the instruction out: by where the text stands, or by a count from the end (upstream's rule).
InstructionMask = Literal["offsets", "counted"]

PoolingMode = Literal["last", "mean", "weighted_mean", "first"]
Attention = Literal["causal", "bidirectional"]
AttnImplementation = Literal[
    "eager", "sdpa", "flash_attention_2",
    "kernels-community/flash-attn2", "kernels-community/flash-attn3", "kernels-community/flash-attn4",
]  # fmt: skip
DtypeName = Literal["auto", "bfloat16", "float16", "float32"]
VectorDtype = Literal["float32", "float16"]
Reduction = Literal["token_mean", "micro_batch_mean"]
SymmetricInstructions = Literal["documented", "as_released"]
TextSide = Literal["query", "document"]
#: Of the numbers of a vector, in sentence-transformers' words.
Precision = Literal["float32", "int8", "uint8", "binary", "ubinary"]
#: What is embedded: one text, or texts and [instruction, text] pairs.
Texts: TypeAlias = "str | Iterable[str | Sequence[str | None]]"
ReconstructionTarget = Literal["counterpart", "self", "both", "next"]
Bottleneck = Literal["vector", "states"]
TargetLoss = Literal["ce", "kl", "bag"]
Trainable = Literal["full", "lora", "tokens"]
#: Of LoRA's two matrices, in peft's words. Those that would change the base's own weights are not here.
LoraInit = Literal["gaussian", "orthogonal"]
#: A frozen base in whole numbers, by bitsandbytes.
QuantisedBase = Literal["8bit", "4bit"]
MergeKind = Literal["mean", "slerp"]
DecoderWeights = Literal["shared", "frozen"]
#: What a pass is for: all of it is trained; only what goes into it is; or nothing is, and nothing is kept.
PassKind = Literal["trained", "frozen", "read"]
AnchorProjection = Literal["none", "scaled", "linear"]
#: What Stage II compares with what: of a query (`q`) and a document (`d`) one each.
Direction = Literal["qd", "dq", "qq", "dd"]
Partition = Literal["joint", "per_direction"]
Hardened = Literal["hard_negatives", "in_batch_negatives", "all_negatives"]
MarginKind = Literal["absolute", "relative"]
MaskTokenType = Literal["blank", "eos", "mask"]
MaskingScheme = Literal["default", "all_mask"]

#: About how many characters a token stands for, where nothing is counted: to guess which texts are long.
CHARACTERS_A_TOKEN = 4

#: Spellings of the released configs and of upstream LLM2Vec, and the mode each one means.
POOLING_ALIASES: dict[str, PoolingMode] = {
    **{mode: mode for mode in get_args(PoolingMode)},
    "eos_token": "last",
    "last_token": "last",
    "bos_token": "first",
}


class UserError(ValueError):
    """Something a user wrote is wrong; the message is one sentence that says what and how to mend it."""


class RunEnds(Exception):
    """A run is over before its last step, or has nothing left to do; the message says why and how to go on.

    `code` is the process's exit code (0 = all is well, 1 = something broke), `is_done` whether all of it was done
    before.
    """

    def __init__(self, message: str, code: int, is_done: bool = False) -> None:
        super().__init__(message)
        self.code = code
        self.is_done = is_done


class Demonstration(NamedTuple):
    """A worked example that stands before a query: another query and its answer."""

    instruction: str
    query: str
    answer: str


class InstructedText(NamedTuple):
    """A text and how it is read."""

    instruction: str  #: what it is read under; empty means none
    text: str  #: the text
    side: TextSide = "query"  #: which of a template's two forms it takes; a template with one form does not ask
    #: few-shot examples before it, in the templates that have a place for them
    examples: tuple[Demonstration, ...] = ()


class Example(NamedTuple):
    """One training row."""

    source: str  #: where it is from
    query: InstructedText  #: what is asked
    positive: InstructedText  #: what answers it
    negatives: tuple[InstructedText, ...]  #: hard negatives; every row of a source has as many
    #: a teacher's scores of the positive and of each negative; empty = there is no teacher
    scores: tuple[float, ...] = ()
    others: tuple[InstructedText, ...] = ()  #: further positives of the query, one of which another epoch may draw
    draw: int = 0  #: which row it is, and in which epoch, as one number; decides what is drawn anew in each epoch


class TokenBatch(TypedDict):
    """One tokenised side of a batch, packed: text after text, nothing between them."""

    input_ids: Tensor  #: [N] ids of all texts
    lengths: list[int]  #: tokens of each text
    pool_mask: Tensor  #: [N] positions that pooling reads
    target_mask: Tensor  #: [N] positions that are reconstructed
    num_targets: list[int]  #: marked positions of each text in `target_mask`
    num_predicted: list[int]  #: those of them that have a token before them in their text
    num_different: list[int]  #: different tokens at them
    num_context: list[int]  #: tokens of each text up to its last marked position; all of them where none is marked
    prefix: int  #: number of tokens that all texts begin with and none is pooled over
    closed: bool  #: whether every text's last token is pooled over
    facts: NotRequired[dict[str, Tensor]]  #: what else an objective knows of each text, by name, [texts, ...]
    #: [N] what is to be predicted at each position, where that is not the token that stands there
    labels: NotRequired[Tensor]


#: What the collator yields: a TokenBatch for each side, such as "query", "positive" and (Stage II) "negative".
Batch: TypeAlias = dict[str, TokenBatch]

#: What an objective knows of the texts of each side beside their vectors, by name, [texts, ...].
TextFacts: TypeAlias = "dict[str, dict[str, Tensor]]"


class Pass(NamedTuple):
    """Texts that run through the decoder together."""

    lengths: tuple[int, ...]  #: tokens of each text
    attention: Attention  #: of each text within itself
    #: of each side, how many texts it has and how many tokens they all begin with
    prefixes: tuple[tuple[int, int], ...] = ()
    closing_only: bool = False  #: only the states of the texts' last tokens are read
    targets: int = 0  #: how many of the states are multiplied with the vocabulary
    kind: PassKind = "trained"  #: what of it is trained

    @property
    def tokens(self) -> int:
        """Of all texts."""
        return sum(self.lengths)

    @property
    def repeated(self) -> int:
        """Tokens that need not run where each shared prefix runs once."""
        return sum((number - 1) * prefix for number, prefix in self.prefixes)


class Output(NamedTuple):
    """What an objective makes of a batch."""

    #: `loss` and detached figures, each this batch's share of the step's (empty if all the loss lies between
    #: vectors)
    parts: dict[str, Tensor]
    #: for each side, an embedding a row, [rows, D]; what `contrast` compares (empty if nothing is)
    vectors: dict[str, Tensor]
    #: what else `contrast` needs to know of each side's rows; no gradient flows to it
    facts: TextFacts = {}  # noqa: RUF012  # an empty default that nobody writes to


class Objective(Protocol):
    """A `torch.nn.Module` that turns a batch into loss parts: `class Mine(nn.Module, Objective)`.

    The trainer divides nothing itself: it asks `count` how many terms each part of each batch holds, sums those over
    the whole optimiser step and all ranks, and hands the totals back. So a loss is a mean over the step however the
    step was cut: `forward` may be called with any of a batch's rows, and `contrast` sees the vectors of all of them.

    Attributes:
        contrasts: whether `forward` returns vectors for `contrast`.
        needs_head: whether `model` must have its language-model head.
        model: what is trained, registered once.
        copies: frozen models that run beside it; in a tuple, as what is registered would be trained and saved.
    """

    contrasts: bool = False
    needs_head: bool = True
    model: PreTrainedModel | PeftModel
    copies: tuple[PreTrainedModel, ...] = ()

    def passes(self, batch: Batch) -> tuple[Pass, ...]:
        """What `forward` runs through the decoder; of the batch only lengths and numbers of targets are read."""
        ...

    def count(self, batch: Batch) -> dict[str, Tensor]:
        """Number of loss terms (tokens, rows) this batch adds to each loss part, as float scalars."""
        ...

    def forward(self, batch: Batch, totals: dict[str, Tensor]) -> Output:
        """What stands in each row alone: its loss parts, and its vectors.

        Without totals no loss part is asked for, only what `contrast` needs.
        """
        ...

    def contrast(self, vectors: dict[str, Tensor], facts: TextFacts, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Loss parts between the vectors of all rows that the ranks hold at once; no model is run.

        Called only if the objective `contrasts`.
        """
        return {}

    if TYPE_CHECKING:  # what is used of torch.nn.Module

        def __call__(self, batch: Batch, totals: dict[str, Tensor]) -> Output: ...

        def parameters(self, recurse: bool = True) -> Iterator[Parameter]: ...


def first_line(error: BaseException) -> str:
    """The first line of an error's text, to go into one sentence of ours."""
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


@contextmanager
def in_one_sentence(
    sentence: Callable[[str], str], of: type[Exception] | tuple[type[Exception], ...] = Exception
) -> Iterator[None]:
    """Around what a library does: an error of its own becomes a `UserError`; one that is a `UserError` stays as it is.

        with in_one_sentence(lambda why: f"{path}: no tokenizer could be loaded ({why})."):
            tokenizer = AutoTokenizer.from_pretrained(path)

    Args:
        sentence: what is said, given the first line of the library's error; of an `OSError` alone, the system's words.
        of: the errors that are the user's affair; by default all, as many libraries raise a type for each damage.
    """
    try:
        yield
    except UserError:
        raise
    except of as error:
        system = error.strerror if of is OSError and isinstance(error, OSError) else None
        raise UserError(sentence(system or first_line(error))) from error


@contextmanager
def needs_extra(what: str, extra: str) -> Iterator[None]:
    """Around the import of a package of an extra; `what` needs which is said where it is not there."""
    with in_one_sentence(lambda _: f'{what}: pip install -e ".[{extra}]".', ImportError):
        yield


def lower_is_better(figure: str) -> bool:
    """Whether the best value of a logged figure is the lowest: of losses, and of what tells how far apart a pair is or
    how crowded vectors are."""
    return any(word in figure for word in ("loss", "alignment", "uniformity", "anisotropy"))
