"""What is said of a run that failed."""

import pytest

from flashmoe_train.launch import reason


@pytest.mark.parametrize(
    "output, errors, wanted",
    [
        ("llama3 on 1 × cuda\n", "Traceback\n  File\nValueError: seq_len is 3\n", "ValueError: seq_len is 3"),
        ("step 1\n", "[rank1]: torch._dynamo.exc.Unsupported: no trace\n[rank1]:   Hint: none\n", "no trace"),
        ("", "error: 8 cannot be shared by 3\n", "error: 8 cannot be shared by 3"),
        ("a table\n\nthe end\n", "Killed\n", "Killed"),
        ("the end\n", "", "the end"),
        ("\n", "", ""),
    ],
)
def test_last_line_that_names_an_error(output: str, errors: str, wanted: str) -> None:
    found = reason(output, errors)
    assert found.endswith(wanted) and (bool(found) == bool(wanted)) and "\n" not in found
