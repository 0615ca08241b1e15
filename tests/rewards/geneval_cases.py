"""Detection sets labelled by hand from GenEval's rules and the partial-credit score on top of them.

A case: why, metadata, detections, correct, strict_correct, score. `terms` in a reason are the score's, in the
order of the clauses. Boxes are given by centre and size; y points down. Two 10 x 10 boxes shrink an offset
by 0.1 * (10 + 10) = 2 an axis.
"""

# ruff: noqa: E501 (a table: one case a line)


def found(label, score=0.95, color=None, at=(0, 0), size=(10, 10)):
    (x, y), (width, height) = at, size
    box = [x - width / 2, y - height / 2, x + width / 2, y + height / 2]
    return {"label": label, "box": box, "score": score, "color": color}


def clause(label, count=1, **more):
    return {"class": label, "count": count, **more}


def asks(tag, *include, exclude=()):
    return {"tag": tag, "include": list(include)} | ({"exclude": list(exclude)} if exclude else {})


def relation(name):
    """A dog in the relation to a cat; the cat is the first clause, as in the benchmark's files."""
    return asks("position", clause("cat"), clause("dog", position=[name, 0]))


DOG, CAT, BIRD = clause("dog"), clause("cat"), clause("bird")
ONE = asks("single_object", DOG)
NO_CAT = asks("single_object", DOG, exclude=[CAT])
NO_PAIR = asks("single_object", DOG, exclude=[clause("cat", 2)])
TWO = asks("two_object", DOG, CAT)
PAIR = asks("two_object", clause("dog", 2), CAT)
COUNT_2 = asks("counting", clause("dog", 2), exclude=[clause("dog", 3)])
COUNT_3 = asks("counting", clause("dog", 3), exclude=[clause("dog", 4)])
COUNT_4 = asks("counting", clause("dog", 4), exclude=[clause("dog", 5)])
COUNT_16 = asks("counting", clause("dog", 16), exclude=[clause("dog", 17)])
RED = asks("colors", clause("dog", color="red"))
RED_2 = asks("colors", clause("dog", 2, color="red"))
LEFT, RIGHT, ABOVE, BELOW = map(relation, ("left of", "right of", "above", "below"))
RED_LEFT = asks("position", CAT, clause("dog", color="red", position=["left of", 0]))
CATS_LEFT = asks("position", clause("cat", 2), clause("dog", position=["left of", 0]))
DOGS_LEFT = asks("position", CAT, clause("dog", 2, position=["left of", 0]))
CHAIN = asks("position", CAT, clause("dog", position=["left of", 0]), clause("bird", position=["above", 1]))
BOTH = asks("color_attr", clause("dog", color="red"), clause("cat", color="blue"))
TWINS = asks("color_attr", clause("dog", color="red"), clause("dog", color="blue"))

SINGLE_OBJECT = [
    ("a second one at exactly 0.3 is not there", ONE, [found("dog"), found("dog", 0.3)], True, True, 1),
    ("just above 0.3", ONE, [found("dog", 0.300001)], True, True, 1),
    ("0.9 is for counting only", ONE, [found("dog", 0.5)], True, True, 1),
    ("a certain cat does not hide an unsure dog", ONE, [found("cat", 0.99), found("dog", 0.31)], True, True, 1),
    ("a score of 0", ONE, [found("dog", 0.0)], False, False, 0),
    ("colour is not asked for", ONE, [found("dog", color="blue")], True, True, 1),
    ("the same box twice is two: no suppression", ONE, [found("dog"), found("dog")], True, False, 0),
    ("five: 1 - 4/1", ONE, [found("dog")] * 5, True, False, -3),
    ("seventeen, sixteen kept: 1 - 15/1", ONE, [found("dog")] * 17, True, False, -14),
    ("excluded cat at exactly 0.3", NO_CAT, [found("dog"), found("cat", 0.3)], True, True, 1),
    ("excluded cat; strict and score ignore `exclude`", NO_CAT, [found("dog"), found("cat", 0.31)], False, True, 1),
    ("excluded cat, no dog", NO_CAT, [found("cat")], False, False, 0),
    ("one cat is fewer than the excluded two", NO_PAIR, [found("dog"), found("cat")], True, True, 1),
    ("two cats are at least the excluded two", NO_PAIR, [found("dog"), *[found("cat")] * 2], False, True, 1),
]  # fmt: skip

TWO_OBJECT = [
    ("both just above 0.3", TWO, [found("dog", 0.31), found("cat", 0.31)], True, True, 1),
    ("the cat at exactly 0.3: terms 1, 0", TWO, [found("dog"), found("cat", 0.3)], False, False, 1 / 2),
    ("nothing", TWO, [], False, False, 0),
    ("two dogs and a cat: terms 0, 1", TWO, [*[found("dog")] * 2, found("cat")], True, False, 1 / 2),
    ("three dogs, no cat: terms -1, 0", TWO, [found("dog")] * 3, False, False, -1 / 2),
    ("one box under both names counts for both", TWO, [found("dog"), found("cat")], True, True, 1),
    ("other classes do not count", TWO, [found("dog"), found("cat"), *[found("bird")] * 3], True, True, 1),
    ("a pair and a cat", PAIR, [*[found("dog")] * 2, found("cat")], True, True, 1),
    ("0.3 holds for counts outside counting", PAIR, [*[found("dog", 0.4)] * 2, found("cat")], True, True, 1),
    ("half a pair: terms 1/2, 1", PAIR, [found("dog"), found("cat")], False, False, 3 / 4),
    ("two pairs: terms 1 - 2/2, 1", PAIR, [*[found("dog")] * 4, found("cat")], True, False, 1 / 2),
    ("a clause given twice is met by one dog", asks("two_object", DOG, DOG), [found("dog")], True, True, 1),
]  # fmt: skip

COUNTING = [
    ("three just above 0.9", COUNT_3, [found("dog", 0.901)] * 3, True, True, 1),
    ("the third at exactly 0.9", COUNT_3, [*[found("dog")] * 2, found("dog", 0.9)], False, False, 2 / 3),
    ("a fourth at exactly 0.9", COUNT_3, [*[found("dog")] * 3, found("dog", 0.9)], True, True, 1),
    ("a fourth just above 0.9: 1 - 1/3", COUNT_3, [*[found("dog")] * 3, found("dog", 0.901)], False, False, 2 / 3),
    ("none", COUNT_3, [], False, False, 0),
    ("one: 1 - 2/3", COUNT_3, [found("dog")], False, False, 1 / 3),
    ("six: 1 - 3/3", COUNT_3, [found("dog")] * 6, False, False, 0),
    ("seven: 1 - 4/3", COUNT_3, [found("dog")] * 7, False, False, -1 / 3),
    ("three among cats", COUNT_3, [*[found("dog")] * 3, *[found("cat")] * 4], True, True, 1),
    ("a crowd of unsure ones", COUNT_3, [*[found("dog", 0.6)] * 15, *[found("dog")] * 3], True, True, 1),
    ("without `exclude` four are enough", asks("counting", clause("dog", 3)), [found("dog")] * 4, True, False, 2 / 3),
    ("two", COUNT_2, [found("dog")] * 2, True, True, 1),
    ("one of two", COUNT_2, [found("dog")], False, False, 1 / 2),
    ("three of two: 1 - 1/2", COUNT_2, [found("dog")] * 3, False, False, 1 / 2),
    ("four in one place: no suppression", COUNT_4, [found("dog")] * 4, True, True, 1),
    ("five of four: 1 - 1/4", COUNT_4, [found("dog")] * 5, False, False, 3 / 4),
    ("sixteen are kept: the surplus is not seen", COUNT_16, [found("dog")] * 18, True, True, 1),
]  # fmt: skip

COLORS = [
    ("red, just above 0.3", RED, [found("dog", 0.31, "red")], True, True, 1),
    ("red at exactly 0.3: terms 0, 0", RED, [found("dog", 0.3, "red")], False, False, 0),
    ("orange: terms 1, 0", RED, [found("dog", color="orange")], False, False, 1 / 2),
    ("the red thing is a cat", RED, [found("dog", color="blue"), found("cat", color="red")], False, False, 1 / 2),
    ("a red cat beside a red dog", RED, [found("dog", color="red"), found("cat", color="red")], True, True, 1),
    (
        "the surest one is red; two: terms 0, 0",
        RED, [found("dog", 0.9, "red"), found("dog", 0.5, "blue")], True, False, 0,
    ),
    ("the same, listed backwards", RED, [found("dog", 0.5, "blue"), found("dog", 0.9, "red")], True, False, 0),
    ("two red", RED_2, [found("dog", color="red")] * 2, True, True, 1),
    ("one red, one blue: terms 1, 1/2", RED_2, [found("dog", color="red"), found("dog", color="blue")], False, False, 3 / 4),
    ("two blue: terms 1, 0", RED_2, [found("dog", color="blue")] * 2, False, False, 1 / 2),
    ("one red of two: terms 1/2, 0", RED_2, [found("dog", color="red")], False, False, 1 / 4),
    ("none of two: terms 0, 0", RED_2, [], False, False, 0),
    ("three red: terms 1/2, 0", RED_2, [found("dog", color="red")] * 3, True, False, 1 / 4),
    (
        "a third, unsure and blue, is not among the two judged",
        RED_2, [*[found("dog", 0.9, "red")] * 2, found("dog", 0.4, "blue")], True, False, 1 / 4,
    ),
    (
        "a third, surest and blue, is",
        RED_2, [*[found("dog", 0.9, "red")] * 2, found("dog", 0.95, "blue")], False, False, 1 / 4,
    ),
]  # fmt: skip

POSITION = [
    ("(4 - 2) / 4 = 0.5 is not beyond; terms 1, 1, 0, 1", LEFT, [found("dog"), found("cat", at=(4, 0))], False, False, 3 / 4),
    ("(5 - 2) / 5 = 0.6", LEFT, [found("dog"), found("cat", at=(5, 0))], True, True, 1),
    ("right, not left", LEFT, [found("dog", at=(50, 0)), found("cat")], False, False, 3 / 4),
    ("y points down: above is the smaller y", ABOVE, [found("dog", at=(0, 10)), found("cat", at=(0, 40))], True, True, 1),
    ("below is the larger y", BELOW, [found("dog", at=(0, 40)), found("cat", at=(0, 10))], True, True, 1),
    ("diagonal, (12 - 2) / 20 = 0.5", LEFT, [found("dog"), found("cat", at=(12, 16))], False, False, 3 / 4),
    ("its other axis, (16 - 2) / 20 = 0.7", ABOVE, [found("dog"), found("cat", at=(12, 16))], True, True, 1),
    ("diagonal, (15 - 2) / 25 = 0.52", LEFT, [found("dog"), found("cat", at=(15, 20))], True, True, 1),
    ("and above at once, (20 - 2) / 25 = 0.72", ABOVE, [found("dog"), found("cat", at=(15, 20))], True, True, 1),
    (
        "the unshrunk length divides: (18 - 4) / 30 = 0.47; the shrunk one would give 0.57",
        ABOVE, [found("dog", size=(20, 20)), found("cat", at=(24, 18), size=(20, 20))], False, False, 3 / 4,
    ),
    (
        "unequal sizes shrink by 0.1 * (30 + 10): (8 - 4) / 8 = 0.5",
        RIGHT, [found("dog", at=(8, 0), size=(30, 30)), found("cat")], False, False, 3 / 4,
    ),
    ("(9 - 4) / 9 = 0.56", RIGHT, [found("dog", at=(9, 0), size=(30, 30)), found("cat")], True, True, 1),
    (
        "tall boxes shrink y by 8: (16 - 8) / 16 = 0.5",
        BELOW, [found("dog", at=(0, 16), size=(10, 40)), found("cat", size=(10, 40))], False, False, 3 / 4,
    ),
    (
        "(17 - 8) / 17 = 0.53",
        BELOW, [found("dog", at=(0, 17), size=(10, 40)), found("cat", size=(10, 40))], True, True, 1,
    ),
    (
        "wide boxes shrink y by 2 only: (16 - 2) / 16",
        ABOVE, [found("dog", size=(40, 10)), found("cat", at=(0, 16), size=(40, 10))], True, True, 1,
    ),
    ("one on the other: no relation", LEFT, [found("dog"), found("cat")], False, False, 3 / 4),
    ("(4 - 2) / 4 = 0.5 upwards", ABOVE, [found("dog"), found("cat", at=(0, 4))], False, False, 3 / 4),
    ("shrinking stops at 0: |1| - 2", RIGHT, [found("dog", at=(1, 0)), found("cat")], False, False, 3 / 4),
    ("shrinking stops at 0 and never turns round", LEFT, [found("dog", at=(1, 0)), found("cat")], False, False, 3 / 4),
    ("(30 - 11) / 30 = 0.63, inside the cat's box", LEFT, [found("dog"), found("cat", at=(30, 0), size=(100, 100))], True, True, 1),
    ("(20 - 11) / 20 = 0.45", LEFT, [found("dog"), found("cat", at=(20, 0), size=(100, 100))], False, False, 3 / 4),
    ("0.3 holds", LEFT, [found("dog", 0.31), found("cat", 0.31, at=(50, 0))], True, True, 1),
    ("nothing: terms 0, 0, 0", LEFT, [], False, False, 0),
    ("no dog: terms 1, 0, 0", LEFT, [found("cat")], False, False, 1 / 3),
    (
        "the surest cat is the target; two cats fail their strict clause: terms 0, 1, 0",
        LEFT, [found("dog"), found("cat", 0.9, at=(50, 0)), found("cat", 0.5, at=(-50, 0))], True, False, 1 / 3,
    ),
    (
        "the surest cat is on the wrong side",
        LEFT, [found("dog"), found("cat", 0.9, at=(-50, 0)), found("cat", 0.5, at=(50, 0))], False, False, 1 / 3,
    ),
    (
        "the surest dog is judged; two dogs: terms 1, 0, 0",
        LEFT, [found("dog", 0.9), found("dog", 0.5, at=(90, 0)), found("cat", at=(50, 0))], True, False, 1 / 3,
    ),
    (
        "left of both cats",
        CATS_LEFT, [found("dog"), found("cat", at=(50, 0)), found("cat", at=(90, 0))], True, True, 1,
    ),
    (
        "between the cats: terms 1, 1, 0, 1",
        CATS_LEFT, [found("dog", at=(70, 0)), found("cat", at=(50, 0)), found("cat", at=(90, 0))], False, False, 3 / 4,
    ),
    (
        "both dogs left",
        DOGS_LEFT, [found("dog"), found("dog", at=(20, 0)), found("cat", at=(60, 0))], True, True, 1,
    ),
    (
        "one dog of two left: terms 1, 1, 0, 1",
        DOGS_LEFT, [found("dog"), found("dog", at=(90, 0)), found("cat", at=(60, 0))], False, False, 3 / 4,
    ),
    (
        "neither dog left: only the first that fails gives a 0",
        DOGS_LEFT, [found("dog", at=(90, 0)), found("dog", at=(95, 0)), found("cat")], False, False, 3 / 4,
    ),
    (
        "a chain: bird above dog, dog left of cat",
        CHAIN, [found("cat", at=(50, 50)), found("dog", at=(0, 50)), found("bird")], True, True, 1,
    ),
    (
        "the chain's middle fails and takes the bird along: terms 1, 1, 0, 1, 1, 0",
        CHAIN, [found("cat", at=(50, 50)), found("dog", at=(90, 50)), found("bird", at=(90, 0))], False, False, 2 / 3,
    ),
    (
        "red, but right: terms 1, 1, 1, 0, 1",
        RED_LEFT, [found("cat"), found("dog", color="red", at=(50, 0))], False, False, 4 / 5,
    ),
    (
        "blue and right: the position is not looked at; terms 1, 1, 0",
        RED_LEFT, [found("cat"), found("dog", color="blue", at=(50, 0))], False, False, 2 / 3,
    ),
    (
        "two dogs cost one 0 for colour and position together: terms 1, 0, 0",
        RED_LEFT, [found("cat", at=(50, 0)), found("dog", 0.9, "red"), found("dog", 0.8, "red")], True, False, 1 / 3,
    ),
]  # fmt: skip

COLOR_ATTR = [
    ("just above 0.3", BOTH, [found("dog", 0.31, "red"), found("cat", 0.31, "blue")], True, True, 1),
    ("the cat at exactly 0.3: terms 1, 1, 0, 0", BOTH, [found("dog", color="red"), found("cat", 0.3, "blue")], False, False, 1 / 2),
    ("nothing", BOTH, [], False, False, 0),
    ("a red dog alone: terms 1, 1, 0, 0", BOTH, [found("dog", color="red")], False, False, 1 / 2),
    ("both blue: terms 1, 0, 1, 1", BOTH, [found("dog", color="blue"), found("cat", color="blue")], False, False, 3 / 4),
    ("a cat of no colour: terms 1, 1, 1, 0", BOTH, [found("dog", color="red"), found("cat")], False, False, 3 / 4),
    ("both green: terms 1, 0, 1, 0", BOTH, [found("dog", color="green"), found("cat", color="green")], False, False, 1 / 2),
    (
        "two red dogs: terms 0, 0, 1, 1",
        BOTH, [*[found("dog", color="red")] * 2, found("cat", color="blue")], True, False, 1 / 2,
    ),
    (
        "the surest dog is red",
        BOTH, [found("dog", 0.9, "red"), found("dog", 0.5, "blue"), found("cat", color="blue")], True, False, 1 / 2,
    ),
    (
        "the surest dog is blue",
        BOTH, [found("dog", 0.8, "red"), found("dog", 0.9, "blue"), found("cat", color="blue")], False, False, 1 / 2,
    ),
    (
        "two dogs and a green cat: terms 0, 0, 1, 0",
        BOTH, [*[found("dog", color="red")] * 2, found("cat", color="green")], False, False, 1 / 4,
    ),
    (
        "the same class twice: both clauses judge the surest dog",
        TWINS, [found("dog", 0.9, "red"), found("dog", 0.8, "blue")], False, False, 0,
    ),
]  # fmt: skip

CASES = [*SINGLE_OBJECT, *TWO_OBJECT, *COUNTING, *COLORS, *POSITION, *COLOR_ATTR]
