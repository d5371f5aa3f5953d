"""Every variant changes what it says, in training and at inference, and leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from cachefold import DMC, fold
from cachefold.cache import layers
from cachefold.core import decisions, merging
from cachefold.models import attention
from cachefold.models.attention import FoldedAttention
from cachefold.models.fold import new_cache
from cachefold.models.hub import WEIGHTS, load_folded, read_config
from cachefold.policies.decisions import LinearDecision
from cachefold.retrofit import data, losses, run, trainer
from cachefold.retrofit.config import DataConfig, RetrofitConfig, from_dict
from cachefold.retrofit.data import PackedDataset
from cachefold.retrofit.losses import distillation_loss
from cachefold.retrofit.prepare import load_model, prepare
from cachefold.retrofit.run import run_retrofit
from cachefold.retrofit.trainer import RetrofitTrainer
from cachefold.zoo import load_base
from tests.benchmark_scripts.tiny import logits_of
from tests.models.tiny import random_ids, scramble_decisions, tiny_model
from tests.retrofit.test_losses import inputs
from tests.retrofit.tiny import make_tokenizer, recipe
from variants import VARIANTS, split
from variants.deciding import entmax_sigmoid

OWNERS = (
    attention, decisions, layers, losses, merging, trainer, DMC, FoldedAttention, LinearDecision,
    RetrofitTrainer, data, run,
)  # fmt: skip


NEW_WEIGHTS = {"state-conditioned": ("sight",), "mlp-residual": ("change.outer",)}
"""Names of what a variant adds to learn; 0 at first."""


def swapped() -> list[Any]:
    """All that a variant may replace."""
    return [value for owner in OWNERS for value in vars(owner).values()]


def dial_config(workspace: Path, output: str, steps: int, **train: object) -> RetrofitConfig:
    values = recipe(workspace, output, steps, **train)
    values["policy"] = {"name": "dmc", "cr": 2, "max_cr": 6, "delay": 4}
    return from_dict(values)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_trained_and_measured_alike_and_leaves_no_trace(
    name: str, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data, "CALIBRATION_TOKENS", 128)
    before = swapped()
    with VARIANTS[name]():
        assert any(old is not new for old, new in zip(before, swapped(), strict=True))
        facts = run_retrofit(dial_config(workspace, name, 4, ramp_fraction=0.1))
        assert "dial" in read_config(facts["folder"])
        model: Any = load_folded(facts["folder"], load_base(str(workspace / "model"))[0].float())
        cache, ids = new_cache(model, cr=3), random_ids(1, 60)
        with torch.no_grad():
            cached = model(input_ids=ids, past_key_values=cache).logits
        for weight in NEW_WEIGHTS.get(name, ()):
            state = load_file(Path(facts["folder"]) / WEIGHTS)
            assert any(state[key].any() for key in state if key.endswith(weight))
        assert cache.compression_ratio() > 1.5
        position = model._cachefold_dial.position(3)
        torch.testing.assert_close(cached, logits_of(model, ids, position=position)[0])
    assert all(old is new for old, new in zip(before, swapped(), strict=True))


def test_a_variant_is_taken_back_when_a_run_fails() -> None:
    before = swapped()
    with pytest.raises(KeyboardInterrupt), VARIANTS["first-position"]():
        raise KeyboardInterrupt
    assert all(old is new for old, new in zip(before, swapped(), strict=True))


def test_changes_name_one_variant_at_most() -> None:
    assert split([]) == ([], None)
    assert split(["train.seed=1", "variant=sinks"]) == (["train.seed=1"], "sinks")
    for changes in (["variant=sink"], ["variant=sinks", "variant=hybrid"]):
        with pytest.raises(ValueError, match="decide-later.* can be a variant"):
            split(changes)


class Watch(TrainerCallback):
    """Which weights moved in each step: adapters, decisions."""

    def __init__(self, model: Any) -> None:
        self.model, self.moved = model, []
        self.last = self._state()

    def _state(self) -> list[Tensor]:
        named = list(self.model.named_parameters())
        parts = [[p for n, p in named if kind in n] for kind in ("lora_B", ".decision.")]
        return [torch.cat([p.detach().flatten() for p in part]).clone() for part in parts]

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        now = self._state()
        self.moved.append([not torch.equal(*pair) for pair in zip(now, self.last, strict=True)])
        self.last = now


def trainer_of(workspace: Path, folder: Path, steps: int) -> RetrofitTrainer:
    config = dial_config(workspace, str(folder), steps, ramp_fraction=0.1)
    model, _ = load_model(config)
    prepare(model, config)
    text = PackedDataset(random_ids(2, 48), length=2 * steps)
    return RetrofitTrainer(model, args=config, train_dataset=text)


@pytest.mark.parametrize(
    ("name", "adapters"), [("frozen", [False] * 4), ("separate", [False, False, True, True])]
)
def test_decisions_learn_alone(
    name: str, adapters: list[bool], workspace: Path, tmp_path: Path
) -> None:
    retrofit = trainer_of(workspace, tmp_path, 4)
    watch = Watch(retrofit.model)
    retrofit.add_callback(watch)
    with VARIANTS[name]():
        retrofit.train()
    assert watch.moved == [[moved, True] for moved in adapters]


@pytest.mark.parametrize(
    ("name", "means"), [("layer-targets", [0.5, 0.25]), ("head-targets", [0.25, 0.75, 0.25, 0.25])]
)
def test_the_ratio_is_asked_of_parts(
    name: str, means: list[float], workspace: Path, tmp_path: Path
) -> None:
    retrofit, recorded = trainer_of(workspace, tmp_path, 4), {}
    first = torch.tensor([[[0.0, 0, 0, 1], [1, 1, 1, 0]]])
    second = torch.tensor([[[0.0, 1, 0, 0], [0, 0, 0, 1]]])
    with VARIANTS[name]():
        retrofit._student_run(0, recorded)
        for layer, alpha in enumerate((first, second)):
            recorded[layer] = decisions.Decisions(alpha, alpha, alpha)
        loss = trainer.compression_loss(torch.tensor([0.375]), 0.375, exact=True)
        one_sided = trainer.compression_loss(torch.tensor([0.375]), 0.375)
    gaps = 0.375 - torch.tensor(means)
    assert loss == gaps.abs().mean() and one_sided == gaps.clamp(min=0).mean()


def test_bulk_is_neither_chat_nor_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CALIBRATION_TOKENS", 4)
    words = {"w5": "chat", "w6": "code", "w7": "docs", "w8": None}
    rows = [json.dumps({"text": f"{word} " * 8, "kind": kind}) for word, kind in words.items()]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    source = DataConfig(files=[str(tmp_path / "text.jsonl")], seq_len=4)
    tokenizer = make_tokenizer()

    def seen() -> set[str]:
        return set(tokenizer.decode(run.load_blocks(source, tokenizer).flatten()).split())

    with VARIANTS["bulk-alone"]():
        assert seen() & set(words) == {"w7", "w8"}
        assert set(data.preset_texts(source, tokenizer)) == {"chat", "code", "bulk"}
    assert seen() >= set(words)


@pytest.mark.parametrize(("name", "share"), [("reverse-kl", 1.0), ("jeffreys", 0.5)])
@pytest.mark.parametrize(("ce_weight", "softcap"), [(0.0, None), (0.3, None), (0.3, 2.0)])
def test_divergences_equal_the_plain_ones(
    name: str, share: float, ce_weight: float, softcap: float | None
) -> None:
    student, teacher, head, labels = inputs()
    logits, target = student @ head.T, (teacher @ head.T).detach()
    if softcap:
        logits, target = (torch.tanh(x / softcap) * softcap for x in (logits, target))
    logp, logq = logits.log_softmax(-1), target.log_softmax(-1)
    reverse = (logp.exp() * (logp - logq)).sum(-1).mean()
    forward = (logq.exp() * (logq - logp)).sum(-1).mean()
    kd = share * reverse + (1 - share) * forward
    ce = torch.nn.functional.nll_loss(logp, labels, ignore_index=-100)
    weights = {"kd_weight": 0.7, "ce_weight": ce_weight, "softcap": softcap}
    with VARIANTS[name]():
        loss, found, _ = distillation_loss(student, teacher, head, labels, chunk=3, **weights)
    wanted = 0.7 * kd + ce_weight * ce
    torch.testing.assert_close((loss, found), (wanted, kd))
    assert not torch.allclose(reverse, forward)
    grads = [torch.autograd.grad(x, (student, head)) for x in (loss, wanted)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("name", ["reverse-kl", "jeffreys"])
def test_without_a_teacher_divergences_are_nothing(name: str) -> None:
    student, _, head, labels = inputs()
    weights = {"kd_weight": 0.0, "ce_weight": 1.0}
    plain = distillation_loss(student, None, head, labels, **weights)
    with VARIANTS[name]():
        assert distillation_loss(student, None, head, labels, **weights)[0] == plain[0]


def test_entmax_is_what_its_definition_gives() -> None:
    """p_i = (x_i / 2 - threshold)^2 where that is positive, and their sum is 1."""
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    halves = torch.stack([x, 0 * x]) / 2
    low, high = halves.max(0).values - 1, halves.max(0).values
    for _ in range(60):
        middle = (low + high) / 2
        above = (halves - middle).clamp(min=0).square().sum(0) > 1
        low, high = torch.where(above, middle, low), torch.where(above, high, middle)
    wanted = (halves[0] - low).clamp(min=0).square()
    torch.testing.assert_close(entmax_sigmoid(x), wanted, atol=1e-9, rtol=0)
    inside = torch.linspace(-1.9, 1.9, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(entmax_sigmoid, inside)


@pytest.mark.parametrize("method", ["gumbel", "sigmoid"])
def test_entmax_relaxes_to_exact_decisions_too(method: str) -> None:
    logits, options = torch.linspace(-4, 4, 500), {"temperature": 0.5, "method": method}
    plain = attention.relax(logits, **options)
    with VARIANTS["entmax"]():
        alpha, again = (attention.relax(logits, **options) for _ in range(2))
    assert (plain > 0).all() and (alpha == 0).any() and (alpha == 1).any()
    assert ((alpha > 0) & (alpha < 1)).any()
    assert torch.equal(alpha, again) == (method == "sigmoid")
    if method == "sigmoid":
        assert torch.equal(alpha, entmax_sigmoid(logits / 0.5))
    inside = ((alpha > 0) & (alpha < 1)).nonzero()
    assert (inside.min() < 150) == (method == "gumbel")  # noise takes it far from 0


def test_hybrid_heads_are_hard_or_soft_and_all_learn() -> None:
    logits = torch.randn(8, 16, 20, generator=torch.Generator().manual_seed(0)).requires_grad_()
    options = {"temperature": 0.3, "method": "gumbel"}
    torch.manual_seed(0)
    plain = attention.relax(logits, **options)
    torch.manual_seed(0)
    with VARIANTS["hybrid"]():
        alpha = attention.relax(logits, **options)
    is_hard = ((alpha == 0) | (alpha == 1)).all(-1)
    assert torch.equal(alpha[~is_hard], plain[~is_hard])
    assert torch.equal(alpha[is_hard], (plain[is_hard] > 0.5).float())
    assert 0.3 < is_hard.float().mean() < 0.7
    grads = [torch.autograd.grad(x.sum(), logits)[0] for x in (alpha, plain)]
    torch.testing.assert_close(*grads)
    assert (grads[0] > 0).any(-1).all()


@pytest.mark.parametrize("per", ["head", "layer"])
def test_mean_merge_weighs_all_tokens_alike(per: str) -> None:
    model, ids = fold(tiny_model(), DMC(delay=4, per=per)), random_ids(1, 30)
    scramble_decisions(model)
    plain, found = logits_of(model, ids)
    assert all((d.omega < 1).any() for d in found.values())
    with VARIANTS["mean-merge"]():
        logits, found = logits_of(model, ids)
    assert all((d.omega == 1).all() and d.alpha.any() for d in found.values())
    assert not torch.allclose(logits, plain, atol=1e-4)
    heads = found[0].alpha[0]
    assert torch.equal(heads[0], heads[1]) == (per == "layer")
