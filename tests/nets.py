"""Tiny models, one for every row of the layer table and every way a tree can be knotted; each with its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import wnsurgery as wn


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is the head's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, padding_idx=0)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.embed(ids)).tanh())


class Branches(nn.Module):
    """Residual and parallel branches, a shared module called twice, grouped and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.left = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.right = nn.Conv2d(8, 8, 1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.drop = nn.Dropout(0.3)
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.shared = nn.Linear(6, 6)
        self.head = nn.Linear(6, 4)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        h = h + self.drop(self.norm(self.left(h.relu()))) + self.right(h)
        h = self.up(h).relu().mean((2, 3))
        return self.head(self.shared(self.shared(h).relu()))


class SameConvTwice(nn.Module):
    """The convolution of a TCN: one module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(3, 4, 2)
        self.net = nn.Sequential(self.conv1, nn.ReLU(), nn.Conv1d(4, 2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Attention(nn.Module):
    """Multi-head attention, packed or with key and value widths of their own."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **widths)
        self.widths = widths

    def forward(self, x: Tensor) -> Tensor:
        key = x[..., : self.widths.get("kdim", 8)]
        value = x[..., : self.widths.get("vdim", 8)]
        return self.attention(x, key, value)[0]


class BilinearNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Bilinear(3, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(x, x)


class Recurrent(nn.Module):
    """Any recurrent module, its output alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out[0] if isinstance(out, tuple) else out


def sequential(*modules: nn.Module) -> nn.Module:
    return nn.Sequential(*modules)


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    return model


def _channels_last() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(4, 6, 3, groups=2)).to(
        memory_format=torch.channels_last
    )


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


NETS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "linear": (lambda: sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), floats(5, 3)),
    "bilinear": (BilinearNet, floats(5, 3)),
    "conv1d": (lambda: sequential(nn.Conv1d(4, 6, 3, groups=2)), floats(2, 4, 7)),
    "conv2d": (lambda: sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4)), floats(2, 3, 8, 8)),
    "conv3d": (lambda: sequential(nn.Conv3d(2, 3, 2)), floats(1, 2, 4, 4, 4)),
    "transposed1d": (lambda: sequential(nn.ConvTranspose1d(4, 3, 3)), floats(2, 4, 5)),
    "transposed2d-grouped": (lambda: sequential(nn.ConvTranspose2d(4, 6, 3, groups=2)), floats(2, 4, 5, 5)),
    "transposed1d-depthwise": (lambda: sequential(nn.ConvTranspose1d(4, 4, 4, stride=2, groups=4)), floats(2, 4, 5)),
    "transposed3d": (lambda: sequential(nn.ConvTranspose3d(2, 3, 2)), floats(1, 2, 3, 3, 3)),
    "channels-last": (_channels_last, floats(2, 3, 8, 8)),
    "rnn": (lambda: Recurrent(nn.RNN(3, 4, batch_first=True)), floats(2, 5, 3)),
    "gru": (lambda: Recurrent(nn.GRU(3, 4, 2, batch_first=True)), floats(2, 5, 3)),
    "lstm": (lambda: Recurrent(nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True)), floats(2, 5, 3)),
    "lstm-projected": (lambda: Recurrent(nn.LSTM(3, 4, proj_size=2, batch_first=True)), floats(2, 5, 3)),
    "rnn-cell": (lambda: Recurrent(nn.RNNCell(3, 4)), floats(2, 3)),
    "gru-cell": (lambda: Recurrent(nn.GRUCell(3, 4)), floats(2, 3)),
    "lstm-cell": (lambda: Recurrent(nn.LSTMCell(3, 4)), floats(2, 3)),
    "attention-packed": (Attention, floats(2, 4, 8)),
    "attention-unpacked": (lambda: Attention(kdim=5, vdim=6), floats(2, 4, 8)),
    "encoder-layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True), floats(2, 4, 8)),
    "tied": (TiedLanguageModel, torch.tensor([[1, 0, 3], [4, 5, 0]])),
    "same-module-twice": (SameConvTwice, floats(2, 3, 9)),
    "branches": (Branches, floats(4, 3, 6, 6)),
    "frozen": (_frozen, floats(5, 3)),
    "single-input": (lambda: sequential(nn.Linear(1, 4), nn.Linear(4, 1)), floats(5, 1)),
}


def net(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """A fresh model in evaluation mode and an input for it."""
    make, x = NETS[name]
    torch.manual_seed(0)
    model = make().to(dtype).eval()
    return model, x.to(dtype) if x.is_floating_point() else x


def bits(t: Tensor) -> Tensor:
    """The bit pattern of a floating-point tensor, so that -0.0 differs from 0.0 and NaN equals itself."""
    return t.detach().contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def effective(model: nn.Module, fqn: str) -> Tensor:
    """The weight the forward pass uses under a qualified name."""
    value: Any = model
    for part in fqn.split("."):
        value = getattr(value, part)
    return value


def large_layer(outputs: int, inputs: int, *, bias: bool = True, seed: int = 0) -> nn.Linear:
    """A converted linear layer whose magnitudes are not the norms it was converted with."""
    torch.manual_seed(seed)
    made = wn.apply_weight_norm(nn.Linear(inputs, outputs, bias=bias))
    with torch.no_grad():
        halves(made)[0].mul_(torch.rand(outputs, 1) + 0.5)
    return made


def halves(module: nn.Module) -> tuple[Tensor, Tensor]:
    """g and v of a module's weight."""
    return module.parametrizations["weight"].pair()  # type: ignore[index,union-attr,operator,no-any-return]
