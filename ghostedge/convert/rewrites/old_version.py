from __future__ import annotations

from ghostedge.convert.rewrites.flat import OPS, Flat


def old_version(model: Flat) -> int:
    """Mark DEPTH_TO_SPACE as version 1, which the reference kernels of LiteRT know too.

    Matches an operator code of DEPTH_TO_SPACE with version 2, which says that int8 is among the types.
    BUILTIN_REF of LiteRT 2.1.0 registers version 1 only and refuses the file; the kernel that it
    registers takes int8.

    Exact because the number is compared when the file is loaded, and nothing else.
    """
    changed = 0
    for code in model.model.operatorCodes:
        if code.builtinCode == OPS.DEPTH_TO_SPACE and code.version == 2:
            code.version = 1
            changed += 1
    return changed
