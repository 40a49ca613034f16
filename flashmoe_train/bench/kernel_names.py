"""Names of kernels, demangled, as a table has room for them."""

import re
from collections.abc import Iterator

_SHORT_TYPES = {
    "__nv_bfloat16": "bf16", "BFloat16": "bf16", "bfloat16_t": "bf16", "__half": "fp16", "Half": "fp16",
    "half_t": "fp16", "float": "fp32", "double": "fp64",
}  # fmt: skip
# Namespaces without a name, as several demanglers say it (ncu loses a bracket), and the types of numbers: (int)64.
_NOISE = re.compile(r"(?:\(anonymous namespace\)|(?<!\w)<unnamed>|unnamed>|\{anonymous\})::|\([\w: ]+\)(?=-?\d)")
_MOST_ARGUMENTS = 6


def short_name(kernel: str) -> str:
    """A demangled name without namespaces and parameters, with a line's worth of template arguments.

    If the only one is a template itself, such as `Sizes<bf16, 64>`, the name gets that one's arguments instead.
    """
    name, arguments = _template(_NOISE.sub("", kernel).removeprefix("void "))
    while len(arguments) == 1 and (inner := _template(arguments[0])[1]):
        arguments = inner
    shown = [_template(argument)[0] for argument in arguments]
    shown[_MOST_ARGUMENTS:] = ["…"] * (len(shown) > _MOST_ARGUMENTS)
    return f"{name}<{', '.join(shown)}>" if shown else name


def _template(text: str) -> tuple[str, list[str]]:
    """("f", ["A<B>", "3"]) of "n::f<A<B>, 3>(int)"."""
    name = re.split("[<(]", text, maxsplit=1)[0]
    arguments = _arguments(text[len(name) + 1 :]) if text[len(name) :].startswith("<") else iter(())
    name = re.sub(r"\w+::", "", name).strip()
    return _SHORT_TYPES.get(name, name) or text, [*arguments]


def _arguments(text: str) -> Iterator[str]:
    """Of "A<B>, 3>(int)", what follows the bracket."""
    depth, begin = 1, 0
    for bracket in re.finditer(r"->|[<([{>)\]},]", text):
        c = bracket[0]
        depth += (c in "<([{") - (c in ">)]}")
        if depth == 0 or (depth == 1 and c == ","):
            yield text[begin : bracket.start()].strip()
            begin = bracket.end()
        if depth == 0:
            return
