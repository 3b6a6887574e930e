"""From prompts and subjects to pictures: what sample.py, train.py, evaluate.py and the apps share.

    pipeline = Pipeline.load("weights/toyworld", "weights/toyworld/moa.safetensors")
    pipeline("a woman on the beach", subjects={"woman": "examples/zoe.png"}, seed=0).save("zoe.png")
"""
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

from models import Models, load_models  # before torch, whose threads it sets up

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from images import to_images
from moa import (ExpertContext, MultimodalPrompt, base_modules, force_routing, load_moa, reuse_self_attention,
                 scale_personalized, sparse_routing, training_of)
from models.clip_text import Tokenizer
from models.controlnet import Control, ControlNet, steering
from models.load import load_part, read_tensors
from samplers import NUM_TIMESTEPS, SAMPLERS, guided, timesteps_of
from subjects import PEOPLE, BoundSubject, bind_subjects, on_grey, on_noise, read_photos
from weights.lora import LoRASetting, MergedLoRAs

DECODED = 64 * 64  # latent pixels that are decoded at a time
PRIOR_ABOVE = 800  # MoA was trained below this timestep; from it on the prior draws alone


@dataclass(frozen=True)
class Subject:
    """A person to be put into a picture: the token that it is fused into and its image feature."""

    position: int  # index of the token among the prompt's 77
    feature: Tensor  # (F,)
    start: int = NUM_TIMESTEPS  # the person is there at timesteps below this one


def warn_if_absent(subjects: Sequence[Sequence[Subject] | None], timesteps: Sequence[int],
                   prior_above: int) -> None:
    """Say so when somebody is in none of a picture's steps, which are at these falling timesteps."""
    starts = [min(person.start, prior_above) for people in subjects for person in people or ()]
    if starts and timesteps[-1] >= min(starts):
        warnings.warn(f"somebody is in no step of the picture: they start below timestep {min(starts)}, "
                      f"and the last of {len(timesteps)} steps is at {timesteps[-1]}; take more steps",
                      stacklevel=3)


def squared_distance(features: Tensor, mean: Tensor, precision: Tensor) -> Tensor:
    """Squared Mahalanobis distance per dimension of features (B, F): (B,)."""
    centred = features.float() - mean
    return ((centred @ precision) * centred).mean(-1)


@dataclass
class Pipeline:
    """A base model, with MoA when `prompt` is there."""

    models: Models
    prompt: MultimodalPrompt | None = None
    merged: MergedLoRAs | None = None
    trained_on: dict[str, Tensor] | None = None  # where the image features of the training's people lie
    max_people: int | None = None  # of one picture of the training
    references: str = "noise"  # or "grey": on what people stood in training

    @classmethod
    def load(cls, weights: str | Path, moa: str | Path | None = None, device: str | torch.device = "cpu",
             dtype: torch.dtype = torch.float32) -> "Pipeline":
        """Load a weights folder and, if given, a MoA file. Raises WeightsError and ValueError."""
        models = load_models(weights, device, dtype)
        if dtype != torch.float32:  # as it was stored: real ones overflow in fp16 and draw black pictures
            models.vae = load_part(weights, "vae", device)
        if moa is None:
            return cls(models)
        path = Path(weights) / "subjects.safetensors"
        trained_on = read_tensors(path) if path.exists() else None
        prompt = load_moa(models.unet, moa)
        trained = training_of(moa)
        if trained.get("image_layers") and Path(moa).resolve().parent != Path(weights).resolve():
            raise ValueError(f"{moa} was trained together with its image encoder, which lies beside it: give "
                             f"--weights {Path(moa).parent}")
        width = models.image_encoder.cfg.output_dim if models.image_encoder else prompt.cfg.image_dim
        sizes = models.text_encoder.cfg.dim, width, len(list(models.unet.transformer_blocks()))
        wanted = prompt.cfg.text_dim, prompt.cfg.image_dim, prompt.cfg.layers
        if sizes != wanted:
            raise ValueError(f"{moa} was trained with other models than those in {weights}: its text tokens, "
                             f"image features and layers are {wanted}, here they are {sizes}")
        world = "grey" if models.config.get("world") == "toyworld" else "noise"  # of older files
        return cls(models, prompt, trained_on=trained_on, max_people=trained.get("max_people"),
                   references=trained.get("references") or world)

    def __call__(self, prompt: str, subjects: Mapping[str, str | Path] | None = None, seed: int = 0,
                 **options) -> Image.Image:
        """One picture. subjects: word of the prompt -> photo of who stands for it. options: of `generate`,
        in place of the weights' own. Raises ValueError."""
        self.check_prompt(prompt)
        bound = bind_subjects(prompt, [f"{word}={file}" for word, file in (subjects or {}).items()])
        people = self.make_subjects(prompt, bound, self.encode_photos(bound, read_photos(bound)))
        options = {**self.models.config.get("sampling", {}), **options}
        return to_images(self.generate([prompt], [seed], [people], **options))[0]

    def set_loras(self, loras: Sequence[LoRASetting], scope: str = "attn") -> None:
        """Draw with these LoRAs from now on, in place of earlier ones; with none as before.

        Scope "attn" changes the prior experts' attention only, so that people stay as they are (the
        paper's Fig. 21). "all" changes whatever the files hold: the prior experts and the layers that both
        experts share.
        Raises LoRAError, a ValueError, and changes nothing then.
        """
        if self.merged is None:
            modules = {"unet": base_modules(self.models.unet),
                       "text_encoder": dict(self.models.text_encoder.named_modules())}
            self.merged = MergedLoRAs({f"{part}.{name}": module for part in modules
                                       for name, module in modules[part].items()
                                       if isinstance(module, nn.Linear | nn.Conv2d)})
        self.merged.set(loras, scope)

    @property
    def device(self) -> torch.device:
        return self.models.unet.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.models.unet.conv_in.weight.dtype

    @torch.no_grad()
    def encode_subjects(self, images: Tensor) -> Tensor:
        """Pictures of people (B, 3, H, W) in [0, 1] -> image features (B, F).

        Padded to a square with black, as references are in training.
        """
        encoder, (height, width) = self.models.image_encoder, images.shape[-2:]
        side = max(height, width)
        left, top = (side - width) // 2, (side - height) // 2
        images = F.pad(images, (left, side - width - left, top, side - height - top))
        return encoder(encoder.preprocess(images).to(self.device, self.dtype))

    def encode_photos(self, subjects: Sequence[BoundSubject], photos: Sequence[Sequence[Tensor]]
                      ) -> list[Tensor]:
        """The image feature (F,) of each subject, of several photos their mean. photos: (3, H, W) as they
        are, or people alone (4, h, w), who are shown as in training. Raises ValueError for who is like nobody
        whom the weights were trained on."""
        means = []
        cut = on_grey if self.references == "grey" else on_noise
        for subject, several in zip(subjects, photos, strict=True):
            features = [self.encode_subjects(cut(photo)[None])[0] for photo in several]
            for feature, file in zip(features, subject.files, strict=True):
                self.refuse_foreign(feature, file)
            means.append(sum(features) / len(features))
        return means

    def refuse_foreign(self, feature: Tensor, file: str) -> None:
        """Raise ValueError where a subject's image feature (F,) lies far from those that the weights were
        trained on: the picture would be of somebody else. Without `trained_on` everybody passes."""
        if (known := self.trained_on) and squared_distance(
                feature[None].cpu(), known["mean"], known["precision"]) > known["limit"]:
            cartoons = ("They know a small cartoon world only, and trained weights for photos do not exist "
                        "yet: docs/photos.md says what training them needs. "
                        if self.models.config.get("world") == "toyworld" else "")
            raise ValueError(f"{file} looks like nobody that these weights were trained on, so the picture "
                             f"would show somebody else. {cartoons}A mask (NAME_mask.png) cuts a person out "
                             "of a photo with others or a background. --any-subject draws it all the same")

    def make_subjects(self, prompt: str, subjects: Sequence[BoundSubject], features: Sequence[Tensor]
                      ) -> list[Subject]:
        """The subjects of a prompt for `generate`, with the image feature (F,) of each.

        Raises ValueError for more of them than training had, a word that is not known or that lies behind
        the last token.
        """
        if self.max_people is not None and len(subjects) > self.max_people:
            raise ValueError(f"{len(subjects)} subjects: these weights were trained on at most "
                             f"{self.max_people} people in a picture, and would mix them up")
        return [Subject(find_token(self.models.tokenize, prompt, subject), feature)
                for subject, feature in zip(subjects, features, strict=True)]

    def encode_text(self, prompts: list[str], clip_skip: int = 1) -> Tensor:
        """(B,) prompts -> (B, 77, C), from the text encoder's last layer but `clip_skip` - 1.

        Raises ValueError if it has fewer layers.
        """
        layers = self.models.text_encoder.cfg.layers
        if not 1 <= clip_skip <= layers:
            raise ValueError(f"clip skip must be in 1..{layers}, the layers of these weights' text encoder, "
                             f"not {clip_skip}")
        return self.models.text_encoder(self.models.tokenize(prompts).to(self.device), clip_skip - 1)

    def context_at(self, text: Tensor, subjects: Sequence[Sequence[Subject]]) -> Callable[[Tensor], object]:
        """The UNet's context as a function of t (B,): subject tokens change with the timestep.

        text: (B, 77, C). subjects: for each prompt its subjects, possibly none.
        """
        if self.prompt is None:
            return lambda t: text
        slots = max(1, max(len(s) for s in subjects))
        features = text.new_zeros(len(text), slots, self.prompt.cfg.image_dim)
        positions = torch.zeros(len(text), slots, dtype=torch.int64, device=text.device)
        start = torch.zeros(len(text), slots, dtype=torch.int64, device=text.device)
        for b, people in enumerate(subjects):
            for s, subject in enumerate(people):
                features[b, s], positions[b, s] = subject.feature, subject.position
                start[b, s] = subject.start
        return lambda t: ExpertContext(
            text, self.prompt(text, features, positions, t[:, None] < start, t))

    def denoiser(self, text: Tensor, subjects: Sequence[Sequence[Subject] | None], prior_only: bool = False,
                 prior_above: int = PRIOR_ABOVE, strength: float = 1.0, sparse: float = 0.0,
                 reuse: bool = False,
                 steer: Callable[[Tensor, Tensor], list[Tensor]] = lambda x, t: []
                 ) -> Callable[[Tensor, Tensor], Tensor]:
        """The network as a sampler calls it: x (B, 4, h, w), t (B,), all alike -> eps (B, 4, h, w).

        text, subjects: as in `context_at`, but None in place of a sample's subjects lets the prior draw
        it alone. steer: x, t -> what ControlNets add to the UNet. Raises ValueError for subjects without
        MoA weights, and for `sparse` with `reuse`.
        """
        if sparse and reuse:
            raise ValueError("sparse routing and reused self-attention do not go together: give one of them")
        if self.prompt is None and any(subjects):
            raise ValueError("subjects need MoA weights: load the pipeline with a MoA file")
        alone = self.prompt is None or prior_only or strength == 0
        mixed = [] if alone else [b for b, people in enumerate(subjects) if people is not None]
        context = self.context_at(text[mixed], [subjects[b] for b in mixed]) if mixed else None
        unet, texts, kept = self.models.unet, bytes_of(text), {}

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            eps, residuals = torch.empty_like(x), steer(x, t)
            rows = mixed if int(t[0]) < prior_above else []
            if rows:
                with (scale_personalized(unet, strength), sparse_routing(unet, sparse) if sparse else
                      reuse_self_attention(unet, kept) if reuse else nullcontext()):
                    eps[rows] = unet(x[rows], t[rows], context(t[rows]), [r[rows] for r in residuals])
            # The same for all people: samples with the same text and noise are computed once, except
            # that each may be steered to its own hint.
            alike: dict[object, list[int]] = {}
            for b, key in enumerate(zip(texts, bytes_of(x), strict=True)):
                if b not in rows:
                    alike.setdefault(b if residuals else key, []).append(b)
            if alike:
                first = [samples[0] for samples in alike.values()]
                with force_routing(unet, 1.0) if self.prompt is not None else nullcontext():
                    found = unet(x[first], t[first], text[first], [r[first] for r in residuals])
                for samples, one in zip(alike.values(), found, strict=True):
                    eps[samples] = one
            return eps

        return denoise

    @torch.no_grad()
    def sample(self, x: Tensor, text: Tensor, null: Tensor,
               subjects: Sequence[Sequence[Subject] | None] | None = None, steps: int = 20,
               guidance_scale: float = 5.0, sampler: str = "unipc", controls: Sequence[Control] = (),
               progress: Callable[[int, int, int, Tensor], None] | None = None, prior_only: bool = False,
               prior_above: int = PRIOR_ABOVE, strength: float = 1.0, sparse: float = 0.0,
               reuse: bool = False) -> Tensor:
        """From noise x (B, 4, h, w) to latents (B, 4, h, w), guided from the text states null (1 or
        B, 77, C) to text (B, 77, C). The rest as in `generate` and `denoiser`."""
        for control in controls:
            self.check_controlnet(control.net)
        states, people = text, list(subjects or [[]] * len(text))
        timesteps = timesteps_of(SAMPLERS[sampler], steps)
        if not prior_only:
            warn_if_absent(people, timesteps, prior_above)
        if guidance_scale != 1:
            states = torch.cat([null.expand_as(text), text])
            people = [None if found is None else [] for found in people] + people
        steer = steering(controls, states, len(text), timesteps)
        denoise = self.denoiser(states, people, prior_only, prior_above, strength, sparse, reuse, steer)
        if guidance_scale != 1:
            denoise = guided(denoise, guidance_scale)
        return SAMPLERS[sampler](denoise, x, steps=steps, progress=progress)

    def check_prompt(self, prompt: str) -> None:
        """Raise ValueError where more than half of a prompt's words are unknown to the weights: the picture
        would be of something else. `generate` does not check, since it draws training sheets too."""
        tokenize = self.models.tokenize
        words, unknown = tokenize.words(prompt), tokenize.unknown_words(prompt)
        if sum(word in unknown for word in words) > len(words) / 2:
            raise ValueError(f"{prompt!r}: {tokenize.complaint(prompt)}; write half of it with others")

    @torch.no_grad()
    def generate(self, prompts: Sequence[str] | Tensor, seeds: Sequence[int | Tensor],
                 subjects: Sequence[Sequence[Subject] | None] | None = None, negative_prompt: str = "",
                 size: tuple[int, int] | None = None, clip_skip: int = 1, **sampling) -> Tensor:
        """Draw one picture per prompt.

        Args:
            prompts, seeds: (B,) each. The noise of a picture depends on its own seed only, or is given
                in its place: (4, h, w). In place of the prompts their text states (B, 77, C), if they
                are not those of any prompt.
            subjects: per prompt the people to be fused in, or None for the prior alone; none by default.
            negative_prompt: what guidance leads away from. It goes through MoA too, without
                subjects: it was trained so, and otherwise guidance would multiply every difference
                between the two branches, in the background as well.
            size: (height, width) in pixels, multiples of the VAE's cell; None is config.json's.
            clip_skip: the text encoder's layer that is used, counted from the last, 1.
            sampling: of `sample`: steps (20), guidance_scale (5.0), sampler (a name in `SAMPLERS`,
                "unipc"), controls, whose effects are added up; progress, called after each step as
                (step, steps, t, predicted clean latents); prior_only, to draw with the base model;
                prior_above (800), from this t up the base model draws alone; strength (1.0), a factor
                of the personalized experts' weight; sparse (0.0), weights of theirs that are no larger
                count as 0 and are not computed; reuse (False), the personalized self-attention of every
                second call is that of the call before (see moa/routing.py for both).
        Returns: (B, 3, H, W) in [-1, 1], float32 on the CPU.
        Raises ValueError for bad sizes and clip skips, ControlNets of other models and, from the
        sampler, for bad steps.
        """
        x = self.noise(seeds, size)
        if isinstance(prompts, Tensor):
            null, text = self.encode_text([negative_prompt], clip_skip), prompts
        else:
            null, text = self.encode_text([negative_prompt, *prompts], clip_skip).split([1, len(prompts)])
        return self.decode(self.sample(x, text, null, subjects, **sampling))

    def check_controlnet(self, net: ControlNet) -> None:
        """Raise ValueError unless a ControlNet has the sizes of this UNet and of this VAE's cells."""
        wanted = {**asdict(self.models.unet.cfg), "factor": self.models.vae.cfg.factor}
        found = {**asdict(net.cfg), "factor": net.cfg.factor}
        wrong = [f"{k} {found[k]}, not {v}" for k, v in wanted.items() if found[k] != v]
        if wrong:
            raise ValueError(f"the ControlNet was made for another base model: it has {'; '.join(wrong)}")

    def noise(self, seeds: Sequence[int | Tensor], size: tuple[int, int] | None = None) -> Tensor:
        """(B, 4, h, w) noise, each picture's drawn on the CPU from its own seed, or given (4, h, w)."""
        height, width = size or (self.models.config["image_size"],) * 2
        factor, channels = self.models.vae.cfg.factor, self.models.unet.cfg.latent_channels
        for name, value in (("height", height), ("width", width)):
            if value < factor or value % factor:
                raise ValueError(f"{name} {value} must be a positive multiple of {factor}")
        shape = (channels, height // factor, width // factor)
        noise = [seed if isinstance(seed, Tensor) else
                 torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        for given in noise:
            if given.shape != shape:
                raise ValueError(f"noise must be {shape} for pictures {width} pixels wide and {height} high, "
                                 f"not {tuple(given.shape)}")
        return torch.stack([each.to(self.device, self.dtype) for each in noise])

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) pictures in [-1, 1] -> (B, 4, h, w) latents. Raises ValueError as `noise` does."""
        vae = self.models.vae
        return vae.encode(pictures.to(self.device, vae.quant_conv.weight.dtype)).to(self.dtype)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4, h, w) latents -> (B, 3, H, W) pictures in [-1, 1], float32 on the CPU.

        Infinite values become NaN, so that they cannot pass for black or white.
        """
        vae = self.models.vae
        latents = latents.to(vae.post_quant_conv.weight.dtype)
        # In fp32 the VAE takes more memory than the UNet: one picture of 512 x 512 at a time.
        size = max(1, DECODED // latents[0, 0].numel())
        pictures = torch.cat([vae.decode(part).float().cpu() for part in latents.split(size)])
        return pictures.masked_fill(pictures.isinf(), float("nan")).clamp(-1, 1)


def find_token(tokenize: Tokenizer, prompt: str, subject: BoundSubject) -> int:
    """Index of the token that a subject is fused into. Raises ValueError if there is none."""
    word, end, files = subject
    if tokenize.unknown_words(word):
        known = [person for person in PEOPLE if not tokenize.unknown_words(person)]
        raise ValueError(f"subject {files[0]}: these weights do not know the word {word!r}; the people "
                         f"they know: {', '.join(known)}")
    before = tokenize.encode(prompt[:end])
    if len(before) > tokenize.length - 2 or before[-1:] != tokenize.encode(word)[-1:]:
        raise ValueError(f"subject {files[0]}: its word {word!r} lies beyond the {tokenize.length} tokens "
                         "of the prompt: make the prompt shorter")
    return len(before)


def slerp(a: Tensor, b: Tensor, amount: float) -> Tensor:
    """From a (...) at amount 0 to b (...) at 1, along the arc between them as vectors: halfway between
    two noises there is noise again, where their mean would be too weak. Exactly a and b at the ends; a
    straight line where there is no one arc, between vectors along one line.
    """
    weights = torch.tensor([1 - amount, amount], dtype=torch.float64)
    cosine = torch.cosine_similarity(a.flatten().cpu().double(), b.flatten().cpu().double(), dim=0)
    if cosine.abs() < 1 - 1e-9:
        angle = cosine.acos()
        weights = (weights * angle).sin() / angle.sin()
    of_a, of_b = weights.tolist()
    return (of_a * a.float() + of_b * b.float()).to(a.dtype)


def interpolate(a: Tensor, b: Tensor, count: int, spherical: bool = False) -> Tensor:
    """From a (...) to b (...) in equal steps: (count, ...), of which the first is a and the last b.

    spherical: along the arc of `slerp` in place of the straight line.
    """
    between = slerp if spherical else torch.lerp
    return torch.stack([between(a, b, k / (count - 1)) for k in range(count)])


def bytes_of(samples: Tensor) -> list[bytes]:
    """The bytes of each sample of a batch: equal where the samples are."""
    return [sample.float().cpu().numpy().tobytes() for sample in samples]
