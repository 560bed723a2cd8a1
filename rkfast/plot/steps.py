"""The step sizes of a network while it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rkfast.plot import look
from rkfast.tsc import StepSizes


def draw(steps: Sequence[StepSizes], axes: Any = None, at: Sequence[float] | None = None) -> Any:
    """Each block's mean step size over the records, a colour for a stage, paler for its first blocks; of one record
    (Table 4 of Yang et al.) the blocks' means and the ranges over their channels.

    Args:
        steps: what ``rkfast.tsc.steps`` returned, time after time.
        axes: to draw into; None makes a figure.
        at: where the records stand, such as epochs; None counts them from 0.

    Returns:
        The figure.

    Raises:
        ValueError: there are no records, or they are not of the same blocks; or of other length than ``at``.
    """
    if not steps:
        raise ValueError("steps: there is nothing to draw; expected at least one record")
    names = [block.name for block in steps[0].blocks]
    for i, record in enumerate(steps):
        if [block.name for block in record.blocks] != names:
            raise ValueError(f"steps: [{i}] has other blocks than [0]; expected records of one network")
    places = list(range(len(steps)) if at is None else at)
    if len(places) != len(steps):
        raise ValueError(f"at: expected {len(steps)}, one for each record, got {len(places)}")
    if axes is None:
        axes = look.figure(8, 4.5).subplots()
    stages: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        stages.setdefault(name.rpartition(".")[0], []).append(i)
    for s, (stage, members) in enumerate(stages.items()):
        colour = look.COLOURS[s % len(look.COLOURS)]
        label = f"{stage}, {len(members)} blocks" if len(members) > 1 else names[members[0]]
        if len(steps) == 1:
            blocks = [steps[0].blocks[i] for i in members]
            axes.vlines(members, [b.min for b in blocks], [b.max for b in blocks], color=colour, alpha=0.5)
            axes.plot(members, [b.mean for b in blocks], label=label, **look.marked(s))
            continue
        for order, i in enumerate(members, 1):
            values = [record.blocks[i].mean for record in steps]
            last = order == len(members)
            axes.plot(
                places, values, label=label if last else None, color=colour, alpha=0.25 + 0.75 * order / len(members)
            )
    first, last_time = steps[0].evolution_time, steps[-1].evolution_time
    if len(steps) == 1:
        axes.set(xlabel="block", title=f"evolution time T = {first:.3g}")
    else:
        axes.set(xlabel="record", title=f"evolution time T from {first:.3g} to {last_time:.3g}")
    axes.set_ylabel("step size, mean over channels")
    look.tidy(axes)
    look.legend(axes)
    return axes.figure
