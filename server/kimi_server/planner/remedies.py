"""What holds a request that does not fit: more GPUs, other GPUs, more memory, or a smaller checkpoint of the model."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from kimi_server.planner.gpus import GPUS, Machine, of_kind
from kimi_server.planner.plan import LEAST_CAPABILITY, Choice, Request, choose
from kimi_server.planner.stored import CAPABILITIES, STORED, WHILE_LOADING
from kimi_server.planner.weight_bytes import weight_bytes
from vllm_kimi_linear.cache.layout import GIB, MIB
from vllm_kimi_linear.config.errors import ConfigError
from vllm_kimi_linear.config.quantization import FIELD

COUNTS = (1, 2, 4, 8)  # GPUs of one machine
# Size as people call it -> the GPU of that size that has least.
OTHERS = {"80 GB": "H100-80GB", "H200": "H200", "48 GB": "L40S"}
LARGEST = {"B200": "B200"}  # named where none of the others is enough


@dataclass(frozen=True)
class Remedy:
    """A plan that fits."""

    choice: Choice
    name: str  # its GPUs; on a CPU the flag for more memory, or nothing
    weights: str | None = None  # of `STORED`; None: the checkpoint that was planned

    @property
    def stored(self) -> bool:
        """Whether it takes another checkpoint."""
        return self.weights is not None and (self.choice.machine.device == "cpu" or self.weights not in WHILE_LOADING)


def phrases(found: Sequence[Remedy], here: Machine) -> list[str]:
    """Each in words to whom has `here`; checkpoints for the same GPUs are one phrase."""
    plain = [each.name for each in found if each.weights is None]
    smaller: dict[str, list[str]] = {}
    for each in found:
        if each.weights is not None:
            smaller.setdefault(each.name, []).append(_weights(each))
    for name, checkpoints in smaller.items():
        several = " or ".join(checkpoints)
        if here.device == "cpu":
            plain.append(f"{name} and {several}" if name else several)
        elif name == f"{here.count} x {here.short}":
            plain.append(f"{several} on {'this GPU' if here.count == 1 else 'these GPUs'}")
        else:
            plain.append(f"{several} on {name}")
    return plain


def _weights(remedy: Remedy) -> str:
    """--weights fp8 (50 GB) or the int4 checkpoint (31 GB), and what it needs where that is not known."""
    assert remedy.weights is not None
    size = f"{_size(remedy.choice) / 1e9:.0f} GB"
    machine, least = remedy.choice.machine, CAPABILITIES[remedy.weights]
    if machine.device == "cuda" and machine.capability is None and least > LEAST_CAPABILITY:
        size += f", from compute capability {least[0]}.{least[1]} on"
    return f"the {remedy.weights} checkpoint ({size})" if remedy.stored else f"--weights {remedy.weights} ({size})"


def remedies(short: Choice) -> list[Remedy]:
    """More of the same GPUs, then others, then smaller checkpoints, best first; none where nothing known is enough."""
    if short.machine.device == "cpu":
        return [*_memory(short)]
    found = [*_more(short.request, short.machine), *_others(short)]
    here = [
        Remedy(choice, f"{short.machine.count} x {short.machine.short}", weights)
        for weights, request in _smaller(short)
        if (choice := _fitting(request, short.machine))
    ]
    if not here:
        for weights, request in _smaller(short):
            here += [replace(each, weights=weights) for each in _more(request, short.machine)]
    return found + here


def _memory(short: Choice) -> Iterator[Remedy]:
    """On a CPU: how much a rank has to have."""
    for weights, request in ((None, short.request), *_smaller(short)):
        choice = choose(request, short.machine)
        held = choice.best.forecast
        gibs = -(-(held.memory + held.shortage(choice.per_server, request.context)) // GIB)
        enough = replace(short.machine, total=gibs * GIB, usable=gibs * GIB)
        yield (
            Remedy(choice, "", weights)
            if choice.fits
            else Remedy(choose(request, enough), f"--memory {gibs}G", weights)
        )


def _more(request: Request, machine: Machine) -> Iterator[Remedy]:
    """The fewest of the same GPUs."""
    each = replace(machine, count=1)
    yield from _fewest(request, each, each.short, [count for count in COUNTS if count > machine.count])


def _others(short: Choice) -> list[Remedy]:
    """The fewest of some GPUs of other sizes."""
    for kinds in (OTHERS, LARGEST):
        found: list[Remedy] = []
        for name, kind in kinds.items():
            if abs(GPUS[kind].mib * MIB - short.machine.total) > short.machine.total // 10:
                shown = kind if short.request.config.get(FIELD) else name  # not every GPU of a size reads fp8
                found += _fewest(short.request, of_kind(kind, 1), shown, COUNTS)
        if found:
            return found
    return []


def _fewest(request: Request, each: Machine, name: str, counts: Iterable[int]) -> Iterator[Remedy]:
    for count in counts:
        if choice := _fitting(replace(request, tensor_parallel=None), replace(each, count=count)):
            yield Remedy(choice, f"{count} x {name}")
            return


def _smaller(short: Choice) -> Iterator[tuple[str, Request]]:
    """The same request of smaller checkpoints that the machine computes with."""
    capability, config = short.machine.capability, {**short.request.config}
    for weights, stored in STORED.items():
        if capability is not None and capability < CAPABILITIES[weights]:
            continue
        request = replace(short.request, config=config | {FIELD: stored})
        try:
            size = _size(choose(request, short.machine))
        except ConfigError:  # sizes that it does not divide
            continue
        if size < _size(short):
            yield weights, request


def _size(choice: Choice) -> int:
    """Bytes of the checkpoint's files; a GPU holds all but a little as they have it."""
    return weight_bytes(choice.best.model_sizes, choice.request.dtype, device="cuda")


def _fitting(request: Request, machine: Machine) -> Choice | None:
    try:
        choice = choose(request, machine)
    except ConfigError:
        return None
    return choice if choice.fits else None
