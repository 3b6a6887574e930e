"""Mixture-of-Attention (arXiv 2404.11565): personalize a frozen text-to-image model."""
from moa.checkpoint import load_moa, moa_config, read_moa, save_moa, training_of, write_moa
from moa.install import add_moa, base_modules, moa_layers
from moa.mixture import ExpertContext, MixtureOfAttention, Router
from moa.prompt import MultimodalPrompt, PromptConfig
from moa.routing import (RoutingKey, force_routing, grid, record_routing, record_subject_attention,
                         reuse_self_attention, scale_personalized, sparse_routing)

__all__ = ["ExpertContext", "MixtureOfAttention", "MultimodalPrompt", "PromptConfig", "Router", "RoutingKey",
           "add_moa", "base_modules", "force_routing", "grid", "load_moa", "moa_config",
           "moa_layers", "read_moa", "record_routing", "record_subject_attention", "save_moa",
           "reuse_self_attention", "scale_personalized", "sparse_routing", "training_of", "write_moa"]
