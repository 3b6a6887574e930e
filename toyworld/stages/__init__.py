"""The stages that make the small world's own models."""
from toyworld.stages.clip import CLIPStage
from toyworld.stages.controlnet import ControlNetStage
from toyworld.stages.classifier import ClassifierStage
from toyworld.stages.prior import PriorStage
from toyworld.stages.vae import VAEStage

STAGES = {"vae": VAEStage, "clip": CLIPStage, "prior": PriorStage, "controlnet": ControlNetStage,
          "classifier": ClassifierStage}
