"""What all stages share that train a UNet to predict noise."""
import torch
from torch import Tensor

from samplers import add_noise, alpha_bar
from training.stage import Stage, step_generator


def noised(stage: Stage, encoded: dict[str, Tensor], null_text: Tensor, step: int,
           turn: int) -> tuple[dict[str, Tensor], Tensor]:
    """The draws of a turn.

    Args:
        encoded: latents (B, 4, h, w) and text (B, M, C). null_text: (1, M, C), of the empty prompt.
    Returns: what the noise is predicted from and compared with: x, eps (B, 4, h, w), t (B,), text
        (B, M, C), weight (B,); and which samples have the empty prompt (B,).
    """
    config, generator, x0 = stage.config, step_generator(stage.seed, step), encoded["latents"]
    eps = stage.noise(x0.shape, generator, turn)
    t = torch.randint(0, config.max_timestep, (config.batch_size,), generator=generator)
    null = torch.rand(config.batch_size, generator=generator) < config.null_probability
    t, null = stage.share(t, turn).to(stage.device), stage.share(null, turn).to(stage.device)
    return {"x": add_noise(x0, eps, t).contiguous(memory_format=torch.channels_last), "eps": eps, "t": t,
            "text": torch.where(null[:, None, None], null_text, encoded["text"]),
            "weight": snr_weight(t, config.min_snr)}, null


def noise_loss(eps_hat: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted mean of the squared error, and without weights as `eps`."""
    error = (eps_hat.float() - batch["eps"]).square().mean((1, 2, 3))
    return (batch["weight"] * error).mean(), {"eps": error.mean()}


def snr_weight(t: Tensor, gamma: float) -> Tensor:
    """min-SNR weight of the eps loss at each timestep (B,): min(SNR, gamma) / SNR; 1 for gamma 0."""
    alpha_bars = torch.tensor(alpha_bar(), dtype=torch.float32, device=t.device)[t]
    snr = alpha_bars / (1 - alpha_bars)
    return snr.clamp(max=gamma) / snr if gamma else torch.ones_like(snr)
