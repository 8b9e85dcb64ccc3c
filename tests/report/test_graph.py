"""The pipeline's drawing: boxes below what they were built from, and none upon another."""

from itertools import combinations

from vlmcore.report.graph import BOX_HEIGHT, draw_graph

# a long edge (a → e) beside a chain, a fan-out and a fan-in
STAGES = {
    "a": [],
    "b": ["a"],
    "c": ["b"],
    "d": ["c"],
    "e": ["d", "a"],
    "f": ["a"],
    "g": ["e", "f"],
    "h": ["e", "f"],
    "alone": [],
}


def test_every_stage_stands_below_what_it_was_built_from():
    boxes = draw_graph(STAGES).boxes
    for stage, parents in STAGES.items():
        assert all(boxes[parent][1] + BOX_HEIGHT < boxes[stage][1] for parent in parents)


def test_no_box_covers_another_and_all_are_inside():
    drawing = draw_graph(STAGES)
    for (x, y), (other_x, other_y) in combinations(drawing.boxes.values(), 2):
        assert y != other_y or abs(x - other_x) >= drawing.box_width
    for x, y in drawing.boxes.values():
        assert 0 <= x <= drawing.width - drawing.box_width
        assert 0 <= y <= drawing.height - BOX_HEIGHT


def test_an_edge_goes_from_box_to_box_and_a_long_one_round_those_between():
    drawing = draw_graph({"a": [], "b": ["a"], "c": ["b", "a"]})
    assert len(drawing.edges) == 3
    long = next(path for path in drawing.edges if "V" in path)
    through = float(long.split("V")[0].split()[-2])
    left = drawing.boxes["b"][0]
    assert not left <= through <= left + drawing.box_width


def test_no_stage_is_no_boxes():
    drawing = draw_graph({})
    assert (drawing.boxes, drawing.edges) == ({}, [])
    assert drawing.width > 0
