"""Mean-only batch normalization: the paper's formula, the running mean, ranks, and the tools around it."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state

from wnsurgery import MeanOnlyBatchNorm1d, MeanOnlyBatchNorm2d, MeanOnlyBatchNorm3d

SHAPES = [
    (MeanOnlyBatchNorm1d, (6, 3)),
    (MeanOnlyBatchNorm1d, (4, 3, 5)),
    (MeanOnlyBatchNorm2d, (3, 3, 4, 2)),
    (MeanOnlyBatchNorm3d, (2, 3, 2, 3, 2)),
]
CLASSES = sorted({cls for cls, _ in SHAPES}, key=lambda cls: cls.__name__)


def per_channel(x: np.ndarray) -> np.ndarray:
    """Mean over everything but axis 1, shaped to broadcast."""
    return x.mean(axis=tuple(d for d in range(x.ndim) if d != 1), keepdims=True)


@pytest.mark.parametrize(("cls", "shape"), SHAPES)
def test_output_and_gradient_are_the_papers(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    """t~ = t - mean[t] + b, and dL/dt = dL/dt~ - mean[dL/dt~], dL/db = the sum of dL/dt~."""
    torch.manual_seed(0)
    norm = cls(3).double()
    norm.bias.data.normal_()
    t = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(shape, dtype=torch.float64)
    out = norm(t)
    out.backward(upstream)
    bias = norm.bias.detach().numpy().reshape(1, 3, *[1] * (t.dim() - 2))
    x, u = t.detach().numpy(), upstream.numpy()
    np.testing.assert_allclose(out.detach().numpy(), x - per_channel(x) + bias, atol=1e-12)
    np.testing.assert_allclose(t.grad.numpy(), u - per_channel(u), atol=1e-12)
    np.testing.assert_allclose(
        norm.bias.grad.numpy(), u.sum(axis=tuple(d for d in range(u.ndim) if d != 1)), atol=1e-12
    )


@pytest.mark.parametrize(("cls", "shape"), SHAPES)
def test_gradients_of_gradients(cls: type[nn.Module], shape: tuple[int, ...]) -> None:
    """First and second derivatives agree with finite differences, in training and in evaluation."""
    torch.manual_seed(0)
    norm = cls(3).double()
    t = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for training in (True, False):
        norm.train(training)
        assert torch.autograd.gradcheck(norm, (t,))
        assert torch.autograd.gradgradcheck(lambda x: norm(x).pow(3), (t,))


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, None])
@pytest.mark.parametrize(("cls", "shape"), SHAPES)
def test_running_mean_follows_torchs_momentum(
    cls: type[nn.Module], shape: tuple[int, ...], momentum: float | None
) -> None:
    """The running mean and the counter are those torch's BatchNorm keeps; None averages all batches alike."""
    torch.manual_seed(0)
    norm = cls(3, momentum=momentum)
    reference = getattr(nn, cls.__name__.removeprefix("MeanOnly"))(3, momentum=momentum)
    for _ in range(4):
        x = torch.randn(shape) + 2
        norm(x)
        reference(x)
        torch.testing.assert_close(norm.running_mean, reference.running_mean)
    assert norm.num_batches_tracked.item() == reference.num_batches_tracked.item() == 4
    norm.eval()
    norm.bias.data.normal_()
    shift = (norm.bias - norm.running_mean).reshape(1, 3, *[1] * (len(shape) - 2))
    torch.testing.assert_close(norm(x), x + shift)
    assert norm.num_batches_tracked.item() == 4


def test_without_statistics_evaluation_uses_the_batch() -> None:
    """track_running_stats=False leaves no buffers, and the mean is always the batch's."""
    norm = MeanOnlyBatchNorm1d(3, track_running_stats=False, bias=False).eval()
    assert not norm.state_dict()
    x = torch.randn(5, 3) + 4
    torch.testing.assert_close(norm(x).mean(0), torch.zeros(3), atol=1e-6, rtol=0)
    assert torch.equal(norm(torch.ones(1, 3)), torch.zeros(1, 3))  # one value per channel is its own mean


def test_a_process_group_asks_for_its_ranks() -> None:
    """Whoever names the ranks wants the mean over them."""
    assert MeanOnlyBatchNorm1d(3, process_group=object()).sync is True
    assert MeanOnlyBatchNorm1d(3).sync is False


@pytest.mark.parametrize("cls", CLASSES)
def test_refuses_what_torchs_batch_norm_refuses(cls: type[nn.Module]) -> None:
    """Another number of axes or of channels, or one value per channel in training, is a ValueError."""
    norm = cls(3)
    reference = getattr(nn, cls.__name__.removeprefix("MeanOnly"))(3)
    for rank in range(2, 7):
        shape = (2, 3, *[2] * (rank - 2))
        accepted = True
        try:
            reference(torch.zeros(shape))
        except ValueError:
            accepted = False
        if accepted:
            norm(torch.zeros(shape))
        else:
            with pytest.raises(ValueError, match=f"got {rank}D input"):
                norm(torch.zeros(shape))
    smallest = norm.ranks[0]
    for channels in (1, 4):
        with pytest.raises(ValueError, match="3 channels"):
            norm(torch.zeros(2, channels, *[2] * (smallest - 2)))
    with pytest.raises(ValueError, match="more than 1 value"):
        norm(torch.zeros(1, 3, *[1] * (smallest - 2)))
    norm.eval()(torch.zeros(1, 3, *[1] * (smallest - 2)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_mean_is_taken_in_float32(dtype: torch.dtype) -> None:
    """A mean whose sum leaves float16, and whose 16-bit sum would lose digits, is right to one rounding."""
    x = (torch.rand(20000, 2, generator=torch.Generator().manual_seed(0)) * 8 + 8).to(dtype)
    norm = MeanOnlyBatchNorm1d(2, momentum=1.0)
    out = norm(x)
    exact = x.double() - x.double().mean(0)
    assert out.dtype == dtype
    assert (out.double() - exact).abs().max() <= torch.finfo(dtype).eps * 8
    torch.testing.assert_close(norm.running_mean.double(), x.double().mean(0), atol=1e-5, rtol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert norm(x.bfloat16()).dtype == torch.bfloat16
    assert norm.running_mean.dtype == torch.float32


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compile_and_export(momentum: float | None) -> None:
    """One graph under torch.compile and torch.export, in training too, with the running mean updated."""
    x = torch.randn(4, 3, 5, 5)
    plain, norm = MeanOnlyBatchNorm2d(3, momentum), MeanOnlyBatchNorm2d(3, momentum)
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), plain(x))
    torch.testing.assert_close(norm.running_mean, plain.running_mean)
    for training in (True, False):
        exported = torch.export.export(copy.deepcopy(plain).train(training), (x,)).module()
        torch.testing.assert_close(exported(x), plain.train(training)(x))


def test_vmap_over_models() -> None:
    """An ensemble under vmap gives what its members give, running means included."""
    members = [MeanOnlyBatchNorm1d(3) for _ in range(2)]
    for member in members:
        member.bias.data.normal_()
    params, buffers = stack_module_state(members)
    x = torch.randn(2, 6, 3)
    out = torch.vmap(lambda p, b, t: functional_call(members[0], (p, b), (t,)))(params, buffers, x)
    for i, member in enumerate(members):
        torch.testing.assert_close(out[i], member(x[i]))
        torch.testing.assert_close(buffers["running_mean"][i], member.running_mean)


def test_copies_pickles_and_state_dicts() -> None:
    """A copy, a pickle and a state dict carry the bias and the statistics."""
    norm = MeanOnlyBatchNorm2d(3)
    norm(torch.randn(2, 3, 4, 4))
    norm.bias.data.normal_()
    fresh = MeanOnlyBatchNorm2d(3)
    fresh.load_state_dict(norm.state_dict())
    assert list(norm.state_dict()) == ["bias", "running_mean", "num_batches_tracked"]
    for other in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm)), fresh):
        assert all(
            torch.equal(a, b) for a, b in zip(norm.state_dict().values(), other.state_dict().values(), strict=True)
        )
    norm.reset_parameters()
    assert not any(t.any() for t in norm.state_dict().values())


RANK = """
import sys, torch, torch.distributed as dist
from wnsurgery import MeanOnlyBatchNorm1d
torch.set_num_threads(1)
rank, where = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{where}/meet", rank=rank, world_size=2)
joint = torch.load(f"{where}/joint.pt")
rows = slice(0, 3) if rank == 0 else slice(3, None)
norm = MeanOnlyBatchNorm1d(4, sync=True).double()
x = joint["x"][rows].clone().requires_grad_()
out = norm(x)
(grad,) = torch.autograd.grad((out**3 * joint["u"][rows]).sum(), x, create_graph=True)
(second,) = torch.autograd.grad(grad.square().sum(), x)
found = {"out": out.detach(), "grad": grad.detach(), "second": second, "mean": norm.running_mean}
norm = MeanOnlyBatchNorm1d(4, track_running_stats=False, sync=True).double()
found["trained"] = norm(x).detach()
found["evaluated"] = norm.eval()(x).detach()
torch.save(found, f"{where}/{rank}.pt")
dist.destroy_process_group()
"""


def test_two_ranks_are_one_batch(tmp_path: Path) -> None:
    """With sync, two processes with uneven shares give the output, gradients and running mean of the joint batch; in
    evaluation without running statistics each has the mean of its own."""
    joint = {"x": torch.randn(8, 4, dtype=torch.float64) + 3, "u": torch.randn(8, 4, dtype=torch.float64)}
    torch.save(joint, tmp_path / "joint.pt")
    root = Path(__file__).parent.parent
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], cwd=root, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    norm = MeanOnlyBatchNorm1d(4).double()
    x = joint["x"].clone().requires_grad_()
    out = norm(x)
    (grad,) = torch.autograd.grad((out**3 * joint["u"]).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), x)
    wanted = {"out": out.detach(), "grad": grad.detach(), "second": second, "trained": out.detach()}
    for name, whole in wanted.items():
        torch.testing.assert_close(torch.cat([p[name] for p in parts]), whole)
    for part, rows in zip(parts, joint["x"].split([3, 5]), strict=True):
        torch.testing.assert_close(part["mean"], norm.running_mean)
        torch.testing.assert_close(part["evaluated"], rows - rows.mean(0))
