"""``reflowlens inspect``: what any file or folder is, without executing anything in it."""

from reflowlens.inspection.inspect import inspect_path as inspect_path
from reflowlens.inspection.report import Inspection as Inspection

__all__ = ["Inspection", "inspect_path"]
