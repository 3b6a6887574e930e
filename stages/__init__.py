"""The stages of `train.py`: what each one trains, on what, with which loss."""
from stages.clip import CLIPStage
from stages.controlnet import ControlNetStage
from stages.graph import RecordedStep, check_graph
from stages.judge import JudgeStage
from stages.lora import LoRAStage
from stages.moa import MoAStage
from stages.presets import PRESETS, SMALL, StageError, TrainConfig, check_preset, make_config
from stages.prior import PriorStage
from stages.stage import Stage
from stages.vae import VAEStage

__all__ = ["PRESETS", "SMALL", "STAGES", "RecordedStep", "Stage", "StageError", "TrainConfig", "check_graph",
           "check_preset", "make_config"]

STAGES: dict[str, type[Stage]] = {
    "vae": VAEStage, "clip": CLIPStage, "prior": PriorStage, "moa": MoAStage,
    "controlnet": ControlNetStage, "lora": LoRAStage, "judge": JudgeStage}
