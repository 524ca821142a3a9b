"""A convolutional network on digits padded to 32 x 32: AdamW beside K-FAC, or any other of the optimizers.

    python examples/classifier.py --data digits
    python examples/classifier.py --data mnist:FOLDER --optimizer sgd adamw kfac-graft
    python examples/classifier.py --resume

Five 3 x 3 convolutions, two of them with stride 2, and a linear layer over the mean of the pixels.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from example_command import parser, train
from example_tasks import classifier


def main(argv: Sequence[str] | None = None) -> None:
    """Train and compare."""
    made = parser(__doc__, steps=300, beside="kfac-graft", out="classifier")
    made.add_argument("--data", default="digits", help="digits or mnist:PATH, a folder of idx files")
    made.add_argument("--batch", type=int, default=128)
    made.add_argument("--width", type=int, default=32, help="channels of the first layer")
    asked = made.parse_args(argv)
    train(classifier(asked.data, width=asked.width, batch=asked.batch), asked)


if __name__ == "__main__":
    sys.exit(main())
