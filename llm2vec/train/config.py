"""One run = one flat JSON file: the keys that are ours, and what they mean.

A key is one of ours (the fields of `Config`) or one of transformers' TrainingArguments (`training_arguments`).
`config_file` reads and checks a file.
"""

from __future__ import annotations

import importlib.util
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.training_args import ParallelMode

from llm2vec.types import (
    AttnImplementation,
    DtypeName,
    MaskingScheme,
    MaskTokenType,
    ReconstructionTarget,
    Reduction,
    Stage,
    SymmetricInstructions,
    UserError,
)

#: Stages that train a LoRA adapter unless told otherwise.
LORA_STAGES: tuple[Stage, ...] = ("stage_II", "simcse", "mntp")

#: What `dataset_name` says where it is no hub dataset.
DATASET_NAMES = ("E5", "Wiki1M")

#: Recomputing activations, under transformers' old and new name.
CHECKPOINTING_KEYS = (
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "activation_checkpointing",
    "activation_checkpointing_kwargs",
)  # fmt: skip

#: Compiling, which is done layer by layer where the model is loaded, not over the whole objective.
COMPILE_KEYS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")

#: Keys that only some stages read; elsewhere they would be ignored, so they are refused.
STAGE_KEYS: dict[str, tuple[Stage, ...]] = {
    "objective": ("stage_I",),
    "target": ("stage_I",),
    "alpha": ("stage_I",),
    "reconstruct_instruction": ("stage_I",),
    "reconstruction_probe": ("stage_I",),
    "loss_scale": ("stage_II", "simcse"),
    "num_hard_negatives": ("stage_II",),
    "examples_per_query": ("stage_II",),
    "matryoshka_dims": ("stage_II", "simcse"),
    "mask_false_negatives": ("stage_II", "simcse"),
    "own_negatives_only": ("stage_II",),
    "distillation_weight": ("stage_II",),
    "lm_weight": ("stage_II",),
    "dataset_config_name": ("mntp",),
    "mask_token_type": ("mntp",),
    "mlm_probability": ("mntp",),
    "data_collator_type": ("mntp",),
    "simcse_dropout": ("simcse",),
    "embedding_diagnostics": ("stage_II", "stage_I", "lm", "simcse"),
}


@dataclass(frozen=True)
class Config:
    """The keys that are ours. What each default follows is in docs/fidelity.md.

    Attributes:
        model_name_or_path: base model: a folder (such as an earlier stage's `output_dir`) or a hub name.
        peft_model_name_or_path: adapters to merge into the base first, innermost first.
        bidirectional: attention of the embedding pass; always on in MNTP.
        pooling_mode: `last` (`eos_token`, `last_token`), `mean`, `weighted_mean`, `first` (`bos_token`). MNTP, which
            pools nothing, hands `mean` on where none is named.
        template: key of `templates.TEMPLATES`; None = inferred from the tokenizer, and said. The special tokens that
            it adds are given to a base that lacks them.
        instruction_join: between instruction and text, in the templates that leave it open; stored in the
            checkpoint, so evaluation uses the same.
        skip_instruction: leave the instruction out of mean pooling.
        max_seq_length: most tokens of a row, template included; only the text is cut.
        doc_max_length: most tokens of the text alone; None = as many as fit.
        torch_dtype: of the weights; None = float32. `bfloat16` without `bf16` is the release's pure bfloat16.
        attn_implementation: `eager`, `sdpa`, `flash_attention_2`.
        use_peft: LoRA instead of all parameters; None = on in Stage II, SimCSE and MNTP, off elsewhere.
        lora_r: rank.
        lora_alpha: scale; None = twice the rank.
        lora_dropout: dropout before the adapter.
        lora_modules: modules that get an adapter; None = the seven projections of a layer.
        dataset_name: "E5", the released archive's 14 sources; or "Wiki1M", a sentence a line, for SimCSE; or for
            MNTP a hub dataset with a column `text`.
        dataset_config_name: which of a hub dataset's configurations (MNTP).
        dataset_file_path: folder with the sources' files; for SimCSE also a `.txt` file; for MNTP also a `.txt` file,
            a text a line, or a `.jsonl` file of objects with `text`.
        sources: which sources to read; None = all of the table.
        sources_file: a JSON table of one's own sources in place of the released archive's.
        max_train_samples: most rows of each source; None = all.
        num_eval_rows: rows at the end of each source's file that are never trained on; with `eval_strategy`, the
            objective's figures on them are logged as `eval_...`.
        nano_beir: hub name or local folder of NanoBEIR (`sentence-transformers/NanoBEIR-en`); with `eval_strategy`,
            nDCG@10 on its 13 sets is logged as `eval_nano_...`; None = not.
        embedding_diagnostics: with `eval_strategy`, log alignment, uniformity, effective rank and cosines of the
            held-out rows' vectors as `eval_...`, by source too, and their histograms in `diagnostics.jsonl`.
        reconstruction_probe: with `eval_strategy`, log loss and token accuracy of the held-out rows' reconstructions
            as `eval_reconstruction_...`: from their own anchors, from another row's and from random ones (Stage I).
        num_hard_negatives: hard negatives a row (Stage II).
        examples_per_query: most few-shot examples before a query, other rows of its micro-batch (Stage II); how many
            is drawn for each query, from 0 up.
        symmetric_instructions: `documented` puts Table 6's symmetric instructions on documents too, `as_released`
            on queries only.
        objective: of Stage I: `reconstruction` through the anchor, or a `token_set` out of a block of added tokens.
        target: what an anchor reconstructs in Stage I: the `counterpart` of its text, or the text itself (`self`).
        alpha: weight of EBQ2D in Stage I, or of the queries under target `self`; 0 and 1 skip the unused pass.
        reconstruct_instruction: whether a query's instruction is a reconstruction target too.
        reduction: `token_mean` over the whole optimiser step, or the release's `micro_batch_mean`.
        loss_scale: 1 / temperature of Stage II and SimCSE.
        matryoshka_dims: the contrastive loss is the mean over the vectors cut to these sizes; None = not cut.
        mask_false_negatives: a document of the pool that has the text of a query's positive is no negative of it.
        own_negatives_only: sources whose queries are compared with their own row's documents only; None = no source.
        distillation_weight: of the term that imitates a teacher's scores of a row's own documents, which every row
            must hold then (`pos_score`, `neg_scores`).
        simcse_dropout: attention dropout of the base in SimCSE.
        lm_weight: of a causal language-modelling loss on the rows' own texts beside the contrastive one; 0 = none.
        mask_token_type: what stands for a masked token in MNTP where the tokenizer has no mask token of its own:
            `blank` (the token `_`), `eos`, or a new token `<mask>`.
        mlm_probability: how likely a token is chosen to be predicted in MNTP.
        data_collator_type: `default`: of the chosen tokens 80 % are masked, 10 % replaced by a random one and 10 %
            kept; `all_mask`: all are masked.
        loss_class: only "HardNegativeNLLLoss".
        total_batch_size: rows of an optimiser step over all processes; None = what per-device batch, accumulation
            and processes give. When set, the accumulation follows from it.
        tokens_per_microbatch: most tokens that a process runs at once; its rows of a step are cut into so many passes,
            and contrastive gradients are cached over them. None = all rows of a per-device batch at once.
        activation_memory_gb: bound on the activations that a pass keeps, in 10^9 bytes: as many layers as needed are
            recomputed in the backward pass. None = no bound. Needs `tokens_per_microbatch`.
        one_source_per: `step`: all rows of an optimiser step come from one source; `micro_batch`: all rows that the
            processes hold at once do, as in the release (the same without accumulation).
        stop_after_n_steps: end here although the schedule's horizon (`num_train_epochs` or `max_steps`) lies
            further; None = run to the horizon.
        resume: `auto`: go on from the newest whole checkpoint in the output folder; `never`: start at step 0 and write
            over what is there; or a checkpoint's folder to go on from (`resume.py`).
        max_skipped_steps: a step whose loss or gradient is not finite is skipped; so many in a row end the run.
        experiment_id: a folder below `output_dir` to write to.
        stage: whose script reads the config; a file need not say.
        training: the TrainingArguments keys, as written.
    """

    model_name_or_path: str
    peft_model_name_or_path: str | list[str] | None = None
    bidirectional: bool = False
    pooling_mode: str = "last"
    template: str | None = None
    instruction_join: str = "; "
    skip_instruction: bool = True
    max_seq_length: int = 512
    doc_max_length: int | None = None
    torch_dtype: DtypeName | None = None
    attn_implementation: AttnImplementation = "sdpa"
    use_peft: bool | None = None
    lora_r: int = 16
    lora_alpha: int | None = None
    lora_dropout: float = 0.05
    lora_modules: list[str] | None = None
    dataset_name: str = "E5"
    dataset_config_name: str | None = None
    dataset_file_path: str | None = None
    sources: list[str] | None = None
    sources_file: str | None = None
    max_train_samples: int | None = None
    num_eval_rows: int = 0
    nano_beir: str | None = None
    embedding_diagnostics: bool = False
    reconstruction_probe: bool = False
    num_hard_negatives: int = 1
    examples_per_query: int = 0
    symmetric_instructions: SymmetricInstructions = "documented"
    objective: Literal["reconstruction", "token_set"] = "reconstruction"
    target: ReconstructionTarget = "counterpart"
    alpha: float = 0.2
    reconstruct_instruction: bool = False
    reduction: Reduction = "token_mean"
    loss_scale: float = 20.0
    matryoshka_dims: list[int] | None = None
    mask_false_negatives: bool = False
    own_negatives_only: list[str] | None = None
    distillation_weight: float = 0.0
    simcse_dropout: float = 0.3
    lm_weight: float = 0.0
    mask_token_type: MaskTokenType = "blank"
    mlm_probability: float = 0.2
    data_collator_type: MaskingScheme = "default"
    loss_class: Literal["HardNegativeNLLLoss"] = "HardNegativeNLLLoss"
    total_batch_size: int | None = None
    tokens_per_microbatch: int | None = None
    activation_memory_gb: float | None = None
    one_source_per: Literal["step", "micro_batch"] = "step"
    stop_after_n_steps: int | None = None
    resume: str = "auto"
    max_skipped_steps: int = 5
    experiment_id: str | None = None
    stage: Stage | None = field(default=None, compare=False)
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def output_dir(self) -> Path:
        """Where the run writes: `output_dir` as given, or the experiment's folder below it."""
        return Path(self.training["output_dir"], self.experiment_id or "")

    @property
    def checkpointing(self) -> dict[str, Any] | None:
        """Arguments of torch's activation checkpointing where it is on, else None."""
        old, old_arguments, new, new_arguments = (self.training.get(key) for key in CHECKPOINTING_KEYS)
        return (old_arguments or new_arguments or {"use_reentrant": False}) if old or new else None

    @property
    def compilation(self) -> dict[str, Any] | None:
        """Arguments of torch.compile where it is on, else None."""
        on, backend, mode = (self.training.get(key) for key in COMPILE_KEYS)
        return {"backend": backend or "inductor", "mode": mode} if on else None

    @property
    def hub_dataset(self) -> str | None:
        """The hub dataset whose texts are read, if any."""
        return None if self.dataset_name in DATASET_NAMES else self.dataset_name

    @property
    def adapters(self) -> list[str]:
        """Adapters to merge into the base, as a list."""
        given = self.peft_model_name_or_path
        return [given] if isinstance(given, str) else list(given or ())


def training_arguments(config: Config, num_processes: int | None = None) -> TrainingArguments:
    """TrainingArguments of a run, with the accumulation that `total_batch_size` asks for.

    Args:
        config: of the run.
        num_processes: of a run that is only planned; None = those that torchrun started.

    Raises:
        UserError: the total batch is no multiple of what the processes hold at once, or transformers refuses a value.
    """
    values = dict(config.training)
    values["output_dir"] = str(config.output_dir)
    values["remove_unused_columns"] = False  # rows are read by our collator, not by column
    values.setdefault("report_to", "tensorboard" if importlib.util.find_spec("tensorboard") else "none")
    values.setdefault("ddp_find_unused_parameters", False)
    # Without this, transformers starts several CPU processes that each believe to be alone.
    values.setdefault("use_cpu", not torch.accelerator.is_available())
    values.setdefault("dataloader_pin_memory", not values["use_cpu"])
    # Rows are tokenised beside the step; on a CPU that would take cores from it, and is too little to notice.
    values.setdefault("dataloader_num_workers", 0 if values["use_cpu"] else 2)
    for key in (*CHECKPOINTING_KEYS, *COMPILE_KEYS):
        values.pop(key, None)  # switched on where the model is loaded: the trainer sees the objective, not the model
    if config.total_batch_size is not None:
        processes = num_processes or int(os.environ.get("WORLD_SIZE", "1"))
        values.setdefault("per_device_train_batch_size", max(1, config.total_batch_size // processes))
        at_once = values["per_device_train_batch_size"] * processes
        if config.total_batch_size % at_once:
            raise UserError(
                f"total_batch_size is {config.total_batch_size}, no multiple of the {at_once} rows that {processes} "
                f"process(es) with per_device_train_batch_size {at_once // processes} hold at once."
            )
        values["gradient_accumulation_steps"] = config.total_batch_size // at_once
    if values.get("fsdp"):
        # Gradients that wait for the step's last micro-batch would lie whole on every process.
        values["accelerator_config"] = {"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    try:
        args = TrainingArguments(**values)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"training arguments: {str(error).strip().splitlines()[0]}") from error
    if args.fsdp and args.parallel_mode != ParallelMode.DISTRIBUTED and (num_processes or 1) == 1:
        raise UserError("fsdp needs several processes; start with torchrun --nproc_per_node=N, or take fsdp out.")
    available = get_available_reporting_integrations()
    for name in [args.report_to] if isinstance(args.report_to, str) else args.report_to or ():
        if name not in ("none", "all", *available):
            choices = ", ".join(["none", *available])
            raise UserError(f"report_to: {name!r} is not installed here; install it, or choose from {choices}.")
    return args
