"""The method's stages of `train.py`: what each one trains, on what, with which loss."""
from training.graph import RecordedStep, check_graph
from training.lora import LoRAStage
from training.moa import MoAStage
from training.presets import SD15, StageError, TrainConfig
from training.stage import Stage

__all__ = ["SD15", "LoRAStage", "MoAStage", "RecordedStep", "Stage", "StageError", "TrainConfig",
           "check_graph"]
