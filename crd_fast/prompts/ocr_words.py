"""Prompts that ask for a written word: `a sign that says "BAKERY"`, by the thousand.

Every word is combined with every scene. One word in five is held out: no training prompt asks for it.
"""

from __future__ import annotations

import random

SCENES = (
    'a sign that says "{}"',
    'a neon sign that says "{}" above a bar at night',
    'a wooden board with "{}" carved into it',
    'a chalkboard on which "{}" is written in white chalk',
    'a coffee mug with "{}" printed on it',
    'a book cover with the title "{}"',
    'a street sign that reads "{}"',
    'graffiti on a brick wall that spells "{}"',
    'a birthday cake with "{}" written in icing',
    'a t-shirt with "{}" in bold letters',
    'a shop window with "{}" painted on the glass',
    'a movie poster with the title "{}"',
    'a road sign beside a highway that says "{}"',
    'a paper note with "{}" in handwriting',
    'a license plate that reads "{}"',
    'a bus with "{}" on its display',
    'a stone gate with "{}" engraved in it',
    'a sticky note on a screen that says "{}"',
    'a flag with "{}" stitched on it',
    'a matchbox with "{}" on the label',
    'a billboard in the desert that says "{}"',
    'a rubber stamp print of "{}" on an envelope',
    'a whiteboard in an office with "{}" on it',
    'a doormat with "{}" woven into it',
)

WORDS = """
    able acid actor adult agent alarm album alert alley amber angel ankle apple april apron arch arena
    army arrow atlas attic aunt autumn award axis bacon badge baker bakery ball bamboo banana band bank
    banner barn basil basket beach beacon bean bear beauty bed bell bench berry bicycle bird birth biscuit
    black blade blanket blossom blue boat bolt bone bonus book border bottle bottom bowl box brain branch
    brave bread breeze brick bridge bright bronze brook broom brush bubble bucket budget bus butter button
    cabin cable cactus cafe cake camel camera camp canal candle candy canvas canyon captain car card cargo
    carpet carrot castle cat cave cedar cellar center chain chair chalk charm cheese cherry chess chief
    chimney cinema circle circus citrus city clay clean clever cliff clock cloud clover coast cobalt cocoa
    coffee coin comet compass copper coral corner cosmic cotton country cradle crane cream creek crown
    crystal cup curtain cycle daisy dance danger dawn deck deep deer delta desert design diamond dinner
    disco dock dog dolphin donkey door dragon dream drum duck dune dust eagle early earth east echo edge
    elbow elm ember empire engine equal escape evening event exit fabric factory falcon family farm
    feather fence fern ferry festival field fig filter finger finish fire fish flag flame flint flood
    flour flower flute fog forest fork fossil fox frame free freedom fresh friend frog frost fruit future
    galaxy gallery garden garlic gate gentle giant ginger glacier glass globe glove gold goose granite
    grape grass gravity green grill grove guard guest guide guitar hammer happy harbor harvest hat hawk
    hazel heart hello helmet herb hero hill history holiday hollow honey hope horizon horse hotel house
    human humble ice idea indigo ink iris iron island ivory jacket jade jar jasmine jazz jelly jewel
    journey juice july jump jungle junior kettle key kind king kiosk kitchen kite kiwi ladder lagoon lake
    lamp lantern large laser laugh lavender leaf legend lemon letter level library light lily lime linen
    lion listen little lizard lobby local logic lotus love lucky lunar lunch machine magic magnet maple
    marble march market mars meadow medal melon memory menu metal midnight milk mint mirror mission model
    modern moon morning moss motor mountain museum music mystery narrow nature nectar needle nest never
    night noble north number nurse oasis ocean office olive onion open opera orange orbit orchard organ
    origin otter oven owl oyster paint palace palm panda paper parade park parrot party pasta path peace
    peach pearl pencil people pepper piano picnic pilot pine pirate pizza planet plaza plum pocket poem
    polar pond poppy port poster potato powder prism public pumpkin puzzle quartz queen quick quiet quilt
    rabbit radio rain raven record red reef rescue ribbon rice river robin robot rocket room rose round
    royal ruby saddle sail salmon salt sand saturn school science sea season secret seed shadow shell
    shine ship shore silent silk silver simple singer sky smile smoke snow soap soft solar song soup south
    spark spice spiral spring square stable star station steam stone storm story street strong studio
    sugar summer summit sun sunday sunset surf swan sweet swift table talent tango tea temple tennis
    theater thunder ticket tiger timber toast today tomato torch tower town toy trail train travel
    treasure tree tropic trumpet tulip tunnel turtle twin ultra umbrella uncle union united urban valley
    vanilla velvet venus victory village violet violin vision vivid volcano voyage walnut water wave west
    whale wheat wheel white wild willow wind window winter wisdom wolf wonder wood word world yellow yoga
    young zebra zone
""".split()  # noqa: SIM905

HELD_OUT_EVERY = 5


def words(held_out: bool) -> list[str]:
    """In upper case, three to eight letters."""
    return [word.upper() for i, word in enumerate(WORDS) if (i % HELD_OUT_EVERY == 0) == held_out]


def entries(held_out: bool) -> list[dict]:
    """All prompts, each `{"prompt", "text", "tag"}`, words and scenes mixed, always in the same order."""
    found = [
        {"prompt": scene.format(word), "text": word, "tag": "text"}
        for word in words(held_out)
        for scene in SCENES
    ]
    random.Random(0).shuffle(found)
    return found
