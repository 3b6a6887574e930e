"""Whose faces are in a picture, and does it show its prompt: the two numbers of the paper's Table 3.

IP is the cosine of FaceNet's embeddings of the faces that MTCNN finds, PC that of CLIP's embeddings of
picture and prompt. Settings, matching and what counts as zero are those of FastComposer's evaluation, which
the paper uses. FaceNet and MTCNN come from facenet-pytorch, which is not among this project's packages.
"""
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evaluate import checksum
from models.clip_image import preprocess
from models.load import differences
from models.open_clip_import import mend_torchvision, open_clip
from images import to_picture
from weights.checkpoints import Lazy, Notes, Refusal, State, choose, open_file
from weights.parts import join_vision, rename

FACE, SMALLEST = 160, 20  # pixels of a face's side: as FaceNet sees it, and at least in the picture
VGGFACE2 = 8631  # people that these weights were trained on; CASIA-WebFace has 10,575
INSTALL = "pip install --no-deps facenet-pytorch==2.6.0 (it asks for an older torch, but runs with this one)"
# The text half of CLIP, transformers' names -> open_clip's, besides those that both halves share.
TEXT_NAMES = {"embeddings.token_embedding.": "token_embedding.", "final_layer_norm.": "ln_final."}


@dataclass
class Networks:
    """What looks at the pictures."""

    detect: Callable[[Image.Image], Tensor | None]  # faces (N, 3, 160, 160), the largest first
    embed: Callable[[Tensor], Tensor]  # (N, 3, 160, 160) -> (N, E) of length 1
    see: Callable[[Image.Image], Tensor]  # (D,) of length 1
    read: Callable[[str], Tensor]  # (D,) of length 1
    files: dict[str, str]  # name -> checksum of its weights
    as_paper: bool = True  # whether CLIP is ViT-L/14

    def reference(self, photo: Image.Image) -> Tensor | None:
        """The embedding (E,) of the largest face of a photo, None where there is none."""
        faces = self.detect(photo)
        return None if faces is None else self.embed(faces[:1])[0].cpu()


# --- the scores ---


def identity_score(faces: Tensor | None, references: Tensor, embed: Callable[[Tensor], Tensor]) -> float:
    """IP of a picture, in 0..1: its least similar person, after faces and references (S, E) were matched.

    faces: (N, 3, 160, 160), the largest first, of which S count; black ones stand for those that are missing.
    None: there is no face, which scores 0.
    """
    if faces is None:
        return 0.0
    faces = faces[:len(references)]
    faces = torch.cat([faces, faces.new_zeros(len(references) - len(faces), *faces.shape[1:])])
    return max(0.0, min(match_greedily(embed(faces).cpu() @ references.T)))


def match_greedily(similarity: Tensor) -> list[float]:
    """Pair rows and columns of (S, S), always the most similar that are left: their similarities."""
    similarity, found = similarity.clone(), []
    for _ in range(len(similarity)):
        row, column = divmod(int(similarity.argmax()), len(similarity))
        found.append(float(similarity[row, column]))
        similarity[row], similarity[:, column] = -torch.inf, -torch.inf
    return found


def prompt_score(networks: Networks, picture: Image.Image, prompt: str) -> float:
    """PC of a picture: the cosine of CLIP's embeddings, in -1..1."""
    return float(networks.see(picture) @ networks.read(prompt))


# --- the networks ---


def load_networks(facenet: Path, clip: Path, device: torch.device) -> Networks:
    """MTCNN, FaceNet and CLIP. Nothing is downloaded. Raises ValueError, saying what to do."""
    detect, embed = load_faces(facenet, device)
    see, read, as_paper = load_clip(clip, device)
    return Networks(detect, embed, see, read, {"facenet": checksum(facenet), **{
        f"clip/{file.name}": checksum(file) for file in clip_files(clip)}}, as_paper)


def load_faces(path: Path, device: torch.device):
    """The face detector and the face embedding of FastComposer's evaluation. Raises ValueError."""
    mend_torchvision()
    try:
        import facenet_pytorch
        from facenet_pytorch.models.utils import detect_face
    except ImportError as error:
        raise ValueError(f"faces are compared by facenet-pytorch, which cannot be imported ({error}): "
                         f"{INSTALL}") from error
    import torchvision
    if not torchvision.extension._has_ops():  # its wheel beside a CPU torch
        detect_face.batched_nms = batched_nms
    detector = facenet_pytorch.MTCNN(
        image_size=FACE, margin=0, min_face_size=SMALLEST, thresholds=[.6, .7, .7], factor=.709,
        post_process=True, keep_all=True, device=device)
    network = facenet_pytorch.InceptionResnetV1().eval()
    network.load_state_dict(read_facenet(path, network))
    network.to(device).requires_grad_(False)

    def detect(picture: Image.Image) -> Tensor | None:
        return detector(picture) if min(picture.size) >= SMALLEST else None  # it cannot take smaller ones

    return detect, lambda faces: network(faces.to(device))


def read_facenet(path: Path, network: torch.nn.Module) -> dict[str, Tensor]:
    """The tensors of facenet-pytorch's vggface2 file that `network` has. Raises ValueError."""
    try:
        state = open_file(path, Notes())
    except (Refusal, OSError) as error:
        raise ValueError(f"--facenet: {error}") from error
    people = state["logits.bias"].shape[0] if "logits.bias" in state else VGGFACE2
    if people != VGGFACE2:
        raise ValueError(f"--facenet {path} was trained on {people} people, the protocol's on vggface2's "
                         f"{VGGFACE2}: give 20180402-114759-vggface2.pt")
    # Its classifier is not used. Counters of batches, which old files lack, play no part in inference.
    found, expected = ({k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked")
                        and not k.startswith("logits.")} for tensors in (state, network.state_dict()))
    if wrong := differences(found, expected):
        raise ValueError(f"--facenet {path} is not facenet-pytorch's InceptionResnetV1: {wrong}. "
                         "Give 20180402-114759-vggface2.pt")
    return {name: tensor.read().float() for name, tensor in found.items()}


def batched_nms(boxes: Tensor, scores: Tensor, group: Tensor, threshold: float) -> Tensor:
    """torchvision's operator of this name: of boxes (N, 4) of one group whose intersection over union exceeds
    `threshold` the best stays. Returns the indices of those that stay, best first."""
    boxes = boxes + (group.to(boxes) * (boxes.max() + 1) if len(boxes) else group)[:, None]
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    order, kept = scores.argsort(descending=True), []
    while len(order):
        best, order = order[0], order[1:]
        kept.append(best)
        common = (torch.minimum(boxes[best, 2:], boxes[order, 2:])
                  - torch.maximum(boxes[best, :2], boxes[order, :2])).clamp(min=0).prod(1)
        order = order[common / (areas[best] + areas[order] - common) <= threshold]
    return torch.stack(kept) if kept else order


def load_clip(path: Path, device: torch.device):
    """CLIP as (picture -> feature, text -> feature), each (D,) of length 1, and whether it is ViT-L/14.
    Raises ValueError.

    path: all of ViT-L/14 in OpenAI's and open_clip's layout or in transformers', a file or its folder.
    """
    model = build_clip(read_clip(path), path).to(device)
    size, length = model.visual.image_size[0], model.context_length
    as_paper = (size, model.visual.conv1.weight.shape[0]) == (224, 1024)
    if not as_paper:
        warnings.warn(f"{path} is not CLIP ViT-L/14: PC is not the paper's then", stacklevel=2)
    tokenize = open_clip().tokenizer.SimpleTokenizer(context_length=length)

    @torch.no_grad()
    def see(picture: Image.Image) -> Tensor:
        pixels = preprocess(to_picture([picture]) / 2 + 0.5, size).to(device)
        return F.normalize(model.encode_image(pixels)[0], dim=0).cpu()

    @cache
    @torch.no_grad()
    def read(prompt: str) -> Tensor:
        return F.normalize(model.encode_text(tokenize(prompt).to(device))[0], dim=0).cpu()

    return see, read, as_paper


def clip_files(path: Path) -> list[Path]:
    """The weight files of --clip. Raises ValueError."""
    if not path.exists():
        raise ValueError(f"--clip {path} does not exist: give CLIP ViT-L/14, a file or folder as "
                         "weights/convert_sd15.py takes for --image-encoder")
    try:
        files = [path / name for name in choose(f.name for f in path.iterdir())] if path.is_dir() else [path]
    except Refusal as error:
        raise ValueError(f"--clip: {error}") from error
    if not files:
        raise ValueError(f"--clip {path} has no model.safetensors, nor another name of a model's file")
    return files


def read_clip(path: Path) -> dict[str, Tensor]:
    """The tensors of CLIP under open_clip's names. Raises ValueError."""
    try:
        state = {name: tensor for file in clip_files(path)
                 for name, tensor in open_file(file, Notes()).items()}
    except (Refusal, OSError) as error:
        raise ValueError(f"--clip: {error}") from error
    if any(name.startswith("text_model.") for name in state):
        state = from_transformers(state)
    return {name: tensor.read().float() for name, tensor in state.items()}


def from_transformers(state: State) -> State:
    """transformers' names -> open_clip's, both halves."""
    found = {}
    for key, tensor in state.items():
        if key.startswith("text_model."):
            name = rename("image_encoder", key.removeprefix("text_model.")).removeprefix("visual.")
            for theirs, ours in TEXT_NAMES.items():
                name = name.replace(theirs, ours)
        elif key == "text_projection.weight":
            name, tensor = "text_projection", Lazy(tensor.shape[::-1], tensor.dtype,
                                                   lambda tensor=tensor: tensor.read().T)
        else:
            name = key if key == "logit_scale" else rename("image_encoder", key)
        if not name.endswith("position_ids"):
            found[name] = tensor
    join_vision(found)
    return found


def build_clip(state: dict[str, Tensor], path: Path) -> torch.nn.Module:
    """open_clip's model of these tensors, for inference in float32. Raises ValueError."""
    from open_clip.model import build_model_from_openai_state_dict
    try:
        model = build_model_from_openai_state_dict(dict(state)).float()
        model.load_state_dict({name: state[name] for name in model.state_dict()})  # which fp16 has rounded
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        missing = [name for name in ("visual.conv1.weight", "text_projection") if name not in state]
        why = f"it has no {missing[0]}" if missing else str(error)[:150]
        raise ValueError(f"--clip {path} is not a whole CLIP, text and images, in OpenAI's, open_clip's "
                         f"or transformers' layout ({why}): give CLIP ViT-L/14") from error
    return model.requires_grad_(False)
