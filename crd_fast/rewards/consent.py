"""Which rewards bring code that is not this package's, and who has to agree to it.

A recipe that somebody gives to `crd-fast train`, and a name on the command line, are their own word. What a
checkpoint's `state.json` or a run's `config.yaml` names is the word of whoever wrote that file, so that
commands which read one refuse to run code, or to send pictures elsewhere, that its rewards name, until they
are told otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from crd_fast.errors import UserError
from crd_fast.rewards.foreign import host_of, is_address, is_loopback
from crd_fast.rewards.registry import REWARDS

OPTION = "--allow-code"


class NeedsConsent(UserError):
    """A loaded file names what the command may do only with `--allow-code`."""


def needs_consent(recipe: Any) -> list[str]:
    """The rewards and judges of a recipe that run code, or ask a server, which do not ship.

    A server of this machine is not among them. Of a loaded file they need `--allow-code`.
    """
    return [
        str(name)
        for rewards in (recipe.rewards, recipe.eval_rewards)
        for name, value in rewards.items()
        if not _is_ours(str(name), value if isinstance(value, Mapping) else {})
    ]


def check_consent(recipe: Any, source: str) -> None:
    """Raises NeedsConsent for such a recipe. source: the file or folder that it was loaded from."""
    if found := needs_consent(recipe):
        raise NeedsConsent(
            f"{source} names rewards that do not ship with crd-fast, and running them runs code, or asks "
            f"servers, that whoever wrote it chose: {', '.join(found)}. If you trust it, add {OPTION}"
        )


def _is_ours(name: str, settings: Mapping) -> bool:
    """Whether a reward runs nobody's code and asks no other machine."""
    address = settings.get("url", name if is_address(name) else None)
    if name == "http" or address is not None:
        return is_loopback(host_of(str(address)))
    return name in REWARDS
