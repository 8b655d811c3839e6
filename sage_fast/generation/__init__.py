"""The pipeline at scale: plans of any size to disk or object storage, exactly once. See docs/generation.md."""

from sage_fast.generation.agreeing import format_of
from sage_fast.generation.committing import committed
from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, about_images, draw_shard
from sage_fast.generation.plan import Part, Plan, Span
from sage_fast.generation.plan_files import read_plan
from sage_fast.generation.run import Summary, generate, open_output
from sage_fast.generation.watching import Meter
from sage_fast.generation.writing import write_shard

__all__ = [
    "GenerateConfig",
    "Meter",
    "Part",
    "Plan",
    "Prepared",
    "Span",
    "Summary",
    "about_images",
    "committed",
    "draw_shard",
    "format_of",
    "generate",
    "open_output",
    "read_plan",
    "write_shard",
]
