"""The pipeline at scale: plans of any size to disk or object storage, exactly once. See docs/generation.md."""

from sage_fast.generation.config import GenerateConfig
from sage_fast.generation.drawing import Prepared, draw_shard
from sage_fast.generation.plan import Part, Plan, Span
from sage_fast.generation.plan_files import read_plan
from sage_fast.generation.run import Summary, generate
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
    "draw_shard",
    "generate",
    "read_plan",
    "write_shard",
]
