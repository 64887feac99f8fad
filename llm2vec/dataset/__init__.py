"""Upstream's training data, under upstream's paths, for training loops of one's own.

from llm2vec.dataset.utils import load_dataset
samples = load_dataset("E5", split="train", file_path="cache/echo-data", effective_batch_size=64)
"""

from llm2vec.dataset.dataset import DataSample, E5Data, TrainSample, Wiki1M
from llm2vec.dataset.utils import load_dataset

__all__ = ["DataSample", "E5Data", "TrainSample", "Wiki1M", "load_dataset"]
