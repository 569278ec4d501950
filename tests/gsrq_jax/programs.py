"""What a compiled program does, and where: read from its text."""

import re

_IDLE = {"parameter", "constant", "broadcast", "iota", "get-tuple-element", "tuple", "bitcast"}


def outside(text: str, scope: str) -> list[str]:
    """Instructions of a named scope that do not lie in the loop that is its own.

    That is the innermost loop that holds as many of them as any. Those outside run as often as what
    is around it. What only names or repeats values, or needs none, does not count.

    Args:
        text: of a compiled program, in HLO.
        scope: as `jax.named_scope` has it.
    """
    bodies: dict[str, list[str]] = {}
    for line in text.splitlines():
        if head := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            lines = bodies[head[1]] = []
        elif line.startswith("  "):
            lines.append(line)
    called = {
        name: bodies.keys() & set(re.findall(r"%([\w.\-]+)", "\n".join(lines)))
        for name, lines in bodies.items()
    }

    def works(line: str) -> bool:
        kind, alone = re.search(r" ([\w\-]+)\((\)?)", line).groups()
        return f"/{scope}/" in line and kind not in _IDLE and not alone

    working = {
        name: [line for line in lines if works(line) and any(" parameter(" in x for x in lines)]
        for name, lines in bodies.items()
    }

    def reached(name: str) -> set[str]:
        return {name}.union(*map(reached, called[name]))

    loops = [reached(name) for name in re.findall(r"body=%([\w.\-]+)", text)]
    count = {id(loop): sum(len(working[name]) for name in loop) for loop in loops}
    own = max(loops, key=lambda loop: (count[id(loop)], -len(loop)))
    assert count[id(own)], f"there is nothing of {scope} in a loop"
    return [line for name in bodies.keys() - own for line in working[name]]
