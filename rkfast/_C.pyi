"""The C++ kernels for CPU tensors. What each returns stands in rkfast/ops/<op>/__init__.py."""

from collections.abc import Sequence

from torch import Tensor, dtype

# What update_running_stats takes behind the moments.
_Moved = tuple[int, Sequence[Tensor], Sequence[Tensor], Sequence[Tensor], float | None]

def survey(
    tensors: Sequence[Tensor | None],
    vectors: Sequence[Tensor | None],
    gates: Sequence[Tensor | None],
    running: int,
    counter: Tensor | None,
) -> int: ...
def survey_block(
    x: Tensor,
    shortcut: Tensor | None,
    convs: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    step: Tensor | None,
    strides: Sequence[int],
) -> int: ...
def survey_growths(
    x: Tensor,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    widths: Sequence[int],
    norms: Sequence[Tensor | None],
    mean: Tensor | None,
    var: Tensor | None,
) -> int: ...
def rk_sum(
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    steps: Sequence[Tensor | None],
    shift: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
    mask: bool,
    out: Tensor | None = None,
) -> list[Tensor]: ...
def rk_sum_backward(
    grad: Tensor,
    mask: Tensor | None,
    coeffs: Sequence[float],
    steps: Sequence[Tensor | None],
    step_terms: Sequence[Tensor],
    step_coeffs: Sequence[float],
    per_sample: Sequence[bool],
    shift: bool,
    channels_last: bool,
) -> list[Tensor]: ...
def bn_rk_sum(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    terms: Sequence[Tensor],
    coeffs: Sequence[float],
    step: Tensor | None,
    channels_last: bool,
    relu: bool,
    eps: float,
    moments: bool,
    mask: bool,
    out: Tensor | None = None,
) -> list[Tensor]: ...
def bn_rk_sum_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    step: Tensor | None,
    mask: Tensor | None,
    coeffs: Sequence[float],
    channels_last: bool,
    relu: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
    need_step: bool,
) -> list[Tensor]: ...
def channel_moments(x: Tensor, channels_last: bool) -> tuple[Tensor, Tensor]: ...
def update_running_stats(
    mean: Tensor,
    var: Tensor,
    count: int,
    running_mean: Sequence[Tensor],
    running_var: Sequence[Tensor],
    num_batches_tracked: Sequence[Tensor],
    momentum: float | None,
) -> None: ...
def dense_block(
    x: Tensor,
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    keeps: Sequence[Tensor | None],
    keep_scale: float,
    reads: Sequence[int],
    writes: Sequence[int],
    eps: Sequence[float],
    channels: int,
    summed: Sequence[int],
    mean: Tensor | None,
    var: Tensor | None,
    keep: bool,
    total_moments: bool,
) -> list[Tensor]: ...
def dense_block_backward(
    grad: Tensor,
    buffer: Tensor,
    mean: Tensor,
    var: Tensor,
    mid_moments: Sequence[Tensor],
    mids: Sequence[Tensor],
    conv1: Sequence[Tensor],
    conv2: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    keeps: Sequence[Tensor | None],
    keep_scale: float,
    reads: Sequence[int],
    writes: Sequence[int],
    eps: Sequence[float],
    inputs: int,
    summed: Sequence[int],
) -> list[Tensor]: ...
def bn_relu_conv(
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    channels_last: bool,
    eps: float,
    moments: bool,
) -> list[Tensor]: ...
def bn_relu_conv_backward(
    grad: Tensor,
    x: Tensor,
    conv: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_conv: bool,
    need_affine: bool,
) -> list[Tensor]: ...
def bn_relu_pool(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    eps: float,
) -> Tensor: ...
def bn_relu_pool_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    channels_last: bool,
    batch_stats: bool,
    eps: float,
    need_x: bool,
    need_affine: bool,
) -> list[Tensor]: ...
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    other: Tensor | None,
    channels_last: bool,
    relu: bool,
    moments: bool,
) -> list[Tensor]: ...
def conv_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    other: Tensor | None,
    channels_last: bool,
    need_x: bool,
    need_weight: bool,
) -> list[Tensor]: ...
def residual_block(
    x: Tensor,
    shortcut: Tensor | None,
    convs: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    step: Tensor | None,
    strides: Sequence[int],
    eps: Sequence[float],
    channels_last: bool,
    keep: bool,
) -> list[Tensor]: ...
def residual_block_backward(
    grad: Tensor,
    x: Tensor,
    outs: Sequence[Tensor],
    mask: Tensor,
    convs: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    step: Tensor | None,
    strides: Sequence[int],
    eps: Sequence[float],
    batch: Sequence[bool],
    channels_last: bool,
    own: bool,
    need_x: bool,
    need_shortcut: bool,
    need_convs: bool,
    need_step: bool,
) -> list[Tensor]: ...
def allow(serves: bool, by_name: bool) -> None: ...
def served() -> dict[str, int]: ...
def last(op: str) -> tuple[list[int], dtype, bool] | None: ...
def forget(op: str) -> None: ...
def rk_sum_call(
    terms: object, coeffs: object, steps: object, shift: object, relu: object, return_moments: object, deferred: bool
) -> Tensor | list[Tensor] | None: ...
def bn_rk_sum_call(
    x: object,
    weight: object,
    bias: object,
    running_mean: object,
    running_var: object,
    terms: object,
    coeffs: object,
    step: object,
    relu: object,
    training: object,
    momentum: object,
    eps: object,
    num_batches_tracked: object,
    moments: object,
    return_moments: object,
) -> Tensor | list[Tensor] | None: ...
def residual_block_recorded(
    x: Tensor,
    shortcut: Tensor | None,
    convs: Sequence[Tensor],
    norms: Sequence[Tensor | None],
    step: Tensor | None,
    strides: Sequence[int],
    eps: Sequence[float],
    channels_last: bool,
    moved: Sequence[_Moved | None],
) -> Tensor: ...
