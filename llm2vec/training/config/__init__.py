"""One run = one flat JSON file. Here stands what each of its keys may say.

A key is one of ours, a field of `Config`, or one of transformers' TrainingArguments. A new key is a new field: type and
default as Python writes them, what it means below it, and all else in a `Key` beside the type: range, the stages that
read it, whether a run's result depends on it, whether a model card shows it. The loader, `resume`, the model card,
`llm2vec schema` and the documentation take it from there.

`file` reads a file; `rules` says which keys contradict each other.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from transformers import TrainingArguments

from llm2vec.text.templates import TEMPLATE_NAME
from llm2vec.types import (
    POOLING_ALIASES,
    AnchorProjection,
    AttnImplementation,
    Bottleneck,
    DecoderWeights,
    Direction,
    DtypeName,
    Hardened,
    LoraInit,
    MarginKind,
    MaskingScheme,
    MaskTokenType,
    Partition,
    QuantisedBase,
    ReconstructionTarget,
    Reduction,
    Stage,
    SymmetricInstructions,
    TargetLoss,
    Trainable,
)

#: Stages that train a LoRA adapter unless told otherwise.
LORA_STAGES: tuple[Stage, ...] = ("stage_II", "simcse", "mntp")

#: What `dataset_name` says where it is no hub dataset.
DATASET_NAMES = ("E5", "Wiki1M")


@dataclass(frozen=True)
class Key:
    """What is known of a key beside its type, its default and its meaning.

    Example:
        >>> KEYS["alpha"].stages, KEYS["alpha"].range
        (('stage_I',), 'it must lie between 0 and 1')
    """

    at_least: int | None = None
    above: int | None = None
    at_most: int | None = None
    below: int | None = None
    """The range of a number. `above` and `below` are outside of it."""
    choices: tuple[str, ...] = ()
    """What a string may be, where the type does not say it."""
    pattern: str = ""
    """What a string looks like, for editors; whoever reads it says what is wrong."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """Who reads the key. Elsewhere it would be ignored, so it is refused."""
    influence: Literal["result", "rounding", "nothing"] = "result"
    """What depends on it. `result`: with another value it is another run, so its checkpoints are refused. `rounding`:
    how a step is computed, not what, so another value is said. `nothing`: no step depends on it."""
    on_card: bool = False
    """Whether a model card shows it."""
    is_path: bool = False
    """Whether its strings name files or folders."""
    refused: str | None = None
    """Why the trainer does not serve it. Nothing but its default may be written."""

    @property
    def range(self) -> str:
        """What a number must be, to end a sentence with."""
        match (self.above, self.at_least, self.at_most, self.below):
            case (above, None, None, None):
                return f"it must be above {above}"
            case (above, None, at_most, None):
                return f"it must be above {above} and at most {at_most}"
            case (None, at_least, None, None):
                return f"{at_least} or more is needed"
            case (None, at_least, at_most, None):
                return f"it must lie between {at_least} and {at_most}"
            case (_, at_least, _, below):
                return f"it must lie in [{at_least}, {below})"


@dataclass(frozen=True)
class Config:
    """The keys that are ours. `docs/fidelity.md` says what each default follows.

    Example:
        >>> config = load_config("train_configs/quickstart/stage_I.json", "stage_I")
        >>> config.alpha, config.training["learning_rate"]
        (0.2, 0.002)
    """

    # --- what is trained ---
    model_name_or_path: Annotated[str, Key(is_path=True)]
    """Base model: a folder, such as an earlier stage's `output_dir`, or a hub name."""
    peft_model_name_or_path: Annotated[str | list[str] | None, Key(is_path=True)] = None
    """Adapters to merge into the base first, innermost first."""
    use_peft: bool | None = None
    """LoRA instead of all parameters. null = on in Stage II, SimCSE and MNTP, off elsewhere; Stage I has
    `trainable`."""
    lora_r: Annotated[int, Key(above=0, at_most=100_000, on_card=True)] = 16
    """Rank of the adapter."""
    lora_alpha: Annotated[int | None, Key(above=0, on_card=True)] = None
    """Scale of the adapter. null = twice the rank."""
    lora_dropout: Annotated[float, Key(at_least=0, below=1)] = 0.05
    """Dropout before the adapter, in training."""
    lora_modules: list[str] | None = None
    """Modules that get an adapter. null = the seven projections of a layer."""
    use_dora: Annotated[bool, Key(on_card=True)] = False
    """DoRA: the adapter turns each output's weights, and their length is learnt apart."""
    use_rslora: Annotated[bool, Key(on_card=True)] = False
    """rsLoRA: the adapter is scaled by lora_alpha / sqrt(lora_r) in place of lora_alpha / lora_r."""
    init_lora_weights: LoraInit | None = None
    """How the adapter begins, in peft's words. null = peft's default. Each begins without effect."""
    load_in: Annotated[QuantisedBase | None, Key(on_card=True)] = None
    """The frozen base in 8 or 4 bits, by bitsandbytes, on an NVIDIA GPU. null = as `torch_dtype` says."""
    torch_dtype: Annotated[DtypeName | None, Key(on_card=True)] = None
    """Type of the weights. null = float32. `bfloat16` without `bf16` is the release's pure bfloat16."""
    attn_implementation: Annotated[AttnImplementation, Key(influence="rounding")] = "sdpa"
    """How attention is computed. A name with a slash is FlashAttention from the hub, for packed texts on CUDA too."""
    fused_layers: Annotated[Literal["auto", "off"], Key(influence="rounding")] = "auto"
    """`auto`: on an NVIDIA GPU, norms, rotary positions and gated products run as one kernel each. `off`: not so."""

    # --- the objective ---
    objective: Annotated[str, Key(stages=("stage_I",), on_card=True)] = "reconstruction"
    """What a vector must tell: a text (`reconstruction`), or another name of `objectives/stage_one.py`."""
    target: Annotated[ReconstructionTarget, Key(stages=("stage_I",), on_card=True)] = "counterpart"
    """Whose text: the `counterpart` of its text, the text itself (`self`), `both`, or what follows behind a cut
    (`next`)."""
    target_loss: Annotated[TargetLoss, Key(stages=("stage_I",), on_card=True)] = "ce"
    """How it tells it: token by token (`ce`); what the frozen base expects at each token (`kl`); or all tokens at once,
    in no order and without a decoder (`bag`)."""
    bottleneck: Annotated[Bottleneck, Key(stages=("stage_I",), on_card=True)] = "vector"
    """What the decoder gets of a text: its `vector`, or the `states` of all pooled tokens of a template that ends in a
    block of them."""
    decoder: Annotated[DecoderWeights, Key(stages=("stage_I",), on_card=True)] = "shared"
    """Whose weights decode: those in training (`shared`), or those that the run starts from (`frozen`)."""
    decoder_bos: Annotated[bool | None, Key(stages=("stage_I",), on_card=True)] = None
    """Whether a BOS stands before what the decoder gets of a text. null = where the decoder is frozen."""
    trainable: Annotated[Trainable, Key(stages=("stage_I",), on_card=True)] = "full"
    """All parameters (`full`), an adapter (`lora`), or the template's added tokens alone (`tokens`)."""
    projection: Annotated[AnchorProjection, Key(stages=("stage_I",), on_card=True)] = "none"
    """What an anchor becomes before it is decoded: itself (`none`, the paper), at the length of an embedding
    (`scaled`), or by a learnt map that Stage II drops (`linear`)."""
    alpha: Annotated[float, Key(at_least=0, at_most=1, stages=("stage_I",), on_card=True)] = 0.2
    """Weight of EBQ2D, or of what starts at the query under another target. 0 and 1 skip the unused pass."""
    imitation_weight: Annotated[float, Key(at_least=0, stages=("stage_I",), on_card=True)] = 0.0
    """Weight of the mean squared difference of a text's mean state, behind `projection` and a learnt map, and the
    vector that `teacher_vectors` has of the text to tell."""
    reconstruct_instruction: Annotated[bool, Key(stages=("stage_I",))] = False
    """Whether a query's instruction is a reconstruction target too."""
    reduction: Reduction = "token_mean"
    """Mean over all tokens of the optimiser step, or the release's mean of micro-batches."""
    loss_scale: Annotated[float, Key(above=0, stages=("stage_II", "simcse"), on_card=True)] = 20.0
    """1 / temperature of the contrastive loss."""
    num_hard_negatives: Annotated[int, Key(at_least=0, stages=("stage_II",), on_card=True)] = 1
    """Hard negatives of a row."""
    matryoshka_dims: Annotated[list[int] | None, Key(stages=("stage_II", "simcse"))] = None
    """The contrastive loss is the mean over the vectors cut to these sizes. null = not cut."""
    mask_false_negatives: Annotated[bool, Key(stages=("stage_II", "simcse"))] = False
    """A document of the pool that has the text of a query's positive is no negative of it."""
    mask_known_positives: Annotated[bool, Key(stages=("stage_II",))] = False
    """Nor is another positive of the same query: one that a row of the batch has for it, or that its own row lists.
    Masks copies of the positive too."""
    guide: Annotated[str | None, Key(stages=("stage_II",), is_path=True)] = None
    """What tells a false negative by its score: the model in training (`self`), or the folder of a stronger model's
    vectors (`llm2vec encode CONFIG FOLDER`). null = nothing does."""
    guide_margin: Annotated[float, Key(stages=("stage_II",))] = 0.0
    """A negative whose cosine with the query is above the positive's less this is false. Below 0 it must be better."""
    guide_margin_kind: Annotated[MarginKind, Key(stages=("stage_II",))] = "absolute"
    """Whether `guide_margin` is a cosine, or a share of the positive's (`relative`)."""
    directions: Annotated[list[Direction] | None, Key(stages=("stage_II",))] = None
    """What is compared: queries with documents (`qd`, always), queries with one another (`qq`), positives with queries
    (`dq`), positives with other rows' documents (`dd`). null = `qd`."""
    partition: Annotated[Partition, Key(stages=("stage_II",))] = "joint"
    """One softmax over all directions, or the mean of one each (`per_direction`, of `qd` and `dq`)."""
    positive_margin: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Taken off the positive's cosine."""
    hardness_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """A query's negatives weigh more the nearer they are: so many times their cosine is added to their logits, without
    gradient."""
    hardness_of: Annotated[Hardened, Key(stages=("stage_II",))] = "hard_negatives"
    """Which negatives `hardness_weight` concerns; `hard_negatives` are those of the query's own row."""
    contrastive_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 1.0
    """Weight of the contrastive loss beside the terms below."""
    cosent_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of CoSENT: all pairs of a query and a document of its row are ordered by cosine as by their scores
    (`pos_score`, `neg_scores`)."""
    gor_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of the spread-out term: the mean squared cosine of queries, and of documents, beyond random ones'."""
    gor_mean_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of the squared mean of the same cosines."""
    teacher_vectors: Annotated[str | None, Key(stages=("stage_II", "stage_I"), is_path=True)] = None
    """Folder of a teacher's vectors of the rows' texts (`llm2vec encode CONFIG FOLDER`). null = no teacher."""
    teacher_cosine_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 1.0
    """Weight of 1 - cos of each text's vector and the teacher's."""
    teacher_mse_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of the mean squared difference of the two, as unit vectors."""
    teacher_similarity_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of the term that imitates the teacher's cosines of a query with its row's own documents."""
    teacher_projection: Annotated[bool, Key(stages=("stage_II",))] = False
    """A learnt map from the model's vectors to the teacher's. It is saved beside the model, and dropped in use."""
    own_negatives_only: Annotated[list[str] | None, Key(stages=("stage_II",))] = None
    """Sources whose queries are compared with their own row's documents only. null = no source."""
    distillation_weight: Annotated[float, Key(at_least=0, stages=("stage_II",))] = 0.0
    """Weight of the term that imitates a teacher's scores of a row's own documents (`pos_score`, `neg_scores`)."""
    lm_weight: Annotated[float, Key(at_least=0, stages=("stage_II", "stage_I"))] = 0.0
    """Weight of a causal language-modelling loss on the rows' own texts, beside the stage's own."""
    simcse_dropout: Annotated[float, Key(at_least=0, below=1, stages=("simcse",))] = 0.3
    """Attention dropout of the base."""
    mask_token_type: Annotated[MaskTokenType, Key(stages=("mntp",))] = "blank"
    """What masks where the tokenizer has no mask token: `blank` (the token `_`), `eos`, or `mask` (a new token)."""
    mlm_probability: Annotated[float, Key(above=0, at_most=1, stages=("mntp",))] = 0.2
    """How likely a token is chosen to be predicted."""
    data_collator_type: Annotated[MaskingScheme, Key(stages=("mntp",))] = "default"
    """`default`: of the chosen tokens 80 % are masked, 10 % made random, 10 % kept. `all_mask`: all are masked."""
    loss_class: Literal["HardNegativeNLLLoss"] = "HardNegativeNLLLoss"
    """Upstream's name of the contrastive loss."""

    # --- from a text to its vector ---
    template: Annotated[str | None, Key(pattern=TEMPLATE_NAME, on_card=True)] = None
    """What stands around a text: a row of `text/templates.py`, with `+memory_8` eight added tokens behind it. null =
    inferred from the tokenizer. Its special tokens are added to a base without."""
    pooling_mode: Annotated[str, Key(choices=tuple(POOLING_ALIASES), on_card=True)] = "last"
    """How the tokens' states become a vector. MNTP pools nothing, and hands `mean` on where none is named."""
    bidirectional: Annotated[bool, Key(on_card=True)] = False
    """Whether tokens of the embedding pass see later ones too. Always on in MNTP."""
    instruction_join: Annotated[str, Key(on_card=True)] = "; "
    """What stands between instruction and text, in templates that leave it open. Evaluation takes it over."""
    skip_instruction: bool = True
    """Leave the instruction out of mean pooling."""
    symmetric_instructions: SymmetricInstructions = "documented"
    """`documented`: documents get Table 6's symmetric instructions too. `as_released`: queries alone."""
    max_seq_length: Annotated[int, Key(above=0, on_card=True)] = 512
    """Most tokens of a row, template included. Only the text is cut."""
    doc_max_length: Annotated[int | None, Key(above=0)] = None
    """Most tokens of the text alone. null = as many as fit."""
    examples_per_query: Annotated[int, Key(at_least=0, stages=("stage_II",))] = 0
    """Most few-shot examples before a query. They are rows of its micro-batch, and their number is drawn from 0 up."""

    # --- the rows ---
    dataset_name: str = "E5"
    """`E5`: the archive's 14 sources. `Wiki1M`: a sentence a line, for SimCSE. MNTP: or a hub dataset with `text`."""
    dataset_config_name: Annotated[str | None, Key(stages=("mntp",))] = None
    """Which of a hub dataset's configurations."""
    dataset_file_path: Annotated[str | None, Key(is_path=True)] = None
    """Folder of the sources' files. SimCSE and MNTP also take a `.txt` file with a text a line, MNTP a `.jsonl` file of
    objects with `text`."""
    sources: list[str] | None = None
    """Which sources to read. null = all of the table."""
    sources_file: Annotated[str | None, Key(is_path=True)] = None
    """A JSON table of your own sources in place of the released archive's."""
    max_train_samples: Annotated[int | None, Key(above=0)] = None
    """Most rows of each source. null = all."""
    source_temperature: Annotated[float, Key(at_least=1)] = 1.0
    """How the sources are mixed: an epoch takes of each a share that grows with its rows to the power of 1 / this. 1 =
    by size, more = more of the small ones, again and again. A source's `weight` is a factor beside it."""
    one_source_per: Literal["step", "micro_batch"] = "step"
    """Which rows share a source: those of an optimiser step, or those that all processes hold at once (the release)."""

    # --- the step ---
    total_batch_size: Annotated[int | None, Key(above=0, on_card=True)] = None
    """Rows of an optimiser step over all processes; the accumulation follows. null = what transformers' keys give."""
    tokens_per_microbatch: Annotated[int | None, Key(above=0, influence="rounding")] = None
    """Most tokens that a process runs at once. Its rows of a step are cut into as many passes, and contrastive
    gradients are cached over them. null = not cut."""
    activation_memory_gb: Annotated[float | None, Key(above=0, influence="rounding")] = None
    """Most activations that a pass keeps, in 10^9 bytes. Layers are recomputed to stay below. null = no bound."""
    stop_after_n_steps: Annotated[int | None, Key(above=0, influence="nothing", on_card=True)] = None
    """End here, though the schedule's horizon (`num_train_epochs`, `max_steps`) lies further. null = go that far."""
    max_skipped_steps: Annotated[int, Key(above=0, influence="nothing")] = 5
    """A step whose loss or gradient is not finite is skipped. So many in a row end the run."""

    # --- what is measured, where eval_strategy is set ---
    num_eval_rows: Annotated[int, Key(at_least=0)] = 0
    """Rows at each source's end, never trained on. Their losses are logged as `eval_...`; SimCSE's tell nothing."""
    embedding_diagnostics: Annotated[bool, Key(stages=("stage_II", "stage_I", "lm", "simcse"))] = False
    """Log alignment, uniformity, effective rank and cosines of held-out rows' vectors, by source too. Histograms go to
    `diagnostics.jsonl`."""
    reconstruction_probe: Annotated[bool, Key(stages=("stage_I",))] = False
    """Log how well held-out rows are reconstructed from their own anchors, from another row's, and from random ones."""
    nano_beir: Annotated[str | None, Key(is_path=True)] = None
    """Hub name or folder of NanoBEIR, such as `sentence-transformers/NanoBEIR-en`. nDCG@10 on its 13 sets is logged as
    `eval_nano_...`."""

    # --- the run ---
    resume: Annotated[str, Key(influence="nothing", is_path=True)] = "auto"
    """`auto`: from the newest whole checkpoint in the output folder. `never`: from step 0. Or a checkpoint's folder."""
    experiment_id: Annotated[str | None, Key(influence="nothing", is_path=True)] = None
    """A folder below `output_dir` to write to."""
    stage: Stage | None = dataclasses.field(default=None, compare=False)
    """Whose script reads the config. A file need not say; in Python it is needed."""
    training: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The TrainingArguments keys, as written. No key of a file; in Python, `training={"output_dir": "output/mine"}`."""

    @property
    def output_dir(self) -> Path:
        """Where the run writes: `output_dir` as given, or the experiment's folder below it."""
        # As TrainingArguments reads it, so that `~` is one place for all.
        return Path(os.path.expanduser(self.training["output_dir"]), self.experiment_id or "")  # noqa: PTH111

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of torch's activation checkpointing where it is on, else None."""
        names = ("gradient_checkpointing", "activation_checkpointing")  # transformers' older name and today's
        if not any(self.training.get(name) for name in names):
            return None
        given: dict[str, Any] = next(filter(None, (self.training.get(f"{name}_kwargs") for name in names)), {})
        return {"use_reentrant": False} | given

    @property
    def compilation(self) -> dict[str, Any] | None:
        """Arguments of torch.compile where it is on, else None."""
        if not self.training.get("torch_compile"):
            return None
        backend = self.training.get("torch_compile_backend") or "inductor"
        return {"backend": backend, "mode": self.training.get("torch_compile_mode")}

    @property
    def hub_dataset(self) -> str | None:
        """The hub dataset whose texts are read, if any."""
        return None if self.dataset_name in DATASET_NAMES else self.dataset_name

    @property
    def adapters(self) -> list[str]:
        """Adapters to merge into the base, as a list."""
        given = self.peft_model_name_or_path
        return [given] if isinstance(given, str) else list(given or ())


#: Recomputing activations and compiling: done where the model is loaded, as the trainer sees the objective alone.
DONE_AT_LOADING = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs", "torch_compile", "torch_compile_backend", "torch_compile_mode",
)  # fmt: skip

#: What is known of transformers' keys, where it is more than their type.
LIBRARY_KEYS: dict[str, Key] = {
    "output_dir": Key(influence="nothing", is_path=True),
    "seed": Key(at_least=0, at_most=2**32 - 1, on_card=True),
    "learning_rate": Key(at_least=0, on_card=True),
    "weight_decay": Key(at_least=0),
    "per_device_train_batch_size": Key(above=0, on_card=True),
    "gradient_accumulation_steps": Key(above=0),
    **dict.fromkeys(("lr_scheduler_type", "warmup_steps", "max_steps", "num_train_epochs", "bf16"), Key(on_card=True)),
    **dict.fromkeys(DONE_AT_LOADING, Key(influence="rounding")),
    # Where output goes, what is logged and saved, how rows are fetched.
    **dict.fromkeys((
        "run_name", "report_to", "project", "trackio_space_id", "disable_tqdm", "log_level",
        "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step", "logging_steps",
        "logging_nan_inf_filter", "save_strategy", "save_steps", "save_total_limit", "save_only_model",
        "save_on_each_node", "dataloader_persistent_workers",
        "dataloader_pin_memory", "dataloader_num_workers", "ddp_timeout", "skip_memory_metrics", "debug",
    ), Key(influence="nothing")),
    "dataloader_prefetch_factor": Key(above=0, influence="nothing"),
    # What would be ignored, or would break the run.
    "data_seed": Key(refused="rows come in the order of `seed`"),
    "train_sampling_strategy": Key(refused="rows come in one-source blocks, in the order of `seed`"),
    "label_smoothing_factor": Key(refused="the losses are the objectives' own"),
    "neftune_noise_alpha": Key(refused="the objectives add no noise to embeddings"),
    "use_liger_kernel": Key(refused="models run by transformers' own code"),
    "auto_find_batch_size": Key(refused="the batch is a query's negatives; `tokens_per_microbatch` bounds the memory"),
    "accelerator_config": Key(refused="it would share rows out otherwise than in one-source blocks"),
    "deepspeed": Key(refused="`fsdp` shares the weights out"),
    "parallelism_config": Key(refused="`fsdp` shares the weights out"),
    "ignore_data_skip": Key(refused="a run that goes on would train on rows that it has seen"),
    "push_to_hub": Key(refused="`llm2vec export` uploads what was trained"),
    "hub_token": Key(
        influence="nothing", refused="a config is written to every checkpoint, so HF_TOKEN or `hf auth login` has it"
    ),
    "enable_jit_checkpoint": Key(
        influence="nothing", refused="SIGTERM saves and ends every run already, with all processes at one step"
    ),
}  # fmt: skip


def _known_keys() -> dict[str, Key]:
    hints = get_type_hints(Config, include_extras=True)
    del hints["training"]
    beside = {name: getattr(hint, "__metadata__", (Key(),))[0] for name, hint in hints.items()}
    return beside | {f.name: LIBRARY_KEYS.get(f.name, Key()) for f in dataclasses.fields(TrainingArguments)}


#: Every key of a config: ours, in the order of `Config`, then transformers'.
KEYS: dict[str, Key] = _known_keys()
