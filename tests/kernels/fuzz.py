"""Random calls of every public loss, compared with the oracle beside this file (loss_oracle.py).

    python tests/kernels/fuzz.py --cases 2000 --seed 0 --impl cpu
    python tests/kernels/fuzz.py --impl triton --cases 150      without a GPU, by Triton's interpreter
    python tests/kernels/fuzz.py --impl cpu --seed 0 --only 137  one case of that run again

--impl is cpu, reference or triton. Prints each case that is wrong with
how to run it again; the exit code is 1 if there was one. test_fuzz.py runs a few cases with every test run.

A case draws the loss, ranks and odd sizes, the layout and the dtype of every tensor, masks, seeds in place
of noise, settings, ragged groups, values that are not finite, and how the call is made: in one step or three,
under no_grad, autocast, deterministic algorithms or hooks of saved tensors, with another number of threads,
upstream gradients, backward twice, the same layout with new values, several cases at once in threads, in a
forked process.
"""

import argparse
import contextlib
import math
import multiprocessing
import os
import random
import sys
import threading
import traceback
from pathlib import Path

if __name__ == "__main__" and "triton" in sys.argv and not {"nvidia0", "kfd"} & {*os.listdir("/dev")}:
    os.environ["TRITON_INTERPRET"] = "1"  # must be there before triton is imported

import torch

sys.path.insert(0, str(Path(__file__).parent))

import crd_kernels
import loss_oracle
from fuzz_draw import draw

ORACLES = {
    "crd_loss": loss_oracle.crd,
    "nft_loss": loss_oracle.nft,
    "awm_loss": loss_oracle.awm,
    "diffusion_dpo_loss": loss_oracle.dpo,
    "flow_matching_loss": loss_oracle.flow_matching,
    "implicit_reward": loss_oracle.implicit_reward,
}
POSITIONAL = {
    "crd_loss": ("policy", "old", "ref_cond", "x0", "noise", "advantage", "group"),
    "nft_loss": ("policy", "old", "ref_cond", "x0", "noise", "advantage", "sigma"),
    "awm_loss": ("policy", "ref_cond", "x0", "noise", "advantage"),
    "diffusion_dpo_loss": ("policy", "reference", "x0", "noise"),
    "flow_matching_loss": ("policy", "x0", "noise"),
    "implicit_reward": ("policy", "old", "x0", "noise"),
}
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TINY = {torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133, torch.float32: 2.0**-149, torch.float64: 0.0}
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETING:
    UNIT[torch.bfloat16] *= 2  # the interpreter cuts off what a GPU rounds
ROUNDINGS = 6  # perturbed answers of the oracle that bound what rounding may do


class Wrong(AssertionError):
    pass


class Marked(torch.Tensor):
    """As libraries derive tensors to say what they hold."""


def call(case, tensors, impl):
    """The public function of a drawn case."""
    first = [tensors.get(name) for name in POSITIONAL[case.name]]
    rest = {name: t for name, t in tensors.items() if name not in POSITIONAL[case.name]}
    return getattr(crd_kernels, case.name)(*first, **rest, **case.settings, impl=impl)


def in_three_steps(case, tensors, impl):
    """crd_loss by measure, center and velocity_grad in micro-batches."""
    reference = {k: case.settings[k] for k in ("guidance_scale",) if k in case.settings}
    whole = {k: tensors.get(k) for k in ("seed", "ref_uncond", "mask")}
    adaptive = {k: case.settings[k] for k in ("adaptive_weighting",) if k in case.settings}
    batch, size = len(tensors["policy"]), case.micro_batch

    def part(name, rows):
        t = tensors.get(name)
        return t if t is None or (name == "mask" and len(t) == 1 != batch) else t[rows]

    parts = []
    slices = [slice(i, min(i + size, batch)) for i in range(0, batch, size)]
    for rows in slices:
        latents = [part(n, rows) for n in ("policy", "old", "ref_cond", "x0", "noise")]
        also = {n: part(n, rows) for n in whole}
        parts.append(crd_kernels.measure(*latents, **also, **reference, **adaptive, impl=impl))
    stats = crd_kernels.Stats.cat(parts)
    centering = {k: v for k, v in case.settings.items() if k not in ("guidance_scale", "adaptive_weighting")}
    out = crd_kernels.center(
        stats,
        tensors["advantage"],
        tensors["group"],
        kl_weight=tensors.get("kl_weight"),
        **centering,
        impl=impl,
    )
    gradients = []
    for rows in slices:
        latents = [part(n, rows) for n in ("policy", "ref_cond", "x0", "noise")]
        also = {n: part(n, rows) for n in whole}
        gradients.append(crd_kernels.velocity_grad(*latents, out[rows], **also, **reference, impl=impl))
    return stats, out, gradients


def run(case, impl, device="cpu"):
    """One call and its backward, as the case says. Returns a dict like the oracle's."""
    tensors = case.make(device)
    for name in case.with_gradients:
        tensors[name].requires_grad_()
    if case.marked:
        tensors[case.marked] = tensors[case.marked].as_subclass(Marked)
    policy = tensors["policy"].requires_grad_(case.gradient)
    if case.non_leaf and case.gradient:
        leaf, policy = policy, policy.view_as(policy)
        tensors["policy"] = policy
    else:
        leaf = policy
    with case.context():
        if case.micro_batch:
            stats, out, gradients = in_three_steps(case, {**tensors, "policy": policy.detach()}, impl)
            found = {n: getattr(stats, n) for n in ("implicit_reward", "kl", "old_kl", "old_deviation")}
            found |= {"loss": out.loss, "policy_loss": out.policy_loss, "kl_loss": out.kl_loss}
        else:
            out = call(case, tensors, impl)
    if case.micro_batch:
        return found | {"grad": torch.cat(gradients)}
    loss = out if case.name == "implicit_reward" else out.loss
    found = {"loss": loss.detach()}
    if case.name == "crd_loss":
        names = ("policy_loss", "kl_loss", "implicit_reward", "kl", "old_kl", "old_deviation")
    else:
        names = () if case.name == "implicit_reward" else ("error", "kl", "old_deviation")
    found |= {name: getattr(out, name) for name in names}
    if any(value.requires_grad for value in list(found.values())):
        raise Wrong("an output that is to be detached has a gradient")
    if not case.gradient or case.no_grad:
        if loss.requires_grad:
            raise Wrong("a loss without a gradient requires one")
        return found
    upstream = torch.as_tensor(case.upstream, dtype=loss.dtype, device=device).expand_as(loss)
    for turn in range(case.backwards):
        loss.backward(upstream, retain_graph=turn + 1 < case.backwards)
    for name in case.with_gradients:
        if tensors[name].grad is not None:
            raise Wrong(f"{name}: got a gradient")
    return found | {"grad": leaf.grad / case.backwards, "dtype": leaf.grad.dtype}


def compare(case, found, tensors):
    """Raises Wrong where `found` lies farther from the oracle than roundings take it."""
    oracle = ORACLES[case.name]
    exact_tensors = {k: None if t is None else _exact(k, t) for k, t in tensors.items()}
    read = {
        k: t for k, t in tensors.items() if not (case.micro_batch and k == "old")
    }  # no input of velocity_grad
    compute = torch.float64 if case.doubles(read) else torch.float32
    eps = (4 if compute == torch.float32 else 64) * UNIT[compute]
    if INTERPRETING:
        eps *= 8  # it adds up thousands of float32 one by one
    if tensors.get("seed") is not None:
        eps = max(eps, 1e-6)
    upstream = torch.as_tensor(case.upstream, dtype=torch.float64)
    exact = oracle(loss_oracle.Case(exact_tensors, case.settings, upstream))
    near = []
    for i in range(ROUNDINGS):
        generator = torch.Generator().manual_seed(i)
        near.append(oracle(loss_oracle.Case(exact_tensors, case.settings, upstream, eps, generator)))
    for name, value in found.items():
        if name == "dtype":
            continue
        wanted = exact[name]
        value = value.detach().cpu().as_subclass(torch.Tensor)
        if value.shape != wanted.shape:
            raise Wrong(f"{name}: shape {tuple(value.shape)} for {tuple(wanted.shape)}")
        dtype = value.dtype
        if name == "grad" and dtype != tensors["policy"].dtype:
            raise Wrong(f"grad: dtype {dtype} for a policy of {tensors['policy'].dtype}")
        spread = torch.stack([(other[name] - wanted).abs() for other in near]).amax(0)
        if name == "grad":  # what an element of a sample may be off by, another may too
            spread = spread.flatten(1).amax(1).view(-1, *[1] * (wanted.dim() - 1)).expand_as(wanted)
        backwards = 1 + (case.backwards > 1) * 2
        allowed = (
            10 * spread + backwards * (UNIT[dtype] + 4 * UNIT[torch.float32]) * wanted.abs() + TINY[dtype]
        )
        if dtype == torch.float64 and compute == torch.float64:
            allowed = 10 * spread + 1e-13 * wanted.abs() + 1e-300
        if compute == torch.float32:
            allowed = allowed + 1e-38 * max(1.0, abs(case.upstream))  # c1 and c2 underflow before the latents
        if name == "loss":  # log(1 + x) where there is no log1p
            allowed = allowed + 1e-15
        if (case.name, name) == (
            "nft_loss",
            "error",
        ):  # follows from the two branches' errors, and so from old
            size = wanted + exact["old_deviation"]
            allowed = (allowed + 20 * eps / case.settings.get("beta", 1.0) * size).nan_to_num(math.inf)
        if name in case.absent:
            allowed = torch.where(torch.isnan(value), math.inf, allowed)  # 0, or NaN where all is
        if name == "grad" and torch.isfinite(exact["loss"]).all():
            wanted = wanted.nan_to_num(math.inf)  # the oracle's 0 * inf; a bounded ratio has no gradient
        _agree(name, value.double(), wanted, allowed, torch.finfo(dtype).max / backwards)
    if case.equal and "implicit_reward" in found and not (found["implicit_reward"] == 0).all():
        raise Wrong("implicit_reward: not exactly 0 where policy equals old")


def _exact(name, tensor):
    tensor = tensor.detach().cpu()
    return tensor if name in ("group", "seed") else tensor.double()


def _agree(name, value, wanted, allowed, largest):
    """NaN where NaN is wanted, sample by sample for gradients; else within `allowed`."""
    finite = torch.isfinite(wanted) & torch.isfinite(allowed)
    finite &= wanted.abs() + allowed < largest
    wrong = finite & ~((value - wanted).abs() <= allowed)
    if wrong.any():
        i = int(wrong.flatten().nonzero()[0])
        got, want, may = (t.flatten()[i].item() for t in (value, wanted, allowed))
        raise Wrong(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, [{i}] is {got}, not {want} +- {may:.2g}"
        )
    bad = torch.isnan(wanted)
    hidden = torch.isfinite(value) & bad
    if name == "grad":  # the oracle's 0 * inf may stand at other elements, but not in other samples
        hidden = hidden.flatten(1).all(1) & bad.flatten(1).any(1)
    if hidden.any():
        raise Wrong(f"{name}: finite where NaN is wanted: {value.flatten()[hidden.flatten().nonzero()[0]]}")


def check(case, impl, device="cpu"):
    """Runs a case, and again with other values of the same layout where it says so."""
    threads = torch.get_num_threads()
    torch.set_num_threads(case.threads)
    try:
        with _deterministic(case.deterministic):
            for _ in range(case.repeats):
                found = run(case, impl, device)
                compare(case, found, case.tensors)
                case.next_values()
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _deterministic(on):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(before or on)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def together(cases, impl):
    """Several cases at once, each in a thread of its own. Returns the errors."""
    errors = []

    def work(case):
        try:
            for _ in range(3):
                compare(case, run(case, impl), case.tensors)
                case.next_values()
        except Exception as error:
            errors.append((case, error))

    threads = [threading.Thread(target=work, args=(case,)) for case in cases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def forked(case, impl):
    """The case in a forked process. Raises Wrong with what it printed.

    In one thread: those of OpenMP do not survive a fork, torch's own operations hang as well.
    """
    case.threads = 1
    receive, send = multiprocessing.get_context("fork").Pipe(duplex=False)

    def work():
        try:
            check(case, impl)
            send.send(None)
        except Exception as error:
            send.send(repr(error))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    send.close()
    if not receive.poll(120):
        process.kill()
        raise Wrong("fork: the child hangs")
    try:
        message = receive.recv()
    except EOFError:
        message = f"the child died, {process.exitcode}"
    process.join()
    if message is not None:
        raise Wrong(f"fork: {message}")


def fuzz(cases, seed, impl, only=None, small=False, threads=True, fork=True):
    """Returns the failures, (number of the case, drawn case, error)."""
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    failures = []
    numbers = range(cases) if only is None else [only]
    for number in numbers:
        dice = random.Random(f"{seed}/{number}")
        case = draw(dice, small=small)
        try:
            if threads and dice.random() < 0.03:
                with _deterministic(False):
                    others = [draw(dice, small=small) for _ in range(3)]
                    failures += [(number, c, e) for c, e in together([case, *others, case.copy()], impl)]
            elif fork and device == "cpu" and dice.random() < 0.01:
                forked(case, impl)
            else:
                check(case, impl, device)
        except Exception as error:
            failures.append((number, case, error))
        if failures and failures[-1][0] == number:
            case, error = failures[-1][1:]
            print(
                f"case {number} of --seed {seed} --impl {impl}: {type(error).__name__}: {error}\n    {case}"
            )
            if not isinstance(error, Wrong):
                traceback.print_exception(error)
        if number % 250 == 249:
            print(f"{number + 1} cases, {len(failures)} wrong", flush=True)
    return failures


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--impl", default="cpu", choices=("cpu", "reference", "triton"))
    parser.add_argument("--only", type=int, help="the number of one case")
    options = parser.parse_args()
    torch.utils.deterministic.fill_uninitialized_memory = True
    interpreting = options.impl == "triton" and not torch.cuda.is_available()
    failures = fuzz(
        options.cases,
        options.seed,
        options.impl,
        options.only,
        small=interpreting,
        threads=not interpreting,
    )
    ran = options.cases if options.only is None else 1
    print(f"{ran} cases with --seed {options.seed} --impl {options.impl}: {len(failures)} wrong")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
