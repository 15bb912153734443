"""Tables of what kinds of devices can do: published ones, which come with the package, and the user's own over them."""

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.resources import files
from typing import Any

from omegaconf import OmegaConf

from evenkeel.config import read_text
from evenkeel.config_values import ConfigError, convert, dotted, shortened
from evenkeel.config_yaml import parse
from evenkeel.plan.hardware import DeviceKind, Link, NodeKind
from evenkeel.plan.memory import WIDTHS

SECTION = "devices"
LEAST, MOST = 1e-9, 1e9
"""Of any number in a table, in its unit: no device is near, and with others times would come out as 0 or infinite."""


@dataclass(frozen=True, slots=True)
class LinkTable:
    """One way, for each device; `source` says which link that is."""

    gb_per_s: float
    latency_us: float = 0.0
    source: str = ""

    def link(self) -> Link:
        return Link(self.gb_per_s * 1e9, self.latency_us * 1e-6)


@dataclass(frozen=True, slots=True)
class DeviceTable:
    """A kind of device, and the node that it typically stands in.

    Attributes:
        name: what the device says of itself (torch.cuda.get_device_name).
        aliases: shorter ones.
        teraflops: peak of dense matrix products, by train.precision; what the device cannot do is left out.
        inside, between: the links among the devices of a node, and of each of them to other nodes.
        source: the data sheet.
        reached: the share of the peak that training reaches where nothing was measured.
    """

    name: str
    memory_gib: float
    memory_gb_per_s: float
    teraflops: dict[str, float]
    inside: LinkTable
    between: LinkTable
    source: str
    aliases: list[str] = field(default_factory=list)
    devices_per_node: int = 8
    reached: float = 0.4

    def kind(self) -> DeviceKind:
        flops = {precision: 1e12 * peak for precision, peak in self.teraflops.items()}
        return DeviceKind(self.name, int(self.memory_gib * 2**30), flops, self.memory_gb_per_s * 1e9, self.reached)

    def node(self, devices: int) -> NodeKind:
        return NodeKind(self.kind(), devices, self.inside.link(), self.between.link())


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Tables by name."""

    tables: tuple[DeviceTable, ...]

    def find(self, name: str, key: str, source: str) -> DeviceTable:
        """The table of a name or alias; upper and lower case are the same.

        Args:
            key, source: where the name was said, for messages.

        Raises:
            ConfigError: if there is none, with the nearest.
        """
        if (found := self._known(name)) is not None:
            return found
        shown = {known.lower(): known for table in self.tables for known in (*table.aliases, table.name)}
        near = difflib.get_close_matches(name.lower(), shown, 1, 0.0)
        known = f"the nearest that is known: {shown[near[0]]}; others go into a file, see --devices"
        raise ConfigError(f"unknown device {shortened(name, 80)!r}; {known}", key, source)

    def with_own(self, section: Any, source: str) -> "Catalogue":
        """With the user's tables: by name or alias, all keys of a new device or some of a known one or of `like`.

        Raises:
            ConfigError: naming source and key.
        """
        if not isinstance(section, Mapping):
            raise ConfigError("expected a mapping of names to tables", SECTION, source)
        found = self
        for name, values in section.items():
            key = dotted(SECTION, name)
            if not isinstance(values, Mapping):
                raise ConfigError("expected a mapping", key, source)
            table = read_table(found._completed(str(name), values, key, source), key, source)
            known = found._known(str(name))
            found = Catalogue((*(t for t in found.tables if t is not known), table))
        return found

    def _known(self, name: str) -> DeviceTable | None:
        return next((t for t in self.tables if name.lower() in map(str.lower, (t.name, *t.aliases))), None)

    def _completed(self, name: str, values: Mapping[str, Any], key: str, source: str) -> dict[str, Any]:
        """All that is said of a device, with what it does not say from the one that it is, or is like."""
        like, known = values.get("like"), self._known(name)
        base = known if like is None else self.find(str(like), dotted(key, "like"), source)
        said = {k: v for k, v in values.items() if k != "like"}
        before = {} if base is None else asdict(base)
        if known is None:
            before |= {"name": name, "aliases": [], "source": source}
        for part in ("teraflops", "inside", "between"):
            if isinstance(said.get(part), Mapping):
                said[part] = {**before.get(part, {}), **said[part]}
        return {**before, **said}


def read_table(values: Mapping[str, Any], key: str, source: str) -> DeviceTable:
    """A table from what YAML says.

    Raises:
        ConfigError: naming source and key.
    """
    table: DeviceTable = convert(values, DeviceTable, key, source, False)
    for precision, peak in table.teraflops.items():
        known = precision in WIDTHS
        _require(
            known, key, f"teraflops.{precision}", f"unknown precision; expected one of {', '.join(WIDTHS)}", source
        )
        _above_zero(peak, key, f"teraflops.{precision}", source)
    for name in ("memory_gib", "memory_gb_per_s", "devices_per_node"):
        _above_zero(getattr(table, name), key, name, source)
    for name in ("inside", "between"):
        check_link(getattr(table, name), dotted(key, name), source)
    holds = LEAST <= table.reached <= 1
    _require(holds, key, "reached", f"is {table.reached:g}; expected a share of the peak above 0, at most 1", source)
    return table


def check_link(link: LinkTable, key: str, source: str) -> None:
    """Raises ConfigError for a link without speed."""
    _above_zero(link.gb_per_s, key, "gb_per_s", source)
    _require(link.latency_us >= 0, key, "latency_us", f"is {link.latency_us:g}; must not be negative", source)
    known = f"is {link.latency_us:g}; expected at most {MOST:g}"
    _require(link.latency_us <= MOST, key, "latency_us", known, source)


def _above_zero(value: float, key: str, name: str, source: str) -> None:
    _require(value > 0, key, name, f"is {value:g}; must be above 0", source)
    known = f"is {value:g}; expected {LEAST:g} to {MOST:g}"
    _require(LEAST <= value <= MOST, key, name, known, source)


def _require(holds: bool, key: str, name: str, problem: str, source: str) -> None:
    if not holds:
        raise ConfigError(problem, dotted(key, name), source)


@lru_cache(maxsize=1)
def published() -> Catalogue:
    """What comes with the package."""
    folder = files("evenkeel") / SECTION
    found = sorted((f for f in folder.iterdir() if f.name.endswith(".yaml")), key=lambda f: f.name)
    return Catalogue(tuple(_published(file.read_text(encoding="utf-8"), str(file)) for file in found))


def _published(text: str, source: str) -> DeviceTable:
    return read_table(mapping_of(text, source), "", source)


def mapping_of(text: str, source: str) -> dict[str, Any]:
    """The mapping that a YAML text is. Raises ConfigError, naming source and line."""
    try:
        values = OmegaConf.to_container(parse(text, source), resolve=True)
    except ConfigError:
        raise
    except Exception as error:  # resolvers of ${...} raise anything
        raise ConfigError(str(error).splitlines()[0], source=source) from None
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def catalogue(path: str | None) -> Catalogue:
    """The published tables, and over them those of a file that has a section `devices`.

    Raises:
        ConfigError: naming file and key.
    """
    if path is None:
        return published()
    values = mapping_of(read_text(path), path)
    unknown = [key for key in values if key != SECTION]
    if unknown:
        raise ConfigError(f"unknown key; expected one section {SECTION!r}", unknown[0], path)
    return published().with_own(values.get(SECTION, {}), path)
