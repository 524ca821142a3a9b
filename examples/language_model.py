"""A language model on the bytes of Python's own standard library: AdamW beside K-FAC, or others.

On one process, or on many with DistributedDataParallel; the batches are the same however many ranks share them:

    python examples/language_model.py
    torchrun --nproc-per-node=2 examples/language_model.py
    torchrun --nproc-per-node=2 examples/language_model.py --resume
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from example_command import parser, train
from example_tasks import Size, language_model


def main(argv: Sequence[str] | None = None) -> None:
    """Train one or several, and say how they compare."""
    made = parser(__doc__, steps=600, beside="kfac", out="language-model")
    for name in ("context", "width", "heads", "blocks"):
        made.add_argument(f"--{name}", type=int, default=getattr(Size, name))
    made.add_argument("--batch", type=int, default=Size.batch, help="windows a step, over all ranks")
    made.add_argument("--text", type=int, default=8_000_000, help="bytes of the library")
    asked = made.parse_args(argv)
    size = Size(asked.context, asked.width, asked.heads, asked.blocks, asked.batch)
    train(language_model(size, text=asked.text), asked)


if __name__ == "__main__":
    sys.exit(main())
