"""Mean-only batch normalization: subtract the batch mean per channel, leave the scale to weight norm.

t~ = t - mean[t] + b over batch and positions, so that dL/dt = dL/dt~ - mean[dL/dt~]; evaluation uses a running mean.

Source: Salimans & Kingma 2016, "Weight Normalization", section 4, equations 9 and 10 (arXiv 1602.07868).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["MeanOnlyBatchNorm", "MeanOnlyBatchNorm1d", "MeanOnlyBatchNorm2d", "MeanOnlyBatchNorm3d"]

_HALF = (torch.float16, torch.bfloat16)


class MeanOnlyBatchNorm(nn.Module):
    """What the three public classes share; they differ in the number of axes they take."""

    ranks: ClassVar[tuple[int, ...]] = ()
    running_mean: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        momentum: float | None = 0.1,
        bias: bool = True,
        track_running_stats: bool = True,
        *,
        sync: bool = False,
        process_group: Any = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.momentum = momentum
        self.track_running_stats = track_running_stats
        self.sync = sync or process_group is not None
        self.process_group = process_group
        if bias:
            self.bias = nn.Parameter(torch.zeros(num_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        tracked = track_running_stats
        count = torch.tensor(0, dtype=torch.long, device=device) if tracked else None
        self.register_buffer("running_mean", torch.zeros(num_features, device=device, dtype=dtype) if tracked else None)
        self.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Forget the running mean."""
        if self.running_mean is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Forget the running mean and set the bias to zero."""
        self.reset_running_stats()
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        self._check(input)
        if self.training or self.running_mean is None:
            mean = self._batch_mean(input)
            if self.training and self.track_running_stats:
                self._track(mean.detach())
        else:
            mean = self.running_mean
        wide = _wide(input.dtype)
        shift = -mean.to(wide) if self.bias is None else self.bias.to(wide) - mean.to(wide)
        return (input + shift.reshape(-1, *[1] * (input.dim() - 2))).to(input.dtype)

    def _check(self, input: Tensor) -> None:
        if input.dim() not in self.ranks:
            raise ValueError(f"expected {' or '.join(f'{r}D' for r in self.ranks)} input (got {input.dim()}D input)")
        if input.shape[1] != self.num_features:
            raise ValueError(f"expected {self.num_features} channels on axis 1 (got {input.shape[1]})")

    def _batch_mean(self, input: Tensor) -> Tensor:
        """Mean per channel over batch and positions, in training of all ranks if asked for, in at least float32."""
        axes = [0, *range(2, input.dim())]
        wide = _wide(input.dtype)
        if self.training and self.sync and _ranks(self.process_group) > 1:
            total = input.sum(axes, dtype=wide)
            count = torch.full_like(total[:1], input.numel() // input.shape[1])
            sums = _AllReduce.apply(torch.cat([total, count]), self.process_group)  # type: ignore[no-untyped-call]
            return sums[:-1] / sums[-1]  # type: ignore[no-any-return]
        if self.training and input.numel() // input.shape[1] < 2:
            raise ValueError(f"expected more than 1 value per channel when training, got input size {input.shape}")
        return input.mean(axes, dtype=wide)

    def _track(self, mean: Tensor) -> None:
        """running_mean <- (1 - momentum) running_mean + momentum mean; momentum None averages all batches alike."""
        if self.running_mean is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        mean = mean.to(self.running_mean.dtype)
        if self.momentum is None:
            self.running_mean.add_((mean - self.running_mean) / self.num_batches_tracked)
        else:
            self.running_mean.mul_(1 - self.momentum).add_(mean, alpha=self.momentum)

    def extra_repr(self) -> str:
        sync = ", sync=True" if self.sync else ""
        bias = "" if self.bias is not None else ", bias=False"
        return (
            f"{self.num_features}, momentum={self.momentum}{bias}, track_running_stats={self.track_running_stats}{sync}"
        )


_DOC = """Mean-only batch normalization of {shapes}, channels on axis 1.

    t~ = t - mean[t] + b, the mean being taken over batch and positions; in evaluation, the running mean. To go after a
    layer under weight norm, which supplies the scale. Its gradient is dL/dt = dL/dt~ - mean[dL/dt~].
    `fold_weight_norm` moves the running mean and b into the bias of the layer before it and leaves an `nn.Identity`.

    >>> norm = wn.{name}(3)
    >>> out = norm(torch.randn({example}) + 5)
    >>> bool(out.mean({axes}).abs().max() < 1e-5), norm.num_batches_tracked.item()
    (True, 1)

    Args:
        num_features: C, the number of channels.
        momentum: running_mean <- (1 - momentum) running_mean + momentum mean, as in torch's BatchNorm (the paper's code
            uses 0.1); None gives the average of all batches.
        bias: learn b, one value per channel; without it, b = 0.
        track_running_stats: keep `running_mean` and `num_batches_tracked`; without them evaluation uses the batch, on
            each rank its own.
        sync: take the mean over all ranks of `torch.distributed` in training, gradients included, as SyncBatchNorm
            does; every rank must take part in every step.
        process_group: the ranks to take it over, None for all; giving one implies `sync`.
        device, dtype: of b and the running mean; default: torch's.

    The mean of 16-bit input is taken in float32; the output has the type of the input.

    Raises ValueError in forward for another number of axes or channels, or for one value per channel in training.

    Source: Salimans & Kingma 2016, section 4, equations 9 and 10.
    """


class MeanOnlyBatchNorm1d(MeanOnlyBatchNorm):
    __doc__ = _DOC.format(shapes="(N, C) or (N, C, L)", name="MeanOnlyBatchNorm1d", example="64, 3", axes="0")
    ranks = (2, 3)


class MeanOnlyBatchNorm2d(MeanOnlyBatchNorm):
    __doc__ = _DOC.format(shapes="(N, C, H, W)", name="MeanOnlyBatchNorm2d", example="8, 3, 5, 5", axes="(0, 2, 3)")
    ranks = (4,)


class MeanOnlyBatchNorm3d(MeanOnlyBatchNorm):
    __doc__ = _DOC.format(
        shapes="(N, C, D, H, W)", name="MeanOnlyBatchNorm3d", example="8, 3, 2, 5, 5", axes="(0, 2, 3, 4)"
    )
    ranks = (5,)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in _HALF else dtype


def _ranks(group: Any) -> int:
    """How many processes take part; 1 without torch.distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 1
    return torch.distributed.get_world_size(group)


class _AllReduce(torch.autograd.Function):
    """Sum over ranks; what the losses of all ranks say about the sum is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _AllReduce.apply(grad, ctx.group), None  # type: ignore[no-untyped-call]
