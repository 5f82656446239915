"""The engine on a GPU: stages, checkpoints and GradCache give what they give on a CPU. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlray.corpus import packing
from mlray.objectives import contrastive
from tests.unit import test_gradcache, test_zero, tiny

pytestmark = [
    *tiny.DEEPSPEED_WARNINGS,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_learns_on_a_gpu(stage: int) -> None:
    plain, found = (test_zero.curve(number, 0, 1) for number in (0, stage))
    assert plain[-1] < plain[0] - 0.2
    assert found == pytest.approx(plain, abs=1e-4)
    assert test_zero.curve(stage, 0, 1, precision="bf16") == pytest.approx(plain, abs=0.1)


@pytest.mark.parametrize(("writer", "reader"), [(2, 3), (3, 1), (0, 2), (1, 0)])
def test_a_checkpoint_of_a_gpu_goes_on_at_another_stage(writer: int, reader: int, tmp_path: Path) -> None:
    undisturbed, resumed = test_zero.resume(tmp_path, writer, reader, 0, 1)
    assert resumed == pytest.approx(undisturbed, abs=1e-5)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("micro", [32, 8])
@pytest.mark.parametrize("cache", ["auto", "always"])
def test_chunks_on_a_gpu_give_the_gradient_of_the_whole_batch(stage: int, micro: int, cache: str) -> None:
    loss, gradients = test_gradcache.expected()
    found = test_gradcache.one_step(stage, micro, 0, 1, cache)
    assert found["loss"] == pytest.approx(loss, abs=1e-5)
    for name, gradient in gradients.items():
        own = found["gradients"][name].cpu().reshape(gradient.shape)
        torch.testing.assert_close(own, gradient, atol=1e-5, rtol=0)


def test_the_blocked_loss_is_that_of_the_cpu() -> None:
    torch.manual_seed(0)
    inputs = test_gradcache.task().inputs(packing.unpack(test_gradcache.rows()))
    assert inputs.texts is not None
    vectors_NH = torch.nn.functional.normalize(torch.randn(len(inputs.texts.names_N), 16), dim=-1)
    own_P = np.arange(test_gradcache.PAIRS)
    told = [
        contrastive.loss(vectors_NH.to(device), inputs.texts, own_P, test_gradcache.LOSS)
        for device in ("cpu", "cuda")
    ]
    assert told[1][:2] == pytest.approx(told[0][:2], rel=1e-5)
    torch.testing.assert_close(told[1][2].cpu(), told[0][2], atol=1e-5, rtol=1e-4)
