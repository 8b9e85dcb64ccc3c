import pytest

from vlmcore.recipe.gates import Gate, parse_gate

GATES = {
    "holdout.exact_match >= 0.9": Gate(None, "holdout", "exact_match", ">=", 0.9),
    "full.holdout.exact_match<1": Gate("full", "holdout", "exact_match", "<", 1.0),
    "  a.b  ==  -1e-3 ": Gate(None, "a", "b", "==", -0.001),
    "swap.MMMU_DEV_VAL.acc <= 5": Gate("swap", "MMMU_DEV_VAL", "acc", "<=", 5.0),
    "a-1.b_2.c > .5": Gate("a-1", "b_2", "c", ">", 0.5),
}

NO_GATES = {
    "": "has no comparison",
    "holdout.exact_match": "has no comparison",
    "holdout.exact_match = 1": "has comparison '='",
    "holdout.exact_match != 1": "has comparison '!='",
    "holdout.exact_match => 1": "has comparison '=>'",
    "exact_match > 1": "compares 'exact_match'; expected benchmark.metric or checkpoint.",
    "a.b.c.d > 1": "compares 'a.b.c.d'",
    "a..b > 1": "compares 'a..b'",
    "a b.c > 1": "compares 'a b.c'",
    "> 1": "compares ''",
    "a.b >": "compares with ''",
    "a.b > x": "compares with 'x'; expected a number such as 0.9",
    "a.b > nan": "compares with 'nan'",
    "a.b > inf": "compares with 'inf'",
    "a.b > 1 > 2": "compares with '1 > 2'",
    "a.b > __import__('os')": "compares with \"__import__('os')\"",
}


@pytest.mark.parametrize(("text", "gate"), GATES.items(), ids=GATES)
def test_a_gate_reads_as_it_is_written(text, gate) -> None:
    assert parse_gate(text) == gate


@pytest.mark.parametrize(("text", "part"), NO_GATES.items(), ids=NO_GATES)
def test_what_is_no_gate_is_refused_with_the_part_not_understood(text, part) -> None:
    with pytest.raises(ValueError) as caught:
        parse_gate(text)
    assert str(caught.value).startswith(f"gate {text!r} ")
    assert part in str(caught.value)
