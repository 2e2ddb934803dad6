"""Train the digits model from nothing and save it as a pipeline folder.

Run it as ``python examples/digits/train.py -o FOLDER``.

First the autoencoder learns to draw digits, then the U-Net and the text encoder learn together
to denoise its latents.  Runs on a CUDA device when there is one, else on the CPU.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as nnf
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

# isort: split
from components import (
    CONTEXT,
    LENGTH,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    build_vae,
    save_pipeline,
)
from digits import captions, load_data, sharpen

MAIN_SIZE = (128, 128)
OTHER_SIZES = ((64, 64), (96, 96), (96, 128), (128, 96))
MAIN_SHARE = 0.6  # of the training steps
NO_CAPTION = 0.15  # share of images trained without their caption
KL_WEIGHT = 1e-4


def render(points: Tensor, size: tuple[int, int], wobble: float = 1.2) -> Tensor:
    """Draw control points (n, 8, 8) as pictures (n, 3, h, w) in -1..1, each slightly moved.

    The digit fills the central square of the canvas.  ``wobble`` scales the random turns,
    stretches, slants and shifts.
    """
    n, (height, width) = len(points), size
    pad_y, pad_x = (3 if height > width else 0), (3 if width > height else 0)
    cells = nnf.pad(points[:, None], (pad_x, pad_x, pad_y, pad_y))

    def noise(scale: float) -> Tensor:
        return (torch.rand(n, device=points.device) * 2 - 1) * scale * wobble

    angle, slant = noise(0.08), noise(0.06)
    turn = torch.stack([angle.cos(), -angle.sin() + slant, angle.sin(), angle.cos()], 1)
    turn = turn.view(n, 2, 2) * torch.stack([1 + noise(0.05), 1 + noise(0.05)], 1)[:, None]
    side = min(height, width)
    canvas = torch.tensor([width / side, height / side], device=points.device)
    padded = torch.tensor([8 / (8 + 2 * pad_x), 8 / (8 + 2 * pad_y)], device=points.device)
    shift = torch.stack([noise(0.08), noise(0.06)], 1)
    theta = torch.cat([turn * canvas, shift[:, :, None]], 2) * padded[:, None]
    grid = nnf.affine_grid(theta, [n, 1, height, width], align_corners=False)
    ink = nnf.grid_sample(cells, grid, "bicubic", padding_mode="border", align_corners=False)
    return (ink.clamp(0, 16) / 8 - 1).repeat(1, 3, 1, 1)


class CopyLoss(nn.Module):
    """The two parts of the autoencoder's loss on a batch of pictures."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean squared error of the copies and the KL divergence of the latents."""
        mean, logvar = self.vae.encode(pictures).latent_dist.parameters.chunk(2, 1)
        latents = mean + (0.5 * logvar.clamp(-30, 20)).exp() * torch.randn_like(mean)
        copies = self.vae.decode(latents, return_dict=False)[0]
        kl = -0.5 * (1 + logvar - mean**2 - logvar.exp()).mean()
        return nnf.mse_loss(copies, pictures), kl


class Denoiser(nn.Module):
    """The U-Net as a plain function of tensors."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, noisy: Tensor, times: Tensor, context: Tensor) -> Tensor:
        """Return the predicted noise."""
        return self.unet(noisy, times, context, return_dict=False)[0]


def graphed(module: nn.Module, *inputs: Tensor) -> nn.Module:
    """Record the module's passes for inputs of these shapes as CUDA graphs; as is on a CPU.

    Networks this small would otherwise spend most of the time launching kernels.
    """
    if not inputs[0].is_cuda:
        return module
    return torch.cuda.make_graphed_callables(module, inputs)


class Average:
    """An exponential moving average of parameters."""

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        self.live = list(parameters)
        self.mean = [p.detach().clone() for p in self.live]
        self.decay = decay

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the live parameters."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self.mean, [p.detach() for p in self.live], 1 - decay)

    @torch.no_grad()
    def apply(self) -> None:
        """Put the average in the place of the live parameters."""
        torch._foreach_copy_(self.live, self.mean)


def rate(step: int, steps: int, warmup: int) -> float:
    """Return the learning rate's factor: a linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


def pick_size(rng: random.Random) -> tuple[int, int]:
    """Choose the size of one training batch."""
    return MAIN_SIZE if rng.random() < MAIN_SHARE else rng.choice(OTHER_SIZES)


def train_vae(vae: AutoencoderKL, points: Tensor, steps: int, batch: int, seed: int) -> None:
    """Train the autoencoder to copy pictures of all sizes; leaves the average in place."""
    rng = random.Random(seed)
    sizes = (MAIN_SIZE, *OTHER_SIZES)
    losses = {
        size: graphed(CopyLoss(vae), render(points[:1].repeat(batch, 1, 1), size))
        for size in sizes
    }
    parameters = list(vae.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=1e-4)
    average = Average(parameters, 0.998)
    start = time.time()
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * rate(step, steps, 100)
        chosen = torch.randint(len(points), (batch,), device=points.device)
        size = pick_size(rng)
        copy_loss, kl = losses[size](render(points[chosen], size, wobble=2.0))
        optimizer.zero_grad()
        (copy_loss + KL_WEIGHT * kl).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        if step % 250 == 0 or step == steps - 1:
            print(
                f"vae {step}/{steps} mse {copy_loss.item():.5f} kl {kl.item():.3f} "
                f"{time.time() - start:.1f} s",
                flush=True,
            )
    average.apply()


@torch.no_grad()
def encode_all(vae: AutoencoderKL, points: Tensor, size: tuple[int, int], copies: int) -> Tensor:
    """Return latents (copies * n, 4, h / 8, w / 8) of pictures of every digit, each moved anew."""
    chunks = points.repeat(copies, 1, 1).split(256)
    return torch.cat([vae.encode(render(c, size)).latent_dist.sample() for c in chunks])


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], device: torch.device) -> Tensor:
    """Return the token ids of the texts, padded as the pipeline pads them."""
    ids = tokenizer(texts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    return ids.input_ids.to(device)


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    token_ids: Tensor,
    latents: dict[tuple[int, int], Tensor],
    labels: Tensor,
    args: argparse.Namespace,
) -> None:
    """Train the U-Net and the text encoder together; leaves the averages in place.

    ``token_ids`` holds the empty caption, then the captions of each digit in turn.
    """
    rng = random.Random(args.seed)
    device = labels.device
    noise_schedule = DDPMScheduler.from_config(build_scheduler().config)
    parameters = [*unet.parameters(), *text_encoder.parameters()]
    optimizer = torch.optim.AdamW(
        parameters, lr=args.lr, weight_decay=1e-2, fused=device.type == "cuda"
    )
    average = Average(parameters, 0.9995)
    times = torch.zeros(args.batch, dtype=torch.int64, device=device)
    context = torch.zeros(args.batch, *token_ids.shape[1:], CONTEXT, device=device)
    denoisers = {
        size: graphed(
            Denoiser(unet), torch.zeros_like(bank[: args.batch]), times, context.requires_grad_()
        )
        for size, bank in latents.items()
    }
    per_digit = (len(token_ids) - 1) // 10
    trend = torch.ones((), device=device)
    start = time.time()
    for step in range(args.steps):
        optimizer.param_groups[0]["lr"] = args.lr * rate(step, args.steps, 300)
        size = pick_size(rng)
        bank = latents[size]
        chosen = torch.randint(len(bank), (args.batch,), device=device)
        clean = bank[chosen]
        caption = torch.randint(per_digit, (args.batch,), device=device)
        caption += 1 + labels[chosen % len(labels)] * per_digit
        caption[torch.rand(args.batch, device=device) < NO_CAPTION] = 0
        context = text_encoder(token_ids)[0][caption]
        noise = torch.randn_like(clean)
        times = torch.randint(1000, (args.batch,), device=device)
        noisy = noise_schedule.add_noise(clean, noise, times)
        loss = nnf.mse_loss(denoisers[size](noisy, times, context), noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        average.update(step)
        trend.lerp_(loss.detach(), 0.01)
        if step % 500 == 0 or step == args.steps - 1:
            print(
                f"unet {step}/{args.steps} loss {trend.item():.5f} {time.time() - start:.1f} s",
                flush=True,
            )
    average.apply()


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to write")
    parser.add_argument("--vae-steps", type=int, default=2200)
    parser.add_argument("--steps", type=int, default=9500, help="steps of the U-Net")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--copies", type=int, default=24, help="moved pictures of each digit")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Train everything and save the pipeline."""
    args = parse()
    start = time.time()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    device = torch.device(args.device)
    data = load_data()
    points = torch.from_numpy(sharpen(data.train_x)).to(device)
    labels = torch.from_numpy(data.train_y).to(device)
    tokenizer = build_tokenizer()

    vae = build_vae().to(device)
    train_vae(vae, points, args.vae_steps, min(args.batch, 64), args.seed)
    vae.requires_grad_(False)
    latents = {MAIN_SIZE: encode_all(vae, points, MAIN_SIZE, args.copies)}
    for size in OTHER_SIZES:
        latents[size] = encode_all(vae, points, size, max(1, args.copies // 3))
    scaling = 1 / latents[MAIN_SIZE].std().item()
    vae.register_to_config(scaling_factor=round(scaling, 5))
    latents = {size: bank * vae.config.scaling_factor for size, bank in latents.items()}
    main_bank = latents[MAIN_SIZE]
    print(f"scaling factor {scaling:.4f}, mean {main_bank.mean((0, 2, 3)).tolist()}", flush=True)

    unet = build_unet().to(device)
    text_encoder = build_text_encoder(tokenizer).to(device)
    texts = [text for digit in range(10) for text in captions(digit)]
    token_ids = tokenize(tokenizer, ["", *texts], device)
    train_unet(unet, text_encoder, token_ids, latents, labels, args)
    weights = sum(p.numel() for part in (vae, text_encoder, unet) for p in part.parameters())
    save_pipeline(args.output, vae.cpu(), text_encoder.cpu(), unet.cpu())
    print(f"{weights / 1e6:.2f} M weights, {time.time() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
