"""The scientist: a non-agentic Bayesian instrument over explicit theories (docs/scientist.md).

Inspired by "Scientist AI" (arXiv 2502.15657): it has no goals, memory or actuators in its design, and tests look for their
absence. That is an inductive finding and no proof, and a wrapper that loops over its answers is an agent.
"""

from fathom.scientist.answer import Answer
from fathom.scientist.build import lint, read
from fathom.scientist.posterior import Budget
from fathom.scientist.scientist import Scientist
from fathom.scientist.world import World

__all__ = ["Answer", "Budget", "Scientist", "World", "lint", "read"]
