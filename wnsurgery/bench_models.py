"""The nets that speed is measured on: wide and narrow, convolutions and attention, one example to a batch and many."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["MODELS", "BenchModel"]


@dataclass(frozen=True)
class BenchModel:
    """A net and its input: `make()` gives both, the same every time."""

    name: str
    make: Callable[[], tuple[nn.Module, Tensor]]


def _mlp(width: int, batch: int) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10)), torch.randn(batch, width)


class _Block(nn.Module):
    """The basic block of ResNet-18."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        same = stride == 1 and inner == outer
        self.skip = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(inner, outer, 1, stride, bias=False), nn.BatchNorm2d(outer))
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (h + self.skip(x)).relu()  # type: ignore[no-any-return]


def _resnet(batch: int) -> tuple[nn.Module, Tensor]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for outer, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Block(width, outer, stride), _Block(outer, outer, 1)]
        width = outer
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))
    return model, torch.randn(batch, 3, 32, 32)


class _Residual(nn.Module):
    """A residual block of HiFi-GAN: three dilated convolutions, each with one that is not."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__()
        self.convs1 = nn.ModuleList(
            nn.Conv1d(width, width, kernel, dilation=d, padding=d * (kernel - 1) // 2) for d in (1, 3, 5)
        )
        self.convs2 = nn.ModuleList(nn.Conv1d(width, width, kernel, padding=(kernel - 1) // 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.convs1, self.convs2, strict=True):
            x = x + second(nn.functional.leaky_relu(first(nn.functional.leaky_relu(x, 0.1)), 0.1))
        return x


class _Generator(nn.Module):
    """A HiFi-GAN generator: four transposed convolutions, three residual blocks after each."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before = nn.Conv1d(80, width, 7, padding=3)
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate, kernel in ((8, 16), (8, 16), (2, 4), (2, 4)):
            self.ups.append(nn.ConvTranspose1d(width, width // 2, kernel, rate, (kernel - rate) // 2))
            width //= 2
            self.blocks.extend(_Residual(width, k) for k in (3, 7, 11))
        self.after = nn.Conv1d(width, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        for i, up in enumerate(self.ups):
            x = up(nn.functional.leaky_relu(x, 0.1))
            x = sum((self.blocks[3 * i + k](x) for k in range(3)), torch.zeros(())) / 3
        return self.after(nn.functional.leaky_relu(x)).tanh()  # type: ignore[no-any-return]


class _Decoder(nn.Module):
    """A block of GPT: causal attention and a perceptron, each after a LayerNorm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, -1))
        h = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(h.transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.norm2(x))))  # type: ignore[no-any-return]


def _gpt(batch: int, length: int, width: int = 384) -> tuple[nn.Module, Tensor]:
    blocks = [_Decoder(width, 6) for _ in range(6)]
    model = nn.Sequential(nn.Embedding(512, width), *blocks, nn.LayerNorm(width), nn.Linear(width, 512))
    return model, torch.randint(0, 512, (batch, length))


def _hifigan(width: int, frames: int) -> tuple[nn.Module, Tensor]:
    return _Generator(width), torch.randn(1, 80, frames)


def _tiny() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(
        8, 16
    )


def _seeded(make: Callable[[], tuple[nn.Module, Tensor]]) -> Callable[[], tuple[nn.Module, Tensor]]:
    def build() -> tuple[nn.Module, Tensor]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return make()

    return build


MODELS: dict[str, BenchModel] = {
    name: BenchModel(name, _seeded(make))
    for name, make in {
        "mlp-b8": lambda: _mlp(4096, 8),
        "mlp-b256": lambda: _mlp(4096, 256),
        "resnet18-b1": lambda: _resnet(1),
        "resnet18-b16": lambda: _resnet(16),
        "hifigan-0.9M": lambda: _hifigan(128, 32),
        "hifigan-14M": lambda: _hifigan(512, 8),
        "gpt-1x64": lambda: _gpt(1, 64),
        "gpt-8x256": lambda: _gpt(8, 256),
        "tiny": _tiny,
    }.items()
}
