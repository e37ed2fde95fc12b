"""Write a text of few words, some of them far more frequent than others, on which experts become unevenly busy.

    python examples/skewed_corpus.py skewed.txt
    torchrun --nproc-per-node 2 examples/pretrain_qwen3_moe.py --data skewed.txt --aux-loss-coeff 0

The word of rank n has a frequency in proportion to 1 / n ** exponent. The same options write the same text.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_WORDS_A_LINE = 12


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="FILE")
    parser.add_argument("--words", type=int, default=24, help="different words; default 24")
    parser.add_argument("--exponent", type=float, default=1.5, help="0 = all equally frequent; default 1.5")
    parser.add_argument("--kilobytes", type=int, default=500, help="length; default 500")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    text = skewed_text(options.words, options.exponent, 1000 * options.kilobytes, options.seed)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")


def skewed_text(words: int, exponent: float, size: int, seed: int = 0) -> str:
    """Lines of random words.

    Args:
        words: Different words, of 2 to 7 letters.
        exponent: Of the frequencies, 1 / n ** exponent for n = 1, 2, ...
        size: Characters, all of one byte.
        seed: Of words and text.
    """
    generator = random.Random(seed)
    vocabulary: dict[str, None] = {}
    while len(vocabulary) < words:
        vocabulary["".join(generator.choices(_LETTERS, k=generator.randint(2, 7)))] = None
    weights = [1 / n**exponent for n in range(1, words + 1)]
    lines, length = [], 0
    while length < size:
        lines.append(" ".join(generator.choices(list(vocabulary), weights, k=_WORDS_A_LINE)) + "\n")
        length += len(lines[-1])
    return "".join(lines)[:size]


if __name__ == "__main__":
    main()
