"""The declaration of a case."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from pyuffd._abi import Feature
from pyuffd.testing._memory_types import MemoryType
from pyuffd.testing._need import Need

NO_FEATURE = Feature(0)

Features = Feature | Callable[[MemoryType], Feature]


@dataclass(frozen=True, slots=True)
class Variant:
    """One of the behaviours that a case accepts, and how user space can tell which one it is.

    Attributes:
        name: What the report shows.
        text: The behaviour, and how to tell, in one line.
        features: Accepted only where the kernel has all of these.
        lacks: Accepted only where the kernel has none of these.
    """

    name: str
    text: str
    features: Feature = NO_FEATURE
    lacks: Feature = NO_FEATURE

    def possible(self, offered: int) -> bool:
        """Return whether a kernel with these feature bits may behave this way."""
        return not int(self.features) & ~offered and not int(self.lacks) & offered


@dataclass(frozen=True, slots=True)
class Spec:
    """What a case declares: one behaviour, on one or more memory types.

    Attributes:
        name: The id without the memory type.
        summary: The behaviour in one line.
        memory: Names of the memory types it runs on; "any" if the type does not matter.
        origin: Where it comes from: a selftest's case, a patch, a manual page's ERRORS entry.
        features: Feature bits the kernel must have, for one memory type or all of them.
        needs: What else it needs: ioctls, privileges, swap, hardware.
        variants: The behaviours that it accepts, if more than one.
        budget_s: Seconds after which the case has stalled.
        is_slow: It is skipped unless slow cases are requested.
        is_alone: It affects the whole machine, so no other case runs at the same time.
        is_crossing: It is one of a table of combinations. The page of the suite shows the table,
            and some of the cases are a fair sample of all.
        is_noisy: The kernel may log warnings about what it does. They are not reported, unless
            they are fatal.
    """

    name: str
    summary: str
    memory: tuple[str, ...]
    origin: str
    features: Features
    needs: tuple[Need, ...]
    variants: tuple[Variant, ...]
    budget_s: float
    is_slow: bool
    is_alone: bool = False
    is_noisy: bool = False
    is_crossing: bool = False

    def features_on(self, memory: MemoryType) -> Feature:
        """Return the feature bits it needs on a memory type."""
        return self.features if isinstance(self.features, Feature) else self.features(memory)

    def id_on(self, memory: str) -> str:
        """Return the id of the case on a memory type."""
        return f"{self.name}.{memory}"

    @property
    def ids(self) -> list[str]:
        """The ids, one for each memory type."""
        return [self.id_on(memory) for memory in self.memory]
