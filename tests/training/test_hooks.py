"""The methods of transformers' Trainer that are overridden here, as the releases that setup.py allows have them."""

from __future__ import annotations

import inspect

import pytest
import transformers
from transformers import Trainer

from llm2vec.training.trainer import EmbedderTrainer

#: Methods and their parameters. Those with an underscore are private: a release may change them without a word.
HOOKS = {
    "_determine_best_metric": "metrics trial",
    "_get_dataloader": "dataset description batch_size sampler_fn is_training dataloader_key",
    "_get_eval_sampler": "eval_dataset",
    "_get_grad_norm": "model grad_norm",
    "_get_train_sampler": "train_dataset",
    "_init_training_state": ("max_steps num_update_steps_per_epoch num_train_epochs resume_from_checkpoint trial"),
    "_load_best_model": "",
    "_load_from_checkpoint": "resume_from_checkpoint model",
    "_load_optimizer_and_scheduler": "checkpoint",
    "_load_rng_state": "checkpoint",
    "_run_epoch": (
        "model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial ignore_keys_for_eval start_time "
        "resume_from_checkpoint epochs_trained steps_trained_in_current_epoch"
    ),
    "_save": "output_dir state_dict",
    "_save_checkpoint": "model trial",
    "create_optimizer": "model",
    "create_scheduler": "num_training_steps optimizer",
    "evaluate": "eval_dataset ignore_keys metric_key_prefix",
    "get_batch_samples": "epoch_iterator num_batches device",
    "log": "logs start_time",
    "train": "resume_from_checkpoint trial ignore_keys_for_eval",
    "training_step": "model inputs num_items_in_batch",
}

#: Private methods that are called here and not overridden.
CALLED = {
    "_prepare_inputs": "inputs",
    "_save_optimizer_and_scheduler": "output_dir",
    "_save_rng_state": "output_dir",
    "_save_scaler": "output_dir",
}


@pytest.mark.parametrize(("name", "parameters"), [*HOOKS.items(), *CALLED.items()])
def test_the_library_has_the_methods_that_are_overridden(name: str, parameters: str) -> None:
    """Or it would never call ours, and train without checks, counts or whole checkpoints."""
    library = f"transformers {transformers.__version__}"
    method = getattr(Trainer, name, None)
    assert method is not None, f"{library} has no Trainer.{name} any more: find what it is called now."
    found = [parameter for parameter in inspect.signature(method).parameters if parameter != "self"]
    assert found == parameters.split(), (
        f"{library} calls Trainer.{name} with {found}, not with {parameters.split()}: see that ours still fits."
    )


def test_the_list_is_complete() -> None:
    overridden = {name for name in vars(EmbedderTrainer) if callable(getattr(Trainer, name, None))}
    assert {name for name in overridden if not name.startswith("__")} == HOOKS.keys()
