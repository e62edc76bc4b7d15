"""One table: text, HTML, Markdown and a DataFrame of the same rows."""

from dataclasses import dataclass

from upcycling.tables import ShownAsTable, Table

ROWS = [{"arm": "MoE", "loss": 2.5, "dead": 0, "fits": True}, {"arm": "dense control", "loss": 3.0, "fits": False}]


def test_text_is_right_aligned_with_two_blanks_and_lines_around_it():
    assert str(Table(ROWS, above=["headline"], below=["note"])).splitlines() == [
        "headline",
        "          arm   loss  dead  fits",
        "          MoE  2.500     0   yes",
        "dense control  3.000          no",
        "note",
    ]


def test_alignment_formats_widths_and_gaps():
    table = Table(
        ROWS, ["arm", "loss", "dead"], left=["arm"], formats={"loss": "+.1f", "dead": "no {}".format},
        width={"loss": 8}, gap="|",
    )  # fmt: skip
    assert str(table).splitlines() == [
        "arm          |    loss|dead",
        "MoE          |    +2.5|no 0",
        "dense control|    +3.0|    ",
    ]
    table.strip = True
    assert str(table).splitlines()[-1] == "dense control|    +3.0|"
    assert str(Table([{"a": "x", "b": None}], left=True, width=3)) == "a    b  \nx    –  "


def test_html_escapes_everything_and_markdown_is_padded():
    table = Table([{"<a>": "<b>"}], above=["1 < 2"], below=["&"])
    assert table._repr_html_() == (
        "<p>1 &lt; 2</p><table><thead><tr><th>&lt;a&gt;</th></tr></thead><tbody><tr><td>&lt;b&gt;</td></tr></tbody>"
        "</table><p>&amp;</p>"
    )
    assert Table(ROWS, ["arm", "loss"]).markdown() == (
        "| arm           | loss  |\n| ------------- | ----- |\n| MoE           | 2.500 |\n| dense control | 3.000 |"
    )


def test_a_frame_has_the_values_and_a_table_is_still_a_list():
    frame = Table(ROWS).frame()
    assert list(frame.columns) == ["arm", "loss", "dead", "fits"]
    assert frame["loss"].mean() == 2.75 and frame["dead"].isna().sum() == 1
    assert Table(ROWS) == ROWS and str(Table([], below=["nothing"])) == "\nnothing"


def test_a_class_shown_as_a_table():
    @dataclass(frozen=True, repr=False)
    class Result(ShownAsTable):
        value: float

        def _as_table(self):
            return Table([{"value": self.value}])

    result = Result(0.25)
    assert str(result) == repr(result) == "value\n0.250" and "<td>0.250</td>" in result._repr_html_()
    assert result.frame()["value"].item() == 0.25
