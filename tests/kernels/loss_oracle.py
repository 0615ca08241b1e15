"""What the losses of crd_kernels are by their public docstrings: in float64, by autograd.

Written from the docstrings and the design alone, apart from the package. Every function takes a `Case`:
`tensors` (float64, masks and groups too, or None) and `settings`, the keywords of the call that are no
tensors. It returns a dict of what the public function returns, with the gradient for policy as "grad".

`eps` makes the answer of the same formulas with roundings of that relative size at every latent and every
mean, drawn by `random`: how far such answers lie from the exact one is how far a correct one may lie.
"""

import math
from dataclasses import dataclass

import numpy
import torch
from torch.nn.functional import binary_cross_entropy_with_logits, logsigmoid

LATENTS = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise", "reference", "ema")


@dataclass
class Case:
    tensors: dict
    settings: dict
    upstream: torch.Tensor | float = 1.0
    eps: float = 0.0
    random: torch.Generator | None = None


class Samples:
    """The latents of a case with its mask: means over the elements of each sample, and the roundings."""

    def __init__(self, case):
        self.case, self.mask = case, case.tensors.get("mask")
        shape = case.tensors["policy"].shape
        self.batch, self.inner = shape[0], tuple(range(1, len(shape)))
        latents = {name: case.tensors.get(name) for name in LATENTS}
        if latents["noise"] is None:
            latents["noise"] = philox_normal(case.tensors["seed"], shape[1:].numel()).view(shape)
        if self.mask is not None:
            self.mask = self.mask.expand(shape)
        for name, value in latents.items():
            if value is None:
                setattr(self, name, None)
                continue
            value = value if self.mask is None else torch.where(self.mask == 0, 0.0, value)
            setattr(self, name, self.rounded(value.clone()))
        if latents["old"] is not None and torch.equal(latents["old"], latents["policy"]):
            self.old = self.policy.clone()
        self.policy.requires_grad_()
        self.target = self.rounded(self.noise - self.x0)
        scale = case.settings.get("guidance_scale", 1.0)
        self.anchor = self.ref_cond
        if self.ref_cond is not None and scale > 1:
            self.anchor = self.ref_uncond + self.rounded(scale * (self.ref_cond - self.ref_uncond))

    def rounded(self, value, times=1):
        if not self.case.eps:
            return value
        unit = torch.rand(value.shape, generator=self.case.random, dtype=torch.float64) * 2 - 1
        return value * (1 + times * self.case.eps * unit)

    def mean(self, value):
        """(B,): over the elements of each sample, weighed by the mask."""
        if self.mask is None:
            return self.rounded(value.mean(self.inner), 5)
        weighed = torch.where(self.mask == 0, 0.0, self.mask * value)
        return self.rounded(weighed.sum(self.inner) / self.mask.sum(self.inner), 5)

    def error(self, v):
        return self.mean((v - self.target).square())

    def size(self, v):
        return self.mean((v - self.target).abs()).detach()

    def distance(self, v, w):
        if v is None or w is None:
            return torch.zeros(self.batch, dtype=torch.float64)
        return self.mean((v - w).square())

    def reward(self):
        def of(v):
            if not self.case.settings.get("adaptive_weighting", True):
                return self.error(v)
            return self.error(v) / self.size(v).clamp(min=1e-5)

        return of(self.old) - of(self.policy)

    def answer(self, loss, **others):
        (grad,) = torch.autograd.grad(loss, self.policy, torch.as_tensor(self.case.upstream).expand_as(loss))
        if self.mask is not None:
            grad = torch.where(self.mask == 0, 0.0, grad)
        return {"loss": loss.detach(), "grad": grad, **{name: v.detach() for name, v in others.items()}}


def quality(advantage, clip):
    return (advantage.clamp(-clip, clip) / (2 * clip) + 0.5).clamp(0, 1)


def mean_over_batch(case, terms):
    return terms.sum() / (case.settings.get("denominator") or len(terms))


def anchor_weights(case, batch):
    weight = case.tensors.get("kl_weight")
    return torch.ones(batch, dtype=torch.float64) if weight is None else weight


def groups_of(case):
    ids = case.tensors["group"].tolist()
    if case.settings.get("centering", "prompt") == "batch":
        return [list(range(len(ids)))]
    members = {}
    for i, name in enumerate(ids):
        members.setdefault(name, []).append(i)
    return list(members.values())


def directions(a, temperature):
    """The weights p of one group, one or two of them."""
    uniform = torch.full_like(a, 1 / len(a))
    if temperature == math.inf:
        return [uniform]
    if temperature == 0:
        chosen = a > 0
        if torch.isnan(a).any():
            return [torch.full_like(a, math.nan), uniform]
        hard = torch.where(chosen, (a - a.max()).exp(), 0.0) if chosen.any() else torch.ones_like(a)
        return [hard / hard.sum(), uniform]
    return [torch.softmax((a - a.max()) / temperature, 0), torch.softmax((a.min() - a) / temperature, 0)]


def crd(case):
    s, x = Samples(case), case.settings
    beta, clip = x.get("beta", 1.0), x.get("advantage_clip", 5.0)
    r, a = s.reward(), quality(case.tensors["advantage"], clip)
    terms = torch.zeros(s.batch, dtype=torch.float64)
    for members in groups_of(case):
        r_g, a_g = r[members], a[members]
        weights = directions(a_g, x.get("temperature", math.inf))
        for p in weights:
            if x.get("centering") == "none":
                p = torch.zeros_like(p)
            r_c, a_c = r_g - (p * r_g.detach()).sum(), a_g - (p * a_g).sum()
            if x.get("loss_type", "mse") == "mse":
                term = (beta * r_c - a_c).square()
            else:
                term = binary_cross_entropy_with_logits(beta * r_c, a_c.sigmoid(), reduction="none")
            terms = terms.index_add(0, torch.tensor(members), term / len(weights))
    policy_loss = clip / beta * mean_over_batch(case, terms)
    kl = s.distance(s.policy, s.anchor)
    kl_beta = x.get("kl_beta", 0.1)
    kl_min = x.get("kl_min", 1e-4) if kl_beta else 0.0
    k = kl_min + a * (kl_beta - kl_min) if x.get("reward_adaptive_kl", True) else kl_beta
    kl_loss = mean_over_batch(case, k * anchor_weights(case, s.batch) * kl)
    return s.answer(
        policy_loss + kl_loss,
        policy_loss=policy_loss,
        kl_loss=kl_loss,
        implicit_reward=r,
        kl=kl,
        old_kl=s.distance(s.old, s.anchor),
        old_deviation=s.distance(s.policy, s.old),
    )


def implicit_reward(case):
    s = Samples(case)
    return s.answer(s.reward())


def nft(case):
    s, x = Samples(case), case.settings
    beta, clip, sigma = x.get("beta", 1.0), x.get("advantage_clip", 5.0), case.tensors["sigma"]
    a = quality(case.tensors["advantage"], clip)

    def d(v):
        if x.get("adaptive_weighting", True):
            return sigma * s.error(v) / torch.maximum(s.size(v), 1e-5 / sigma)
        return sigma.square() * s.error(v)

    positive = s.rounded((1 - beta) * s.old) + beta * s.policy
    negative = s.rounded((1 + beta) * s.old) - beta * s.policy
    kl = s.distance(s.policy, s.anchor)
    loss = clip / beta * mean_over_batch(case, a * d(positive) + (1 - a) * d(negative))
    loss = loss + x.get("kl_beta", 1e-4) * mean_over_batch(case, anchor_weights(case, s.batch) * kl)
    return s.answer(loss, error=s.error(s.policy), kl=kl, old_deviation=s.distance(s.policy, s.old))


def awm(case):
    s, x = Samples(case), case.settings
    clip, t = x.get("advantage_clip", 5.0), case.tensors.get("sigma")
    advantage = case.tensors["advantage"].clamp(-clip, clip)
    g = {
        "uniform": lambda e: e,
        "t": lambda e: t * e,
        "t2": lambda e: t * t * e,
        "huber": lambda e: t * ((e + 1e-10).sqrt() - 1e-5),
        "ghuber": lambda e: 4 * t * ((e + 1e-10) ** 0.25 - 1e-10**0.25),
    }[x.get("weighting", "uniform")]
    error = s.error(s.policy)
    old_error = case.tensors.get("old_error")
    if s.old is not None:
        old_error = s.error(s.old)
    if old_error is None:
        terms = advantage * g(error)
    else:
        rho = (g(old_error).detach() - g(error)).exp()
        terms = -advantage * rho
        if (sides := x.get("clip_range")) is not None:
            below, above = sides if isinstance(sides, (tuple, list)) else (sides, sides)
            terms = -torch.minimum(advantage * rho, advantage * rho.clamp(1 - below, 1 + above))
    kl = s.distance(s.policy, s.anchor)
    loss = mean_over_batch(case, terms)
    loss = loss + x.get("kl_beta", 0.0) * mean_over_batch(case, anchor_weights(case, s.batch) * kl)
    if s.ema is not None:
        loss = loss + x.get("ema_kl_beta", 0.0) * mean_over_batch(case, s.distance(s.policy, s.ema))
    beside = s.old if s.ema is None else s.ema
    return s.answer(loss, error=error, kl=kl, old_deviation=s.distance(s.policy, beside))


def dpo(case):
    s = Samples(case)
    g = s.error(s.policy) - s.error(s.reference)
    preferred, rejected = g.chunk(2)
    loss = -logsigmoid(-case.settings.get("beta", 5000.0) / 2 * (preferred - rejected)).mean()
    deviation = s.distance(s.policy, s.reference)
    return s.answer(loss, error=s.error(s.policy), kl=s.distance(None, None), old_deviation=deviation)


def flow_matching(case):
    s, weight = Samples(case), case.tensors.get("weight")
    error = s.error(s.policy)
    loss = (error if weight is None else weight * error).mean()
    return s.answer(loss, error=error, kl=s.distance(None, None), old_deviation=s.distance(None, None))


def philox_normal(seeds, n):
    """(B, n): the noise of int64 seeds, Philox 4x32-10 and Box-Muller as the package's docs define it."""
    u32 = numpy.uint32
    seeds = numpy.asarray(seeds.tolist(), dtype=numpy.int64).astype(numpy.uint64)[:, None]
    keys = [(seeds & 0xFFFFFFFF).astype(u32), (seeds >> 32).astype(u32)]
    blocks = numpy.arange(-(-n // 4), dtype=numpy.uint64)[None].repeat(len(seeds), 0)
    c = [(blocks & 0xFFFFFFFF).astype(u32), (blocks >> 32).astype(u32)]
    c += [numpy.zeros_like(c[0]), numpy.zeros_like(c[0])]
    for turn in range(10):
        low = c[0].astype(numpy.uint64) * 0xD2511F53
        high = c[2].astype(numpy.uint64) * 0xCD9E8D57
        k = [((key.astype(numpy.uint64) + turn * step) & 0xFFFFFFFF).astype(u32) for key, step in
             zip(keys, (0x9E3779B9, 0xBB67AE85))]  # fmt: skip
        c = [(high >> 32).astype(u32) ^ c[1] ^ k[0], high.astype(u32), (low >> 32).astype(u32) ^ c[3] ^ k[1],
             low.astype(u32)]  # fmt: skip
    u = [((word >> 8).astype(numpy.float32) + numpy.float32(0.5)) * numpy.float32(2**-24) for word in c]
    u = [value.astype(numpy.float64) for value in u]
    out = []
    for radius, turn in ((u[0], u[1]), (u[2], u[3])):
        radius = numpy.sqrt(-2 * numpy.log(radius))
        out += [radius * numpy.cos(2 * math.pi * turn), radius * numpy.sin(2 * math.pi * turn)]
    return torch.from_numpy(numpy.stack(out, -1).reshape(len(seeds), -1)[:, :n].copy())
