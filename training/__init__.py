"""The stages of `train.py`: what each one trains, on what, with which loss."""
from training.clip import CLIPStage
from training.controlnet import ControlNetStage
from training.graph import RecordedStep, check_graph
from training.judge import ClassifierStage
from training.lora import LoRAStage
from training.moa import MoAStage
from training.presets import PRESETS, SMALL, StageError, TrainConfig, check_preset, make_config
from training.prior import PriorStage
from training.stage import Stage
from training.vae import VAEStage

__all__ = ["PRESETS", "SMALL", "STAGES", "RecordedStep", "Stage", "StageError", "TrainConfig", "check_graph",
           "check_preset", "make_config"]

STAGES: dict[str, type[Stage]] = {
    "vae": VAEStage, "clip": CLIPStage, "prior": PriorStage, "moa": MoAStage,
    "controlnet": ControlNetStage, "lora": LoRAStage, "classifier": ClassifierStage}
