"""A diffusion policy's inner loop: 16 actions of 8 joints, a small 1-D U-Net, DDPM and DDIM.

python examples/robot_policy.py    (needs diffusers, for the schedulers to compare with)

A policy's scheduler is swapped as here. In lerobot's: policy.diffusion.noise_scheduler =
fast.convert(policy.diffusion.noise_scheduler). Chi et al., "Diffusion Policy" (2023).
"""

import statistics
import time

import diffusers
import torch
from torch import nn

import fastgen
from fastgen.integrations import diffusers as fast


class UNet(nn.Module):
    """(B, 8, 16) actions and a timestep to the noise that is in them."""

    def __init__(self, joints=8, width=64):
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.first = nn.Conv1d(joints, width, 5, padding=2)
        self.down = nn.Conv1d(width, 2 * width, 4, stride=2, padding=1)
        self.middle = nn.Conv1d(2 * width, 2 * width, 5, padding=2)
        self.up = nn.ConvTranspose1d(2 * width, width, 4, stride=2, padding=1)
        self.last = nn.Conv1d(2 * width, joints, 5, padding=2)

    def forward(self, x, t, cond=None):
        t = t.float().view(-1, 1) if isinstance(t, torch.Tensor) else torch.tensor([[float(t)]])
        a = torch.relu(self.first(x) + self.time(t / 100.0).unsqueeze(-1))
        b = torch.relu(self.middle(torch.relu(self.down(a))))
        return self.last(torch.cat([a, torch.relu(self.up(b))], 1))


def with_scheduler(scheduler, network, steps):
    def act():
        scheduler.set_timesteps(steps)
        x = torch.randn(1, 8, 16)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, t), t, x, return_dict=False)[0]
        return x

    return act


def with_plan(plan, network):
    seeds = iter(range(1 << 30))
    return lambda: fastgen.sample(network, plan, (1, 8, 16), seed=next(seeds))


@torch.inference_mode()
def main(rounds=40):
    torch.manual_seed(0)
    network = UNet().eval()
    schedule = fastgen.NoiseSchedule.cosine(100)
    for name, steps in (("DDPM", 100), ("DDIM", 10)):
        made = getattr(diffusers, f"{name}Scheduler")(
            num_train_timesteps=100, beta_schedule="squaredcos_cap_v2"
        )
        solver = getattr(fastgen.solvers, name.lower())
        ways = {
            "diffusers": with_scheduler(made, network, steps),
            "converted": with_scheduler(fast.convert(made, noise="fastgen"), network, steps),
            "fastgen.sample": with_plan(solver(schedule, steps, clip=1.0), network),
        }
        times = {way: [] for way in ways}
        for _ in range(rounds):
            for way, act in ways.items():
                start = time.perf_counter()
                act()
                times[way].append(1e3 * (time.perf_counter() - start))
        for way, taken in times.items():
            taken = sorted(taken[3:])  # the first ones warm up
            p50, p99 = taken[len(taken) // 2], taken[int(0.99 * len(taken))]
            mean = statistics.mean(taken)
            print(f"{name}, {steps:3} steps, {way:<14} mean {mean:6.2f} ms, p50 {p50:6.2f}, "
                  f"p99 {p99:6.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
