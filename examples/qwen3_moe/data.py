"""Byte-level text: which files, which of them are held out, and the sequence that belongs to a sample number."""

from __future__ import annotations

import hashlib
import math
import os
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from megatron_ep_v2.errors import InputError

from .options import Options
from .runtime import Runtime

HELD_OUT = 16  # one file in so many is for validation
SEPARATOR = b"\0"  # between files; text has no such byte
STDLIB_EXCLUDED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo"}


class Samples(Protocol):
    """Training and validation sequences by number, the same on every rank.

    Attributes:
        num_valid: Held-out sequences.
        unigram_entropy: Of the training tokens, in nats: the loss of a model that knows only their frequencies.
        fingerprint: Changes with the data.
        description: One line for the log.
    """

    num_valid: int
    unigram_entropy: float
    fingerprint: str
    description: str

    def train(self, sample: int) -> torch.Tensor:
        """[seq_length + 1] int64. Any number: after the last sample comes the next epoch."""

    def valid(self, sample: int) -> torch.Tensor:
        """[seq_length + 1] int64, sample < num_valid."""


@dataclass(frozen=True)
class Corpus:
    """Text as bytes, split by file."""

    train: bytes
    valid: bytes
    description: str


class TextSamples:
    """Windows of a corpus: side by side, in a new order each epoch."""

    def __init__(self, corpus: Corpus, seq_length: int, seed: int):
        self._train = np.frombuffer(corpus.train, dtype=np.uint8)
        self._valid = np.frombuffer(corpus.valid, dtype=np.uint8)
        self.seq_length, self.seed = seq_length, seed
        self.num_train, self.num_valid = ((len(t) - 1) // seq_length for t in (self._train, self._valid))
        self.unigram_entropy = entropy(np.bincount(self._train, minlength=256))
        self.fingerprint = hashlib.sha256(corpus.train + corpus.valid).hexdigest()[:16]
        self.description = corpus.description
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))
        # Spread over all held-out files, whatever the number that is asked for.
        self._valid_order = np.random.default_rng(0).permutation(self.num_valid)

    def train(self, sample: int) -> torch.Tensor:
        epoch, index = divmod(sample, self.num_train)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_train)
        return self._window(self._train, int(self._order[1][index]))

    def valid(self, sample: int) -> torch.Tensor:
        return self._window(self._valid, int(self._valid_order[sample]))

    def _window(self, text: np.ndarray, index: int) -> torch.Tensor:
        start = index * self.seq_length
        return torch.from_numpy(text[start : start + self.seq_length + 1].astype(np.int64))


def entropy(counts: np.ndarray) -> float:
    """In nats, of the distribution with these counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


def text_samples(options: Options, runtime: Runtime) -> TextSamples:
    """Rank 0 reads the files; every rank gets the same bytes, also where hosts have different files."""
    corpus = runtime.from_main(lambda: read_corpus(options))
    return TextSamples(corpus, options.shape.seq_length, options.seed)


def read_corpus(options: Options) -> Corpus:
    """Read at most `max_data_mb` of text and hold out whole files; of a single file, its end."""
    files = list(_standard_library() if not options.data else _files_under(options.data))
    texts, total, left_out = [], 0, 0
    for name, path, explicit in files:
        text = _read(path, explicit)
        if text is None or total + len(text) > options.max_data_mb * 1_000_000:
            left_out += 1
        elif text:
            texts.append((name, text))
            total += len(text)
    if len(texts) == 1:
        text = texts[0][1]
        cut = len(text) - len(text) // HELD_OUT
        train, valid = [text[:cut]], [text[cut:]]
        how = "the end of the file"
    else:
        # By a stable hash of the name, so the choice does not depend on the order of a listing.
        texts.sort(key=lambda item: (zlib.crc32(item[0].encode()), item[0]))
        num_valid = max(1, len(texts) // HELD_OUT)
        valid, train = ([t for _, t in part] for part in (texts[:num_valid], texts[num_valid:]))
        how = f"{num_valid} whole files"
    rest = f", {left_out} binary files or beyond --max-data-mb left out" if left_out else ""
    description = (
        f"{_source(options)}: {len(texts)} files, {total / 1e6:.1f} MB of text as bytes{rest}; held out: {how}"
    )
    corpus = Corpus(SEPARATOR.join(train), SEPARATOR.join(valid), description)
    _check_size(corpus, options)
    return corpus


def _source(options: Options) -> str:
    return ", ".join(map(str, options.data)) if options.data else "the Python standard library's sources"


def _check_size(corpus: Corpus, options: Options) -> None:
    needed = options.shape.seq_length + 1
    for part, text in (("training", corpus.train), ("validation", corpus.valid)):
        if len(text) < needed:
            raise InputError(
                f"too little text for {part}",
                found=f"{len(text)} bytes in {corpus.description}",
                needed=f"{needed} bytes, one sequence",
                fix="more or larger files in --data, a smaller --seq-length, or a larger --max-data-mb",
            )


def _standard_library() -> Iterator[tuple[str, Path, bool]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not STDLIB_EXCLUDED.intersection(relative.parts):
            yield relative.as_posix(), path, False


def _files_under(paths: Sequence[Path]) -> Iterator[tuple[str, Path, bool]]:
    """(stable name, path, named on the command line) of every file; hidden ones and caches are left out."""
    for path in paths:
        if path.is_file():
            yield path.name, path, True
        elif path.is_dir():
            for folder, folders, names in os.walk(path):
                folders[:] = sorted(f for f in folders if not f.startswith(".") and f != "__pycache__")
                for name in sorted(n for n in names if not n.startswith(".")):
                    file = Path(folder, name)
                    if file.is_file():
                        yield file.relative_to(path).as_posix(), file, False
        else:
            raise InputError(
                f"--data: no such file or folder: {path}", fix="check the path; it is read on the host of rank 0"
            )


def _read(path: Path, explicit: bool) -> bytes | None:
    """A file's bytes if it is UTF-8; None for a binary file (one with a zero byte) inside a folder."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(
            f"--data: cannot read {path}", found=error.strerror, fix="make it readable, or leave it out"
        ) from error
    if SEPARATOR in content and not explicit:
        return None
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"--data: {path} is not UTF-8 text",
            found=f"byte 0x{content[error.start]:02x} at offset {error.start}",
            needed="UTF-8",
            fix="iconv -f LATIN1 -t UTF-8 (or whatever it is in), or leave it out",
        ) from error
    return content


def train_batches(samples: Samples, options: Options, step: int, rank: int, world: int) -> list[torch.Tensor]:
    """The rank's micro-batches [B, seq_length + 1] of step 0, 1, ...

    Sample numbers run through micro-batches first and ranks second, so that the micro-batches of a step are the same
    sets of samples on any number of ranks.
    """
    size, first = options.micro_batch_size(world), step * options.recipe.global_batch_size
    starts = (first + (micro * world + rank) * size for micro in range(options.num_micro_batches(world)))
    return [torch.stack([samples.train(start + i) for i in range(size)]) for start in starts]


def valid_batches(
    samples: Samples, options: Options, rank: int, world: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The rank's share of the evaluation: (tokens [B, seq_length + 1], weight [B]).

    Each rank makes the same number of forward passes; fillers beyond the last sample weigh 0.
    """
    size, total = options.micro_batch_size(world), min(options.eval_samples, samples.num_valid)
    for micro in range(math.ceil(total / (size * world))):
        numbers = [(micro * world + rank) * size + i for i in range(size)]
        tokens = torch.stack([samples.valid(n if n < total else 0) for n in numbers])
        yield tokens, torch.tensor([float(n < total) for n in numbers])
