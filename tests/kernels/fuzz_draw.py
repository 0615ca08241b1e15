"""What fuzz.py draws: a call of a loss, with its layouts, dtypes, values, settings and surroundings."""

import contextlib
import copy
import math

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LATENTS = ("policy", "old", "ref_cond", "ref_uncond", "x0", "noise", "reference", "ema")
WEIGHTINGS = ("uniform", "t", "t2", "huber", "ghuber")
NAMES = (
    *["crd_loss"] * 5,
    *["nft_loss"] * 2,
    *["awm_loss"] * 3,
    "diffusion_dpo_loss",
    "flow_matching_loss",
    "implicit_reward",
)


class Layout:
    """Where the numbers of one tensor lie: `place` puts values there, alike at each call."""

    def __init__(self, dice, shape, dtype, kinds):
        self.shape, self.dtype, self.kind = tuple(shape), dtype, dice.choice(kinds)
        dims = range(len(shape))
        self.order = dice.sample(dims, len(shape))
        if dice.random() < 0.7:  # the batch stays in front
            self.order = [0, *(d for d in self.order if d != 0)]
        self.dim, self.step, self.offset = dice.choice(dims), dice.randint(1, 3), dice.randint(0, 5)
        self.flat = [d for d in dims if dice.random() < 0.4]

    def place(self, values, device):
        shape, kind = self.shape, self.kind
        if kind == "expanded":
            picked = values[tuple(slice(0, 1) if d in self.flat else slice(None) for d in range(len(shape)))]
            return picked.to(device, self.dtype).expand(shape)
        if kind == "offset":
            room = torch.empty(values.numel() + self.offset, dtype=self.dtype, device=device)
            out = room[self.offset :].view(shape)
        elif kind == "halves":
            out = torch.empty(2 * shape[0], *shape[1:], dtype=self.dtype, device=device).chunk(2)[1]
        elif kind == "permuted":
            out = self._permuted(shape, device)
        elif kind == "sliced":
            larger = list(shape)
            larger[self.dim] = larger[self.dim] * self.step + self.offset
            room = self._permuted(larger, device)
            cut = slice(self.offset, self.offset + shape[self.dim] * self.step, self.step)
            out = room[tuple(cut if d == self.dim else slice(None) for d in range(len(shape)))]
        else:
            out = torch.empty(shape, dtype=self.dtype, device=device)
        assert out.shape == torch.Size(shape)
        return out.copy_(values)

    def _permuted(self, shape, device):
        room = torch.empty([shape[d] for d in self.order], dtype=self.dtype, device=device)
        return room.permute([self.order.index(d) for d in range(len(shape))])


LATENT_KINDS = ("contiguous", "contiguous", "offset", "halves", "permuted", "sliced", "expanded")
VECTOR_KINDS = ("contiguous", "contiguous", "offset", "sliced", "expanded")


class Drawn:
    """One call: `make(device)` gives its tensors, `settings` its other keywords."""

    def __repr__(self):
        lines = [f"{self.name}{self.shape} {self.settings}"]
        for name, t in self.tensors.items():
            if t is not None:
                kind = self.layouts[name].kind if name in self.layouts else "shared"
                lines.append(f"{name}: {kind} {str(t.dtype)[6:]} {tuple(t.shape)} {t.stride()}")
        how = {k: v for k, v in vars(self).items() if isinstance(v, (bool, int, str, float)) and k != "name"}
        return "\n    ".join([*lines, str(how)])

    def copy(self):
        return copy.deepcopy(self)

    def next_values(self):
        self.values_seed += 1

    def doubles(self, tensors):
        """Whether some tensor that is certainly read is float64."""
        guided = self.settings.get("guidance_scale", 1.0) > 1
        read = [tensors.get(name) for name in LATENTS if guided or name != "ref_uncond"]
        return any(t is not None and t.dtype == torch.float64 for t in read)

    @contextlib.contextmanager
    def context(self):
        with contextlib.ExitStack() as stack:
            if self.no_grad:
                stack.enter_context(torch.inference_mode() if self.inference else torch.no_grad())
            if self.hooks:  # as copies kept on the host come back
                hooks = torch.autograd.graph.saved_tensors_hooks
                stack.enter_context(hooks(lambda t: t.clone().contiguous(), lambda t: t))
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            yield

    def make(self, device="cpu"):
        self.tensors = {name: None for name in self.given}
        values = self._values(torch.Generator().manual_seed(self.values_seed))
        for name in self.layouts:
            self.tensors[name] = self.layouts[name].place(values[name], device)
        if self.shared:  # ema is old
            self.tensors["ema"] = self.tensors["old"]
        return dict(self.tensors)

    def _values(self, random):
        """float64 values of every tensor, before they are rounded to its dtype."""

        def normal(*size):
            return torch.randn(*size, generator=random, dtype=torch.float64)

        shape, batch = self.shape, self.shape[0]
        x0, noise = normal(*shape), normal(*shape)
        if self.exact:  # multiples of 1/4: policy - target is exactly 0
            x0, noise = (x0 * 4).round() / 4, (noise * 4).round() / 4
        old = noise - x0 + self.distance * normal(*shape)
        out = {"x0": x0, "noise": noise}
        for name in LATENTS:
            out.setdefault(name, old + self.spread * normal(*shape))
        out["old"] = old
        if self.exact:
            out["policy"] = noise - x0
        if self.equal:
            out["policy"] = out["old"]
        for name, which, position, value in self.spoilt:
            flat = out[name].reshape(batch, -1).clone()
            flat[which, position % flat.shape[1]] = value
            out[name] = flat.view(shape)
        out["advantage"] = self.advantage_size * normal(batch)
        if self.grid:  # equal ones, and none closer than hard selection can tell apart
            out["advantage"] = (out["advantage"] * 2).round() / 2
        for which, value in self.odd_advantages:
            out["advantage"][which] = value
        out["weight"] = out["advantage"]
        out["group"] = torch.tensor(self.ids)
        out["sigma"] = torch.rand(batch, generator=random, dtype=torch.float64) * 0.98 + 0.02
        out["kl_weight"] = (torch.rand(batch, generator=random, dtype=torch.float64) * 3).floor() / 1.5
        out["old_error"] = (normal(*shape) * 0.3).square().flatten(1).mean(1) + self.distance**2
        low, high = -(2**63), 2**63 - 1
        out["seed"] = torch.randint(low, high, (batch,), generator=random)
        out["seed"][0] = (low, high, 0, -1)[self.values_seed % 4]
        if "mask" in self.layouts:
            out["mask"] = self._mask(random, out)
        return out

    def _mask(self, random, out):
        layout = self.layouts["mask"]
        mask = torch.rand(layout.shape, generator=random, dtype=torch.float64)
        kept = mask < 0.7
        if not self.empty_mask:
            kept.view(layout.shape[0], -1)[:, 0] = True
        else:
            kept[0] = False
        mask = kept * (1.0 if not layout.dtype.is_floating_point else 2 * mask + 0.1)
        placed = layout.place(mask, "cpu").double()
        if self.nan_behind_mask is not None:
            name = self.nan_behind_mask
            out[name] = torch.where(placed.expand(self.shape) == 0, math.nan, out[name])
        return mask


def draw(dice, small=False):
    case = Drawn()
    case.name = dice.choice(NAMES)
    case.shape = _shape(dice, small, pairs=case.name == "diffusion_dpo_loss")
    batch = case.shape[0]
    case.values_seed = dice.randrange(2**31)
    case.distance, case.spread = dice.choice((1.0, 1.0, 0.1)), dice.choice((0.3, 0.3, 1e-2, 2.0))
    case.equal, case.exact = dice.random() < 0.08, dice.random() < 0.05
    case.equal &= not case.exact
    case.settings, names = _settings(dice, case)
    case.shared = "shared" in names
    case.given = [n for n in names if n != "shared"]
    case.grid = dice.random() < 0.4 or case.settings.get("temperature", 1) < 1e-3
    case.advantage_size = dice.choice((1.0, 1.0, 3.0, 30.0))
    case.odd_advantages = []
    if dice.random() < 0.15:
        odd = (math.nan, math.inf, -math.inf, 1e30, -1e30, 0.0)
        case.odd_advantages = [(dice.randrange(batch), dice.choice(odd)) for _ in range(dice.randint(1, 2))]
    _tensors(dice, case)
    _surroundings(dice, case)
    case.tensors = {}
    return case


def _shape(dice, small, pairs):
    kind = dice.random()
    limit = 60 if small else 4000
    if kind < 0.12:
        batch, limit = dice.randint(1, 40 if small else 300), 6 if small else 12
    else:
        batch = dice.randint(1, 4 if small else 9)
    batch += batch % 2 if pairs else 0
    if 0.12 <= kind < 0.22:
        n = dice.choice((2047, 2048, 2049, 4097, 6151, 16385))
        return (min(batch, 2), n) if small else (batch, n)
    shape = []
    for _ in range(dice.randint(1, 7)):
        size = dice.choice((1, 1, 2, 3, 5, 7, 9, 16, 17, 33))
        if math.prod(shape) * size <= limit:
            shape.append(size)
        else:
            shape.append(1 if dice.random() < 0.3 else 2)
            if math.prod(shape) > limit:
                shape[-1] = 1
    return (batch, *shape)


def _settings(dice, case):
    """The keywords that are no tensors, and the names of the tensors that are given."""
    name, batch = case.name, case.shape[0]
    names = {
        "crd_loss": ["policy", "old", "x0", "advantage", "group"],
        "nft_loss": ["policy", "old", "x0", "advantage", "sigma"],
        "awm_loss": ["policy", "x0", "advantage"],
        "diffusion_dpo_loss": ["policy", "reference", "x0"],
        "flow_matching_loss": ["policy", "x0"],
        "implicit_reward": ["policy", "old", "x0"],
    }[name]
    names.append("seed" if dice.random() < 0.2 else "noise")
    if dice.random() < 0.3:
        names.append("mask")
    values, chosen = {}, {}
    if name in ("crd_loss", "nft_loss", "awm_loss"):
        if dice.random() < 0.85:
            names.append("ref_cond")
            values["guidance_scale"] = dice.choice((1.0, 0.0, -1.0, 4.5, 1.001, 7, 4.5))
            if values["guidance_scale"] > 1 or dice.random() < 0.1:
                names.append("ref_uncond")
            if values["guidance_scale"] > 1:
                chosen["guidance_scale"] = values.pop("guidance_scale")
        values["kl_beta"] = dice.choice((0.0, 0.1, 1.0, 3))
        values["advantage_clip"] = dice.choice((5.0, 1, 0.3, 100.0))
        values["denominator"] = dice.choice((None, 1, 2.5, 4.0 * batch))
        if dice.random() < 0.3:
            names.append("kl_weight")
    if name == "crd_loss":
        values["beta"] = dice.choice((1.0, 30.0, 0.01, 1000, 7.3))
        values["temperature"] = dice.choice((math.inf, math.inf, 0, 0.0, 1e-30, 1e-3, 0.1, 1, 50.0, 1e30))
        values["loss_type"] = dice.choice(("mse", "bce"))
        values["centering"] = dice.choice(("prompt", "prompt", "batch", "none"))
        values["adaptive_weighting"] = dice.random() < 0.5
        values["reward_adaptive_kl"] = dice.random() < 0.5
        if dice.random() < 0.5:
            chosen["kl_beta"] = values.pop("kl_beta")
            chosen["kl_min"] = dice.choice((0.0, chosen["kl_beta"], chosen["kl_beta"] / 3))
        elif values["kl_beta"] == 0:
            values["kl_min"] = 1e-4  # kl_beta = 0 switches the anchor off whatever kl_min
    if name == "nft_loss":
        values["beta"] = dice.choice((1.0, 0.1, 0.5, 2, 1e-2))
        values["adaptive_weighting"] = dice.random() < 0.5
    if name == "implicit_reward":
        values["adaptive_weighting"] = dice.random() < 0.5
    if name == "diffusion_dpo_loss":
        values["beta"] = dice.choice((5000.0, 1, 50.0))
    if name == "flow_matching_loss" and dice.random() < 0.6:
        names.append("weight")
    if name == "awm_loss":
        values["weighting"] = dice.choice(WEIGHTINGS)
        beside = dice.choice(
            ([], [], ["old"], ["old"], ["old_error"], ["ema"], ["ema", "old_error"], "shared")
        )
        names += ["old", "shared"] if beside == "shared" else beside
        if "old" in names or "old_error" in names:
            sides = (None, 0.2, 1e-3, (0.1, 0.3), [0.5, 2.0], (1, 1))
            values["clip_range"] = dice.choice(sides)
        if "ema" in names or "shared" in names:
            values["ema_kl_beta"] = dice.choice((0.0, 0.5, 2))
        if dice.random() < 0.5:
            chosen["weighting"] = values.pop("weighting")
            if chosen["weighting"] != "uniform" or dice.random() < 0.3:
                names.append("sigma")
        else:
            del values["weighting"]
    return {**{k: v for k, v in values.items() if dice.random() < 0.6}, **chosen}, names


def _tensors(dice, case):
    """Dtype and layout of each, and what is spoilt in them."""
    shape, batch = case.shape, case.shape[0]
    one = dice.choice(FLOATS) if dice.random() < 0.5 else None
    kinds = ("contiguous",) if dice.random() < 0.2 else LATENT_KINDS
    case.layouts = {}
    case.empty_mask = dice.random() < 0.05
    for name in case.given:
        if name in LATENTS:
            case.layouts[name] = Layout(dice, shape, one or dice.choice(FLOATS), kinds)
        elif name == "mask":
            sizes = [n if dice.random() < 0.6 else 1 for n in shape]
            dtype = dice.choice((torch.bool, torch.uint8, *FLOATS))
            case.layouts[name] = Layout(dice, sizes, dtype, ("contiguous", "permuted", "sliced", "offset"))
        elif name != "group":
            dtype = torch.int64 if name == "seed" else dice.choice((torch.float32, torch.float32, *FLOATS))
            case.layouts[name] = Layout(dice, (batch,), dtype, VECTOR_KINDS)
    if "group" in case.given:
        dtype = dice.choice((torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8))
        bounds = torch.iinfo(dtype)
        step = dice.choice((1, 1, 2**8, 2**16, 2**32, 2**33 + 1, 2**62, -(2**31)))
        pool = [bounds.min, bounds.max, -1, 0, *(step * i for i in range(-3, max(4, batch // 2)))]
        pool = [i for i in pool if bounds.min <= i <= bounds.max]
        pool = dice.sample(pool, min(len(pool), dice.randint(1, batch)))
        case.ids = [dice.choice(pool) for _ in range(batch)]
        case.layouts["group"] = Layout(dice, (batch,), dtype, VECTOR_KINDS)
    else:
        case.ids = [0] * batch
    if case.equal and "old" in case.layouts:
        for name in ("policy", "old"):
            if case.layouts[name].kind == "expanded":
                case.layouts[name].kind = "contiguous"
            case.layouts[name].dtype = case.layouts["policy"].dtype
    case.equal &= "old" in case.layouts and case.name == "crd_loss"
    case.spoilt, latents = [], [n for n in case.layouts if n in LATENTS]
    if dice.random() < 0.1 and not case.equal:
        value = dice.choice((math.nan, math.inf, -math.inf))
        case.spoilt = [(dice.choice(latents), dice.randrange(batch), dice.randrange(10**6), value)]
    case.nan_behind_mask = dice.choice(latents) if dice.random() < 0.5 and not case.equal else None
    if case.nan_behind_mask and case.layouts[case.nan_behind_mask].kind == "expanded":
        case.nan_behind_mask = None
    if (case.empty_mask and "mask" in case.layouts) or case.spoilt:
        case.equal = False


def _surroundings(dice, case):
    case.gradient = dice.random() < 0.95
    case.non_leaf = dice.random() < 0.4
    case.no_grad, case.inference = dice.random() < 0.05, dice.random() < 0.5
    case.autocast = dice.random() < 0.1
    case.hooks = dice.random() < 0.1
    floats = [n for n in case.given if n not in ("policy", "group", "seed", "mask")]
    case.with_gradients = dice.sample(floats, min(2, len(floats))) if dice.random() < 0.1 else []
    case.marked = dice.choice([n for n in case.given if n != "policy"]) if dice.random() < 0.05 else ""
    if case.marked in case.with_gradients or case.hooks or (case.inference and case.no_grad):
        case.marked = ""
    case.absent = ["old_deviation"] if not {"old", "ema", "reference"} & set(case.given) else []
    case.absent += ["kl", "old_kl", "kl_loss"] if "ref_cond" not in case.given else []
    case.deterministic = dice.random() < 0.5
    case.threads = dice.choice((1, 1, 1, 2, 3))
    case.repeats = dice.choice((1, 1, 2, 3))
    case.backwards = dice.choice((1, 1, 1, 1, 2, 3))
    case.upstream = dice.choice((1.0, 1.0, 0.5, -3.0, 1024.0, 2.0**-10, 0.0))
    case.micro_batch = (
        dice.randint(1, case.shape[0]) if case.name == "crd_loss" and dice.random() < 0.3 else 0
    )
    if case.micro_batch:
        case.upstream, case.backwards = 1.0, 1
