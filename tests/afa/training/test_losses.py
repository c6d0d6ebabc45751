"""Losses against recorded outputs of the published code."""

from __future__ import annotations

from typing import Any

import torch

from afa.model.heads import AffinityHead
from afa.training.losses import classification_loss, segmentation_loss
from afa_ext import affinity_from_attention, affinity_labels, affinity_loss


def test_affinity_golden(golden: Any) -> None:
    gold = golden("affinity")
    attention, weight, bias = (gold[name].requires_grad_() for name in ("attn", "weight", "bias"))
    affinity = affinity_from_attention(attention, weight, bias)
    torch.testing.assert_close(affinity, gold["affinity"], rtol=1e-4, atol=1e-6)

    labels = affinity_labels(gold["label_map"], stride=16, radius=int(gold["radius"]))
    assert labels.dtype == torch.uint8
    assert torch.equal(labels, gold["aff_label"])
    assert (labels == 1).sum() + 1 == gold["pos_count"]
    assert (labels == 0).sum() + 1 == gold["neg_count"]

    loss = affinity_loss(affinity, labels)
    torch.testing.assert_close(loss, torch.tensor(gold["loss"]), rtol=1e-4, atol=0)
    loss.backward()
    for tensor, name in ((attention, "grad_attn"), (weight, "grad_weight"), (bias, "grad_bias")):
        expected = gold[name]
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_affinity_head_is_the_definition_without_the_maps() -> None:
    torch.manual_seed(0)
    head = AffinityHead(6, 8)
    head.weight.data.normal_()
    head.bias.data.normal_()
    queries = torch.randn(2, 6, 12, 8, requires_grad=True)
    keys = torch.randn(2, 6, 12, 8, requires_grad=True)
    head.weight.data *= 0.1
    ours = head(queries, keys)
    theirs = affinity_from_attention(queries @ keys.transpose(-2, -1), head.weight, head.bias)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert torch.equal(ours, ours.transpose(1, 2))
    probe = torch.randn_like(theirs)
    inputs = (queries, keys, head.weight, head.bias)
    grads = torch.autograd.grad((ours * probe).sum(), inputs), torch.autograd.grad((theirs * probe).sum(), inputs)
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_standardized_affinity_head_is_its_definition() -> None:
    """And doesn't depend on the size of the logits of a map."""
    torch.manual_seed(0)
    head = AffinityHead(3, 8, standardized=True)
    head.weight.data.normal_()
    head.bias.data.normal_()
    queries, keys = torch.randn(2, 3, 12, 8) + 1, torch.randn(2, 3, 12, 8)
    maps = queries @ keys.transpose(-2, -1)
    maps = maps + maps.transpose(-2, -1)
    maps = (maps - maps.mean((2, 3), keepdim=True)) / maps.std((2, 3), correction=0, keepdim=True)
    expected = torch.sigmoid((maps * head.weight.view(-1, 1, 1)).sum(1) + head.bias)
    torch.testing.assert_close(head(queries, keys), expected, rtol=1e-4, atol=1e-5)
    scale = torch.tensor([0.5, 7.0, 30.0]).view(-1, 1, 1)
    torch.testing.assert_close(head(queries * scale, keys), head(queries, keys), rtol=1e-4, atol=1e-5)
    constant = torch.ones(1, 3, 12, 8)
    assert head(constant, constant).isfinite().all()


def test_affinity_head_starts_as_token_similarity() -> None:
    queries = torch.randn(1, 4, 5, 16)
    affinity = AffinityHead(4, 16)(queries, queries)
    scaled = (queries @ queries.transpose(-2, -1)).mean(1) / 4  # sqrt(16)
    torch.testing.assert_close(affinity, torch.sigmoid(scaled), rtol=1e-4, atol=1e-5)


def test_affinity_loss_without_pairs_is_finite() -> None:
    labels = torch.full((1, 4, 4), 255, dtype=torch.uint8)
    affinity = torch.rand(1, 4, 4, requires_grad=True)
    loss = affinity_loss(affinity, labels)
    loss.backward()
    assert loss == 0
    assert affinity.grad is not None and torch.equal(affinity.grad, torch.zeros_like(affinity))


def test_segmentation_golden(golden: Any) -> None:
    gold = golden("loss_metric")
    logits = gold["logits"].requires_grad_()
    loss = segmentation_loss(logits, gold["labels"])
    torch.testing.assert_close(loss, torch.tensor(gold["seg_loss"]), rtol=1e-5, atol=0)
    loss.backward()
    torch.testing.assert_close(logits.grad, gold["grad_logits"], rtol=1e-4, atol=1e-8)


def test_segmentation_loss_with_one_kind_of_pixel_or_none() -> None:
    logits = torch.randn(1, 3, 4, 4, requires_grad=True)
    background = segmentation_loss(logits, torch.zeros(1, 4, 4, dtype=torch.long))
    torch.testing.assert_close(background, -0.5 * logits.log_softmax(1)[:, 0].mean())
    nothing = segmentation_loss(logits, torch.full((1, 4, 4), 255))
    nothing.backward()
    assert logits.grad is not None
    assert nothing == 0 and torch.equal(logits.grad, torch.zeros_like(logits))


def test_segmentation_loss_upsamples_logits() -> None:
    logits = torch.randn(2, 3, 4, 4)
    labels = torch.randint(0, 3, (2, 16, 16))
    up = torch.nn.functional.interpolate(logits, (16, 16), mode="bilinear", align_corners=False)
    assert torch.equal(segmentation_loss(logits, labels), segmentation_loss(up, labels))


def test_classification_loss() -> None:
    logits, tags = torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 0.0]])
    expected = -(torch.sigmoid(logits[0, 0]).log() + torch.sigmoid(-logits[0, 1]).log()) / 2
    torch.testing.assert_close(classification_loss(logits, tags), expected)
