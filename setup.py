"""Packaging. `pip install -e .` for users; `pip install -c constraints.txt -e .[dev]` for the tested versions."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

setup(
    name="llm2vec",
    version=re.findall(r'^__version__ = "(.+)"$', (HERE / "llm2vec/__init__.py").read_text(encoding="utf-8"), re.M)[0],
    description="Anchor Embedding and LLM2Vec on current libraries: train and use LLM text embedders",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The Anchor Embedding and LLM2Vec maintainers",
    license="MIT",
    license_files=["LICENSE"],
    keywords=["text embeddings", "large language models", "contrastive learning", "retrieval", "MTEB", "LLM2Vec"],
    project_urls={"Paper": "https://arxiv.org/abs/2509.03020", "LLM2Vec's paper": "https://arxiv.org/abs/2404.05961"},
    classifiers=[
        "Development Status :: 5 - Production/Stable",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Text Processing :: Indexing",
        "Typing :: Typed",
    ],
    packages=find_packages(include=["llm2vec", "llm2vec.*"]),
    package_data={
        "llm2vec": ["py.typed"],
        "llm2vec.data": ["*.json"],
        "llm2vec.evaluation": ["*.json"],
        "llm2vec.export": ["*.jinja"],
        "llm2vec.reports": ["*.jinja", "data/*/*.json"],
    },
    entry_points={"console_scripts": ["llm2vec = llm2vec.__main__:start"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        # Before 5.6, accelerate divides a step's loss by its micro-batches once more. A later minor release may rename
        # a hook of the Trainer that `llm2vec.training.trainer` overrides; its test says which.
        "transformers>=5.6,<5.24",
        "peft>=0.18",
        "accelerate>=1.10",
        "datasets>=4.0",
        "filelock>=3.30",  # the first that locks a descriptor, which a started program can inherit
        "huggingface_hub",
        "jinja2",
        "numpy",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        # Before 6, sentence-transformers runs the code that a local folder brings along.
        "eval": ["matplotlib", "mteb>=2.26,<3", "pytrec-eval-terrier", "scipy>=1.15", "sentence-transformers>=6"],
        "base": ["gguf"],
        "quickstart": ["PyStemmer", "bm25s", "matplotlib"],
        "logging": ["tensorboard"],
        "data": ["py3langid"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "bf16": ["torch-optimi"],
        "ray": ["ray[data]>=2.51"],
        "dev": ["hypothesis", "jsonschema", "mypy", "pre-commit", "pytest", "pytest-xdist", "ruff"],
    },
)
