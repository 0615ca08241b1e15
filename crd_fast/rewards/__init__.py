"""Rewards: `score(images, prompts, metadata) -> list[float | None]`, one value an image, None: not scored.

images: uint8, (N, height, width, 3); prompts: N strings; metadata: N dicts, a line of the prompts file each.
All three are the call's own: a read-only copy of the images (`images.copy()` may be drawn on), deep copies of
the metadata.
A reward is named in the recipe: one of `REWARDS`, or `package.module:name` of a function with that
signature, or of a class with a method `score` and optionally `setup(device)`, `check(metadata)`, which may
refuse prompts before any work by a ValueError, and `report(images, prompts, metadata) -> dict[str, float]`,
what an evaluation adds to its metrics; judges are not asked for theirs. Under the key `per_image` it may have
a dict of names to N values each, for what can be said of single pictures: two evaluations are then compared
picture by picture.

    rewards: {ocr: 1.0, my_package.my_module:my_reward: 0.5}              # weights
    rewards: {ocr: {weight: 1.0, mode: word}, "http://localhost:8701": 1.0}  # settings; a server's address

In Python the reward itself may stand in the place of its name: `Rewards({my_reward: 1.0})` and
`Trainer(recipe, folder, rewards={my_reward: 0.5, "ocr": 0.5})`.

An image that a reward does not score neither counts in its means nor is moved by it; a prompt whose samples
no reward scores is warned of, and an iteration or an evaluation of such prompts alone ends the run.

Settings are keyword arguments of the class or function; `weight`, `timeout` (seconds for one call), `retries`
(of a call that raises ConnectionError or TimeoutError), `workers` (a number of processes, or `auto`: the
cores but one) and `skip_others` (prompts that its `check` refuses are not scored) are taken by the engine,
the last four only where the reward has no argument of that name; one that takes `timeout` itself, as `http`
and `vlm` do for each answer of a server, ends its calls itself. A judge that is `optional` is left out where
a package that it needs is not installed. In training a reward is called with one prompt's samples at a time,
in a thread of its own while the next are generated; in an evaluation with up to 64 images, no prompt's
samples parted. With workers the calls are the same ones, several at work at once, each in a process that has
loaded the reward for itself.
"""

from crd_fast.rewards.consent import check_consent, needs_consent
from crd_fast.rewards.registry import REWARDS, Rewards, by_name, load, name_of

__all__ = ["REWARDS", "Rewards", "by_name", "check_consent", "load", "name_of", "needs_consent"]
