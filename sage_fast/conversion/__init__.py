"""Files of networks: what is in one, and the same networks in another format (docs/formats.md)."""

from sage_fast.conversion.carrying import TARGETS
from sage_fast.conversion.describing import describe
from sage_fast.conversion.writing import convert

__all__ = ["TARGETS", "convert", "describe"]
