"""Whole networks, fused, beside what a user would run instead: the stock network in eager and compiled PyTorch and,
for inference, exported to OpenVINO and ONNX Runtime; all with the same weights."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rkfast
from rkfast import dispatch
from rkfast.extras import require
from rkfast.nn.alike import without_chance, without_checkpoints
from rkfast.swap.copies import tensors

from . import gate
from .contest import COMPILE, Contender, Contest, Suite, forced, raised
from .workload import MODES, dense

IN_CHANS = 3
SETTLING = 3  # batches from which the running statistics come
REDRAWN = 5  # further batches that may clear gradients which were off on the first
GATE_IMAGES = 32  # at most: activations in fp64 take room
ROUGHLY = 1e-3  # relative error up to which another library's logits are those of the same network
INFERENCE = ("compile_freezing", "openvino", "onnxruntime")
PEERS = (
    *("eager", "eager_channels_last", "compile", *INFERENCE),
    *("compile_max_autotune", "compile_cuda_graphs"),
)


class Variant(NamedTuple):
    """One of ours: what its name says besides who served it, and what makes it of a copy of the stock network."""

    name: str
    make: Callable[[nn.Module], nn.Module]
    compiled: bool = False
    graphed: bool = False


class NetworkCase:
    """Training is one step: forward, loss, backward; inference the forward in eval mode."""

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # bfloat16, float16: under autocast
    layout: str
    training: bool
    main: bool

    @property
    def name(self) -> str:
        return "train" if self.training else "inference"

    @property
    def id(self) -> str:
        dtype = "" if self.dtype == torch.float32 else f"{str(self.dtype).removeprefix('torch.')}/"
        return f"{self.op}/{'x'.join(map(str, self.shape))}/{dtype}{self.name}"

    @property
    def modes(self) -> tuple[str, ...]:
        return MODES[1:] if self.training else MODES[:1]

    def bytes(self) -> None:
        return None

    def autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(device, self.dtype) if self.dtype != torch.float32 else contextlib.nullcontext()

    def draw(self, generator: torch.Generator) -> Tensor:
        """Normally distributed images [N, C, H, W], no two equally bright."""
        noise = torch.randn(self.shape, generator=generator, device=generator.device)
        return noise + torch.randn(*self.shape[:2], 1, 1, generator=generator, device=generator.device)

    def settled(self, model: nn.Module, generator: torch.Generator) -> nn.Module:
        """model, its running statistics the means over some batches."""
        norms = [m for m in model.train().modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = None
        with torch.no_grad():
            for _ in range(SETTLING):
                model(self.draw(generator))
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return model.train(self.training)

    def stock(self, generator: torch.Generator) -> nn.Module:
        """The stock network that every contender is a copy of."""
        raise NotImplementedError

    def variants(self) -> Iterator[Variant]:
        raise NotImplementedError


@dataclass(frozen=True)
class Network:
    name: str
    size: int
    batches: tuple[int, ...]
    main: int | None  # the batch of the main cases
    options: tuple[tuple[str, Any], ...] = ()
    label: str = ""  # where the name alone does not tell
    memory: tuple[str, ...] = ("speed", "min")


@dataclass(frozen=True)
class ModelCase(NetworkCase):
    network: Network
    batch: int
    training: bool
    dtype: torch.dtype = torch.float32
    main: bool = field(default=False, compare=False)

    layout = "channels_last"

    @property
    def op(self) -> str:  # type: ignore[override]
        return self.network.label or self.network.name

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        return (self.batch, IN_CHANS, self.network.size, self.network.size)

    def create(self, **options: Any) -> nn.Module:
        return rkfast.create_model(self.network.name, in_chans=IN_CHANS, **dict(self.network.options), **options)

    def stock(self, generator: torch.Generator) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(zlib.crc32(self.network.name.encode()))
            model = self.create(fused=False).to(generator.device)
        return self.settled(model, generator)

    def variants(self) -> Iterator[Variant]:
        for memory in self.network.memory[: None if self.training else 1]:
            yield Variant("" if memory == "speed" else f"{memory} memory", functools.partial(self._fused, memory))
        if not self.training:
            yield Variant("folded", rkfast.fold)

    def _fused(self, memory: str, stock: nn.Module) -> nn.Module:
        model = self.create(fused=True, **({"memory": memory} if len(self.network.memory) > 1 else {}))
        model.load_state_dict(stock.state_dict())
        return model


def outputs(result: Any) -> list[Tensor]:
    """The floating-point tensors that a network returned."""
    return [t for _, t in tensors(result, "output") if t.is_floating_point()]


def loss(found: list[Tensor], labels: Tensor) -> Tensor:
    """Cross entropy of logits [N, classes]; of other outputs the sum of their mean squares."""
    if len(found) == 1 and found[0].dim() == 2:
        return F.cross_entropy(found[0], labels)
    return torch.stack([t.square().mean() for t in found]).sum()


class Steps(Contender):
    """The steps of a network; ``call`` is what runs it."""

    def __init__(
        self, case: NetworkCase, model: nn.Module, images: Tensor, labels: Tensor, backend: str = "auto"
    ) -> None:
        self.case, self.model, self.images, self.labels, self.backend = case, model, images, labels, backend
        self.call: Callable[[Tensor], Any] = model
        self.parameters = list(model.parameters())

    def compile(self, mode: str) -> None:
        self.call = torch.compile(_alone(self.model), mode=mode, dynamic=False)
        self.compiled = True

    def graph(self) -> None:
        with self.case.autocast(self.images.device.type):
            self.call = rkfast.graphed(self.model, self.images)
        self.has_footprint = False  # a graph keeps its memory from step to step

    def forward(self) -> Any:
        with torch.no_grad(), self.case.autocast(self.images.device.type):
            return self.call(self.images)

    def forward_grad(self) -> Tensor:
        with self.case.autocast(self.images.device.type):
            return loss(outputs(self.call(self.images)), self.labels)

    def backward(self, outputs: Tensor) -> None:
        outputs.backward()
        # Here and not before the next step, so that a step's peak counts its gradients.
        self.model.zero_grad(set_to_none=True)


class Exported(Contender):
    """Inference of another library, which keeps its memory between calls."""

    compiled = True
    has_footprint = False

    def __init__(self, infer: Callable[[], Any]) -> None:
        self.infer = infer

    def forward(self) -> Tensor:
        return torch.from_numpy(self.infer())


class Networks:
    """A fused network beside the stock one."""

    def __init__(self, case: NetworkCase, contest: Contest) -> None:
        self.case, self.contest = case, contest
        generator = torch.Generator(contest.device).manual_seed(zlib.crc32(case.id.encode()))
        self.stock = case.stock(generator)
        drawn = [case.draw(generator) for _ in range(1 + REDRAWN)]
        with torch.no_grad():
            found = outputs(copy.deepcopy(self.stock).eval()(drawn[0]))
        if not found:
            raise ValueError(f"{case.op}: there is no floating-point tensor in what it returns")
        count, classes = (*found[0].shape, 1)[:2]
        labels = [torch.randint(classes, (count,), generator=generator, device=contest.device) for _ in drawn]
        self.batches = list(zip(drawn, labels, strict=True))
        self.images, self.labels = self.batches[0]
        self.references: dict[int, tuple[gate.Results, gate.Results]] = {}  # by batch: eager's and those in fp64
        self.rough = ROUGHLY
        self.graphs = contest.device == "cuda"

    def ours(self) -> Iterator[tuple[str, gate.Verdict, Contender]]:
        for backend in self.contest.backends:
            for variant in self._variants():
                try:
                    contender, served = self._started(variant, backend)
                    with forced(backend):
                        verdict = self._verdict(variant)
                except Exception as error:
                    yield ", ".join(filter(None, (backend, variant.name))), raised(error), Contender()
                    continue
                self.rough = max(ROUGHLY, 2 * verdict.eager)
                yield ", ".join(filter(None, (served, variant.name))) or "stock", verdict, contender
        self.references.clear()

    def _variants(self) -> list[Variant]:
        """Those of the case, and on a GPU the fastest of them in CUDA graphs."""
        variants = list(self.case.variants())
        if self.graphs:
            fastest = variants[0 if self.case.training else -1]
            name = ", ".join(filter(None, (fastest.name, "graphed")))
            variants.append(fastest._replace(name=name, graphed=True))
        return variants

    def _started(self, variant: Variant, backend: str) -> tuple[Steps, str]:
        """A contender that has run its first step, and the backends that served it."""
        start, before = time.perf_counter(), dispatch.served()
        contender = self._contender(variant, self.images, self.labels, backend)
        with forced(backend):
            contender.both() if self.case.training else contender.forward()
        contender.first_s = time.perf_counter() - start
        served = {by for _, by in dispatch.served() - before}
        return contender, "+".join(b for b in dispatch.BACKENDS if b in served)

    def _contender(self, variant: Variant, images: Tensor, labels: Tensor, backend: str = "auto") -> Steps:
        model = variant.make(copy.deepcopy(self.stock)).to(self.contest.device).train(self.case.training)
        last = self.case.layout == "channels_last"
        contender = Steps(self.case, _arranged(model, last), dense(images, last), labels, backend)
        if variant.compiled:
            contender.compile("default")
        if variant.graphed:
            contender.graph()
        return contender

    def _verdict(self, variant: Variant) -> gate.Verdict:
        """A ReLU that flips in ours and in none of eager's moves the gradients, and nothing else, a hundred times
        further than rounding does: gradients that were off are cleared by a batch on which they are not. (ERKNet,
        7 x 32 x 32: flips on 6 batches of 9, in eager channels_last on 7, in eager on 2.)"""
        verdict = self._compared(variant, 0)
        for batch in range(1, len(self.batches)):
            if verdict.failure is None or not verdict.failure.startswith("gradients"):
                break
            verdict = self._compared(variant, batch)
        return verdict

    def _compared(self, variant: Variant, batch: int) -> gate.Verdict:
        given, labels = (t[:GATE_IMAGES] for t in self.batches[batch])
        if batch not in self.references:
            eager, wide = copy.deepcopy(self.stock), copy.deepcopy(self.stock).double()
            self.references[batch] = (
                self._results(Steps(self.case, eager, given, labels)),
                self._results(Steps(self.case, wide, given.double(), labels)),
            )
        return gate.compare(self._results(self._contender(variant, given, labels)), *self.references[batch], rms=True)

    def _results(self, steps: Steps) -> gate.Results:
        """Without dropout, which would draw differently in each, and checkpoints, which move statistics twice."""
        model = steps.model
        without_chance(model)
        without_checkpoints(model)
        autocast = self.case.autocast(steps.images.device.type)
        if steps.images.dtype == torch.float64:
            autocast = contextlib.nullcontext()
        with autocast, torch.set_grad_enabled(self.case.training):
            found = outputs(steps.call(steps.images))
            total = loss(found, steps.labels)
        if not self.case.training:
            return gate.Results(found, [], [])
        total.backward()
        gradients = [torch.zeros(()) if p.grad is None else p.grad for p in steps.parameters]
        buffers = [b if b.is_floating_point() else b.double() for b in model.buffers()]
        return gate.Results([total.detach(), *(t.detach() for t in found)], gradients, buffers)

    def peers(self) -> Iterator[tuple[str, Callable[[], Contender]]]:
        for name in self.contest.peers:
            if name not in INFERENCE or not (self.case.training or self.case.dtype != torch.float32):
                yield name, functools.partial(self._peer, name)

    def _peer(self, name: str) -> Contender:
        if name in ("openvino", "onnxruntime"):
            if self.contest.device != "cpu":
                raise ValueError(f"{name} is measured on the CPU only")
            contender: Contender = Exported((_openvino if name == "openvino" else _onnxruntime)(self))
        else:
            layout = {"eager": "contiguous", "eager_channels_last": "channels_last"}.get(name, self.case.layout)
            contender = steps = self._stock(layout == "channels_last")
            if name in COMPILE:
                steps.compile(COMPILE[name])
        if not self.case.training:
            with _freezing() if name == "compile_freezing" else contextlib.nullcontext():
                found = outputs(contender.forward())
            for ours, theirs in zip(outputs(self._stock(False).forward()), found, strict=False):
                gap = gate.error(theirs.double(), ours.double(), rms=True)
                if not gap <= self.rough:
                    raise ValueError(f"its results are off by {gap:.1e}, where {self.rough:.1e} is allowed")
        return contender

    def _stock(self, channels_last: bool) -> Steps:
        model = _arranged(copy.deepcopy(self.stock), channels_last)
        return Steps(self.case, model, dense(self.images, channels_last), self.labels)


def _arranged(model: nn.Module, channels_last: bool) -> nn.Module:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return model.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's stubs


def _alone(model: nn.Module) -> Callable[..., Any]:
    """model with code of its own: Dynamo would take what it compiled for the same code before, frozen or not."""

    def call(*args: Any) -> Any:
        return model(*args)

    call.__code__ = call.__code__.replace()
    return call


def _freezing() -> contextlib.AbstractContextManager[Any]:
    from torch._inductor import config

    return config.patch(freezing=True)  # as an option of torch.compile Dynamo would not see it


def _openvino(networks: Networks) -> Callable[[], Any]:
    openvino = require("openvino", "bench")
    images = networks.images
    converted = openvino.convert_model(networks.stock, example_input=images, input=[tuple(images.shape)])
    hints = {
        "INFERENCE_NUM_THREADS": networks.contest.threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16, where the CPU has it
    }
    compiled = openvino.Core().compile_model(converted, "CPU", hints)
    given = images.numpy()
    return lambda: compiled(given, share_inputs=True, share_outputs=True)[0]


def _onnxruntime(networks: Networks) -> Callable[[], Any]:
    onnxruntime = require("onnxruntime", "bench")
    require("onnxscript", "bench")  # torch.onnx needs it
    program = torch.onnx.export(networks.stock, (networks.images,), dynamo=True, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = networks.contest.threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads run on into the next sample
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    given = {session.get_inputs()[0].name: networks.images.numpy()}
    return lambda: session.run(None, given)[0]


ERK, IRK, IRK_WIDE = ((("growth_rate", k),) for k in (36, 80, 150))
IMAGENET = (("growth_rate", 32), ("m", (2, 4, 8, 20)), ("stem", "imagenet"), ("num_classes", 1000))


def ho_resnet(method: str, batch: int) -> Network:
    return Network("ho_resnet-58", 32, (batch,), batch, (("method", method),), f"ho_resnet-58-{method}")


FULL: dict[str, dict[str, list[Network]]] = {
    "cpu": {
        "densenet": [
            Network("densenet121", 224, (1, 4, 16), 4),
            Network("densenet121", 96, (4,), None),
            Network("densenet121", 331, (4,), None),
        ],
        "erknet": [Network("erknet-7x1_7x1_7x1", 32, (7, 16, 32), 16, ERK)],
        "irknet": [Network("irknet-5x1_5x1_5x1-ab", 32, (7, 16, 32), 16, IRK)],
        "ho_resnet": [ho_resnet("rk4", 8), ho_resnet("rk8", 8)],
        "tsc": [Network("tsc_resnet50", 224, (4,), 4), Network("tsc_resnet-56", 32, (16,), 16)],
        "resnet": [Network("resnet50", 224, (4,), 4)],
    },
    "cuda": {
        "densenet": [Network("densenet121", 224, (256,), 256)],
        "erknet": [
            Network("erknet-7x1_7x1_7x1", 32, (64,), 64, ERK),
            Network("erknet-3x1_3x1_4x1_2x1-b", 224, (256,), 256, IMAGENET),
        ],
        "irknet": [
            Network("irknet-5x1_5x1_5x1-ab", 32, (64,), 64, IRK),
            Network("irknet-5x1_5x1_5x1-ab", 32, (64,), 64, IRK_WIDE, "irknet-5x1_5x1_5x1-ab-k150"),
        ],
        "ho_resnet": [ho_resnet("rk4", 128), ho_resnet("rk8", 128)],
        "tsc": [Network("tsc_resnet50", 224, (256,), 256), Network("tsc_resnet-110", 32, (64,), 64)],
        "resnet": [Network("resnet50", 224, (256,), 256)],
    },
}
TINY = {
    "densenet": Network("densenet-10-bc", 8, (2,), 2, (("growth_rate", 4), ("init_channels", 8))),
    "erknet": Network("erknet-2x1_1x1", 8, (2,), 2, (("growth_rate", 6),)),
    "irknet": Network("irknet-2x1_2x1-ab", 8, (2,), 2, (("growth_rate", 6),)),
    "ho_resnet": Network("ho_resnet-10", 8, (2,), 2, (("width", 8),), memory=("speed",)),
    "tsc": Network("tsc_resnet-8", 12, (2,), 2),
    "resnet": Network("resnet-8", 12, (2,), 2),
}


def cases(family: str, size: str, device: str) -> Iterator[ModelCase]:
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)
    for network in [TINY[family]] if size == "tiny" else FULL[device][family]:
        for batch in network.batches:
            main = batch == network.main
            for dtype in dtypes if size == "full" else dtypes[:1]:
                if size == "full" or main:
                    yield from (ModelCase(network, batch, training, dtype, main) for training in (True, False))


SUITE = Suite(
    kind="family of models",
    cases={family: functools.partial(cases, family) for family in TINY},
    field=Networks,
    backends=lambda device: ("auto",),  # a network may hold ops that a backend has no kernel for
    peers={"cpu": PEERS[:-2], "cuda": (*PEERS[:3], "compile_cuda_graphs")},
    known_peers=PEERS,
    rounds=(7, 200),
)
