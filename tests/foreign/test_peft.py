"""Models of peft as they come from get_peft_model: learned, saved, personalized, saved again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from fedl2p import ClientData, InnerLoop, MetaNets, Rounds, Settings, learn, personalize
from foreign.nets.attention import Plain, bert, lora, lora_bert
from foreign.nets.case import seeded

SETTINGS = Settings(finetune=InnerLoop(epochs=1, batch_size=4))


def inputs(n: int, *, tokens: bool, seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    if not tokens:
        return torch.randn(n, 5, generator=generator, dtype=torch.float64)
    ids = torch.randint(11, (n, 4), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: nn.Module, x: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(**x).logits if isinstance(x, dict) else model.eval()(x)


@pytest.mark.parametrize(
    ("build", "base", "tokens"),
    [(seeded(lora), seeded(Plain), False), (seeded(lora_bert), seeded(bert), True)],
    ids=["small net", "BERT with a dictionary"],
)
def test_adapters_are_learned_and_become_the_clients_own(
    build: Callable[[], nn.Module], base: Callable[[], nn.Module], tokens: bool, tmp_path: Path
) -> None:
    model = build()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert 0 < len(trained) < len(before)

    def part(n: int, seed: int) -> tuple[Any, Tensor]:
        return inputs(n, tokens=tokens, seed=seed), torch.arange(n) % 3

    clients = {f"c{i}": ClientData(part(7, i), part(5, 10 + i)) for i in range(3)}
    learn(model, clients, rounds=Rounds(rounds=2), settings=SETTINGS).save(tmp_path / "nets")
    nets = MetaNets.load(tmp_path / "nets")
    assert list(nets.sites.params) == trained

    got = personalize(model, nets, part(9, 30), epochs=3)
    assert type(got.model) is peft.peft_model.PeftModelForSequenceClassification or not tokens
    after = dict(got.model.named_parameters())
    for name, value in model.named_parameters():
        assert torch.equal(value, before[name]), name  # the user's own
        assert after[name].requires_grad == (name in trained)
        assert torch.equal(after[name], before[name]) == (name not in trained), name

    got.model.save_pretrained(tmp_path / "adapter")
    bare = base()
    for name, own in model.get_base_model().state_dict().items():
        plain = name.replace(".base_layer", "").replace(".original_module", "")
        if plain in bare.state_dict():
            bare.state_dict()[plain].copy_(own)
    again = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter").double()
    for norm in (m for m in got.model.modules() if isinstance(m, nn.BatchNorm1d)):
        (theirs,) = (m for m in again.modules() if isinstance(m, nn.BatchNorm1d))
        theirs.load_state_dict(norm.state_dict())  # statistics are no part of an adapter
    x = inputs(6, tokens=tokens, seed=40)
    torch.testing.assert_close(logits(again, x), logits(got.model, x))
