"""The methods by their names. Each is checked when it is first asked for."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from rkfast.tableau.surd import Surd


def _over(denominator: int, numerators: Sequence[int]) -> list[Fraction]:
    return [Fraction(n, denominator) for n in numerators]


def _surd(d: int, p: int, q: int = 0, denominator: int = 1) -> Surd | Fraction:
    """(p + q sqrt(d)) / denominator"""
    rational = Fraction(p, denominator)
    return Surd(rational, Fraction(q, denominator), d) if q else rational


_root2, _root6 = functools.partial(_surd, 2), functools.partial(_surd, 6)


def _dense(entries: Mapping[int, Any], size: int) -> list[Any]:
    """Of stages that are numbered from 1."""
    return [entries.get(j, 0) for j in range(1, size + 1)]


# Gill, "A process for the step-by-step integration of differential equations in an automatic digital computing
# machine".
_GILL = {
    "a": [[], ["1/2"], [_root2(-1, 1, 2), _root2(2, -1, 2)], [0, _root2(0, -1, 2), _root2(2, 1, 2)]],
    "b": ["1/6", _root2(2, -1, 6), _root2(2, 1, 6), "1/6"],
    "c": [0, "1/2", "1/2", 1],
    "order": 4,
}

# Verner, "Explicit Runge-Kutta methods with estimates of the local truncation error", the 16 stages of order 8(9).
_VERNER_C = [
    0,
    "1/12",
    "1/9",
    "1/6",
    _root6(2, 2, 15),
    _root6(6, 1, 15),
    _root6(6, -1, 15),
    "2/3",
    "1/2",
    "1/3",
    "1/4",
    "4/3",
    "5/6",
    1,
    "1/6",
    1,
]
_VERNER_A: list[dict[int, Any]] = [
    {},
    {1: "1/12"},
    {1: "1/27", 2: "2/27"},
    {1: "1/24", 3: "1/8"},
    {1: _root6(4, 94, 375), 3: _root6(-282, -252, 375), 4: _root6(328, 208, 375)},
    {1: _root6(9, -1, 150), 4: _root6(312, 32, 1425), 5: _root6(69, 29, 570)},
    {
        1: _root6(927, -347, 1250),
        4: _root6(-16248, 7328, 9375),
        5: _root6(-489, 179, 3750),
        6: _root6(14268, -5798, 9375),
    },
    {1: "2/27", 6: _root6(16, -1, 54), 7: _root6(16, 1, 54)},
    {1: "19/256", 6: _root6(118, -23, 512), 7: _root6(118, 23, 512), 8: "-9/256"},
    {1: "11/144", 6: _root6(266, -1, 864), 7: _root6(266, 1, 864), 8: "-1/16", 9: "-8/27"},
    {
        1: _root6(5034, -271, 61440),
        7: _root6(7859, -1626, 10240),
        8: _root6(-2232, 813, 20480),
        9: _root6(-594, 271, 960),
        10: _root6(657, -813, 5120),
    },
    {
        1: _root6(5996, -3794, 405),
        6: _root6(-4342, -338, 9),
        7: _root6(154922, -40458, 135),
        8: _root6(-4176, 3794, 45),
        9: _root6(-340864, 242816, 405),
        10: _root6(26304, -15176, 45),
        11: "-26624/81",
    },
    {
        1: _root6(3793, 2168, 103680),
        6: _root6(4042, 2263, 13824),
        7: _root6(-231278, 40717, 69120),
        8: _root6(7947, -2168, 11520),
        9: _root6(1048, -542, 405),
        10: _root6(-1383, 542, 720),
        11: "2624/1053",
        12: "3/1664",
    },
    {
        1: "-137/1296",
        6: _root6(5642, -337, 864),
        7: _root6(5642, 337, 864),
        8: "-299/48",
        9: "184/81",
        10: "-44/9",
        11: "-5120/1053",
        12: "-11/468",
        13: "16/9",
    },
    {
        1: _root6(33617, -2168, 518400),
        6: _root6(-3846, 31, 13824),
        7: _root6(155338, -52807, 345600),
        8: _root6(-12537, 2168, 57600),
        9: _root6(92, 542, 2025),
        10: _root6(-1797, -542, 3600),
        11: "320/567",
        12: "-1/1920",
        13: "4/105",
    },
    {
        1: _root6(-36487, -30352, 279600),
        6: _root6(-29666, -4499, 7456),
        7: _root6(2779182, -615973, 186400),
        8: _root6(-94329, 91056, 93200),
        9: _root6(-232192, 121408, 17475),
        10: _root6(101226, -22764, 5825),
        11: "-169984/9087",
        12: "-87/30290",
        13: "492/1165",
        15: "1260/233",
    },
]
_VERNER_B8: dict[int, Any] = {
    1: "103/1680",
    8: "-27/140",
    9: "76/105",
    10: "-201/280",
    11: "1024/1365",
    12: "3/7280",
    13: "12/35",
    14: "9/280",
}
_VERNER_B9: dict[int, Any] = {
    1: "23/525",
    8: "171/1400",
    9: "86/525",
    10: "93/280",
    11: "-2048/6825",
    12: "-3/18200",
    13: "39/175",
    15: "9/25",
    16: "233/4200",
}


def _verner(stages: int) -> dict[str, Any]:
    return {
        "a": [_dense(row, stages) for row in _VERNER_A[:stages]],
        "b": _dense(_VERNER_B8, stages),
        "c": _VERNER_C[:stages],
        "order": 8,
    }


METHODS: dict[str, dict[str, Any]] = {
    "euler": {"a": [[]], "b": [1], "c": [0], "order": 1},
    "midpoint": {"a": [[], ["1/2"]], "b": [0, 1], "c": [0, "1/2"], "order": 2},
    # The trapezoidal rule with Euler's step for its predictor; Heun's method of second order.
    "improved_euler": {"a": [[], [1]], "b": ["1/2", "1/2"], "c": [0, 1], "order": 2},
    # Ralston, "Runge-Kutta methods with minimum error bounds", second order.
    "ralston": {"a": [[], ["2/3"]], "b": ["1/4", "3/4"], "c": [0, "2/3"], "order": 2},
    "heun3": {"a": [[], ["1/3"], [0, "2/3"]], "b": ["1/4", 0, "3/4"], "c": [0, "1/3", "2/3"], "order": 3},
    "rk3": {"a": [[], ["1/2"], [-1, 2]], "b": ["1/6", "2/3", "1/6"], "c": [0, "1/2", 1], "order": 3},  # Kutta's
    "rk4": {
        "a": [[], ["1/2"], [0, "1/2"], [0, 0, 1]],
        "b": ["1/6", "1/3", "1/3", "1/6"],
        "c": [0, "1/2", "1/2", 1],
        "order": 4,
    },
    "rk38": {  # Kutta's 3/8 rule
        "a": [[], ["1/3"], ["-1/3", 1], [1, -1, 1]],
        "b": ["1/8", "3/8", "3/8", "1/8"],
        "c": [0, "1/3", "2/3", 1],
        "order": 4,
    },
    "gill4": _GILL,
    # Nystroem, "Ueber die numerische Integration von Differentialgleichungen", which corrects Kutta's fifth order.
    "nystrom5": {
        "a": [
            [],
            ["1/3"],
            _over(25, [4, 6]),
            _over(4, [1, -12, 15]),
            _over(81, [6, 90, -50, 8]),
            _over(75, [6, 36, 10, 8, 0]),
        ],
        "b": _over(192, [23, 0, 125, 0, -81, 125]),
        "c": [0, "1/3", "2/5", 1, "2/3", "4/5"],
        "order": 5,
    },
    # Huta, "Une amelioration de la methode de Runge-Kutta-Nystroem".
    "huta6": {
        "a": [
            [],
            ["1/9"],
            _over(24, [1, 3]),
            _over(6, [1, -3, 4]),
            _over(8, [-5, 27, -24, 6]),
            _over(9, [221, -981, 867, -102, 1]),
            _over(48, [-183, 678, -472, -66, 80, 3]),
            _over(82, [716, -2079, 1002, 834, -454, -9, 72]),
        ],
        "b": _over(840, [41, 0, 216, 27, 272, 27, 216, 41]),
        "c": [0, "1/9", "1/6", "1/3", "1/2", "2/3", "5/6", 1],
        "order": 6,
    },
    # Fehlberg, "Low-order classical Runge-Kutta formulas with stepsize control": goes on with the fourth order.
    "fehlberg45": {
        "a": [
            [],
            ["1/4"],
            _over(32, [3, 9]),
            _over(2197, [1932, -7200, 7296]),
            ["439/216", -8, "3680/513", "-845/4104"],
            ["-8/27", 2, "-3544/2565", "1859/4104", "-11/40"],
        ],
        "b": ["25/216", 0, "1408/2565", "2197/4104", "-1/5", 0],
        "c": [0, "1/4", "3/8", "12/13", 1, "1/2"],
        "order": 4,
        "b_embedded": ["16/135", 0, "6656/12825", "28561/56430", "-9/50", "2/55"],
        "order_embedded": 5,
    },
    # Dormand and Prince, "A family of embedded Runge-Kutta formulae": goes on with the fifth order.
    "dopri5": {
        "a": [
            [],
            ["1/5"],
            _over(40, [3, 9]),
            _over(45, [44, -168, 160]),
            _over(6561, [19372, -76080, 64448, -1908]),
            ["9017/3168", "-355/33", "46732/5247", "49/176", "-5103/18656"],
            ["35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84"],
        ],
        "b": ["35/384", 0, "500/1113", "125/192", "-2187/6784", "11/84", 0],
        "c": [0, "1/5", "3/10", "4/5", "8/9", 1, 1],
        "order": 5,
        "b_embedded": ["5179/57600", 0, "7571/16695", "393/640", "-92097/339200", "187/2100", "1/40"],
        "order_embedded": 4,
    },
    "verner8": _verner(14),
    # Goes on with the eighth order, as HO-ResNet's adaptive blocks do; the ninth estimates its error.
    "verner89": {**_verner(16), "b_embedded": _dense(_VERNER_B9, 16), "order_embedded": 9},
}
