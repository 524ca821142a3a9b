"""The real ``Trainer``, on the CPU: what it trains with the callback is what a plain loop with KFAC trains."""

from __future__ import annotations

import copy
import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kfac_cond as kc

from ..architectures import library
from ..test_capture import hooks_of
from ..training import parameters_of

transformers = library("transformers")
library("accelerate")
integration = importlib.import_module("kfac_cond.integrations.transformers")
KFACCallback, label_mask = integration.KFACCallback, integration.label_mask

pytestmark = pytest.mark.filterwarnings("ignore")
WORDS, LENGTH, IGNORED = 11, 5, -100
SCHEDULE = kc.Schedule(factors=2, inverses=4)


@pytest.fixture(autouse=True)
def _one_process(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def causal() -> nn.Module:
    sizes = {"vocab_size": WORDS, "n_positions": 8, "n_embd": 6, "n_layer": 1, "n_head": 2}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0
        )
    ).double()


def masked() -> nn.Module:
    sizes = {"vocab_size": WORDS, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForMaskedLM(
        transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8)
    ).double()


def classifier() -> nn.Module:
    sizes = {"vocab_size": WORDS, "hidden_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, intermediate_size=8, max_position_embeddings=8, num_labels=3)
    ).double()


def encoder_decoder() -> nn.Module:
    sizes = {"vocab_size": WORDS, "d_model": 6, "d_kv": 3, "d_ff": 8, "num_layers": 1, "num_heads": 2}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    ).double()


def examples(count: int, *, seed: int = 2) -> list[dict[str, Tensor]]:
    """Sentences of which a part is not to be predicted, unevenly."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(WORDS, (count, LENGTH), generator=generator)
    prompt = torch.randint(1, LENGTH - 1, (count, 1), generator=generator)
    labels = torch.where(torch.arange(LENGTH) < prompt, IGNORED, words)
    return [{"input_ids": one, "labels": two} for one, two in zip(words, labels, strict=True)]


def make(model: nn.Module) -> kc.KFAC:
    data = kc.Data(mask=label_mask(model), seed=3)
    return kc.KFAC(model, kc.Categorical(dim=-1), damping=0.1, schedule=SCHEDULE, data=data)


def trainer(model: nn.Module, callback, root: Path, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(root),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        learning_rate=0.05,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        per_device_train_batch_size=2,
        train_sampling_strategy="sequential",
        **{"max_steps": 4, "save_strategy": "no", **options},
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    made = transformers.Trainer(
        model, arguments, train_dataset=examples(16), callbacks=[callback], optimizers=(optimizer, None)
    )
    made.remove_callback(transformers.PrinterCallback)
    return made


def plain(model: nn.Module, *, steps: int = 4, accumulate: int = 1) -> kc.KFAC:
    """The same by hand: the loss over all valid terms of a step, in float32 as there, with labels shifted here."""
    likelihood = kc.Categorical(dim=-1, ignore_index=IGNORED)
    kfac = kc.KFAC(model, likelihood, damping=0.1, schedule=SCHEDULE, data=kc.Data(seed=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    kfac.attach(optimizer)
    data = examples(16)
    model.train()
    for step in range(steps):
        optimizer.zero_grad()
        rows = [data[(2 * (step * accumulate + i)) % 16 :][:2] for i in range(accumulate)]
        pairs = [[torch.stack([row[key] for row in pair]) for key in ("input_ids", "labels")] for pair in rows]
        terms = sum(int((labels[:, 1:] != IGNORED).sum()) for _, labels in pairs)
        for words, labels in pairs:
            logits = model(input_ids=words).logits
            ahead = torch.cat([labels[:, 1:], torch.full((len(labels), 1), IGNORED)], dim=1)
            kfac.update(logits, targets=ahead)
            loss = nn.functional.cross_entropy(logits.float().flatten(0, 1), ahead.flatten(), reduction="sum")
            (loss / terms).backward()
        optimizer.step()
    return kfac


MASKS = {
    "causal": (causal, [[False, True, True, False]]),
    "masked": (masked, [[False, False, True, True]]),
    "encoder-decoder": (encoder_decoder, [[False, False, True, True]]),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_mask_is_that_of_the_models_own_loss(name):
    made, expected = MASKS[name]
    model = made().eval()
    labels = torch.tensor([[IGNORED, IGNORED, 3, 4]])
    mask = label_mask(model)((), {"labels": labels}, None)
    assert mask.tolist() == expected
    # The loss does not depend on logits where the mask says so, and does where it does not.
    outputs = model(input_ids=torch.tensor([[1, 2, 3, 4]]), labels=labels)
    outputs.logits.retain_grad()
    outputs.loss.backward()
    assert torch.equal(outputs.logits.grad.abs().sum(-1) > 0, mask)


def test_labels_of_whole_examples():
    model = classifier()
    assert label_mask(model)((), {"labels": torch.tensor([1, IGNORED, 0])}, None).tolist() == [True, False, True]


def test_labels_that_are_shifted_already():
    ahead = torch.tensor([[1, IGNORED]])
    assert label_mask(causal())((), {"labels": ahead, "shift_labels": ahead}, None).tolist() == [[True, False]]


def test_a_batch_whose_labels_were_taken_out_is_refused(tmp_path):
    with pytest.raises(kc.CaptureError, match="Label smoothing and compute_loss_func"):
        trainer(causal(), KFACCallback(make), tmp_path, label_smoothing_factor=0.1).train()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_its_loop_is_a_plain_loop(tmp_path, accumulate):
    model, callback = causal(), KFACCallback(make)
    twin = copy.deepcopy(model)
    trainer(model, callback, tmp_path, gradient_accumulation_steps=accumulate).train()
    kfac = plain(twin, accumulate=accumulate)
    assert callback.kfac.step == kfac.step == 4
    torch.testing.assert_close(parameters_of(model), parameters_of(twin), rtol=1e-10, atol=1e-12)
    for name, block in kfac.fisher().items():
        torch.testing.assert_close(callback.kfac.fisher()[name].G, block.G, rtol=1e-10, atol=1e-14)


def test_resumed_is_uninterrupted(tmp_path):
    start = causal()
    whole, callback = copy.deepcopy(start), KFACCallback(make)
    trainer(whole, callback, tmp_path / "whole", max_steps=6).train()
    first = copy.deepcopy(start)
    trainer(first, KFACCallback(make), tmp_path / "run", max_steps=3, save_strategy="steps", save_steps=3).train()
    again, resumed = causal(), KFACCallback(make)
    trainer(again, resumed, tmp_path / "run", max_steps=6).train(resume_from_checkpoint=True)
    assert resumed.kfac.step == 6
    assert torch.equal(parameters_of(again), parameters_of(whole))


def test_a_checkpoint_elsewhere(tmp_path):
    trainer(causal(), KFACCallback(make), tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2).train()
    folder = tmp_path / "run" / "checkpoint-2"
    callback = KFACCallback(make, resume_from=folder)
    trainer(causal(), callback, tmp_path / "other", max_steps=3).train(resume_from_checkpoint=str(folder))
    assert callback.kfac.step == 3
    (folder / "kfac.pt").unlink()
    with pytest.raises(kc.StateError, match=r"no .*kfac\.pt: .*resume_from_checkpoint"):
        trainer(causal(), callback, tmp_path / "other", max_steps=3).train(resume_from_checkpoint=str(folder))


def test_nothing_remains_at_the_end(tmp_path):
    model, callback = causal(), KFACCallback(make)
    before = sum(hooks_of(model))
    trainer(model, callback, tmp_path).train()
    assert sum(hooks_of(model)) == before
    assert len(callback.kfac.fisher())
    trainer(model, callback, tmp_path).train()


def test_replicas_in_one_process_are_refused():
    class Arguments:
        n_gpu = 2

    with pytest.raises(kc.AttachError, match="torchrun"):
        KFACCallback(make).on_train_begin(Arguments(), None, None, model=causal(), optimizer=None)


def test_without_the_library_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "kfac_cond.integrations.transformers")
    with pytest.raises(ImportError, match=r"pip install 'kfac-cond\[transformers\]'"):
        importlib.import_module("kfac_cond.integrations.transformers")
