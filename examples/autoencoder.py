"""The deep autoencoder on curves, digits or MNIST: AdamW beside K-FAC, or any other of the optimizers.

    python examples/autoencoder.py --data curves
    python examples/autoencoder.py --data mnist:FOLDER --optimizer adam muon kfac-graft
    python examples/autoencoder.py --data digits --until 200
    python examples/autoencoder.py --data digits --resume

Eight layers, 784-1000-500-250-30-250-500-1000-784 with tanh and a linear code; the loss is the cross-entropy of the
pixels, summed over an image. Hinton & Salakhutdinov 2006; Martens & Grosse 2015 (arXiv:1503.05671), section 13.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from example_command import parser, train
from example_tasks import WIDTHS, autoencoder


def main(argv: Sequence[str] | None = None) -> None:
    """Train and compare."""
    made = parser(__doc__, steps=500, beside="kfac-graft", out="autoencoder")
    made.add_argument("--data", default="curves", help="curves, digits or mnist:PATH, a folder of idx files")
    made.add_argument("--batch", type=int, default=500)
    made.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="of the encoder, 784 first")
    asked = made.parse_args(argv)
    train(autoencoder(asked.data, widths=asked.widths, batch=asked.batch), asked)


if __name__ == "__main__":
    sys.exit(main())
