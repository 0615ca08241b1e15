"""crd-fast score and serve-reward: rewards without a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from crd_fast.commands.terminal import console, parse_settings, plain, say
from crd_fast.errors import UserError
from crd_fast.run.new_files import check_new, write_new


def score(
    reward: Annotated[
        str,
        typer.Option(
            help="A reward that ships (ocr, geneval, ...), my_reward.py:score, package.module:name, or a "
            "server's address."
        ),
    ],
    images: Annotated[
        Path,
        typer.Option(
            help="A folder of pictures, in natural order of names: 2 before 10. Or GenEval's folders, or a "
            ".jsonl manifest, `image` and `prompt` on a line."
        ),
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="A line for each picture: text, or .jsonl with the metadata that the reward needs; with an "
            "`image` on each line, a manifest. Not needed where the pictures come with their prompts."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="A setting of the reward, as in a recipe. Repeatable."
        ),
    ] = None,
    json_: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Write the scores as JSON as well. Never overwritten."),
    ] = None,
) -> None:
    """Score pictures with any reward, without a model or a run.

    The first picture by name belongs to the first prompt, and so on, unless a manifest says which is whose.
    Prints each picture's score and their mean; what comes out is what training and evaluation would see.

    - `crd-fast score --reward ocr --images pictures --prompts prompts.txt`
    - `crd-fast score --reward ocr --images manifest.jsonl`, or a folder with `00000/samples/0000.png` and
      `00000/metadata.jsonl`, as GenEval has it
    - `crd-fast score --reward ocr --set mode=word ...` reads pictures that show one word and nothing else
    - `crd-fast score --reward my_module:my_reward ...` tries a reward of your own
    """
    import json

    from rich.table import Table

    from crd_fast.rewards.pictures import score_pictures

    if json_ is not None:
        json_ = check_new(json_, "--json")
    settings = parse_settings(set_ or [])
    with console.status("scoring"):
        rows = score_pictures(reward, settings, images, prompts)
    known = [row["score"] for row in rows if row["score"] is not None]
    if not known:
        raise UserError(f"reward {reward}: expected values, got None for all {len(rows)} pictures")
    mean = sum(known) / len(known)
    table = Table()
    for column in ("picture", "prompt"):
        table.add_column(column, overflow="fold")
    table.add_column("score", justify="right")
    for row in rows:
        table.add_row(
            plain(row["image"]), plain(row["prompt"]), "-" if row["score"] is None else f"{row['score']:.4f}"
        )
    console.print(table)
    of = f"{len(known)} of {len(rows)}" if len(known) < len(rows) else str(len(rows))
    say(f"{reward}: mean {mean:.4f} of {of} pictures")
    if json_ is not None:
        # a setting may be what YAML has and JSON has not, a date
        result = {"reward": reward, "settings": settings, "mean": mean, "scores": rows}
        write_new(json_, "--json", (json.dumps(result, indent=1, default=str) + "\n").encode())


def serve_reward(
    reward: Annotated[
        str, typer.Argument(help="A reward's name, file.py:name or module:name.", metavar="REWARD")
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the reward. Repeatable."),
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8701,
    token_env: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The environment variable with the token that clients must show."),
    ] = None,
    max_images: Annotated[int, typer.Option(min=1, help="Images a request.")] = 64,
    max_megapixels: Annotated[int, typer.Option(min=1, help="All images of a request.")] = 64,
    max_megabytes: Annotated[int, typer.Option(min=1, help="A request's body.")] = 64,
    queue: Annotated[int, typer.Option(min=1, help="Requests at once; further ones are told to wait.")] = 16,
) -> None:
    """Score images for other processes and machines, over HTTP.

    A recipe calls it with `rewards: {http: {url: "http://127.0.0.1:8701", token_env: NAME}}`. It listens to
    this machine alone unless told otherwise, and to others only with a token.
    """
    try:
        from crd_fast.rewards import server
    except ModuleNotFoundError as error:
        raise UserError(f"serve-reward: needs {error.name}: pip install 'crd-fast[server]'") from None
    from crd_fast.rewards.http import token_from

    token = None if token_env is None else token_from(token_env)
    limits = server.Limits(
        images=max_images, pixels=max_megapixels * 2**20, bytes=max_megabytes * 2**20, requests=queue
    )
    with server.bind(host, port, token) as listening:
        worker = server.Worker(reward, parse_settings(set_ or []))
        address = f"http://{host}:{listening.getsockname()[1]}"
        needed = "with a token" if token else "without a token"
        say(f"serving {reward} at {address} {needed}")
        server.serve(worker, listening, token, limits)
