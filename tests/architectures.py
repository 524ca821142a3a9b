"""Public model definitions with small sizes and random weights: nothing is downloaded."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

Batch = dict[str, Tensor]
Made = tuple[nn.Module, Batch, Callable[[Any], Tensor]]
"""A model, a batch of keyword arguments, and the loss of its outputs."""

CLASSES, WORDS, LENGTH = 5, 64, 7


def library(name: str) -> Any:
    """transformers or torchvision; the test is skipped where it is not installed, and fails where it breaks."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed", allow_module_level=True)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # A wheel whose compiled part was built for another torch lacks these operators, and refuses to be imported.
    for operator in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, operator):
            _FRAGMENT.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)


#: Operators are there as long as the library that defines them.
_FRAGMENT = torch.library.Library("torchvision", "FRAGMENT")


def _words() -> Tensor:
    return torch.randint(WORDS, (4, LENGTH))


def _pixels(size: int) -> Tensor:
    return torch.randn(4, 3, size, size)


def logits_of(outputs: Any) -> Tensor:
    """What parametrises p, in whatever a model returns."""
    if isinstance(outputs, Tensor):
        return outputs
    logits: Tensor = outputs["logits" if "logits" in outputs else "logits_per_image"]
    return logits


def _cross_entropy(labels: Tensor) -> Callable[[Any], Tensor]:
    def loss(outputs: Any) -> Tensor:
        logits = logits_of(outputs)
        return nn.functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), labels.flatten())

    return loss


def _language(model: nn.Module) -> Made:
    words = _words()
    return model, {"input_ids": words}, _cross_entropy(words.roll(-1, dims=1))


def _vision(model: nn.Module, argument: str, size: int) -> Made:
    return model, {argument: _pixels(size)}, _cross_entropy(torch.randint(CLASSES, (4,)))


def gpt2() -> Made:
    t = library("transformers")
    config = t.GPT2Config(
        vocab_size=WORDS, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
    )
    return _language(t.GPT2LMHeadModel(config))


def _bert_sizes() -> dict[str, int]:
    return {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def bert() -> Made:
    t = library("transformers")
    config = t.BertConfig(vocab_size=WORDS, max_position_embeddings=16, num_labels=CLASSES, **_bert_sizes())
    model = t.BertForSequenceClassification(config)
    mask = torch.ones(4, LENGTH, dtype=torch.long)
    mask[0, 5:] = 0
    batch = {"input_ids": _words(), "attention_mask": mask}
    return model, batch, _cross_entropy(torch.randint(CLASSES, (4,)))


def llama() -> Made:
    t = library("transformers")
    return _language(t.LlamaForCausalLM(t.LlamaConfig(vocab_size=WORDS, num_key_value_heads=1, **_bert_sizes())))


def t5() -> Made:
    t = library("transformers")
    config = t.T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    words = _words()
    batch = {"input_ids": words, "decoder_input_ids": words}
    return t.T5ForConditionalGeneration(config), batch, _cross_entropy(words)


def mixtral() -> Made:
    t = library("transformers")
    config = t.MixtralConfig(vocab_size=WORDS, num_key_value_heads=1, num_local_experts=3, **_bert_sizes())
    return _language(t.MixtralForCausalLM(config))


def mamba() -> Made:
    t = library("transformers")
    config = t.MambaConfig(vocab_size=WORDS, hidden_size=16, state_size=4, num_hidden_layers=2)
    return _language(t.MambaForCausalLM(config))


def vit() -> Made:
    t = library("transformers")
    config = t.ViTConfig(image_size=16, patch_size=8, num_labels=CLASSES, **_bert_sizes())
    return _vision(t.ViTForImageClassification(config), "pixel_values", 16)


def distilbert() -> Made:
    t = library("transformers")
    config = t.DistilBertConfig(
        vocab_size=WORDS, max_position_embeddings=16, n_layers=2, n_heads=2, dim=16, hidden_dim=24, num_labels=CLASSES
    )
    batch = {"input_ids": _words()}
    return t.DistilBertForSequenceClassification(config), batch, _cross_entropy(torch.randint(CLASSES, (4,)))


def clip() -> Made:
    t = library("transformers")
    text = {"vocab_size": WORDS, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": WORDS - 1}
    config = t.CLIPConfig(
        text_config={**_bert_sizes(), **text},
        vision_config={**_bert_sizes(), "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    batch = {"input_ids": _words(), "pixel_values": _pixels(16)}

    return t.CLIPModel(config), batch, _cross_entropy(torch.arange(4))


def whisper() -> Made:
    t = library("transformers")
    coder = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
    config = t.WhisperConfig(
        vocab_size=WORDS,
        num_mel_bins=8,
        d_model=16,
        max_source_positions=10,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        **{f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in coder.items()},
    )
    words = _words()
    batch = {"input_features": torch.randn(4, 8, 20), "decoder_input_ids": words}
    return t.WhisperForConditionalGeneration(config), batch, _cross_entropy(words.roll(-1, dims=1))


def wav2vec2() -> Made:
    t = library("transformers")
    config = t.Wav2Vec2Config(
        vocab_size=WORDS,
        conv_dim=(8, 8),
        conv_stride=(5, 4),
        conv_kernel=(10, 4),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2,
        mask_time_prob=0.0,
        layerdrop=0.0,
        **_bert_sizes(),
    )
    model = t.Wav2Vec2ForCTC(config)
    frames = int(model._get_feat_extract_output_lengths(200))
    return model, {"input_values": torch.randn(4, 200)}, _cross_entropy(torch.randint(WORDS, (4, frames)))


def resnet() -> Made:
    models = library("torchvision").models.resnet
    return _vision(models.ResNet(models.Bottleneck, [1, 1, 1, 1], num_classes=CLASSES, width_per_group=8), "x", 16)


def mobilenet() -> Made:
    models = library("torchvision").models.mobilenetv3
    blocks = [
        models.InvertedResidualConfig(16, 3, 16, 8, True, "RE", 1, 1, 1.0),
        models.InvertedResidualConfig(8, 5, 24, 8, False, "HS", 2, 1, 1.0),
    ]
    return _vision(models.MobileNetV3(blocks, last_channel=32, num_classes=CLASSES, dropout=0.0), "x", 16)


def regnet() -> Made:
    models = library("torchvision").models.regnet
    sizes = models.BlockParams(
        [1, 1], [8, 16], [4, 8], bottleneck_multipliers=[1.0, 1.0], strides=[2, 2], se_ratio=0.25
    )
    return _vision(models.RegNet(sizes, num_classes=CLASSES, stem_width=8), "x", 16)


def shufflenet() -> Made:
    models = library("torchvision").models.shufflenetv2
    return _vision(models.ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 32], num_classes=CLASSES), "x", 16)


def densenet() -> Made:
    models = library("torchvision").models.densenet
    model = models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, bn_size=2, num_classes=CLASSES)
    return _vision(model, "x", 16)


def efficientnet() -> Made:
    models = library("torchvision").models.efficientnet
    blocks = [models.MBConvConfig(1, 3, 1, 8, 8, 1), models.MBConvConfig(2, 3, 2, 8, 16, 1)]
    model = models.EfficientNet(blocks, dropout=0.0, stochastic_depth_prob=0.0, num_classes=CLASSES, last_channel=32)
    return _vision(model, "x", 16)


def convnext() -> Made:
    models = library("torchvision").models.convnext
    blocks = [models.CNBlockConfig(8, 16, 1), models.CNBlockConfig(16, None, 1)]
    return _vision(models.ConvNeXt(blocks, num_classes=CLASSES), "x", 16)


def swin() -> Made:
    models = library("torchvision").models.swin_transformer
    model = models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 2],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
    )
    return _vision(model, "x", 16)


def swin_v2() -> Made:
    """Position biases from a network on a table that all examples share; a weight of attention used without a call."""
    models = library("torchvision").models.swin_transformer
    model = models.SwinTransformer(
        patch_size=[4, 4],
        embed_dim=8,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=[2, 2],
        stochastic_depth_prob=0.0,
        num_classes=CLASSES,
        block=models.SwinTransformerBlockV2,
        downsample_layer=models.PatchMergingV2,
    )
    return _vision(model, "x", 16)


def vision_transformer() -> Made:
    models = library("torchvision").models.vision_transformer
    model = models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=24, num_classes=CLASSES
    )
    return _vision(model, "x", 16)


ARCHITECTURES: dict[str, Callable[[], Made]] = {
    "GPT-2": gpt2,
    "BERT": bert,
    "Llama": llama,
    "T5": t5,
    "Mixtral": mixtral,
    "Mamba": mamba,
    "ViT": vit,
    "DistilBERT": distilbert,
    "CLIP": clip,
    "Whisper": whisper,
    "Wav2Vec2": wav2vec2,
    "ResNet": resnet,
    "MobileNet": mobilenet,
    "ConvNeXt": convnext,
    "Swin": swin,
    "SwinV2": swin_v2,
    "VisionTransformer": vision_transformer,
    "RegNet": regnet,
    "ShuffleNet": shufflenet,
    "DenseNet": densenet,
    "EfficientNet": efficientnet,
}
