"""Adapters: only they move, plain peft opens them, another backbone refuses them, languages are swapped."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mlray.config import Adapter, ConfigError, Contrastive, Model, Objective, RunError
from mlray.corpus import packing
from mlray.corpus.windows import Window
from mlray.models import adapters, backbone, embedder, tokenizer
from mlray.models.origin import Origin
from mlray.objectives import labels
from mlray.objectives.table import Task
from mlray.training import checkpoint, loop
from mlray.training.checkpoint import Progress
from mlray.training.engine import Engine
from tests.unit import test_labels, tiny

pytestmark = [
    *tiny.DEEPSPEED_WARNINGS,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning:transformers"),
]
TAGS = test_labels.TAGS


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked encoder on disk, as pre-training leaves it."""
    folder = tmp_path_factory.mktemp("base")
    masked = tiny.encoder()
    weights = {name: parameter.detach() for name, parameter in masked.named_parameters()}
    backbone.export(masked, tiny.tokens(), weights, folder)
    return folder


def tagged(number: int) -> Any:
    texts = tiny.texts("de", 60, seed=number)
    tags = [" ".join("B-LOC" if word == "Alltag" else "O" for word in text.split()) for text in texts]
    cut = labels.Words(test_labels.encoder(), labels.numbered(TAGS), 32)
    return packing.pack(Window(number, texts, tags, [0] * 60, list(range(60))), cut, 32, 0)


def train(model: Any, steps: int, zero_stage: int = 0) -> tuple[list[float], Engine]:
    config = tiny.train(steps=steps, lr=2e-2, zero_stage=zero_stage)
    batches = tiny.deal(tagged(0), 8) * steps
    task = Task(Objective(name="tagging"), tokenizer.vocabulary(tiny.tokens()), ["de"], 0)
    engine = Engine(model, config, 1)
    return [step.loss for step in loop.steps(engine, batches, task, config, start=0, seed=0)], engine


def inputs() -> dict[str, torch.Tensor]:
    return labels.collate(packing.unpack(tagged(1).slice(0, 4)))[0]


def trained(model: Any) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@pytest.mark.parametrize(("kind", "stage"), [("lora", 0), ("lora", 3), ("dora", 0), ("ia3", 0)])
def test_only_the_adapter_and_the_head_move_and_what_is_saved_is_what_was_trained(
    base: Path, tmp_path: Path, kind: str, stage: int
) -> None:
    model = test_labels.model("words", TAGS, folder=base)
    digest = adapters.digest(model)
    wrapped = adapters.add(model, Adapter.model_validate({"kind": kind}))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    moving = set(trained(model))
    assert all("lora" in name or "ia3" in name or "modules_to_save" in name for name in moving)
    losses, engine = train(model, 12, stage)
    assert losses[-1] < losses[0] / 2
    weights = {name: tensors["master"] for name, tensors in engine.state()}
    assert weights.keys() == moving
    now = {**dict(model.named_parameters()), **weights}  # ZeRO-3 keeps its partitions elsewhere
    if stage == 3:
        now = {name: now[name] for name in weights}
        gathered = tiny.gathered(model, before.keys() - moving)
        assert gathered.keys() == before.keys() - moving
        now.update(gathered)
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]) == (name not in moving), name
    adapters.export(wrapped, digest, "tagging", tiny.tokens(), weights, tmp_path)
    again = test_labels.model("words", TAGS, folder=base)
    adapters.load(again, tmp_path, objective="tagging")
    assert Origin.of(tmp_path).labels == TAGS
    with torch.no_grad():
        again.eval()
        assert all(
            torch.equal(tensor, before[n])
            for n, tensor in again.named_parameters()
            if n in before.keys() - moving
        )
        expected = again(**inputs())
        if stage == 0:
            assert torch.equal(model.eval()(**inputs()), expected)
        plain = transformers.AutoModelForTokenClassification.from_pretrained(base, num_labels=2)
        opened = peft.PeftModel.from_pretrained(plain, tmp_path).eval()
        ids = torch.tensor([[5, 9, 11, 30]])
        segments, offsets = torch.ones_like(ids), torch.arange(4)[None]
        ours = again(ids, segments, offsets, torch.arange(4))
        assert torch.allclose(opened(input_ids=ids).logits[0], ours, atol=1e-5)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_run_of_an_adapter_goes_on_from_its_checkpoint(base: Path, tmp_path: Path, stage: int) -> None:
    config = tiny.train(steps=6, lr=2e-2, zero_stage=stage)
    batches = tiny.deal(tagged(0), 8) * 6
    task = Task(Objective(name="tagging"), tokenizer.vocabulary(tiny.tokens()), ["de"], 0)

    def fresh() -> tuple[Engine, Any]:
        model = test_labels.model("words", TAGS, folder=base)
        digest = adapters.digest(model)
        wrapped = adapters.add(model, Adapter(kind="lora"))
        return Engine(model, config, 1), functools.partial(
            adapters.export, wrapped, digest, "tagging", tiny.tokens()
        )

    engine, export = fresh()
    losses = []
    for step in loop.steps(engine, batches, task, config, start=0, seed=0):
        losses.append(step.loss)
        if step.number == 3:
            checkpoint.save(engine, Progress(step=3), "", export, str(tmp_path), tiny.STORAGE)
    again, _ = fresh()
    found, _ = checkpoint.newest(str(tmp_path), tiny.STORAGE)
    assert found is not None
    checkpoint.load(again, found, tiny.STORAGE)
    rest = [step.loss for step in loop.steps(again, batches[3:], task, config, start=3, seed=0)]
    assert rest == losses[3:]
    assert peft.PeftConfig.from_pretrained(f"{found.uri}/weights").peft_type == "LORA"


@pytest.mark.parametrize(
    ("kind", "stacked"), [("lora", False), ("dora", False), ("ia3", False), ("lora", True), ("dora", True)]
)
def test_merged_weights_give_the_logits_of_the_adapter(
    base: Path, tmp_path: Path, kind: str, stacked: bool
) -> None:
    model = test_labels.model("words", TAGS, folder=base)
    below = language_adapter(base, tmp_path / "de", 0) if stacked else None
    wrapped = adapters.add(model, Adapter.model_validate({"kind": kind, "rank": 4}), below)
    train(model, 5)
    with torch.no_grad():
        expected = model.eval()(**inputs())
        model.model = adapters.merge(wrapped)
        assert not [name for name, _ in model.named_parameters() if "lora" in name or "ia3" in name]
        assert torch.allclose(model.eval()(**inputs()), expected, atol=1e-5)


def test_an_adapter_of_another_backbone_is_refused(base: Path, tmp_path: Path) -> None:
    model = test_labels.model("words", TAGS, folder=base)
    digest = adapters.digest(model)
    wrapped = adapters.add(model, Adapter(kind="lora"))
    with pytest.raises(RunError, match="the adapter has learnt nothing: every lora_B is as it began"):
        adapters.export(wrapped, digest, "tagging", tiny.tokens(), trained(model), tmp_path / "untrained")
    moved = {name: tensor + 0.1 for name, tensor in trained(model).items()}
    adapters.export(wrapped, digest, "tagging", tiny.tokens(), moved, tmp_path)
    other = test_labels.model("words", TAGS, hidden_size=32)
    assert adapters.digest(other) != digest
    with pytest.raises(ConfigError, match=f"trained on the backbone {digest[:12]} and this one is"):
        adapters.load(other, tmp_path, objective="tagging")
    with pytest.raises(ConfigError, match="no adapter at"):
        adapters.load(other, base, objective="tagging")
    written = tmp_path / "adapter_model.safetensors"
    written.write_bytes(written.read_bytes()[:-9])
    again = test_labels.model("words", TAGS, folder=base)
    with pytest.raises(ConfigError, match=r"the adapter's weights cannot be read: .*incomplete"):
        adapters.load(again, tmp_path, objective="tagging")
    with pytest.raises(ConfigError, match="was trained for tagging, not for classification"):
        adapters.load(other, tmp_path, objective="classification")


def test_a_head_does_not_change_the_backbone(base: Path) -> None:
    models = [
        test_labels.model("words", TAGS, folder=base),
        test_labels.model("texts", ["a", "b", "c"], folder=base),
    ]
    assert adapters.digest(models[0]) == adapters.digest(models[1])


def test_a_tensor_that_was_lost_is_told(base: Path, tmp_path: Path) -> None:
    model = test_labels.model("words", TAGS, folder=base)
    wrapped = adapters.add(model, Adapter(kind="lora"))
    weights = trained(model)
    name = next(name for name in weights if "lora_B" in name)
    for broken in (
        {**weights, name: torch.empty(0)},
        {key: value for key, value in weights.items() if key != name},
    ):
        with pytest.raises(RunError, match=r"lora_B\.task\.weight did not reach the checkpoint"):
            adapters.export(wrapped, "", "tagging", tiny.tokens(), broken, tmp_path)


def language_adapter(
    base: Path, folder: Path, seed: int, objective: str = "masked", targets: tuple[str, ...] = ()
) -> Path:
    """A LoRA on the masked encoder, moved by hand."""
    masked = tiny.encoder()
    loaded = backbone.build(Model(family="bert", max_positions=64), tiny.tokens(), base)
    digest = adapters.digest(loaded)
    wrapped = adapters.add(loaded, Adapter(kind="lora", targets=targets))
    torch.manual_seed(seed)
    for parameter in trained(loaded).values():
        parameter += 0.05 * torch.randn_like(parameter)
    adapters.export(wrapped, digest, objective, tiny.tokens(), trained(loaded), folder)
    assert adapters.digest(masked) == digest
    return folder


def lose_a_tensor(folder: Path) -> None:
    """Writes an adapter's file again without its first tensor."""
    path = folder / "adapter_model.safetensors"
    save_file(dict(list(load_file(path).items())[1:]), path)


def test_a_language_is_swapped_below_a_task_that_stays(base: Path, tmp_path: Path) -> None:
    german, swahili = (
        language_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("de", "sw"))
    )
    model = test_labels.model("words", TAGS, folder=base)
    digest = adapters.digest(model)
    wrapped = adapters.add(model, Adapter(kind="lora"), german)
    assert all(f".{adapters.TASK}." in name for name in trained(model))
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if f".{adapters.LANGUAGE}." in n}
    assert len(frozen) > 10
    rounds = [train(model, 20)[0] for _ in range(4)]
    assert rounds[-1][-1] < 0.1 * rounds[0][0]
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in frozen.items())
    adapters.export(wrapped, digest, "tagging", tiny.tokens(), trained(model), tmp_path / "task")
    asked = labels.collate(packing.unpack(tagged(1)))[0]
    with torch.no_grad():
        expected = model.eval()(**asked)
        results = {}
        for name, folder in (("de", german), ("sw", swahili)):
            opened = test_labels.model("words", TAGS, folder=base)
            adapters.load(opened, tmp_path / "task", folder, objective="tagging")
            results[name] = opened.eval()(**asked)
    alone = test_labels.model("words", TAGS, folder=base)
    with pytest.raises(
        ConfigError, match=r"was trained above a language adapter; name one in adapter\.language_path"
    ):
        adapters.load(alone, tmp_path / "task", objective="tagging")
    assert torch.allclose(results["de"], expected, atol=1e-6)
    assert float((results["sw"] - expected).abs().max()) > 1e-3
    assert np.isfinite(results["sw"].numpy()).all()
    # The task stays: random language weights of this size leave most of the places that it found as they were.
    found, kept = (logits.argmax(-1) == TAGS.index("B-LOC") for logits in (expected, results["sw"]))
    assert 10 < int(found.sum()) < 0.3 * len(found)
    assert int((kept & found).sum()) > 0.8 * int(found.sum())
    assert int((kept & ~found).sum()) < 0.05 * len(found)
    lose_a_tensor(tmp_path / "task")
    with pytest.raises(ConfigError, match=r"/task and the model differ in base_model"):
        adapters.load(
            test_labels.model("words", TAGS, folder=base), tmp_path / "task", german, objective="tagging"
        )


def test_what_is_no_language_adapter_lies_below_no_task(base: Path, tmp_path: Path) -> None:
    german = language_adapter(base, tmp_path / "de", 0)
    model = test_labels.model("words", TAGS, folder=base)
    digest = adapters.digest(model)
    wrapped = adapters.add(model, Adapter(kind="lora"), german)
    moved = {name: tensor + 0.1 for name, tensor in trained(model).items()}
    for objective, name in (("tagging", "task"), ("masked", "stacked")):
        adapters.export(wrapped, digest, objective, tiny.tokens(), moved, tmp_path / name)
    other = language_adapter(base, tmp_path / "other", 0, "contrastive")
    empty = language_adapter(base, tmp_path / "empty", 0)
    (empty / "adapter_model.safetensors").unlink()
    wanted = r"; adapter\.language_path takes one that was trained alone for masked, causal, denoising"
    for below, reason in (
        (other, f"was trained for contrastive{wanted}"),
        (tmp_path / "stacked", f"was trained for masked above a language adapter{wanted}"),
        (empty, r"adapter_model\.safetensors is missing"),
    ):
        fresh = test_labels.model("words", TAGS, folder=base)
        with pytest.raises(ConfigError, match=reason):
            adapters.add(fresh, Adapter(kind="lora"), below)
        with pytest.raises(ConfigError, match=reason):
            adapters.load(fresh, tmp_path / "task", below, objective="tagging")
        assert not [name for name, _ in fresh.named_parameters() if "lora" in name]


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules:UserWarning")  # no head to leave out
@pytest.mark.parametrize(
    ("targets", "complaint"),
    [((), "the adapter does not fit"), (("query", "value"), "and the model differ in base_model")],
)
def test_what_has_another_shape_lies_below_no_task(
    base: Path, tmp_path: Path, targets: tuple[str, ...], complaint: str
) -> None:
    """An encoder of vectors has no head: the layers have other names there than below a head."""
    language_adapter(base, tmp_path / "de", 0, targets=targets)
    plain = embedder.build(Model(family="bert"), Contrastive(), tiny.tokens(), base)
    with pytest.raises(ConfigError, match=complaint):
        adapters.add(plain, Adapter(kind="lora"), tmp_path / "de")


def test_a_head_that_nobody_has_trained_stays_below_no_adapter(base: Path, tmp_path: Path) -> None:
    plain = embedder.build(Model(family="bert"), Contrastive(), tiny.tokens(), base)
    backbone.export(plain, tiny.tokens(), dict(plain.named_parameters()), tmp_path)
    masked = backbone.build(Model(family="bert"), tiny.tokens(), tmp_path)
    with pytest.raises(ConfigError, match=r"has no cls\.predictions\..*, and below an adapter it would stay"):
        adapters.add(masked, Adapter(kind="lora"))
    adapters.add(backbone.build(Model(family="bert"), tiny.tokens(), base), Adapter(kind="lora"))
    # A head for labels is trained beside the adapter.
    adapters.add(test_labels.model("words", TAGS, folder=tmp_path), Adapter(kind="lora"))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_targets_that_the_model_has_not_are_named(base: Path, kind: str) -> None:
    model = test_labels.model("words", TAGS, folder=base)
    with pytest.raises(
        ConfigError, match=r"the adapter does not fit; see .* adapter\.targets .*No modules were"
    ) as caught:
        adapters.add(model, Adapter.model_validate({"kind": kind, "targets": ("nothing",)}))
    assert "\n" not in str(caught.value)


def test_only_lora_and_dora_stack(base: Path, tmp_path: Path) -> None:
    german = language_adapter(base, tmp_path / "de", 0)
    model = test_labels.model("words", TAGS, folder=base)
    with pytest.raises(ConfigError, match="only LoRA and DoRA stack"):
        adapters.add(model, Adapter(kind="ia3"), german)


@pytest.mark.parametrize("family", ["bert", "xlm-roberta", "modernbert"])
def test_ia3_scales_keys_values_and_what_enters_the_second_feed_forward_matrix(family: str) -> None:
    model = tiny.encoder(family)
    wrapped = adapters.add(model, Adapter(kind="ia3"))
    found = {
        name.removeprefix("base_model.model."): module.ia3_l[adapters.TASK].shape
        for name, module in wrapped.named_modules()
        if hasattr(module, "ia3_l")
    }
    inner = model.model.config.intermediate_size
    forward = [name for name, shape in found.items() if shape == (1, inner)]
    layers = model.model.config.num_hidden_layers
    assert len(forward) == layers
    assert all(name.endswith("mlp.Wo" if family == "modernbert" else "output.dense") for name in forward)
    assert not any("attention.output" in name for name in found)
    attention = {name.rsplit(".", 1)[1] for name in found.keys() - set(forward)}
    assert attention == ({"Wqkv"} if family == "modernbert" else {"key", "value"})
