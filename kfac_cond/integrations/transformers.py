"""K-FAC in the loop of the transformers library: a callback for its ``Trainer``, and the mask of a batch's labels."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints import load_checkpoint, save_checkpoint
from ..data import Pick
from ..errors import AttachError, CaptureError, StateError
from ..preconditioner import KFAC
from . import library

_transformers = library("transformers", "transformers")

#: In the folder of each checkpoint.
FILE = "kfac.pt"
IGNORED = -100


def label_mask(model: nn.Module) -> Pick:
    """What ``kc.Data(mask=...)`` needs: the terms that the model's own loss counts, those not labelled -100.

    Of a causal language model the logits of a position are scored against the label of the next, so that its last
    position has no term.

    Args:
        model: a model of the library; its loss function says whether labels are shifted.

    Raises:
        CaptureError: when it is called for a batch without labels.
    """
    causal = _losses().ForCausalLMLoss
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    shifted = not decodes and getattr(model, "loss_function", None) is causal

    def mask(args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any) -> Tensor:
        labels = kwargs.get("labels")
        if labels is None:
            raise CaptureError(
                f"a forward of {type(model).__name__} without labels=, found {sorted(kwargs)}: the mask of its terms "
                f"is taken from them. Label smoothing and compute_loss_func take the labels out of the batch before "
                f"the model is called: leave them out, or pass kc.Data(mask=...) of your own"
            )
        valid: Tensor = labels != IGNORED
        if not shifted:
            return valid
        ahead = kwargs.get("shift_labels")
        if ahead is not None:
            return torch.as_tensor(ahead != IGNORED)
        return nn.functional.pad(valid[..., 1:], (0, 1), value=False)

    return mask


def _losses() -> Any:
    """The module of the library's loss functions."""
    return library("transformers", "transformers.loss.loss_utils")


class KFACCallback(_transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Wraps the model when training begins, preconditions the optimizer's steps, and leaves no trace at the end.

    Each checkpoint of the ``Trainer`` gets a file ``kfac.pt``, and ``train(resume_from_checkpoint=...)`` goes on with
    it. Gradient accumulation is as without it: all batches of a step make one capture.

    Args:
        make: gives the KFAC of a model, say ``lambda model: kc.KFAC(model, kc.Categorical(dim=-1), damping=0.1,
            data=kc.Data(mask=label_mask(model)))``.
        resume_from: the checkpoint's folder, where it is not in ``output_dir`` under its own name.

    Attributes:
        kfac: the KFAC of this training, or of the last; None before the first.
    """

    def __init__(self, make: Callable[[nn.Module], KFAC], *, resume_from: str | Path | None = None) -> None:
        self.kfac: KFAC | None = None
        self._make = make
        self._resume_from = resume_from

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Wrap the model, attach to the optimizer, and go on from the checkpoint where there is one.

        Raises:
            AttachError: several devices in one process.
            StateError: a checkpoint without a state of KFAC.
        """
        if args.n_gpu > 1:
            raise AttachError(
                f"the Trainer splits batches over {args.n_gpu} devices by nn.DataParallel, whose replicas lose their "
                f"hooks: start one process a device with torchrun, or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        self._remove()
        self.kfac = self._make(kwargs["model"])
        self.kfac.attach(kwargs["optimizer"])
        if state.global_step > 0:
            self.kfac.load_state_dict(self._loaded(args, state))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state beside that of the optimizer."""
        assert self.kfac is not None
        saved = self.kfac.state_dict()
        if args.should_save:
            save_checkpoint(_folder(args, state) / FILE, kfac=saved)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take it off the model and the optimizer."""
        self._remove()

    def _loaded(self, args: Any, state: Any) -> Any:
        path = (_folder(args, state) if self._resume_from is None else Path(self._resume_from)) / FILE
        if not path.exists():
            raise StateError(
                f"training goes on from step {state.global_step}, and there is no {path}: the checkpoint is elsewhere "
                f"(KFACCallback(make, resume_from=folder)), its saving was cut short (resume from the one before), or "
                f"it is of a run without K-FAC (load its weights with from_pretrained, and train without "
                f"resume_from_checkpoint)"
            )
        return load_checkpoint(path)["kfac"]

    def _remove(self) -> None:
        if self.kfac is not None:
            self.kfac.remove()


def _folder(args: Any, state: Any) -> Path:
    """Where the Trainer keeps the checkpoint of this step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
