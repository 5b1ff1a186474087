"""csp.fuse: finds stages in networks that know nothing of this package, and lets the operators run them.

trace.py runs a module's forward on symbols and lists what it does; cut.py makes graphs of that; plan.py is what a fused
module runs instead, and when it may (make_plan.py: from a module to that); swap.py puts it in place; choose.py says of
which modules; report.py says what was done.
"""

from csp_kernels.fusion.choose import fuse, fused, unfuse
from csp_kernels.fusion.report import Report

__all__ = ["Report", "fuse", "fused", "unfuse"]
