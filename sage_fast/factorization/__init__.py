"""Dictionaries of category-relevant and category-irrelevant attributes, from latents and labels alone."""

from sage_fast.factorization.category_irrelevant import CategoryIrrelevantDictionary
from sage_fast.factorization.category_relevant import CategoryRelevantDictionary
from sage_fast.factorization.class_embeddings import class_embeddings, residuals

__all__ = ["CategoryIrrelevantDictionary", "CategoryRelevantDictionary", "class_embeddings", "residuals"]
