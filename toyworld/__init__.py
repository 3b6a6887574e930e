"""The small world: deterministic cartoon people in scenes, with captions, masks and identities.

Every picture is a pure function of a seed. Shapes are drawn with Pillow at `SUPERSAMPLING` times
the output size and box-reduced. All drawing coordinates are in units of a 128-pixel canvas; a
person is drawn in units of one hundredth of its body height, feet at y = 0 and the head at
negative y.

Command line (writes the FastComposer dataset layout):

    python -m toyworld --output FOLDER --count 1000 --split train --workers 4
"""
from toyworld.folder import main
from toyworld.pen import SIZE
from toyworld.render import render_reference, render_scene
from toyworld.scenes import (ACTIVITIES, ATTRIBUTES, COLOR_ATTRIBUTES, CONTEXTS, HELD_OUT, NOUNS,
                                  ONE_PERSON, STYLES, SUIT, TRAITS, TWO_PERSON, Identity, Scene,
                                  attribute_labels, compose_scene, describe, identity_key, identity_split,
                                  sample_identity, sample_scene, vocabulary)

__all__ = ["ACTIVITIES", "attribute_labels", "ATTRIBUTES", "COLOR_ATTRIBUTES", "compose_scene", "CONTEXTS",
           "describe", "HELD_OUT", "Identity", "identity_key", "identity_split", "main", "NOUNS",
           "ONE_PERSON", "render_reference", "render_scene", "sample_identity", "sample_scene", "Scene",
           "SIZE", "STYLES", "SUIT", "TRAITS", "TWO_PERSON", "vocabulary"]
