"""Nets that weight norm is known from, written anew and small after their papers, and torch's own sequence models.

HiFi-GAN (Kong et al. 2020), TCN (Bai et al. 2018), PixelCNN++ (Salimans et al. 2017), the projection head of DINO
(Caron et al. 2021), the signed distance net of NeuS (Wang et al. 2021), WaveGlow (Prenger et al. 2019). They come as
their authors train them: under torch's weight norm, the old hooks or the parametrization.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import weight_norm as hooked
from torch.nn.utils.parametrizations import weight_norm

__all__ = ["CLASSICS"]

Inputs = Mapping[str, Tensor]


def floats(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


class HiFiGAN(nn.Module):
    """The generator: transposed convolutions, each followed by the mean of dilated residual blocks."""

    def __init__(self, mels: int = 8, width: int = 16, rates: tuple[int, ...] = (4, 2)) -> None:
        super().__init__()
        self.conv_pre = hooked(nn.Conv1d(mels, width, 7, padding=3))
        self.ups, self.blocks = nn.ModuleList(), nn.ModuleList()
        for rate in rates:
            self.ups.append(hooked(nn.ConvTranspose1d(width, width // 2, 2 * rate, rate, rate // 2)))
            width //= 2
            branches = [nn.ModuleList(self._conv(width, k, d) for d in (1, 3)) for k in (3, 5)]
            self.blocks.append(nn.ModuleList(branches))
        self.conv_post = hooked(nn.Conv1d(width, 1, 7, padding=3))

    @staticmethod
    def _conv(width: int, kernel: int, dilation: int) -> nn.Module:
        return hooked(nn.Conv1d(width, width, kernel, dilation=dilation, padding=(kernel - 1) // 2 * dilation))

    def forward(self, mel: Tensor) -> Tensor:
        x = self.conv_pre(mel)
        for up, branches in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, 0.1))
            total = torch.zeros_like(x)
            for branch in branches:  # type: ignore[union-attr]
                y = x
                for conv in branch:
                    y = y + conv(F.leaky_relu(y, 0.1))
                total = total + y
            x = total / len(branches)  # type: ignore[arg-type]
        return self.conv_post(F.leaky_relu(x)).tanh()


class PeriodDiscriminator(nn.Module):
    """HiFi-GAN's discriminator of one period: the sound folded into rows, kernels (k, 1)."""

    def __init__(self, period: int = 3) -> None:
        super().__init__()
        self.period = period
        widths = [1, 4, 8, 8]
        self.convs = nn.ModuleList(weight_norm(nn.Conv2d(a, b, (5, 1), (3, 1), (2, 0))) for a, b in pairwise(widths))
        self.conv_post = weight_norm(nn.Conv2d(8, 1, (3, 1), 1, (1, 0)))

    def forward(self, sound: Tensor) -> Tensor:
        sound = F.pad(sound, (0, -sound.shape[-1] % self.period), "reflect")
        x = sound.view(*sound.shape[:2], -1, self.period)
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
        return self.conv_post(x).flatten(1)


class TemporalBlock(nn.Module):
    """A block of the TCN: each convolution is known under two names."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        pad = nn.ConstantPad1d((2 * dilation, 0), 0.0)
        self.conv1 = hooked(nn.Conv1d(inputs, outputs, 3, dilation=dilation))
        self.conv2 = hooked(nn.Conv1d(outputs, outputs, 3, dilation=dilation))
        self.net = nn.Sequential(pad, self.conv1, nn.ReLU(), nn.Dropout(0.2), pad, self.conv2, nn.ReLU())
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) + (x if self.downsample is None else self.downsample(x))).relu()


def tcn() -> nn.Module:
    return nn.Sequential(TemporalBlock(4, 8, 1), TemporalBlock(8, 8, 2), nn.Conv1d(8, 5, 1))


class GatedBlock(nn.Module):
    """PixelCNN++'s gated residual block with a skip from the other stream, convolutions shifted down."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv2d(2 * width, width, (2, 3)))
        self.skip = weight_norm(nn.Conv2d(2 * width, width, 1))
        self.second = weight_norm(nn.Conv2d(2 * width, 2 * width, (2, 3)))

    @staticmethod
    def _elu(x: Tensor) -> Tensor:
        return F.elu(torch.cat([x, -x], 1))

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        h = self.first(F.pad(self._elu(x), (1, 1, 1, 0))) + self.skip(self._elu(other))
        value, gate = self.second(F.pad(self._elu(h), (1, 1, 1, 0))).chunk(2, 1)
        return x + value * gate.sigmoid()


class PixelCNN(nn.Module):
    """One resolution of PixelCNN++ with its way down and up, and a mixture of logistics at the end."""

    def __init__(self, width: int = 6, mixtures: int = 2) -> None:
        super().__init__()
        self.enter = weight_norm(nn.Conv2d(4, width, (2, 3)))
        self.blocks = nn.ModuleList(GatedBlock(width) for _ in range(2))
        self.down = weight_norm(nn.Conv2d(width, width, (2, 3), 2))
        self.up = weight_norm(nn.ConvTranspose2d(width, width, (2, 3), 2, (0, 1), (0, 1)))
        self.leave = weight_norm(nn.Conv2d(width, 10 * mixtures, 1))

    def forward(self, image: Tensor) -> Tensor:
        ones = torch.ones_like(image[:, :1])
        x = self.enter(F.pad(torch.cat([image, ones], 1), (1, 1, 1, 0)))
        low = self.down(F.pad(x, (1, 1, 1, 0)))
        y = self.up(low)[..., : x.shape[-2], : x.shape[-1]]
        for block in self.blocks:
            y = block(y, x)
        return self.leave(F.elu(y))


class DINOHead(nn.Module):
    """A projection onto prototypes of norm one: the last layer's magnitudes are 1 and not trained."""

    def __init__(self, inputs: int = 12, prototypes: int = 20) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 8))
        self.last_layer = weight_norm(nn.Linear(8, prototypes, bias=False))
        magnitude = self.last_layer.parametrizations.weight.original0  # type: ignore[union-attr]
        magnitude.data.fill_(1)
        magnitude.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class SignedDistance(nn.Module):
    """NeuS: a softplus net over a positional encoding, started as a sphere, its input joined again halfway."""

    def __init__(self, width: int = 16, layers: int = 4) -> None:
        super().__init__()
        inputs = 3 + 3 * 2 * 2
        sizes = [inputs, *[width] * layers, width + 1]
        for i, (a, b) in enumerate(pairwise(sizes)):
            out = b - inputs if i + 1 == layers // 2 else b
            layer = nn.Linear(a, max(1, out))
            nn.init.normal_(layer.weight, 0.0, math.sqrt(2.0 / b))
            nn.init.zeros_(layer.bias)
            self.add_module(f"lin{i}", hooked(layer))
        self.halfway, self.count = layers // 2, len(sizes) - 1

    def forward(self, points: Tensor) -> Tensor:
        bands = [f(points * 2**k) for k in range(2) for f in (torch.sin, torch.cos)]
        encoded = torch.cat([points, *bands], -1)
        x = encoded
        for i in range(self.count):
            if i == self.halfway:
                x = torch.cat([x, encoded], -1) / math.sqrt(2)
            x = getattr(self, f"lin{i}")(x)
            if i < self.count - 1:
                x = F.softplus(x, beta=100)
        return x


class WaveGlow(nn.Module):
    """Two steps of flow: an invertible 1x1 convolution with its log-determinant, an affine coupling by a WaveNet."""

    def __init__(self, channels: int = 4, mels: int = 3, width: int = 8) -> None:
        super().__init__()
        self.mixers, self.couplings = nn.ModuleList(), nn.ModuleList()
        for _ in range(2):
            mixer = nn.Conv1d(channels, channels, 1, bias=False)
            with torch.no_grad():
                mixer.weight.copy_(torch.linalg.qr(torch.randn(channels, channels))[0][..., None])
            self.mixers.append(mixer)
            self.couplings.append(
                nn.ModuleDict(
                    {
                        "start": weight_norm(nn.Conv1d(channels // 2, width, 1)),
                        "mel": weight_norm(nn.Conv1d(mels, 2 * width, 1)),
                        "gate": weight_norm(nn.Conv1d(width, 2 * width, 3, padding=1)),
                        "end": nn.Conv1d(width, channels, 1),
                    }
                )
            )

    def forward(self, sound: Tensor, mel: Tensor) -> tuple[Tensor, Tensor]:
        x, total = sound, sound.new_zeros(())
        for mixer, parts in zip(self.mixers, self.couplings, strict=True):
            x = mixer(x)
            total = total + torch.slogdet(mixer.weight.squeeze(-1))[1] * sound.shape[0] * sound.shape[-1]  # type: ignore[operator,union-attr]
            kept, changed = x.chunk(2, 1)
            value, gate = (parts["gate"](parts["start"](kept)) + parts["mel"](mel)).chunk(2, 1)  # type: ignore[index]
            shift, scale = parts["end"](value.tanh() * gate.sigmoid()).chunk(2, 1)  # type: ignore[index]
            x = torch.cat([kept, changed * scale.exp() + shift], 1)
            total = total + scale.sum()
        return x, total


class Sequence(nn.Module):
    """Torch's recurrent layers one after the other, cells included."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, bidirectional=True, batch_first=True)
        self.gru = nn.GRU(12, 5, batch_first=True)
        self.rnn = nn.RNN(5, 5, batch_first=True)
        self.cell = nn.LSTMCell(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.lstm, self.gru, self.rnn):
            x = layer(x)[0]
        h = c = x.new_zeros(x.shape[0], 4)
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
        return h


def transformer() -> nn.Module:
    return nn.Transformer(8, 2, 1, 1, 16, batch_first=True)


CLASSICS: dict[str, Callable[[], tuple[nn.Module, Inputs]]] = {
    "hifi-gan": lambda: (HiFiGAN(), {"mel": floats(2, 8, 6)}),
    "hifi-gan-period": lambda: (PeriodDiscriminator(), {"sound": floats(2, 1, 100)}),
    "tcn": lambda: (tcn(), {"input": floats(2, 4, 12)}),
    "pixelcnn++": lambda: (PixelCNN(), {"image": floats(2, 3, 8, 8)}),
    "dino-head": lambda: (DINOHead(), {"x": floats(4, 12)}),
    "neus-sdf": lambda: (SignedDistance(), {"points": floats(6, 3)}),
    "waveglow": lambda: (WaveGlow(), {"sound": floats(2, 4, 10), "mel": floats(2, 3, 10)}),
    "torch-transformer": lambda: (transformer(), {"src": floats(2, 5, 8), "tgt": floats(2, 4, 8)}),
    "torch-recurrent": lambda: (Sequence(), {"x": floats(2, 5, 4)}),
}
