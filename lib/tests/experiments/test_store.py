"""The file of a study: gone on with where its setting is today's, begun anew elsewhere, whole at any time."""

import json
from types import SimpleNamespace

import pytest
from tiny import TINY

from upcycling.experiments.store import begin, save, setting

SERIES = SimpleNamespace(
    preset=TINY, name="worlds", train_stream=SimpleNamespace(key="a"), validation_stream=SimpleNamespace(key="b")
)


def test_a_stored_result_is_gone_on_with_where_the_setting_is_the_same(tmp_path):
    out = tmp_path / "folder" / "result.json"
    result = begin(SERIES, out, "rows", windows=3)
    assert result["rows"] == [] and result["setting"] == setting(SERIES) | {"windows": 3}
    assert "one thread" in result["machine"] and result["corpus"] == "worlds"
    result["rows"].append({"seed": 0})
    save(result, out)
    assert json.loads(out.read_text(encoding="utf-8")) == result and [*out.parent.iterdir()] == [out]
    assert begin(SERIES, out, "rows", windows=3)["rows"] == [{"seed": 0}]
    assert begin(SERIES, out, "rows", windows=4)["rows"] == [] and begin(SERIES, None, "rows")["rows"] == []
    save(result, None)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '"rows"'])
def test_a_file_that_is_no_result_is_not_written_over(text, tmp_path):
    out = tmp_path / "result.json"
    out.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"result\.json is no result of this study .* move it away or write elsewhere"):
        begin(SERIES, out, "rows")
