"""A clique block: stages that update each other in turn, over slots like those of a dense block.

With a slot for every value that a stage takes, ``[y, v_1 ... v_s, z_1 ... z_s]``, the newest values of the others lie
next to each other: ``v_{i+1} ... v_s, z_1 ... z_{i-1}`` is a window that slides on by a slot from stage to stage. That
is all that clique_block adds to dense_block, whose kernels run it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from rkfast.ops.channel_moments import Moments
from rkfast.ops.dense_block import Slots, checked, run
from rkfast.ops.norm import Norm


class Stages(NamedTuple):
    """Convolutions and BatchNorms of s stages; with a bottleneck also the second ones."""

    conv1: Sequence[Tensor]
    norm1: Sequence[Norm]
    conv2: Sequence[Tensor] = ()
    norm2: Sequence[Norm] = ()


def clique_block(
    y: Tensor,
    init: Stages,
    update: Stages,
    *,
    read_input: bool = False,
    newest: bool = True,
    rounds: int = 1,
    sum: bool = True,
    drop_rate: float = 0.0,
    training: bool = True,
    memory: str = "speed",
    moments: Moments | None = None,
    return_moments: bool = False,
) -> Any:
    """Stage-I and Stage-II of a clique block as one function, over one channels_last buffer with a slot for each value.

    With ``f(x) = conv1(relu(norm1(x)))``, or ``conv2(relu(norm2(conv1(relu(norm1(x))))))`` with a bottleneck::

        Stage-I    v_i = f_i([y, v_1, ..., v_{i-1}])                                     i = 1 ... s
        Stage-II   z_i = g_i([z_1, ..., z_{i-1}, v_{i+1}, ..., v_s])                     newest values
                   z_i = g_i([v_1, ..., v_{i-1}, v_{i+1}, ..., v_s])                     newest=False
        out = y + z_1 + ... + z_s                                                        or [z_1, ..., z_s]

    This is IRKNet's step (Zhu et al., "Convolutional Neural Networks combined with Runge-Kutta Methods", section
    3.3.2), CliqueNet's block (Yang et al., "Convolutional Neural Networks with Alternately Updated Clique", section 3),
    and, with read_input, the later RKCNN-I and RKCNN-R. Weights that both stages share are given twice, and their
    gradients add up: with W_ji from j to i, ``init.conv1[i]`` is [W_0i ... W_{i-1}i] and ``update.conv1[i]`` is all but
    W_0i and W_ii.

    Args:
        y: Tensor [N, C, H, W]; dtypes as in dense_block.
        init: of the s stages, s at least 2; the i-th reads C + (i - 1) * k channels.
        update: of the s updates, which read (s - 1) * k channels, and y before them with read_input. Norms may be given
            for all rounds, rounds * s of them; otherwise all rounds have the same. Channels stand in the order of the
            formula.
        read_input: y takes part in the update.
        newest: updates read what the ones before them made; False: what the round before made.
        rounds: of updates; each starts from what the one before made.
        sum: add the result to y, for which y must have k channels; False returns z_1, ..., z_s.
        drop_rate, training, memory, moments, return_moments: as in dense_block.

    Returns:
        Tensor [N, C, H, W], or [N, s * k, H, W] with sum=False; channels_last. For the backward are kept: the buffer of
        C + (1 + rounds) * s * k channels, their moments and, at "speed", the bottlenecks.

    Differentiable once. Running statistics and counters advance once for each time that their norm is used.

    Raises:
        TypeError, ValueError, RuntimeError: as dense_block; ValueError also for fewer than 2 stages, and for
            newest=False with more than one round.
    """
    s = len(init.conv1)
    if s < 2:
        raise ValueError(f"init: expected at least 2 stages, which update each other, got {s}")
    if rounds < 1:
        raise ValueError(f"rounds: expected at least 1, got {rounds}")
    if not newest and rounds > 1:
        raise ValueError("rounds: newest=False reads three ranges of slots from the second round on; expected 1")
    for name, values in (("conv1", update.conv1), ("conv2", update.conv2)):
        if len(values) not in ((s,) if name == "conv1" else (0, s)):
            raise ValueError(f"update.{name}: expected {s}, as many as stages in init, got {len(values)}")
    conv1 = [*init.conv1, *(w for _ in range(rounds) for w in update.conv1)]
    conv2 = [*init.conv2, *(w for _ in range(rounds) for w in update.conv2)]
    norm1 = [*init.norm1, *_each_round(update.norm1, s, rounds)]
    norm2 = [*init.norm2, *_each_round(update.norm2, s, rounds)]
    y, conv1, conv2 = checked(y, conv1, conv2, norm1, norm2, moments, memory, drop_rate)
    slots = _slots(y.shape[1], (conv2 or conv1)[0].shape[0], s, rounds, read_input, newest, sum)
    widths = {w.shape[0] for w in conv2 or conv1}
    if len(widths) != 1:
        raise ValueError(f"init, update: all stages have the same number of channels; got {sorted(widths)}")
    rate = drop_rate if training else 0.0
    out, found = run(y, slots, conv1, norm1, conv2, norm2, rate, memory, moments, return_moments)
    return (out, found) if return_moments else out


def _each_round(norms: Sequence[Norm], s: int, rounds: int) -> list[Norm]:
    return list(norms) * (rounds if len(norms) == s else 1)


def _slots(c: int, k: int, s: int, rounds: int, read_input: bool, newest: bool, sum: bool) -> Slots:
    reads: list[int] = []
    turns: list[tuple[int, int]] = []
    for i in range(s):
        reads += [0, c + i * k, 0, 0]
        turns.append((0, 0))
    for n in range(rounds):
        for i in range(s):
            before = c + n * s * k  # where the values of the round before begin
            window = [before + (i + 1) * k, before + (i + s) * k]
            if not newest:
                reads += [0 if read_input else c, before + i * k, before + (i + 1) * k, before + s * k]
                turns.append((0, 0))
            elif read_input:
                reads += [0, c, *window]
                turns.append((c, i * k))
            else:
                reads += [*window, 0, 0]
                turns.append((0, i * k))
    evaluations = s * (1 + rounds)
    channels = c + evaluations * k
    last = channels - s * k
    if sum and k != c:
        raise ValueError(f"sum: adds stages of {k} channels to y, which has {c}; expected as many")
    return Slots(
        reads=reads,
        writes=[c + i * k for i in range(evaluations)],
        channels=channels,
        summed=[last + i * k for i in range(s)] if sum else [],
        first=0 if sum else last,
        turns=turns,
    )
