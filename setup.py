"""Packaging. `pip install -e .` for users; `pip install -c constraints.txt -e .[dev]` for the tested versions."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="llm2vec",
    version="1.0.0",
    description="Anchor Embedding and LLM2Vec on current libraries: train and use LLM text embedders",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["llm2vec", "llm2vec.*"]),
    package_data={
        "llm2vec": ["py.typed"],
        "llm2vec.data": ["*.json"],
        "llm2vec.evaluation": ["*.json"],
        "llm2vec.reports": ["*.jinja", "data/*/*.json"],
    },
    entry_points={"console_scripts": ["llm2vec = llm2vec.__main__:start"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.6",
        "transformers>=5.6",  # before, accelerate divides a step's loss by its micro-batches once more
        "peft>=0.18",
        "accelerate>=1.10",
        "datasets>=4.0",
        "filelock>=3.30",  # the first that locks a descriptor, which a started program can inherit
        "jinja2",
        "numpy",
        "safetensors",
        "tqdm",
    ],
    extras_require={
        # Before 6, sentence-transformers runs the code that a local folder brings along.
        "eval": ["matplotlib", "mteb>=2.26,<3", "pytrec-eval-terrier", "scipy>=1.15", "sentence-transformers>=6"],
        "quickstart": ["PyStemmer", "bm25s", "matplotlib"],
        "logging": ["tensorboard"],
        "data": ["py3langid"],
        "docs": ["mkdocs-material", "mkdocstrings[python]"],
        "bf16": ["torch-optimi"],
        "ray": ["ray[data]>=2.51"],
        "dev": ["hypothesis", "mypy", "pre-commit", "pytest", "pytest-xdist", "ruff"],
    },
)
