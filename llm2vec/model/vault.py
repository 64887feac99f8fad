"""A folder, or a repository on the hub, that somebody else wrote, and what of it may be opened.

    folder = open_folder("output/stage_I")
    folder.config        # what its config.json says; refused if that names what may not be opened
    weights_of(folder)   # its safetensors

Such a folder names what libraries open and run: weights files of any kind, classes, kernels, patterns, sizes. So its
JSON files are read here before any library reads them, and what is not known to be harmless is refused. Weights are
safetensors, code is the installed libraries' own, and not much more is allocated than the weights' headers account for.
The libraries themselves are called in `backbone`, and nowhere else.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from llm2vec.files import parse_json, read_object
from llm2vec.hub import QUANTISATION, find_file
from llm2vec.model.settings import SETTINGS_FILE, read_settings
from llm2vec.types import UserError, first_line

logger = logging.getLogger(__name__)

CONFIG_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
MODEL_WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
#: Found in a sentence-transformers model's repository, and in no other.
MODULES_FILE = "modules.json"

#: Ways to attend, and to run experts, that a config may name. Others are repositories of kernels on the hub.
IMPLEMENTATIONS = ("eager", "sdpa", "flash_attention_2", "flex_attention", "grouped_mm", "batched_mm")
#: Words in a config's keys that count modules, and the most that is built of such.
MOST = {"layer": 1024, "expert": 1 << 14}
#: Words in keys that say how wide a module is, which `check_size` holds against the weights.
WIDTH = re.compile("size|dim")
#: No vocabulary has more tokens; an adapter may bring some that its base lacks.
MOST_TOKENS = 1 << 20
#: A config may describe so many weights for one that the files hold (half a T5 is stored alone), and so many more.
MOST_WEIGHTS, FREE_WEIGHTS = 4, 1 << 26

#: A tokenizer's normalizer may write so many characters for one.
MOST_GROWTH = 4096

#: LoRA, and embeddings of new tokens alone; other kinds open files of their own.
ADAPTER_KINDS = ("LORA", "TRAINABLE_TOKENS")
#: Keys of an adapter that decide how it is applied. What else peft knows must be left as it is.
ADAPTER_KEYS = {
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora",
    "modules_to_save", "init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "trainable_token_indices", "use_dora", "lora_bias", "ensure_weight_tying",
}  # fmt: skip
INITIALISATIONS = (None, True, False, "gaussian", "orthogonal", "pissa", "olora")
#: Patterns that are matched in no time whatever the name: names, `.*` a few times, and groups of names.
PATTERN = re.compile(r"(?:[\w^$-]|\\[.d]\+?|\.[*+]?|\((?:\?:)?(?:[\w|-]|\\\.)*\))*")
MOST_WILDCARDS, MOST_PATTERNS, LONGEST_PATTERN = 3, 4096, 1000

#: Modules of sentence-transformers that a folder may list, by their class paths of all versions.
MODULES = "Transformer, Pooling, Normalize, Dense, LayerNorm, Dropout, StaticEmbedding"
MODULE = re.compile(
    r"sentence_transformers\.(?:models|(?:base|sentence_transformer)\.modules)(?:\.\w+)?\."
    rf"({MODULES.replace(', ', '|')})"
)
#: Keys that a `sentence_bert_config.json` may have. In a group of keywords for other libraries, scalars under these.
TRANSFORMER_KEYS = {
    "max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name", "unpad_inputs",
    "processing_kwargs", "query_length", "document_length", "query_expansion",
}  # fmt: skip
KEYWORDS = {
    "attn_implementation", "dtype", "torch_dtype", "use_cache", "is_causal", "add_pooling_layer", "padding_side",
    "truncation_side", "model_max_length", "use_fast", "add_bos_token", "add_eos_token",
}  # fmt: skip
KEYWORD_GROUPS = {"model_args", "model_kwargs", "tokenizer_args", "processor_kwargs", "config_args", "config_kwargs"}


# --- a folder, and what it names ---


@dataclass(frozen=True)
class Folder:
    """A folder, or a repository on the hub, that was opened; nothing that it names is harmful."""

    path: str  #: as it was named
    run: dict[str, Any]  #: what its `run.json` says; empty where there is none, as for a name on the hub
    names: frozenset[str] | None = None  #: of the files in the folder; None = the hub is asked for each
    config: dict[str, Any] | None = None  #: what its `config.json` says; None = it has none
    adapter: dict[str, Any] | None = None  #: what its `adapter_config.json` says; None = it has none
    commit: str | None = None  #: of a repository, the one that all its files are taken from; None = it is a folder

    def find(self, name: str) -> str | None:
        """A file of it; None where it has none of that name, or the hub is out of reach. Errors are
        `hub.find_file`'s."""
        if self.names is None:
            return find_file(self.path, name, self.commit)
        return str(Path(self.path) / name) if name in self.names else None

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What its `llm2vec_config.json` says; empty where there is none. What are no settings is a `UserError`."""
        file = self.find(SETTINGS_FILE)
        return {} if file is None else read_settings(Path(file))

    @property
    def place(self) -> str:
        """Where an adapter's files lie on this machine."""
        return str(Path(self.find(ADAPTER_FILE) or self.path).parent) if self.names is None else self.path


def folder_at(path: str, run: dict[str, Any] | None = None, revision: str | None = None) -> Folder:
    """A folder or repository as it stands, at its newest revision or another; `open_folder` looks for what is missing
    of it, too. `run` is what its `run.json` says, if that was asked. A `UserError` where its configs cannot be read, or
    name what may not be opened."""
    folder = Path(path)
    names = frozenset(file.name for file in folder.iterdir() if file.is_file()) if folder.is_dir() else None
    opened = Folder(path, run or {}, names, commit=revision if names is None else None)
    for name in (ADAPTER_FILE, CONFIG_FILE):
        try:
            file = opened.find(name)
        except UserError:  # no possible name of a repository: whoever opens the model says so
            break
        if file is None:
            continue
        try:
            content = read_object(Path(file))
        except UserError as error:
            raise UserError(f"{path}: its {name} cannot be read ({error})") from error
        commit = Path(file).parent.name if names is None else None
        if name == CONFIG_FILE:
            _check_config(content, f"{path}/{name}")
            opened = replace(opened, config=content, commit=commit)
        else:
            _check_adapter(content, f"{path}/{name}")
            opened = replace(opened, adapter=content, commit=commit)
    return opened


def _check_config(config: Mapping[str, Any], where: str) -> None:
    for key, value in _entries(config):
        if key.endswith("_implementation"):
            for name in value.values() if isinstance(value, dict) else [value]:
                if name is not None and name not in IMPLEMENTATIONS:
                    raise UserError(f"{where}: {key} is {name!r}; allowed: {', '.join(IMPLEMENTATIONS)}.")
        elif key == "transformers_weights" and value is not None:
            _check_weights_name(value, where)
        elif key == "quantization_config" and value is not None:
            method = value.get("quant_method") if isinstance(value, dict) else value
            if method not in QUANTISATION:
                raise UserError(
                    f"{where}: the weights are quantised by {method!r}; allowed: {', '.join(QUANTISATION)}."
                )
        elif key == "use_pretrained_backbone" and value:
            raise UserError(f"{where}: {key} is {value!r}; weights of another repository are not opened.")
        elif type(value) is int and not WIDTH.search(key) and any(w in key and value > m for w, m in MOST.items()):
            raise UserError(f"{where}: {key} is {value}, which no model has.")


def _entries(content: Any) -> Iterator[tuple[str, Any]]:
    """The keys and values of all objects in a piece of JSON."""
    parts = [content]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            yield from part.items()
            parts += part.values()
        elif isinstance(part, list):
            parts += part


def _check_weights_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors(\.index\.json)?", name):
        raise UserError(f"{where}: names {name!r} as weights; only safetensors files of the folder itself are opened.")


def _check_adapter(config: Mapping[str, Any], where: str) -> None:
    kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
    if kind not in ADAPTER_KINDS:
        raise UserError(f"{where}: peft_type is {kind!r}; allowed: {', '.join(ADAPTER_KINDS)}.")
    if base is not None and not isinstance(base, str):
        raise UserError(f"{where}: base_model_name_or_path is {base!r}; a string is needed.")
    unset = LoraConfig().to_dict()
    for key, value in config.items():
        if key in unset.keys() - ADAPTER_KEYS and value not in (None, False, [], {}, unset[key]):
            raise UserError(f"{where}: {key} is {str(value)[:60]!r}; leave it out, as no adapter needs it.")
    for key, tokens in _entries({key: config.get(key) for key in ("trainable_token_indices", "token_indices")}):
        if isinstance(tokens, list) and any(type(token) is int and token > MOST_TOKENS for token in tokens):
            raise UserError(f"{where}: {key} has {max(tokens)}; no vocabulary is so large.")
    if (chosen := config.get("init_lora_weights")) not in INITIALISATIONS:
        raise UserError(f"{where}: init_lora_weights is {chosen!r}; allowed: {', '.join(map(str, INITIALISATIONS))}.")
    patterns = [config[key] for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), str)]
    for key in ("layers_pattern", "rank_pattern", "alpha_pattern"):
        named = config.get(key) or ()
        patterns += [named] if isinstance(named, str) else named
    if len(patterns) > MOST_PATTERNS:
        raise UserError(f"{where}: has {len(patterns)} patterns; at most {MOST_PATTERNS} are matched.")
    for pattern in map(str, patterns):
        wild = sum(map(pattern.count, "*+("))
        if wild > MOST_WILDCARDS or len(pattern) > LONGEST_PATTERN or not PATTERN.fullmatch(pattern):
            raise UserError(
                f"{where}: the pattern {pattern[:60]!r} is not matched; allowed are names with at most "
                f"{MOST_WILDCARDS} of `.*` and `(one|other)`."
            )


def check_tokenizer(folder: Folder) -> str | None:
    """Refuse, by a `UserError`, a tokenizer that would make a text many times as long before it reads it; and a path
    that is no possible name. Of a repository, returns the commit that was looked at, and that it must be taken from."""
    is_local = folder.names is not None
    file = f"{folder.path}/tokenizer.json" if is_local else find_file(folder.path, "tokenizer.json", folder.commit)
    try:
        normalizer = json.loads(Path(file).read_bytes()).get("normalizer") if file else None
    except (OSError, ValueError, AttributeError, RecursionError):  # the library says what is wrong with it
        normalizer = None
    written = (value for key, value in _entries(normalizer) if key == "content" and isinstance(value, str))
    growth = math.prod(len(value) or 1 for value in written)
    if growth > MOST_GROWTH:
        raise UserError(f"{folder.path}/tokenizer.json: its normalizer may make a text {growth:.2g} times as long.")
    return folder.commit if is_local or file is None else Path(file).parent.name


# --- weights ---


def weights_of(folder: Folder) -> list[str]:
    """The files of a full model's weights; all are safetensors, and other names, or none, are a `UserError`."""
    named = (folder.config or {}).get("transformers_weights") or MODEL_WEIGHTS
    if (file := folder.find(named)) is not None and named.endswith(".safetensors"):
        return [file]
    index = file or folder.find(f"{named}.index.json")
    parts: dict[str, str | None] = {}
    if index is not None:
        shards = read_object(Path(index)).get("weight_map")
        names: Iterable[Any] = shards.values() if isinstance(shards, dict) else [shards]
        for name in names:
            _check_weights_name(name, f"{folder.path}/{Path(index).name}")
            parts[name] = parts.get(name) or folder.find(name)
    missing = [name for name, file in parts.items() if file is None]
    if missing or not parts:
        raise UserError(f"{folder.path} holds no {min(missing, default=named)}; only safetensors are opened.")
    return [file for file in parts.values() if file is not None]


def check_size(folder: Folder, described: int) -> None:
    """Refuse, by a `UserError`, a model whose config describes much more weights than its files hold, by their headers;
    other errors are as of `weights_of`, or say that a file is damaged."""
    stored = sum(math.prod(shape) for file in weights_of(folder) for shape in _shapes(file))
    if described > MOST_WEIGHTS * stored + FREE_WEIGHTS:
        what = f"describes {described:,} weights, and the safetensors hold {stored:,}"
        raise UserError(f"{folder.path}/{CONFIG_FILE}: {what}.")


def _shapes(file: str) -> list[list[int]]:
    """The shapes of a safetensors file's tensors."""
    try:
        with safe_open(file, "numpy") as tensors:
            return [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: could not be loaded ({first_line(error)}).") from error


def check_adapter_weights(folder: Folder) -> None:
    """Refuse, by a `UserError`, an adapter without safetensors, or of a rank that no tensor in them has."""
    config, file = folder.adapter or {}, folder.find(ADAPTER_WEIGHTS)
    if file is None:  # peft would open a pickle instead
        raise UserError(f"peft_model_name_or_path: {folder.path!r} holds no {ADAPTER_WEIGHTS}.")
    largest = max((max(shape) for shape in _shapes(file) if math.prod(shape) > 1), default=1)
    for rank in (config.get("r"), *(config.get("rank_pattern") or {}).values()):
        if type(rank) is int and rank > max(largest, LoraConfig().r):
            raise UserError(f"{folder.path}/{ADAPTER_FILE}: the rank {rank} is that of no tensor in {ADAPTER_WEIGHTS}.")


def model_below(folder: Folder) -> Folder:
    """Where the full model lies that transformers loads for a folder: there, or where its adapter's base is, checked
    alike."""
    if folder.adapter is None:
        return folder
    check_adapter_weights(folder)
    return folder_at(str(folder.adapter.get("base_model_name_or_path"))) if folder.config is None else folder


# --- sentence-transformers ---


def check_modules(folder: Path, path: str) -> tuple[list[Folder], dict[str, Any]]:
    """Refuse, by a `UserError`, a sentence-transformers folder, once called `path`, that lists or names what may not be
    opened. Returns where full models lie, below an adapter if there is one, and the keywords that the folder gives for
    loading."""
    if not (folder / MODULES_FILE).is_file():
        raise UserError(f"{path} has no {MODULES_FILE}.")
    where = f"{path}/{MODULES_FILE}"
    modules = parse_json((folder / MODULES_FILE).read_bytes(), where)
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise UserError(f"{where}: a list of objects with a `type` is needed.")
    models: list[Folder] = []
    keywords: dict[str, Any] = {}
    for module in modules:
        named, subfolder = module.get("type"), module.get("path")
        known = MODULE.fullmatch(named) if isinstance(named, str) else None
        if known is None:
            raise UserError(f"{where}: lists {named!r}; of sentence-transformers' modules, {MODULES} are opened.")
        if not isinstance(subfolder, str) or Path(subfolder).is_absolute() or ".." in Path(subfolder).parts:
            raise UserError(f"{where}: the path {subfolder!r} leads out of the folder.")
        inner = folder / subfolder
        part = folder_at(str(inner)) if inner.is_dir() else Folder(str(inner), {}, frozenset())
        if known[1] == "Transformer":
            keywords |= _keywords(part)
            models.append(model_below(part))
        elif known[1] in ("Dense", "LayerNorm", "StaticEmbedding"):
            sizes = [(part.config or {}).get(key) or 0 for key in ("in_features", "out_features", "dimension")]
            if any(type(size) is not int for size in sizes):
                raise UserError(f"{inner}/{CONFIG_FILE}: sizes are {sizes}; whole numbers are needed.")
            check_size(part, max(sizes[0] * sizes[1], sizes[2]))
    declared = folder / "config_sentence_transformers.json"
    prompts = (read_object(declared).get("prompts") if declared.is_file() else None) or {}
    if not isinstance(prompts, dict) or not all(isinstance(text, str | None) for text in prompts.values()):
        raise UserError(f"{declared}: prompts is {prompts!r}; an object of strings is needed.")
    return models, keywords


def _keywords(part: Folder) -> dict[str, Any]:
    """What a module with a model gives for loading it, for which other libraries read it."""
    given: dict[str, Any] = {}
    for name in sorted(part.names or ()):
        if not re.fullmatch(r"sentence_[\w-]+_config\.json", name):
            continue
        where = f"{part.path}/{name}"
        for key, value in read_object(Path(where)).items():
            group = value if key in KEYWORD_GROUPS and isinstance(value, dict) else {}
            wrong = next(
                (k for k, v in group.items() if k not in KEYWORDS or not isinstance(v, str | int | None)), None
            )
            if wrong is not None:
                raise UserError(f"{where}: {key} has {wrong!r}; allowed: {', '.join(sorted(KEYWORDS))}.")
            if value and not group and key not in TRANSFORMER_KEYS:
                raise UserError(f"{where}: {key} is {value!r}; allowed: {', '.join(sorted(TRANSFORMER_KEYS))}.")
            if key == "max_seq_length" and not isinstance(value, int | None):
                raise UserError(f"{where}: {key} is {value!r}; a whole number is needed.")
            _check_config(group, where)
            given |= group
    return given
