"""FlowCut for LLaVA: models, pruning and everything that does not need an inference engine."""

__version__ = "0.1.0"
