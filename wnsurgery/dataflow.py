"""Who feeds whom: the calls of a model's leaf modules, the values between them, and the neighbours that follow.

A `Flow` is one way through a model's forward, however it was found. The questions asked of it are "which layer
alone makes the input of this module" and "which layer alone takes its output".
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

__all__ = ["INPUT", "OUTPUT", "Call", "Flow", "Neighbour", "Traces", "Value", "hands_on"]

_PASSING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def hands_on(module: nn.Module) -> bool:
    """Whether a module in evaluation gives back its input as it is, by torch's own forward and not one put on it.

    >>> hands_on(nn.Dropout()), hands_on(nn.ReLU())
    (True, False)
    """
    return type(module) in _PASSING and "forward" not in vars(module)


# Where a value comes from outside of what was followed, and where it goes there.
INPUT, OUTPUT = "an input", "an output"


@dataclass(eq=False, repr=False)
class Value:
    """A tensor on its way: what made it, and everything that takes it (a call, or words for anything else)."""

    origin: Call | str
    uses: list[Call | str] = field(default_factory=list)


@dataclass(eq=False, repr=False)
class Call:
    """One call of a leaf module; `source` is its argument if it is a single tensor, `rank` that tensor's, if known."""

    module: nn.Module
    source: Value | None
    rank: int | None = None
    result: Value = field(init=False)

    def __post_init__(self) -> None:
        self.result = Value(self)


@dataclass(eq=False, repr=False)
class Flow:
    """One way through a forward: the calls of each leaf module by identity, and tensors read past their module."""

    calls: dict[int, list[Call]] = field(default_factory=dict)
    read: dict[int, str] = field(default_factory=dict)

    def add(self, call: Call) -> None:
        self.calls.setdefault(id(call.module), []).append(call)


@dataclass(frozen=True)
class Neighbour:
    """The module before or after another, and why it cannot be taken for its only neighbour ("" if it can).

    `hidden`: it may be one all the same, in code around them that could not be followed.
    """

    module: nn.Module | None
    fault: str = ""
    rank: int | None = None
    hidden: bool = False


@dataclass(eq=False, repr=False)
class Traces:
    """Everything known about a model's data flow.

    Attributes:
        names: qualified name of every module, by identity.
        groups: parts of the model traced on their own; each a list of alternative ways through it.
        opaque: modules whose forward could not be followed, by identity, with the reason.
        apart: modules traced on their own although their forward can be followed, by identity.
        observed: the flow of a real run, if there were inputs.
    """

    names: dict[int, str]
    groups: list[list[Flow]] = field(default_factory=list)
    opaque: dict[int, str] = field(default_factory=dict)
    apart: set[int] = field(default_factory=set)
    observed: Flow | None = None

    def before(self, module: nn.Module, gone: Collection[int] = ()) -> Neighbour:
        """The module whose output is the input of `module` and goes nowhere else; `gone` counts as passing through."""
        return self._answer(module, gone, forwards=False)

    def after(self, module: nn.Module, gone: Collection[int] = ()) -> Neighbour:
        """The only module that takes the output of `module`."""
        return self._answer(module, gone, forwards=True)

    def read(self, module: nn.Module) -> str:
        """What reads a tensor of a module past the module; "" if nothing does."""
        return next((flow.read[id(module)] for flow in self._flows() if id(module) in flow.read), "")

    def _flows(self) -> Iterable[Flow]:
        yield from (flow for group in self.groups for flow in group)
        if self.observed is not None:
            yield self.observed

    def _answer(self, module: nn.Module, gone: Collection[int], *, forwards: bool) -> Neighbour:
        inside = [group for group in self.groups if any(id(module) in flow.calls for flow in group)]
        seen = self.observed is not None and id(module) in self.observed.calls
        traced = _Question(self.names, self.groups, gone, forwards).ask(module, inside) if inside else None
        if not seen or self.observed is None:
            return self._or_hidden(module, traced)
        real = [[self.observed]]
        answer = _Question(self.names, real, gone, forwards).ask(module, real)
        if answer.fault or traced is None or self.opaque:
            return answer
        if traced.fault or traced.module is not answer.module:
            return Neighbour(answer.module, traced.fault or "tracing and running the model disagree on what feeds it")
        return answer

    def _or_hidden(self, module: nn.Module, traced: Neighbour | None) -> Neighbour:
        """What tracing says, with what it cannot say where code around a module could not be followed."""
        untraced = self._untraced_around(module)
        if traced is None:
            return Neighbour(None, untraced or "the forward pass never calls it", hidden=bool(untraced))
        return replace(traced, hidden=traced.hidden and bool(untraced))

    def _untraced_around(self, module: nn.Module) -> str:
        """What could not be followed of the forwards around a module; "" if all of it could."""
        name = self.names.get(id(module), "")
        for key, reason in self.opaque.items():
            outer = self.names.get(key, "")
            if not outer or name.startswith(f"{outer}."):
                where = f"the forward of {outer}" if outer else "the model's forward"
                return f"{where} could not be traced ({reason}); example inputs would show the data flow"
        return ""


@dataclass(frozen=True)
class _Question:
    names: Mapping[int, str]
    groups: Sequence[Sequence[Flow]]
    gone: Collection[int]
    forwards: bool

    def ask(self, module: nn.Module, inside: Sequence[Sequence[Flow]]) -> Neighbour:
        if len(inside) > 1:
            return Neighbour(None, "called in several places")
        found: Neighbour | None = None
        for flow in inside[0]:
            if id(module) in flow.calls:
                one = self._in_flow(flow, module)
                if one.module is None or (found is not None and found.module is not one.module):
                    return one if one.module is None else Neighbour(None, "its neighbour depends on the branch taken")
                if found is None or one.fault:
                    found = one
        assert found is not None
        other = found.module
        assert other is not None
        if not found.fault and any(id(other) in flow.calls and id(module) not in flow.calls for flow in inside[0]):
            return Neighbour(other, f"{self._name(other)} is used without it in another branch")
        if not found.fault and any(id(other) in f.calls for g in self.groups if g is not inside[0] for f in g):
            return Neighbour(other, f"{self._name(other)} is called in several places")
        return found

    def _in_flow(self, flow: Flow, module: nn.Module) -> Neighbour:
        calls = flow.calls[id(module)]
        if len(calls) > 1:
            return Neighbour(None, f"called {len(calls)} times")
        here = self._downstream(calls[0]) if self.forwards else self._upstream(calls[0])
        if here.module is not None and not here.fault and len(flow.calls[id(here.module)]) > 1:
            count = len(flow.calls[id(here.module)])
            return Neighbour(here.module, f"{self._name(here.module)} is called {count} times")
        return here

    def _upstream(self, call: Call) -> Neighbour:
        fault = ""
        value = call.source
        while value is not None:
            others = [use for use in value.uses if use is not call]
            if others and not fault:
                fault = self._shared(value, others[0])
            if isinstance(value.origin, str):
                hidden = value.origin == INPUT and not fault
                return Neighbour(None, f"its input comes from {value.origin}, not from a layer", hidden=hidden)
            call = value.origin
            if not self._passes(call.module):
                return Neighbour(call.module, fault, call.rank)
            value = call.source
        return Neighbour(None, "its input is not a single tensor")

    def _downstream(self, call: Call) -> Neighbour:
        while True:
            uses = call.result.uses
            if not uses:
                return Neighbour(None, "nothing takes its output")
            if len(uses) > 1:
                return Neighbour(None, "its output is used more than once")
            if isinstance(uses[0], str):
                return Neighbour(None, f"its output goes to {uses[0]}, not to a layer", hidden=uses[0] == OUTPUT)
            after, call = call, uses[0]
            if call.source is not after.result:
                return Neighbour(None, f"{self._name(call.module)} takes several inputs")
            if not self._passes(call.module):
                return Neighbour(call.module, "", call.rank)

    def _passes(self, module: nn.Module) -> bool:
        return hands_on(module) or id(module) in self.gone

    def _shared(self, value: Value, use: Call | str) -> str:
        maker = value.origin if isinstance(value.origin, str) else self._name(value.origin.module)
        taker = use if isinstance(use, str) else self._name(use.module)
        return f"the output of {maker} is used elsewhere, too ({taker})"

    def _name(self, module: nn.Module) -> str:
        return self.names.get(id(module)) or f"an unregistered {type(module).__name__}"
