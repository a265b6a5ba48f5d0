"""Speed of the mixers beside their peers: python benchmarks/speed.py --mixers mamba2,attention --lengths 512,2048 --json FILE"""

from __future__ import annotations

import argparse
import sys

import torch

from remanence.errors import RemanenceError
from remanence.evaluate.speed import meta, print_table, speed, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mixers", help="slugs, separated by commas; default: every mixer of the catalog")
    parser.add_argument("--lengths", default="2048", help="tokens, separated by commas")
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    try:
        mixers = given.mixers.split(",") if given.mixers else None
        lengths = [int(length) for length in given.lengths.split(",")]
        sizes = {"dim": given.dim, "heads": given.heads, "batch": given.batch, "repeats": given.repeats}
        rows = speed(mixers, lengths, **sizes)
        print_table(rows)
        if given.json:
            write_json(given.json, rows, meta(lengths=lengths, dtype="float32", **sizes))
    except (RemanenceError, ValueError) as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
