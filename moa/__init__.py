"""Mixture-of-Attention (arXiv 2404.11565): personalize a frozen text-to-image model."""
from moa.install import (add_moa, base_modules, belongs_to_encoder, force_routing, load_moa, moa_config,
                         moa_layers, record_routing, record_subject_attention, save_moa, scale_personalized,
                         write_moa)
from moa.mixture import ExpertContext, MixtureOfAttention
from moa.prompt import MultimodalPrompt, PromptConfig
from moa.router import Router
from moa.sparse import sparse_routing

__all__ = ["ExpertContext", "MixtureOfAttention", "MultimodalPrompt", "PromptConfig", "Router",
           "add_moa", "base_modules", "belongs_to_encoder", "force_routing", "load_moa", "moa_config",
           "moa_layers", "record_routing", "record_subject_attention", "save_moa", "scale_personalized",
           "sparse_routing", "write_moa"]
