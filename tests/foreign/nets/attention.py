"""Attention: torch's layers, a vision transformer, BERT by transformers' own classes, LoRA."""

from __future__ import annotations

import peft
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from foreign.nets.case import Case, seeded


class Encoder(nn.Module):
    """Embedded tokens and torch's encoder."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class SelfAttention(nn.Module):
    """One multi-head attention between batch-norms."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x.transpose(1, 2)).transpose(1, 2)
        return self.head(self.attention(h, h, h, need_weights=False)[0].mean(1))


class VisionTransformer(nn.Module):
    """Patches, a class token, positions, fused attention with pre-norms."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 4, 2, stride=2)
        self.cls = nn.Parameter(torch.zeros(1, 1, 4))
        self.position = nn.Parameter(torch.zeros(1, 5, 4))
        self.norm1, self.norm2 = nn.LayerNorm(4), nn.LayerNorm(4)
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), -1, -1), x], 1) + self.position
        n, t, d = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, t, 3, 2, d // 2).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(h.transpose(1, 2).reshape(n, t, d))
        return self.head((x + self.mlp(self.norm2(x)))[:, 0])


def bert(dropout: float = 0.0) -> transformers.BertForSequenceClassification:
    """Return transformers' BERT classifier, very small."""
    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=11,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=6,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
            num_labels=3,
        )
    )


class Logits(nn.Module):
    """A model of transformers, wrapped as users wrap them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(input_ids=tokens).logits


class Plain(nn.Module):
    """What the adapters of LoRA go into."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.norm(self.a(x))))))


def lora(dropout: float = 0.0) -> nn.Module:
    """Return a peft model as it comes from get_peft_model: adapters and the head are trained."""
    config = peft.LoraConfig(
        r=2, target_modules=["a", "b"], modules_to_save=["head"], lora_dropout=dropout
    )
    return peft.get_peft_model(Plain(), config)


def lora_bert() -> nn.Module:
    """Return BERT with adapters on its attention, as it comes from get_peft_model."""
    config = peft.LoraConfig(
        r=2, task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=0.0
    )
    return peft.get_peft_model(bert(), config)


CASES = {
    "TransformerEncoder": Case(build=seeded(Encoder), shape=(4,), tokens=11),
    "MultiheadAttention": Case(build=seeded(SelfAttention), shape=(3, 4)),
    "vision transformer": Case(build=seeded(VisionTransformer), shape=(1, 4, 4)),
    "BERT": Case(build=seeded(lambda: Logits(bert())), shape=(4,), tokens=11),
    "LoRA": Case(build=seeded(lora), shape=(5,)),
    "LoRA on BERT": Case(build=seeded(lambda: Logits(lora_bert())), shape=(4,), tokens=11),
    "TransformerEncoder with dropout": Case(
        build=seeded(lambda: Encoder(0.3)), shape=(4,), tokens=11, random=True
    ),
    "MultiheadAttention with dropout": Case(
        build=seeded(lambda: SelfAttention(0.3)), shape=(3, 4), random=True
    ),
    "BERT with dropout": Case(
        build=seeded(lambda: Logits(bert(0.2))), shape=(4,), tokens=11, random=True
    ),
    "LoRA with dropout": Case(build=seeded(lambda: lora(0.3)), shape=(5,), random=True),
}
