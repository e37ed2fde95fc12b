"""Megatron's own data: PREFIX.bin and PREFIX.idx, read through megatron.core.datasets."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_ep_v2.errors import InputError
from megatron_ep_v2.megatron.qwen3_moe.trainer import check_token_ids

from .data import entropy
from .options import Options
from .runtime import Runtime

INDEX_HEADER = b"MMIDIDX"
ENTROPY_TOKENS = 4_000_000  # of the training samples in their order: the files may be larger than memory


class Vocabulary:
    """The tokenizer that GPTDataset asks for: the tokens are in the files, so it only knows their number."""

    pad = -1  # no token is padding

    def __init__(self, vocab_size: int):
        self.vocab_size, self.eod = vocab_size, vocab_size - 1
        self.unique_identifiers = OrderedDict(vocab_size=vocab_size)


class IndexedSamples:
    """GPTDataset's training and validation samples; the training split is as long as the run, in epochs if need be."""

    def __init__(self, options: Options, cache: Path):
        self._train, self._valid = _build(options, cache)
        self.num_valid = min(len(self._valid), options.eval_samples)
        self.fingerprint = hashlib.sha256(Path(f"{options.data_path}.idx").read_bytes()).hexdigest()[:16]
        counts = np.zeros(options.shape.vocab_size, dtype=np.int64)
        for sample in range(min(len(self._train), max(1, ENTROPY_TOKENS // options.shape.seq_length))):
            tokens = self.train(sample)[1:]
            check_token_ids(tokens, len(counts))
            counts += np.bincount(tokens, minlength=len(counts))
        self.unigram_entropy = entropy(counts)
        self.description = (
            f"{options.data_path}: split {options.split}, {len(self._train)} training and {self.num_valid} validation "
            f"samples; unigram entropy of {counts.sum()} training tokens"
        )

    def train(self, sample: int) -> torch.Tensor:
        return _sequence(self._train, sample)

    def valid(self, sample: int) -> torch.Tensor:
        return _sequence(self._valid, sample)


def indexed_samples(options: Options, runtime: Runtime) -> IndexedSamples:
    runtime.together(lambda: check_files(options))
    return runtime.together(lambda: IndexedSamples(options, options.out / "index_cache"))


def check_files(options: Options) -> None:
    """Refuse what the builder would stumble over between two barriers, leaving the other ranks to wait."""
    prefix = options.data_path
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise InputError(
                f"--data-path: no file {prefix}{suffix}",
                needed=f"{prefix}.bin and {prefix}.idx on every host",
                fix="give the prefix without the ending; Megatron's tools/preprocess_data.py writes both files",
            )
    with open(f"{prefix}.idx", "rb") as stream:
        header = stream.read(len(INDEX_HEADER))
    if header != INDEX_HEADER:
        raise InputError(
            f"--data-path: {prefix}.idx is not an index of Megatron's",
            found=f"a file that begins with {header!r}",
            needed=repr(INDEX_HEADER),
            fix="write it again with Megatron's tools/preprocess_data.py",
        )
    index = IndexedDataset(prefix)  # has to outlive `lengths`, a view of its mapped file
    lengths = index.sequence_lengths
    shares = [float(share) for share in options.split.split(",")]
    if len(shares) != 3 or not all(shares[:2]):
        raise InputError(
            "--split cannot be used",
            found=options.split,
            needed="three shares, the first two above 0",
            fix="--split 95,5,0",
        )
    ends = np.rint(np.cumsum(shares[:2]) / sum(shares) * len(lengths)).astype(int)
    for part, count in (("training", lengths[: ends[0]].sum()), ("validation", lengths[ends[0] : ends[1]].sum())):
        if count <= options.shape.seq_length:
            raise InputError(
                f"--data-path: too few tokens for {part}",
                found=f"{count} tokens of {lengths.sum()} in {len(lengths)} documents, split {options.split}",
                needed=f"{options.shape.seq_length + 1}, one sequence",
                fix="more data, a smaller --seq-length, or another --split",
            )


def _build(options: Options, cache: Path) -> tuple[GPTDataset, GPTDataset]:
    config = GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.shape.seq_length,
        blend=([options.data_path], None),
        split=options.split,
        path_to_cache=str(cache),
        tokenizer=Vocabulary(options.shape.vocab_size),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    sizes = [options.recipe.steps * options.recipe.global_batch_size, options.eval_samples, 0]
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
    return train, valid


def _sequence(dataset: GPTDataset, sample: int) -> torch.Tensor:
    item = dataset[sample]
    return torch.cat((item["tokens"], item["labels"][-1:]))
