"""Which network a state_dict belongs to, whatever the script that wrote it called its tensors.

The names of both sides are brought to one spelling by the same function, and compared together with the shapes. Where
none of our networks fits by its names, one may fit by the order of its tensors.

Names and shapes do not determine a function: strides, for example, leave no trace in them. The accuracy of a network
that another program made should therefore be measured.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]
Layout = Callable[[str, int], Shapes]  # of an architecture with so many classes

ALIKE = 0.2  # of the tensors of two networks; with fewer equal ones no difference is the first
COUNTER = ".num_batches_tracked"  # of a BatchNorm; old files have none, and nothing here uses them
CLASSIFIER = re.compile(r"(fc|linear|classifier|heads?|logits|output|last_linear)\d*(\.(\d+|fc|linear|head))*", re.I)
STAGE = re.compile(r"^(layer|stage|block|group)_?(\d+)(\.layers?)?(?=\.\d)")
SHORTCUT = re.compile(r"(?<=\.)(downsample|(conv)?_?shortcut|skip(_connection)?|identity|proj(ection)?)(?=\.|$)", re.I)
NORM = re.compile(r"(?<![^.])(batch_?)?norm(?=\d*(\.|$))")


@dataclass(frozen=True)
class Match:
    """A network whose tensors a file holds: `names` maps each name in the file to that in the network, in its order.

    With `by_order` the names said nothing, and only the order of the tensors, their shapes and their grouping did.
    """

    arch: str
    names: dict[str, str]
    by_order: bool = False


def identify(file: Shapes, ours: Iterable[str], others: Callable[[], Iterable[str]], layout: Layout) -> Match:
    """The network with these tensors: of `ours` by names, of `ours` by order, or of `others` by names.

    Raises ValueError when none fits, naming the closest and the first difference after renaming, and when several fit.
    """
    found: dict[str, tuple[float, list[str]]] = {}

    def by_names(arch: str) -> Match | None:
        names, differences, likeness = compare(file, arch, layout)
        found[arch] = likeness, differences
        return None if differences else Match(arch, names)

    if match := next(filter(None, map(by_names, ours)), None):
        return match
    matches = [Match(arch, names, True) for arch in ours if (names := compare_order(file, arch, layout))]
    if len(matches) > 1:
        raise ValueError(f"fits several networks by the order of its tensors: {', '.join(m.arch for m in matches)}")
    if matches:
        return matches[0]
    if match := next(filter(None, map(by_names, others())), None):
        return match
    closest = max(found, key=lambda arch: found[arch][0])
    likeness, differences = found[closest]
    first, more = differences[0], len(differences) - 1
    if likeness < ALIKE:
        tensors = ", ".join(f"{name} {tuple(shape)}" for name, shape in list(file.items())[:3])
        raise ValueError(f"fits no known network (docs/networks.md) and is like none of them; it begins with {tensors}")
    raise ValueError(f"fits no known network; closest is {closest}, but {first}" + f" (and {more} more)" * (more > 0))


def canonical(shapes: Shapes) -> dict[str, str]:
    """The names of a network's tensors -> the same in one spelling. They stay as they are if two would become one."""
    modules = {name: name.rpartition(".")[0] for name in shapes}
    classifiers = {module for module in modules.values() if CLASSIFIER.fullmatch(module)}
    spelled = {}
    for name, module in modules.items():
        if classifiers == {module}:
            module = "classifier"
        else:
            module = NORM.sub("bn", SHORTCUT.sub("shortcut", STAGE.sub(r"layer\2", module)))
            # A shortcut may be a convolution, or a sequence that begins with one.
            module += ".0" * (module.endswith(".shortcut") and len(shapes[name]) == 4)
        spelled[name] = f"{module}.{name.rpartition('.')[2]}"
    return spelled if len(set(spelled.values())) == len(spelled) else {name: name for name in shapes}


def compare(file: Shapes, arch: str, layout: Layout) -> tuple[dict[str, str], list[str], float]:
    """The names of the file -> those of the network, every difference in words, and the share of equal tensors."""
    theirs = {spelled: name for name, spelled in canonical(file).items()}
    lengths = [file[name][:1] for spelled, name in theirs.items() if spelled.startswith("classifier.")]
    expected = layout(arch, _classes(lengths or [shape[:1] for shape in file.values()]))
    ours = {spelled: name for name, spelled in canonical(expected).items()}
    names = {theirs[spelled]: name for spelled, name in ours.items() if spelled in theirs}
    missing = [f"{ours[s]} is missing" for s in ours if s not in theirs and not s.endswith(COUNTER)]
    extra = [f"{theirs[s]} is unknown" for s in theirs if s not in ours]
    if not missing and not extra:  # now it is certain which tensor is the classifier's
        last = [name for name in expected if not name.endswith(COUNTER)][-1]
        expected = layout(arch, _classes([file[name][:1] for name in names if names[name] == last]))
    shapes = [
        f"{name} has shape {tuple(file[name])}, not {tuple(expected[ours])}"
        for name, ours in names.items()
        if tuple(file[name]) != tuple(expected[ours])
    ]
    equal = len(names) - len(shapes)
    return names, missing + extra + shapes, equal / (len(file) + len(expected) - equal)


def compare_order(file: Shapes, arch: str, layout: Layout) -> dict[str, str]:
    """The names of the file -> those of the network, tensor by tensor; empty if they do not fit.

    The sequences of (last part of the name, shape) must be equal. That alone would confuse a residual network with its
    pre-activation variant, so the tensors of each module of the network must also be a module of the file, whole.
    """
    theirs = [name for name in file if not name.endswith(COUNTER)]
    expected = layout(arch, _classes([file[name][:1] for name in theirs]))
    ours = [name for name in expected if not name.endswith(COUNTER)]
    if [_signature(name, file) for name in theirs] != [_signature(name, expected) for name in ours]:
        return {}
    parts = [name.split(".") for name in theirs]
    modules: dict[str, list[int]] = {}  # positions of the tensors of each
    for position, name in enumerate(ours):
        components = name.split(".")
        for depth in range(1, len(components)):
            modules.setdefault(".".join(components[:depth]), []).append(position)
    for positions in modules.values():
        first = parts[positions[0]]
        depth = next(n for n in range(len(first), -1, -1) if all(parts[p][:n] == first[:n] for p in positions))
        if sum(part[:depth] == first[:depth] for part in parts) != len(positions):
            return {}
    names = dict(zip(ours, theirs))
    owners = {theirs.rpartition(".")[0]: ours.rpartition(".")[0] for ours, theirs in names.items()}
    names |= {owners.get(n.removesuffix(COUNTER), n) + COUNTER: n for n in file if n.endswith(COUNTER)}
    return {names[name]: name for name in expected if name in names} if set(names) <= set(expected) else {}


def _signature(name: str, shapes: Shapes) -> tuple:
    return name.rpartition(".")[2], tuple(shapes[name])


def _classes(lengths: list[tuple[int, ...]]) -> int:
    """The last of these lengths of tensors, if it can be a number of classes."""
    known = [length for (length,) in filter(None, lengths) if length > 0]
    return known[-1] if known else 1
