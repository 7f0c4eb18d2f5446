"""The original project's language model in PyTorch, after its description; parameters carry its published names."""

import torch
from torch import nn
from torch.nn import functional

TOKENS = ["<EOS>", "<UNK>", "<BOS>", *"abcdefg\n"]
LENGTH = 24  # of the longest sequence, a multiple of all total factors


class Head(nn.Module):
    def __init__(self, d_model, d_head, block_size, bias):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d_model, d_head, bias=bias) for _ in range(3))
        self.register_buffer("tril", torch.ones(block_size, block_size).tril())

    def forward(self, x):
        scores = self.q(x) @ self.k(x).mT * self.q.out_features**-0.5
        hidden = self.tril[: x.shape[1], : x.shape[1]] == 0
        return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ self.v(x)


class Attention(nn.Module):
    def __init__(self, d_model, n_heads, block_size, bias):
        super().__init__()
        d_head = d_model // n_heads
        self.heads = nn.ModuleList(Head(d_model, d_head, block_size, bias) for _ in range(n_heads))
        self.linear = nn.Linear(n_heads * d_head, d_model)

    def forward(self, x):
        return self.linear(torch.cat([head(x) for head in self.heads], -1))


class FeedForward(nn.Module):
    def __init__(self, d_model):
        super().__init__()
        self.sequence = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.ReLU(), nn.Linear(4 * d_model, d_model))

    def forward(self, x):
        return self.sequence(x)


class Layer(nn.Module):
    def __init__(self, d_model, n_heads, block_size, bias):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attn = Attention(d_model, n_heads, block_size, bias)
        self.ffn = FeedForward(d_model)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Hourglass(nn.Module):
    """`factors` are pairs of layers and factor; each factor multiplies those before it, the first one is ignored."""

    def __init__(self, d_model, n_heads, block_size, factors, bias):
        super().__init__()

        def layers():
            return nn.ModuleList(Layer(d_model, n_heads, block_size, bias) for _ in range(factors[0]))

        self.pre_layer = layers()
        self.hourglass = None
        if len(factors) > 2:
            self.k = factors[3]
            self.linearProjection = nn.Linear(self.k * d_model, d_model)
            self.hourglass = Hourglass(d_model, n_heads, block_size, factors[2:], bias)
            self.post_layer = layers()

    def forward(self, x):
        for layer in self.pre_layer:
            x = layer(x)
        if self.hourglass is None:
            return x
        batch, length, d_model = x.shape
        shifted = functional.pad(x, (0, 0, self.k, 0))[:, : length + 1]  # by k, not k - 1: one position longer
        shifted = functional.pad(shifted, (0, 0, 0, -shifted.shape[1] % self.k))
        pooled = self.linearProjection(shifted.reshape(batch, -1, self.k * d_model))
        x = x + self.hourglass(pooled).repeat_interleave(self.k, 1)[:, :length]
        for layer in self.post_layer:
            x = layer(x)
        return x


class PositionalEncoding(nn.Module):
    def __init__(self, d_model, block_size):
        super().__init__()
        self.pe = nn.Embedding(block_size, d_model)


class HourglassLM(nn.Module):
    """int [B, L] -> logits [B, L, vocab_size]; `bias` in the query, key and value projections, which it has not."""

    def __init__(self, vocab_size, d_model, n_heads, block_size, factors, bias=False):
        super().__init__()
        self.position_embedding = PositionalEncoding(d_model, block_size)
        self.tokens_embedding = nn.Embedding(vocab_size, d_model)
        self.hourglass = Hourglass(d_model, n_heads, block_size, factors, bias)
        self.norm = nn.LayerNorm(d_model)
        self.linear = nn.Linear(d_model, vocab_size)

    def forward(self, tokens):
        x = self.tokens_embedding(tokens) + self.position_embedding.pe.weight[: tokens.shape[1]]
        return self.linear(self.norm(self.hourglass(x)))


def randomize(model, seed=0):
    """Large weights, so that no path is too faint to test."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.2, generator=generator)
    return model.eval()


def original(factors, *, vocab_size=11, bias=False):
    return randomize(HourglassLM(vocab_size, 16, 3, LENGTH, factors, bias))  # heads of 5: 3 does not divide 16


class Malicious:
    """An object that creates the file at `path` when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")
